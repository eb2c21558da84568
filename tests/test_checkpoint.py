"""support/checkpoint.py: files are never lost or overwritten, and lead back to the same model; and
the entry point in support/cli.py."""
import io
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch

import evaluate
import lora
import train
from autolora import AutoLoRALinear
from conftest import ROOT, same
from model import GPT, NANO, read
from support import adapter_state, checkpoint, distributed
from test_train import SMALL, killed_after, place, same_run, tensors, write_rows

SEARCH = [*SMALL, *"--method autolora --rank 4 --search_steps 4 --search_split 0.6".split(),
          *"--steps 3 --eval_every 1 --beta_lr 0.5".split()]


def assert_refused(argv, message, capsys):
    """train.py must exit with status 2 and one line that contains the message."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        train.main(argv)
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1, err


def test_reserve_path_creates_a_file_that_did_not_exist():
    for path, reserved in ((None, "out/lora.pt"), (None, "out/lora-2.pt"), ("a/b.pt", "a/b.pt")):
        assert checkpoint.reserve_path(path, "lora") == reserved
        assert os.path.getsize(reserved) == 0
    with pytest.raises(ValueError, match="a/b.pt exists already: .* or continue .* --resume"):
        checkpoint.reserve_path("a/b.pt", "lora")


def test_a_run_does_not_overwrite_the_file_of_another(capsys):
    train.main([*SMALL, *"--steps 1 --out a.pt".split()])
    first = Path("a.pt").read_bytes()
    assert_refused([*SMALL, "--out", "a.pt"], "a.pt exists already", capsys)
    assert Path("a.pt").read_bytes() == first


def test_a_reserved_path_is_free_again_if_nothing_could_be_written(monkeypatch):
    monkeypatch.setattr(torch, "save", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        checkpoint.write({}, checkpoint.reserve_path("a.pt"))
    assert not os.path.exists("a.pt") and not os.path.exists("a.pt.part")


def test_only_the_main_process_writes(monkeypatch):
    monkeypatch.setattr(distributed, "process_index", lambda: 1)
    checkpoint.write({}, "a.pt")
    assert not os.path.exists("a.pt")


@pytest.mark.parametrize("error", [RuntimeError("unexpected pos 64"), OSError(28, "No space left")])
def test_a_full_disk_stops_a_run_but_keeps_its_last_checkpoint(error, monkeypatch, capsys):
    argv = [*SMALL, *"--steps 3 --eval_every 1".split()]
    save = torch.save
    calls = []

    def disk_is_full(saved, f):
        calls.append(f)
        if len(calls) > 2:
            f.write(b"half of it")
            raise error
        save(saved, f)

    train.main([*argv, "--out", "whole.pt"])
    with monkeypatch.context() as m:
        m.setattr(torch, "save", disk_is_full)
        assert_refused([*argv, "--out", "a.pt"], error.args[-1], capsys)
    assert read("a.pt")["step"] == 1                    # not the content of a.pt.part
    train.main(["--resume", "a.pt"])
    assert same_run("a.pt", "whole.pt")


def test_resume_requires_the_same_data_and_base_model_and_an_unfinished_run(capsys, monkeypatch):
    os.mkdir("d")
    for name in ("train", "valid"):
        write_rows(f"d/{name}.jsonl", "abcdefgh")
    flags = [*SMALL, "--data", "d", "--steps", "2"]
    killed_after(1, [*flags, "--out", "a.pt"], monkeypatch)
    train.main([*flags, "--out", "ended.pt"])
    assert_refused(["--resume", "ended.pt"], "ended.pt: the run has ended; start", capsys)
    assert_refused(["--resume", "a.pt", "--model", "nano"], "trained on another base model", capsys)
    for name in ("train", "valid"):
        write_rows(f"d/{name}.jsonl", "abcdefgx")
        assert_refused(["--resume", "a.pt"], "a.pt: the data has changed since", capsys)
        write_rows(f"d/{name}.jsonl", "abcdefgh")
    os.rename("base.pt", "moved.pt")
    train.main(["--resume", "a.pt", "--model", "moved.pt"])
    assert same(tensors("a.pt"), tensors("ended.pt"))


def test_a_fully_fine_tuned_checkpoint_is_not_restored_into_another_base_model():
    saved = {"base": "0123456789abcdef", "model": {}}
    with pytest.raises(ValueError, match="another base model: .* is 0123456789abcdef, this model"):
        checkpoint.restore(saved, GPT.from_pretrained("base.pt"))


def test_read_ranks_of_an_adapter_and_its_three_errors():
    model = GPT.from_pretrained("base.pt")
    base = adapter_state.fingerprint(model)
    ranks = {"h.0.attn.q": 3, "h.1.mlp.up": 5}
    files = [("found.pt", lora.LoRALinear), ("search.pt", AutoLoRALinear)]
    for path, layer in files:
        lora.inject(model, rank=ranks, layer=layer)
        torch.save({"adapter": adapter_state.state_dict(model)}, path)
        lora.remove(model)
    torch.save(read("found.pt")["adapter"], "by_hand.pt")
    assert checkpoint.read_ranks("found.pt", base) == ranks
    assert checkpoint.read_ranks("by_hand.pt", base) == ranks
    for path, fingerprint, message in [
            ("base.pt", base, "base.pt: the file contains no adapter"),
            ("found.pt", "0123", "found.pt: its adapter belongs to another base than --model"),
            ("search.pt", base, "search.pt: the search for ranks has not ended")]:
        with pytest.raises(ValueError, match=f"^--ranks_from {message}"):
            checkpoint.read_ranks(path, fingerprint)


def test_a_run_takes_the_ranks_of_another(capsys):
    train.main([*SMALL, *"--rank 3 --targets q up --steps 1 --out a.pt".split()])
    train.main([*SMALL, *"--ranks_from a.pt --steps 1 --out b.pt".split()])
    shapes = [{name: t.shape for name, t in tensors(path).items()} for path in ("a.pt", "b.pt")]
    assert shapes[0] == shapes[1]
    assert_refused([*SMALL, "--ranks_from", "base.pt"], "--ranks_from base.pt: the file", capsys)


@pytest.mark.parametrize("method, dtype", [("lora", torch.bfloat16), ("full", torch.float32)])
def test_with_bf16_only_a_frozen_base_is_stored_in_bf16(method, dtype):
    argv = [*SMALL, "--method", method, "--dtype", "bf16", "--steps", "9"]
    train.main(argv)
    model = checkpoint.start_model(train.parse(argv)[0], torch.device("cpu"))
    assert {p.dtype for p in model.parameters()} == {dtype}
    saved = read(f"out/{method}.pt")
    assert {t.dtype for t in tensors(f"out/{method}.pt").values()} == {torch.float32}
    assert saved["after"]["rows.jsonl"]["loss"] < saved["before"]["rows.jsonl"]["loss"]
    checkpoint.restore(saved, GPT.from_pretrained("base.pt"))   # the same base model, in float32


# Checkpoints of earlier versions

def in_old_format(path):
    """Rewrite an interrupted search as earlier versions stored it: two flags had other names, and
    an adapter's settings were only the arguments that had been passed to inject."""
    saved = read(path)
    settings = saved["settings"]
    settings["ranks"] = settings.pop("ranks_from")
    settings["split"] = settings.pop("search_split")
    assert saved["adapter"]["settings"] == {"alpha": 16.0, "gate": "softmax", "dropout": 0.0}
    saved["adapter"]["settings"] = {"alpha": 16.0}
    torch.save(saved, path)


