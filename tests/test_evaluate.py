"""evaluate.py: what it counts, and the command on the checkpoints of train.py."""
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

TOK = data.tokenizer(257)
CPU = torch.device("cpu")
FP32 = Namespace(batch_size=3, dtype="fp32")
ON_CPU = ["--device", "cpu"]


@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_evaluate_counts_tokens_and_exact_matches(batch_size):
    settings = Namespace(batch_size=batch_size, dtype="fp32")
    model = random_gpt(dtype=torch.float32).train()
    texts = ("ab", "c"), ("abc", "defgh"), ("b", "xy"), ("q" * 40, "r" * 20)
    rows = [data.encode(TOK, *text) for text in texts]
    for prompt in ("abc", "b"):     # for each, a row that the model gets right and two it does not
        ids = [*prompt.encode(), TOK.eot_token]
        new, = model.generate([ids], 20, stop=TOK.eot_token)
        rows.append(data.Row([*ids, *new, TOK.eot_token], len(ids)))
        rows.append(data.Row([*ids, *new, 65, TOK.eot_token], len(ids)))
        rows.append(data.Row([*ids, *new[:-1], TOK.eot_token], len(ids)))   # the model continues
    tasks = [Task("t", [], rows), Task("text", [], rows, text=True)]
    got = evaluate.evaluate(model, tasks, settings, CPU)
    tokens = [len(row.ids) - row.prompt_len for row in rows]
    losses = [model(*data.collate([row]))[1].item() for row in rows]
    mean = sum(n * loss for n, loss in zip(tokens, losses)) / sum(tokens)
    assert got["t"] == {"loss": pytest.approx(mean, rel=1e-5), "exact": 2 / 10}
    assert got["text"] == {"loss": got["t"]["loss"]}
    assert model.training


def test_the_first_prompts_of_every_task_end_with_eot_except_for_plain_text():
    rows = [data.encode(TOK, f"prompt {i}", "a completion of it") for i in range(5)]
    prompts = [[*f"prompt {i}".encode(), TOK.eot_token] for i in range(5)]
    windows = [data.Row([*range(i, i + 40)], 1) for i in range(5)]
    text = Task("text", [], windows, text=True)
    assert evaluate.first_prompts([Task("a", [], rows)]) == prompts[:3]
    assert evaluate.first_prompts([text]) == [[*range(i, i + 16)] for i in range(3)]
    tasks = [Task("a", [], rows), text, Task("b", [], rows[1:]), Task("c", [], rows[2:])]
    assert evaluate.first_prompts(tasks) == [prompts[0], [*range(16)], prompts[1], prompts[2]]


def test_the_table_has_79_columns_and_a_mean():
    short = Task("banana", [], [0])
    long = Task("a very " * 9 + "long", [], [0] * 1200)
    before = {short.name: {"loss": 10.0, "exact": 0.25}, long.name: {"loss": 1234.5}}
    after = {short.name: {"loss": 2.0, "exact": 0.75}, long.name: {"loss": 1.0}}
    lines = evaluate.results_table([short, long], before, after).splitlines()
    assert max(map(len, lines)) <= 79
    assert lines[2].split() == ["banana", "1", "10.000", "2.000", "0.250", "0.750"]
    assert lines[3].split()[-6:] == ["long", "1,200", "1234.500", "1.000", "-", "-"]
    assert lines[4].split() == ["mean", "1,201", "622.250", "1.500", "-", "-"]


def adapted(path):
    """The base model with a checkpoint's adapter added by hand: W + B diag(s) A."""
    model = GPT.from_pretrained("base.pt")
    adapter = read(path)["adapter"]
    for name, own in adapter["tensors"].items():
        delta = (own["B"] * adapter["scale"][name]) @ own["A"]
        model.get_submodule(name).weight.data += delta
    return model


@pytest.mark.parametrize("method", ["full", "lora", "multilora", "autolora"])
def test_the_command_repeats_the_results_of_the_run(method, capsys):
    write_rows("t.txt", ["the quick brown fox"] * 40)           # any text will do
    more = "--data rows.jsonl t.txt --eval_rows 3 --block_size 40 --steps 3 --out a.pt"
    after = train.main(flags(method, more))
    printed = capsys.readouterr().out.splitlines()
    assert evaluate.main(["a.pt", *ON_CPU]) == after and after["t.txt"].keys() == {"loss"}
    assert set(capsys.readouterr().out.splitlines()[:5]) <= set(printed)    # the table


def test_other_tasks_and_a_moved_base_with_an_unfinished_search(monkeypatch, capsys):
    killed_after(3, [*KINDS["autolora"], "--out", "a.pt"], monkeypatch)
    write_rows("other.jsonl", ["some", "thing", "else"] * 9)
    tasks = data.load(["other.jsonl"], TOK, 64, 2)
    losses = []
    for model in (GPT.from_pretrained("base.pt"), adapted("a.pt")):
        losses.append(evaluate.evaluate(model, tasks, FP32, CPU)["other.jsonl"]["loss"])
    before, after = losses
    os.rename("base.pt", "moved.pt")
    argv = ["a.pt", "--base", "moved.pt", *ON_CPU, *"--data other.jsonl --eval_rows 2".split()]
    got = evaluate.main(argv)["other.jsonl"]
    assert got["loss"] == pytest.approx(after, rel=1e-5) and abs(before - after) > 1e-3
    assert f"{'other.jsonl':28} {2:8} {before:9.3f} {after:9.3f}" in capsys.readouterr().out


