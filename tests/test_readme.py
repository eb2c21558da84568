"""The README: its commands are spelled right, the main ones run (in small), so does its Python; its tables are the results."""
import json
import re
import shlex
import sys
import time
from statistics import mean

import pytest
import torch

import tables
import train
from conftest import ROOT
from model import NANO, read


README = (ROOT / "README.md").read_text()
COMMANDS = [shlex.split(c.replace("\\\n", " ")) for c in re.findall(r"train\.py((?: (?:[^\n`\\]|\\\n)*)?)\n", README)
            if not c.strip().startswith("--help")]


@pytest.mark.parametrize("flags", COMMANDS, ids=" ".join)
def test_every_command_is_spelled_right(flags):
    train.parse(flags)


@pytest.mark.parametrize("flags", ["", "--method full", "--method multilora --n_blocks 4", "--method autolora"])
def test_the_main_commands_run(flags, tmp_path, monkeypatch, capsys):
    assert flags.split() in COMMANDS and len(COMMANDS) >= 12
    monkeypatch.chdir(tmp_path)
    if "autolora" in flags:
        flags += " --search_steps 2"
    results = train.main([*flags.split(), "--steps", "2", "--batch_size", "10", "--eval_rows", "3"])
    assert set(results) == {"instruct", "arith", "infer", "facts", "data2text"}
    assert "next     python train.py --eval out/" in capsys.readouterr().out


def test_the_python_runs_and_prints_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(code, {})
    assert capsys.readouterr().out.split() == re.findall(r"print\(.*# (.*)", code)


def test_every_link_leads_to_a_file():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_every_equation_is_where_the_map_says():
    found = re.findall(r"\| `(.+)` in `(\w+\.py)` \|", README)
    assert len(found) == 10
    for line, file in found:
        assert (ROOT / file).read_text().count(line) == 1, line


def test_the_lengths_of_the_files():
    for file, lines in re.findall(r"\[`(\w+\.py)`\]\(\1\) \| (\d+) \|", README):
        assert len((ROOT / file).read_text().splitlines()) == int(lines), file


# every number of a table is in a results file

def test_the_tables_are_those_of_the_results():
    assert tables.fill(README) == README and len(re.findall(r"^<!-- \w+ -->$", README, re.M)) == 2 * len(tables.BLOCKS)


@pytest.mark.parametrize("method", train.METHODS)
def test_the_learning_rate_by_default_is_the_best_tried_but_for_ties(method):
    tried = tables.tried_rates(method)
    assert len(tried) >= 3 and max(tried.values()) - tried[train.METHODS[method][-2]] < 0.03


def test_what_is_said_of_the_planted_ranks():
    null = tables.PLANTED["random_beta"]
    assert f"{null['mean']:.1f} ± {null['std']:.1f}" in README


def test_what_is_said_of_the_first_seeds():
    for name in ("autolora", "uniform"):
        assert tables.pm(map(tables.exact, tables.runs(name)[:3])) in README


def test_what_is_said_of_intruders():
    counts = {k: [mean(x[k] for name, x in tables.METHODS["intruders"].items() if name.startswith(f"{method}-"))
                  for method in ("lora", "multilora", "full")] for k in ("real", "null")}
    text = README.replace("\n ", "")
    assert "number {:.1f} with LoRA, {:.1f} with MultiLoRA and {:.1f} with full".format(*counts["real"]) in text
    assert "brings {:.1f}, {:.1f} and {:.1f} of them".format(*counts["null"]) in text


def test_what_is_said_of_nano():
    held = read(NANO)
    assert f"to {tables.exact(held):.3f} mean exact match" in README.replace("\n", " ")
    flags = next(c for c in COMMANDS if "pretrained/nano.pt" in c)
    now = vars(train.parse(flags)[0]) | {"dtype": "fp32", "block_size": 512}
    assert {k: now[k] for k in held["args"]} == held["args"]            # it is what that command makes


def test_the_samples_of_real_text():
    for line in tables.E2E["lora-B"]["samples"] + tables.E2E["full-nano"]["samples"]:
        assert line in README


def test_what_is_said_of_speed():
    assert tables.BENCH["shape"] in README.replace("\n", " ")
    assert ", ".join(f"{k} {v}" for k, v in tables.BENCH["versions"].items()) in README.replace("\n", " ")


def test_what_the_benchmark_measures():
    import bench
    rows = bench.alternate({"short": lambda: time.sleep(0.005), "long": lambda: time.sleep(0.05)}, 5, "cpu", "short")
    assert rows["short"]["ratio"] == 1 and 2 < rows["long"]["ratio"] < 12 and rows["long"]["ms"] > 49
    linear, x = torch.nn.Linear(64, 32), torch.randn(8, 64, requires_grad=True)
    assert bench.held(linear, lambda: linear(x))[1] == x.numel() * 4                # its input, and not its weight


def test_the_benchmark_runs(tmp_path, monkeypatch):
    import bench
    flags = "--rounds 2 --n_layer 1 --n_embd 64 --vocab_size 300 --batch 1 8 --latency 1x8 --generate 4 4 --device cpu"
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags.split(), "--out", str(tmp_path / "bench.json")])
    bench.main()
    got = json.loads((tmp_path / "bench.json").read_text())
    full, ours = got["training"]["full fine-tuning"], got["training"]["LoRA"]
    assert ours["ratio"] == 1 and ours["parameters"] == 8 * (4 * 2 * 64 + 2 * 5 * 64)
    assert full["optimizer_MB"] == pytest.approx(8e-6 * full["parameters"], rel=0.01)
    for table in ("training", "latency", "generation"):
        assert set(tables.BENCH[table]) - set(got[table]) <= {n for n in tables.BENCH[table] if "peft" in n or "transf" in n or "loralib" in n or "x" in n}
