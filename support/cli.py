"""
What the commands share: argument types, one-line errors, signals, progress, the entry point.
"""
import argparse
import math
import os
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from support.distributed import print0


def parser(description, usage):
    return argparse.ArgumentParser(description=description, usage=usage, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


def bounded(kind, low, high=math.inf):
    """An argparse type: a `kind` (int or float) from `low` to `high`."""
    def convert(text):
        value = kind(text)
        if not low <= value <= high or abs(value) == math.inf:
            allowed = "a finite number"
            if low > -math.inf:
                allowed += f", at least {low}"
            if high < math.inf:
                allowed += f" and at most {high}"
            raise argparse.ArgumentTypeError(f"{text} is not {allowed}")
        return value

    convert.__name__ = kind.__name__            # argparse's own messages show this name
    return convert


@contextmanager
def one_line_errors(*kinds):
    """Print an exception of these kinds (ValueError and OSError by default) as one line and exit
    with status 2, because the user's input is wrong and not the program."""
    try:
        yield
    except BrokenPipeError:
        raise
    except kinds or (ValueError, OSError) as e:
        print(f"{Path(sys.argv[0]).name}: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2)


def interrupt(number, frame):
    """Treat SIGTERM, which batch schedulers send before they kill a job, like Ctrl-C."""
    raise KeyboardInterrupt(number)


@contextmanager
def deferred_signals():
    """
    Collect SIGINT and SIGTERM in the list that the block gets, so that a training step is never
    left half done. A second signal ends the program at once.
    """
    received = []

    def remember(number, frame):
        if received:
            sys.exit(128 + number)
        received.append(number)

    handlers = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:      # as in `nohup` and background jobs
            handlers[number] = signal.signal(number, remember)
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class Progress:
    """The progress of a loop: on a terminal one line that is rewritten, elsewhere ten lines."""

    def __init__(self, name, first, steps):
        self.name = name
        self.first = first
        self.steps = steps
        self.began = time.monotonic()

    def show(self, done, loss):
        """Call it after step `done`."""
        seconds = max(time.monotonic() - self.began, 1e-9)
        speed = (done - self.first) / seconds
        left = round((self.steps - done) / speed)
        text = (f"{self.name} {done:>{len(str(self.steps))}}/{self.steps}  loss {loss:7.4f}  "
                f"{speed:7.2f} steps/s  {left // 60:3}:{left % 60:02} left")
        last = done == self.steps
        if sys.stdout.isatty():
            width = shutil.get_terminal_size().columns - 1
            print0(f"\r{text[:width]:<{width}}", end="\n" if last else "")
        elif last or done % max(1, self.steps // 10) == 0:
            print0(text)


def run_main(main):
    """Call a command's main without tracebacks for Ctrl-C, for `| head` and for a terminal that
    cannot print η."""
    signal.signal(signal.SIGTERM, interrupt)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt as e:
        number = e.args[0] if e.args else signal.SIGINT     # Python's own has no number
        sys.exit(128 + number)                  # the exit status that shells expect
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