def test_rows_that_have_changed_since_the_run_are_reported(capsys):
    """A row appended to a .jsonl file changes which rows are held out."""
    write_rows("grows.jsonl", ["some", "thing", "else"] * 9)
    train.main([*SMALL, *"--data grows.jsonl rows.jsonl --steps 1 --out a.pt".split()])
    capsys.readouterr()
    evaluate.main(["a.pt", *ON_CPU])
    evaluate.main(["a.pt", *ON_CPU, "--eval_rows", "1"])
    assert "changed" not in capsys.readouterr().out
    with open("grows.jsonl", "a") as f:
        f.write('\n{"prompt": "new", "completion": "row"}\n')
    for more in ([], ["--eval_rows", "1"], ["--data", "grows.jsonl"]):
        evaluate.main(["a.pt", *ON_CPU, *more])
        assert "the rows of grows.jsonl have changed since the run" in capsys.readouterr().out


@pytest.mark.parametrize("name, end", [("rows.jsonl", [256]), ("t.txt", [])])
def test_a_prompt_is_followed_by_eot_unless_the_run_was_on_plain_text(name, end, capsys):
    write_rows("t.txt", ["the quick brown fox"] * 40)
    train.main([*SMALL, *f"--data {name} --steps 3 --lr 1e-2 --out a.pt".split()])
    capsys.readouterr()
    evaluate.main(["a.pt", "--prompt", "row 5", "b", *ON_CPU])
    model = adapted("a.pt")
    lines = []
    for prompt in ("row 5", "b"):
        ids = [*prompt.encode(), *end]
        new, = model.generate([ids], 65 - len(ids), TOK.eot_token)
        lines += [f"  {prompt}", f"    -> {TOK.decode(new).strip()}"]
    assert capsys.readouterr().out == "\n".join(lines) + "\n"


@pytest.mark.parametrize("method, dtype", [("full", "fp32"), ("lora", "fp32"), ("lora", "bf16")])
def test_export_writes_the_model_with_its_adapter_merged(method, dtype):
    train.main(flags(method, f"--steps 3 --out a.pt --dtype {dtype}"))
    evaluate.main(["a.pt", *ON_CPU, "--export", "model.bin"])
    got = GPT.from_pretrained("model.bin", n_head=2).state_dict()
    want = tensors("a.pt") if method == "full" else adapted("a.pt").state_dict()
    assert got.keys() == want.keys() and all(near(got[name], want[name], 1e-6) for name in want)


def test_a_model_from_scratch_is_stored_in_half_precision():
    train.main([*KINDS["scratch"], "--out", "small.pt"])
    assert {w.dtype for w in tensors("small.pt").values()} == {torch.float16}


@pytest.mark.parametrize("argv, message", [
    ("base.pt", "base.pt is neither a checkpoint of train.py nor an adapter"),
    ("missing.pt", "No such file or directory: 'missing.pt'"),
    ("a.pt --base nano", "trained on another base model"),
    ("full.pt --base other.pt", "trained on another base model, with the fingerprint"),
    ("full.pt --base other.pt --prompt x", "trained on another base model"),
    ("full.pt --base other.pt --export x.bin", "trained on another base model"),
    ("a.pt --export base.pt", "--export base.pt: it exists already; choose another name"),
    ("a.pt --export folder", "--export folder: it exists already; choose another name"),
    ("full.pt --export x", "full fine-tuning has no adapter: pass a file name such as model.bin"),
    ("damaged.pt", "damaged.pt is damaged: it has no adapter"),
    ("a.pt --prompt " + 99 * "x", "leaves room for 0 new tokens"),
    ("by_hand.pt --base base.pt", "by_hand.pt does not contain its tasks: pass --data"),
])
def test_errors_are_one_line_that_says_what_is_wrong(argv, message, capsys):
    files = {"base.pt", "rows.jsonl", "a.pt", "full.pt", "other.pt", "by_hand.pt", "damaged.pt",
             "folder"}
    train.main([*SMALL, "--steps", "1", "--out", "a.pt"])
    train.main([*SMALL, "--method", "full", "--steps", "1", "--out", "full.pt"])
    other = {"model": random_gpt(seed=1).state_dict(), "config": read("base.pt")["config"]}
    torch.save(other, "other.pt")
    torch.save(read("a.pt")["adapter"], "by_hand.pt")
    torch.save(read("a.pt") | {"adapter": None}, "damaged.pt")
    os.mkdir("folder")
    capsys.readouterr()
    with pytest.raises(SystemExit, match="^2$"):
        evaluate.main(argv.split())
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and not out
    assert {*os.listdir()} == files
