"""support/checkpoint.py: files are never lost or overwritten, and lead back to the same model."""
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

import evaluate
import lora
import train
from autolora import AutoLoRALinear
from conftest import same
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


# One run for each file

def test_a_path_is_reserved_by_an_empty_file_that_did_not_exist():
    for path, name in ((None, "out/lora.pt"), (None, "out/lora-2.pt"), ("a/b.pt", "a/b.pt")):
        with checkpoint.reserved(path, "lora") as reserved:
            assert reserved == name and os.path.getsize(name) == 0
            checkpoint.write({}, name)
    with pytest.raises(ValueError, match="a/b.pt exists already: .* or continue .* --resume"):
        with checkpoint.reserved("a/b.pt", "lora"):
            pass


def test_a_run_does_not_overwrite_the_file_of_another(capsys):
    train.main([*SMALL, *"--steps 1 --out a.pt".split()])
    first = Path("a.pt").read_bytes()
    assert_refused([*SMALL, "--out", "a.pt"], "a.pt exists already", capsys)
    assert Path("a.pt").read_bytes() == first


def test_a_reserved_path_is_free_again_if_nothing_could_be_written(monkeypatch):
    before = {*os.listdir()}
    monkeypatch.setattr(torch, "save", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main([*SMALL, "--out", "a.pt"])
    assert {*os.listdir()} == before


def test_a_process_deletes_only_its_own_reservation(capsys):
    with checkpoint.reserved("a.pt", "lora"):
        for argv in ([*SMALL, "--out", "a.pt"], ["--resume", "a.pt"]):
            assert_refused(argv, "a.pt is in use by another run", capsys)
            assert os.path.exists("a.pt")
    assert not os.path.exists("a.pt")


def test_an_empty_file_of_a_run_that_was_killed_before_it_saved_is_used_again():
    Path("a.pt").touch()
    with checkpoint.reserved("a.pt", "lora") as path:
        checkpoint.write({}, path)
    assert os.path.getsize("a.pt") > 0


def test_a_second_run_cannot_write_the_same_file(monkeypatch, capsys):
    """The lock holds before the checkpoint is read, and after it was replaced; a link to the file
    does not avoid it."""
    argv = [*SMALL, *"--steps 3 --eval_every 1".split()]
    train.main([*argv, "--out", "whole.pt"])
    killed_after(2, [*argv, "--out", "a.pt"], monkeypatch)
    os.symlink("a.pt", "link.pt")
    write = checkpoint.write
    tried = []

    def write_and_try(saved, path):
        write(saved, path)
        for name in ("a.pt", "link.pt", os.path.abspath("a.pt")):
            with monkeypatch.context() as m:
                m.setattr(checkpoint, "open_run", lambda *_: pytest.fail("the file was read"))
                assert_refused(["--resume", name], f"{name} is in use by another run", capsys)
            tried.append(name)

    with monkeypatch.context() as m:
        m.setattr(checkpoint, "write", write_and_try)
        train.main(["--resume", "a.pt"])
    assert len(tried) == 6 and same_run("a.pt", "whole.pt")     # after step 2 and at the end
    with checkpoint.locked("a.pt"), checkpoint.locked("whole.pt"):
        pass                                                    # it is free; each file has its own


def test_no_lock_is_taken_where_it_would_be_wrong_or_impossible(monkeypatch):
    """torchrun's other processes do not write, and some file systems and Windows have no locks."""
    Path("a.pt").touch()
    monkeypatch.setenv("RANK", "1")
    with checkpoint.locked("a.pt"), checkpoint.locked("a.pt"):
        pass
    monkeypatch.setenv("RANK", "0")
    with checkpoint.locked("a.pt"), pytest.raises(OSError, match="a.pt is in use by another run"):
        with checkpoint.locked("a.pt"):
            pass
    with monkeypatch.context() as m, checkpoint.locked("a.pt"):
        m.setattr(checkpoint, "fcntl", None)
        with checkpoint.locked("a.pt"):
            pass

    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with checkpoint.locked("a.pt"):
        pass


def test_the_lock_of_a_file_that_was_just_removed_is_not_held(monkeypatch):
    """The other run ends after this one opened the lock's file, and a third one starts."""
    Path("a.pt").touch()
    flock = checkpoint.fcntl.flock

    def late_flock(*arguments):
        for file in Path().glob(".*.lock"):
            file.unlink()
        flock(*arguments)

    monkeypatch.setattr("fcntl.flock", late_flock)
    with pytest.raises(OSError, match="a.pt is in use by another run"):
        with checkpoint.locked("a.pt"):
            pass


# Files that are written completely or not at all

def test_a_process_killed_while_writing_leaves_the_last_checkpoint_and_no_litter(monkeypatch):
    argv = [*SMALL, *"--steps 3 --eval_every 1".split()]
    train.main([*argv, "--out", "whole.pt"])
    killed_after(2, [*argv, "--out", "a.pt"], monkeypatch)
    before = {*os.listdir()}

    def half_of_it(saved, f):
        f.write(b"half of it")
        f.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        torch.save = half_of_it
        train.main(["--resume", "a.pt"])
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len(os.listdir()) == len(before) + 2                 # the partial file, and the lock's
    assert read("a.pt")["step"] == 1
    of_another_run = checkpoint.beside("b.pt", "1.part")
    of_another_run.touch()
    train.main(["--resume", "a.pt"])
    of_another_run.unlink()                             # it is still there
    assert same_run("a.pt", "whole.pt") and {*os.listdir()} == before


@pytest.mark.parametrize("length", [248, 251, 255])
def test_a_name_of_any_length_that_the_file_system_allows(length):
    before = {*os.listdir()}
    name = "a" * (length - 3) + ".pt"
    train.main([*SMALL, "--steps", "1", "--out", name])
    assert {*os.listdir()} == {name, *before} and read(name)["after"]


def test_a_name_that_is_too_long_leaves_no_file(capsys):
    before = {*os.listdir()}
    assert_refused([*SMALL, "--out", 256 * "a"], "File name too long", capsys)
    assert {*os.listdir()} == before


def test_writing_follows_a_symbolic_link_and_the_umask():
    os.mkdir("elsewhere")
    Path("elsewhere/a.pt").write_text("")
    os.symlink("elsewhere/a.pt", "a.pt")
    checkpoint.write({"x": 1}, "a.pt")
    assert os.path.islink("a.pt") and read("elsewhere/a.pt") == {"x": 1}
    assert os.listdir("elsewhere") == ["a.pt"]
    old = os.umask(0o022)
    checkpoint.write({}, "b.pt")
    os.umask(old)
    assert os.stat("b.pt").st_mode & 0o777 == 0o644


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
    assert read("a.pt")["step"] == 1                    # not the content of the partial file
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
        assert_refused(["--resume", "a.pt"], "a.pt: the data differs from that of the run", capsys)
        write_rows(f"d/{name}.jsonl", "abcdefgh")
    os.rename("base.pt", "moved.pt")
    os.rename("d", "data moved")
    assert_refused(["--resume", "a.pt", "--model", "moved.pt"], "there is no task d", capsys)
    moved = ["--model", "moved.pt", "--data", "data moved"]
    train.main(["--resume", "a.pt", *moved])
    assert same(tensors("a.pt"), tensors("ended.pt"))
    assert read("a.pt")["after"] == read("ended.pt")["after"]       # the task keeps its name
    assert evaluate.main(["a.pt", "--device", "cpu"]).keys() == {"data moved"}


def test_a_fully_fine_tuned_checkpoint_is_not_restored_into_another_base_model():
    saved = {"base": "0123456789abcdef", "model": {}}
    with pytest.raises(ValueError, match="another base model, .* 0123456789abcdef; this one"):
        checkpoint.restore(saved, GPT.from_pretrained("base.pt"))


@pytest.mark.parametrize("change, missing", [
    ({"adapter": None}, "adapter"), ({"settings": None}, "settings"), ({"history": 3}, "history"),
    ({"settings": {"method": "lora"}}, "model, data, seed, dtype, block_size, batch_size"),
    ({"optimizer": None}, None)])
def test_damaged_checkpoints_have_one_line_errors(change, missing, monkeypatch, capsys):
    killed_after(1, [*SMALL, "--out", "a.pt"], monkeypatch)
    saved = read("a.pt") | change
    if missing is None:                         # these are needed to resume only
        del saved["optimizer"], saved["settings"]["lr"]
    torch.save(saved, "a.pt")
    if missing is None:
        assert_refused(["--resume", "a.pt"], "a.pt is damaged or of another version: it has no lr, "
                       "optimizer", capsys)
        return
    assert_refused(["--resume", "a.pt"], f"a.pt is damaged: it has no {missing}", capsys)
    with pytest.raises(ValueError, match=f"^a.pt is damaged: it has no {missing}"):
        checkpoint.open_run("a.pt")


def test_an_interrupted_exact_search_cannot_be_compiled(monkeypatch, capsys):
    killed_after(1, [*SEARCH, "--hypergrad", "exact", "--out", "a.pt"], monkeypatch)
    assert_refused(["--resume", "a.pt", "--compile"],
                   "--hypergrad exact cannot be compiled: omit --compile", capsys)


def test_read_ranks_of_an_adapter_and_its_errors():
    model = GPT.from_pretrained("base.pt")
    base = adapter_state.fingerprint(model)
    ranks = {"h.0.attn.q": 3, "h.1.mlp.up": 5}
    files = [("found.pt", lora.LoRALinear), ("search.pt", AutoLoRALinear)]
    for path, layer in files:
        lora.inject(model, rank=ranks, layer=layer)
        torch.save({"adapter": adapter_state.state_dict(model)}, path)
        lora.remove(model)
    torch.save(read("found.pt")["adapter"], "by_hand.pt")
    torch.save({"adapter": {"h.0.attn.q": {"A": torch.ones(3, 16)}}}, "early.pt")
    torch.save({"adapter": None}, "damaged.pt")
    assert checkpoint.read_ranks("found.pt", base) == ranks
    assert checkpoint.read_ranks("by_hand.pt", base) == ranks
    for path, fingerprint, message in [
            ("base.pt", base, "base.pt: the file contains no adapter"),
            ("early.pt", base, "early.pt: the file contains no adapter, or one of an early "),
            ("damaged.pt", base, "damaged.pt: the file contains no adapter"),
            ("found.pt", "0123", "found.pt: its adapter was trained on another base model"),
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


def test_a_folder_that_was_removed_during_the_run_is_made_again():
    os.mkdir("folder")
    argv = [*SMALL, *"--steps 2 --eval_every 1 --out folder/a.pt".split()]
    with pytest.MonkeyPatch.context() as m:
        evaluate_held_out = train.Run.evaluate_held_out

        def remove_folder(run):
            shutil.rmtree("folder", ignore_errors=True)
            return evaluate_held_out(run)

        m.setattr(train.Run, "evaluate_held_out", remove_folder)
        train.main(argv)
    assert read("folder/a.pt")["after"] is not None


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
