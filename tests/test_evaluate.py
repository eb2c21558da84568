"""evaluate.py: what is counted, and the command on what train.py left."""
import os
from argparse import Namespace

import pytest
import torch

import evaluate
import train
from conftest import random_gpt
from model import GPT, read
from support import data
from support.data import Task
from test_train import KINDS, SMALL, flags, killed_after, near, place, tensors, write_rows

TOK, CPU = data.tokenizer(257), torch.device("cpu")
FP32, ON_CPU = Namespace(batch_size=3, dtype="fp32"), ["--device", "cpu"]


def test_it_counts_tokens_and_exact_matches():
    model = random_gpt(dtype=torch.float32).train()
    texts = ("ab", "c"), ("abc", "defgh"), ("b", "xy"), ("q" * 40, "r" * 20)
    rows = [data.encode(TOK, *text) for text in texts]
    for prompt in ("abc", "b"):         # and two that the model gets right, and two that go on
        ids = [*prompt.encode(), TOK.eot_token]
        new, = model.generate([ids], 20, stop=TOK.eot_token)
        rows.append(data.Row([*ids, *new, TOK.eot_token], len(ids)))
        rows.append(data.Row([*ids, *new, 65, TOK.eot_token], len(ids)))
    tasks = [Task("t", [], rows), Task("text", [], rows, text=True)]
    got = evaluate.evaluate(model, tasks, TOK, FP32, CPU, generate=True)
    counted = [len(r.ids) - r.given for r in rows]
    losses = [model(*data.collate([r]))[1].item() for r in rows]
    mean = sum(n * loss for n, loss in zip(counted, losses)) / sum(counted)
    assert got["t"] == {"loss": pytest.approx(mean, rel=1e-5), "exact": 2 / 8}
    assert got["text"] == {"loss": got["t"]["loss"]} and model.training


def test_the_table_has_79_columns_and_a_mean():
    short, long = Task("banana", [], [0]), Task("a very " * 9 + "long", [], [0] * 1200)
    before = {short.name: {"loss": 10.0, "exact": 0.25}, long.name: {"loss": 1234.5}}
    after = {short.name: {"loss": 2.0, "exact": 0.75}, long.name: {"loss": 1.0}}
    lines = evaluate.table([short, long], before, after).splitlines()
    assert max(map(len, lines)) <= 79
    assert lines[2].split() == ["banana", "1", "10.000", "2.000", "0.250", "0.750"]
    assert lines[3].split()[-6:] == ["long", "1,200", "1234.500", "1.000", "-", "-"]
    assert lines[4].split() == ["mean", "1,201", "622.250", "1.500", "-", "-"]


def adapted(path):
    """The base with a checkpoint's adapter added by hand: W + (B ∘ s) A."""
    model, adapter = GPT.from_pretrained("base.pt"), read(path)["adapter"]
    for name, own in adapter["tensors"].items():
        model.get_submodule(name).weight.data += (own["B"] * adapter["scale"][name]) @ own["A"]
    return model


@pytest.mark.parametrize("method", ["full", "lora", "multilora", "autolora"])
def test_it_finds_what_the_run_printed(method, capsys):
    write_rows("t.txt", ["the quick brown fox"] * 40)           # as good a text as another
    more = "--data rows.jsonl t.txt --eval_rows 3 --block_size 40 --steps 3 --out a.pt"
    after = train.main(flags(method, more))
    printed = capsys.readouterr().out.splitlines()
    assert evaluate.main(["a.pt", *ON_CPU]) == after and after["t.txt"].keys() == {"loss"}
    assert set(capsys.readouterr().out.splitlines()[:5]) <= set(printed)    # the table


def test_other_tasks_prompts_an_unfinished_search_and_a_moved_base(monkeypatch, capsys):
    killed_after(3, [*KINDS["autolora"], "--out", "a.pt"], monkeypatch)
    write_rows("other.jsonl", ["some", "thing", "else"] * 9)
    tasks = data.load(["other.jsonl"], TOK, 64, 2)
    models = GPT.from_pretrained("base.pt"), adapted("a.pt")
    base, want = [evaluate.evaluate(m, tasks, TOK, FP32, CPU)["other.jsonl"]["loss"]
                  for m in models]
    os.rename("base.pt", "moved.pt")
    argv = ["a.pt", "--base", "moved.pt", *ON_CPU]
    got = evaluate.main([*argv, *"--data other.jsonl --eval_rows 2".split()])["other.jsonl"]
    assert got["loss"] == pytest.approx(want, rel=1e-5) and abs(base - want) > 1e-3
    assert f"{'other.jsonl':28} {2:8} {base:9.3f} {want:9.3f}" in capsys.readouterr().out
    evaluate.main([*argv, "--prompt", "row 5"])
    new, = models[1].generate([[*b"row 5", TOK.eot_token]], 59, TOK.eot_token)
    assert capsys.readouterr().out == f"  row 5\n    -> {TOK.decode(new)}\n"


@pytest.mark.parametrize("method, dtype", [("full", "fp32"), ("lora", "fp32"), ("lora", "bf16")])
def test_what_is_exported_is_the_model_with_its_adapter_merged(method, dtype):
    train.main(flags(method, f"--steps 3 --out a.pt --dtype {dtype}"))
    evaluate.main(["a.pt", *ON_CPU, "--export", "model.bin"])
    got = GPT.from_pretrained("model.bin", n_head=2).state_dict()
    want = tensors("a.pt") if method == "full" else adapted("a.pt").state_dict()
    assert got.keys() == want.keys() and all(near(got[name], want[name], 1e-6) for name in want)


def test_a_model_from_scratch_is_stored_in_half_precision():
    train.main([*KINDS["scratch"], "--out", "small.pt"])
    assert {w.dtype for w in tensors("small.pt").values()} == {torch.float16}


@pytest.mark.parametrize("argv, message", [
    ("base.pt", "base.pt: not a checkpoint of train.py"),
    ("a.pt --base nano", "base"),
    ("a.pt --export base.pt", "base.pt is there already"),
    ("a.pt --prompt " + 99 * "x", "room for 0 new ones"),
])
def test_errors_say_in_a_line_what_is_wrong(argv, message, capsys):
    train.main([*SMALL, "--steps", "1", "--out", "a.pt"])
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(argv.split())
    out, err = capsys.readouterr()
    assert message in err.splitlines()[-1] and err.count("\n") <= 2 and not out