def test_an_interrupted_search_of_an_earlier_version_is_resumed(monkeypatch):
    train.main([*SEARCH, "--out", "whole.pt"])
    killed_after(3, [*SEARCH, "--out", "a.pt"], monkeypatch)
    in_old_format("a.pt")
    train.main(["--resume", "a.pt"])
    assert same_run("a.pt", "whole.pt")
    assert read("a.pt")["settings"].keys() == read("whole.pt")["settings"].keys()


def test_a_finished_checkpoint_of_an_earlier_version_is_read(capsys):
    assert {"ranks", "split"} <= read(NANO)["settings"].keys()
    saved, settings = checkpoint.open_run(NANO, {"rank": 3})
    assert (settings.ranks_from, settings.search_split, settings.rank) == (None, 0.7, 3)
    assert not {"ranks", "split"} & vars(settings).keys()
    evaluate.main([str(NANO), "--prompt", "reverse abc", "--device", "cpu"])
    assert capsys.readouterr().out.split()[-2:] == ["->", "cba"]


@pytest.mark.parametrize("name, argv", [("train.py", SMALL), ("evaluate.py", ["a.pt"])])
def test_terminals_without_greek_letters_and_closed_pipes(name, argv, monkeypatch, capsys):
    train.main([*SMALL, "--steps", "1", "--out", "a.pt"])
    read_end, write_end = os.pipe()
    os.close(read_end)
    for words, stdout, status in [(["--help"], io.TextIOWrapper(io.BytesIO(), "cp1252"), 0),
                                  (argv, os.fdopen(write_end, "w"), 141)]:
        monkeypatch.setattr(sys, "argv", [name, *words])
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit, match=f"^{status}$"):
            runpy.run_path(str(ROOT / name), run_name="__main__")       # as python does
    assert not capsys.readouterr().err
