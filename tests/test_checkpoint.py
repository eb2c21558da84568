"""support/checkpoint.py and support/command.py: files that last, names, and terminals."""
import io
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch

import train
from conftest import ROOT
from model import GPT, read
from support import checkpoint
from test_train import KINDS, SMALL, identical, killed_after, place, same_run, tensors, write_rows


def refused(argv, message, capsys):
    """In a line, with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        train.main(argv)
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_no_run_takes_the_file_of_another(capsys):
    train.main([*SMALL, "--steps", "1"])
    first = Path("out/lora.pt").read_bytes()
    train.main([*SMALL, "--steps", "2"])
    refused([*SMALL, "--out", "out/lora.pt"], "out/lora.pt is there already: choose", capsys)
    assert Path("out/lora.pt").read_bytes() == first and read("out/lora-2.pt")["step"] == 2


def test_a_name_that_was_claimed_is_free_again_where_nothing_could_be_written(monkeypatch):
    monkeypatch.setattr(torch, "save", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        checkpoint.write({}, checkpoint.claim("a.pt"))
    assert not os.path.exists("a.pt") and not os.path.exists("a.pt.part")


@pytest.mark.parametrize("error", [RuntimeError("unexpected pos 64"), OSError(28, "No space left")])
def test_a_full_disk_stops_a_run_in_a_line_and_costs_no_checkpoint(error, monkeypatch, capsys):
    save, calls = torch.save, []

    def disk_is_full(saved, f):
        calls.append(f)
        if len(calls) > 2:
            f.write(b"half of it")
            raise error
        save(saved, f)

    train.main([*KINDS["lora"], "--out", "whole.pt"])
    with monkeypatch.context() as m:
        m.setattr(torch, "save", disk_is_full)
        refused([*KINDS["lora"], "--out", "a.pt"], error.args[-1], capsys)
    assert read("a.pt")["step"] == 1                        # and not what is in a.pt.part
    train.main(["--resume", "a.pt"])
    assert same_run("a.pt", "whole.pt")


def test_what_cannot_be_resumed(capsys, monkeypatch):
    os.mkdir("d")
    for name in ("train", "valid"):
        write_rows(f"d/{name}.jsonl", "abcdefgh")
    flags = [*SMALL, "--data", "d", "--steps", "2"]
    killed_after(1, [*flags, "--out", "a.pt"], monkeypatch)
    train.main([*flags, "--out", "ended.pt"])
    refused(["--resume", "ended.pt"], "this run has ended", capsys)
    refused(["--resume", "a.pt", "--model", "nano"], "base", capsys)
    for name in ("train", "valid"):
        write_rows(f"d/{name}.jsonl", "abcdefgx")
        refused(["--resume", "a.pt"], "a.pt: the data has changed since", capsys)
        write_rows(f"d/{name}.jsonl", "abcdefgh")
    os.rename("base.pt", "moved.pt")
    train.main(["--resume", "a.pt", "--model", "moved.pt"])
    assert identical(tensors("a.pt"), tensors("ended.pt"))


def test_ranks_are_those_of_an_adapter_of_this_base(monkeypatch, capsys):
    killed_after(2, [*KINDS["autolora"], "--out", "search.pt"], monkeypatch)
    train.main([*SMALL, *"--rank 3 --targets q up --steps 1 --out a.pt".split()])
    train.main([*SMALL, *"--ranks a.pt --steps 1 --out b.pt".split()])
    a, b = ({n: t.shape for n, t in tensors(path).items()} for path in ("a.pt", "b.pt"))
    assert a == b
    refused([*SMALL, "--ranks", "search.pt"], "--ranks search.pt", capsys)
    refused([*SMALL, "--ranks", "a.pt", "--model", "nano"], "--ranks a.pt", capsys)


@pytest.mark.parametrize("method, base", [("lora", torch.bfloat16), ("full", torch.float32)])
def test_under_bf16_only_a_frozen_base_is_bf16(method, base):
    argv = [*SMALL, "--method", method, "--dtype", "bf16", "--steps", "9"]
    train.main(argv)
    model = checkpoint.start_model(train.parse(argv)[0], torch.device("cpu"))
    assert {p.dtype for p in model.parameters()} == {base}
    saved = read(f"out/{method}.pt")
    assert {t.dtype for t in tensors(f"out/{method}.pt").values()} == {torch.float32}
    assert saved["after"]["rows.jsonl"]["loss"] < saved["before"]["rows.jsonl"]["loss"]
    checkpoint.restore(saved, GPT.from_pretrained("base.pt"))       # the same base, in float32


@pytest.mark.parametrize("name, argv", [("train.py", SMALL), ("evaluate.py", ["a.pt"])])
def test_terminals_without_greek_letters_and_readers_that_leave(name, argv, monkeypatch, capsys):
    train.main([*SMALL, "--steps", "1", "--out", "a.pt"])
    read_end, write_end = os.pipe()
    os.close(read_end)
    for given, stdout, status in [(["--help"], io.TextIOWrapper(io.BytesIO(), "cp1252"), 0),
                                  (argv, os.fdopen(write_end, "w"), 141)]:
        monkeypatch.setattr(sys, "argv", [name, *given])
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit, match=f"^{status}$"):
            runpy.run_path(str(ROOT / name), run_name="__main__")       # python name given
    assert not capsys.readouterr().err
