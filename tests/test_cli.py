"""support/cli.py: argument types, one-line errors, signals, progress, the entry point."""
import argparse
import io
import math
import os
import signal
import sys
from types import SimpleNamespace

import pytest
import torch

from support import cli


def test_bounded_converts_a_number_within_its_limits():
    p = argparse.ArgumentParser(exit_on_error=False)
    p.add_argument("--share", type=cli.bounded(float, 0, 1))
    p.add_argument("--n", type=cli.bounded(int, 1))
    assert vars(p.parse_args(["--share", "1", "--n", "1"])) == {"share": 1.0, "n": 1}
    p.add_argument("--any", type=cli.bounded(float, -math.inf))
    assert p.parse_args(["--any=-1e300"]).any == -1e300
    wrong = "is not a finite number"
    share = f"{wrong}, at least 0 and at most 1"
    for words, message in [("--share 1.5", f"argument --share: 1.5 {share}"),
                           ("--share nan", f"argument --share: nan {share}"),
                           ("--n 0", f"argument --n: 0 {wrong}, at least 1"),
                           ("--n 1.5", "argument --n: invalid int value: '1.5'"),
                           ("--any inf", f"argument --any: inf {wrong}"),
                           ("--any=-inf", f"argument --any: -inf {wrong}"),
                           ("--any nan", f"argument --any: nan {wrong}")]:
        with pytest.raises(argparse.ArgumentError, match=f"^{message}$"):
            p.parse_args(words.split())


def test_one_line_errors_are_for_users_and_other_exceptions_are_not_caught(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["some/folder/train.py"])
    for kinds, error in [((), ValueError("a\n  b")), ((), OSError("a b")),
                         ([KeyError], KeyError())]:
        with pytest.raises(SystemExit, match="^2$"), cli.one_line_errors(*kinds):
            raise error
    assert capsys.readouterr().err == "train.py: a b\ntrain.py: a b\ntrain.py: \n"
    for kinds, error in [((), KeyError()), ((), BrokenPipeError()), ([OSError], ValueError())]:
        with pytest.raises(type(error)), cli.one_line_errors(*kinds):
            raise error


# Signals ------------------------------------------------------------------------------------------
def send(number):
    os.kill(os.getpid(), number)


@pytest.fixture
def handled():
    """A list of the signals that reach the handler of this test."""
    received = []
    handlers = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        handlers[number] = signal.signal(number, lambda number, frame: received.append(number))
    yield received
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_deferred_until_the_block_ends(number, handled):
    with cli.deferred_signals() as signals:
        send(number)
        assert signals == [number]
    assert not handled
    send(number)                                        # the handlers are restored
    assert handled == [number] and signals == [number]


def test_a_second_deferred_signal_exits_at_once(handled):
    with pytest.raises(SystemExit, match="^143$"), cli.deferred_signals():
        send(signal.SIGINT)
        send(signal.SIGTERM)
        pytest.fail("the block went on")
    send(signal.SIGINT)
    assert handled == [signal.SIGINT]


def test_an_ignored_signal_stays_ignored(handled):
    """As in background jobs, which Ctrl-C in the terminal must not reach."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with cli.deferred_signals() as signals:
        send(signal.SIGINT)
    assert not signals and signal.getsignal(signal.SIGINT) == signal.SIG_IGN


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_command_without_a_traceback(number, status, handled):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(SystemExit, match=f"^{status}$"):
        cli.run_main(lambda: send(number))


# Terminals ----------------------------------------------------------------------------------------
def test_progress_is_ten_lines_in_a_file_and_one_line_on_a_terminal(monkeypatch, capsys):
    clock = SimpleNamespace(monotonic=iter(range(100, 10_000, 2)).__next__)     # 2 s for each call
    monkeypatch.setattr(cli, "time", clock)

    def run():
        progress = cli.Progress("train", 4, 40)         # resumed after step 4
        for step in range(5, 41):
            progress.show(step, torch.tensor(1.25))
        return capsys.readouterr().out

    lines = run().splitlines()
    assert [line.split()[1] for line in lines] == [f"{step}/40" for step in range(8, 41, 4)]
    assert lines[0] == "train  8/40  loss  1.2500     0.50 steps/s    1:04 left"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for columns in (80, 40):                            # a longer line would be wrapped
        monkeypatch.setenv("COLUMNS", str(columns))
        shown = run()
        assert shown.count("\r") == 36 and shown.count("\n") == 1 and shown.endswith("\n")
        assert {len(line) for line in shown[1:-1].split("\r")} == {columns - 1}
        assert shown.startswith("\rtrain  5/40  loss  1.2500")


def test_progress_with_a_clock_that_does_not_advance(monkeypatch, capsys):
    """Some clocks tick only every 16 ms. (A clock that is set back is not used.)"""
    monkeypatch.setattr(cli, "time", SimpleNamespace(monotonic=lambda: 100.0))
    cli.Progress("train", 0, 10).show(1, torch.tensor(1.25))
    assert capsys.readouterr().out.startswith("train  1/10  loss  1.2500")


def test_terminals_without_greek_letters_and_closed_pipes(monkeypatch):
    """`python train.py --help` in a Windows console, and `python evaluate.py CKPT | head`."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "cp1252"))
    cli.run_main(lambda: print("the step size η"))
    sys.stdout.seek(0)
    assert sys.stdout.read() == "the step size ?\n"
    read_end, write_end = os.pipe()
    os.close(read_end)
    monkeypatch.setattr(sys, "stdout", os.fdopen(write_end, "w"))
    with pytest.raises(SystemExit, match="^141$"):
        cli.run_main(lambda: print("a line"))
    print("a later line")                               # goes to /dev/null without an error
    sys.stdout.flush()
