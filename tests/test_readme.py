"""The README's commands: all are spelled right, the two main ones run (in small), and so does its Python."""
import json
import re
import shlex
from statistics import mean, stdev

import pytest

import train
from conftest import ROOT
from model import NANO, read

README = (ROOT / "README.md").read_text()
COMMANDS = [shlex.split(c.replace("\\\n", " ")) for c in re.findall(r"train\.py((?: (?:[^\n`\\]|\\\n)*)?)\n", README)
            if not c.strip().startswith("--help")]


@pytest.mark.parametrize("flags", COMMANDS, ids=" ".join)
def test_every_command_is_spelled_right(flags):
    train.parse(flags)


@pytest.mark.parametrize("flags", ["", "--method full"])
def test_the_main_commands_run(flags, tmp_path, monkeypatch, capsys):
    assert flags.split() in COMMANDS and len(COMMANDS) > 8
    monkeypatch.chdir(tmp_path)
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


# every number of a table is in a results file

def exact(result, task):
    return mean(r["exact"] for r in result.values()) if task == "mean" else result[task]["exact"]


@pytest.mark.parametrize("task", ["instruct", "arith", "infer", "facts", "data2text", "mean"])
def test_the_table_of_nano(task):
    runs = json.loads((ROOT / "experiments/results/nano.json").read_text())["runs"]
    cells = [f"{exact(runs['lora-seed0']['before'], task):.3f}"]
    for method in ("lora", "full"):
        over_seeds = [exact(runs[f"{method}-seed{s}"]["after"], task) for s in range(3)]
        cells.append(f"{mean(over_seeds):.3f} ± {stdev(over_seeds):.3f}")
    assert f"| {task} | {' | '.join(cells)} |" in README


@pytest.mark.parametrize("method, rates", [("lora", ["5e-3", "", "2e-2"]), ("full", ["5e-4", "", "2e-3"])])
def test_the_table_of_learning_rates(method, rates):
    runs = json.loads((ROOT / "experiments/results/nano.json").read_text())["runs"]
    got = [runs[f"{method}-lr{rate}" if rate else f"{method}-seed0"] for rate in rates]
    cells = [f"{r['lr']:g}: {exact(r['after'], 'mean'):.3f}" for r in got]
    assert f"| {method} | {' | '.join(cells)} |" in README


def test_what_is_said_of_nano():
    held = read(NANO)
    assert f"to {exact(held['after'], 'mean'):.3f} mean exact match" in README.replace("\n", " ")
    flags = next(c for c in COMMANDS if "pretrained/nano.pt" in c)
    assert vars(train.parse(flags)[0]) | {"dtype": "fp32", "block_size": 512} == held["args"]   # it is what that command makes


def test_the_table_of_real_text():
    runs = json.loads((ROOT / "experiments/results/e2e.json").read_text())["runs"]
    for name, r in runs.items():
        before, *_ = r["before"].values()
        after, *_ = r["after"].values()
        if name not in ("small", "read"):
            assert f"| {before['loss']:.3f} | {after['loss']:.3f} |" in README
    for line in runs["lora-read"]["samples"] + runs["full-nano"]["samples"]:
        assert line in README


def test_the_table_of_speed():
    rows = json.loads((ROOT / "experiments/results/bench_cpu.json").read_text())["rows"]
    for name, r in rows.items():
        if name != "LoRA (ours)":
            assert f"| {name} | {r['ours_over_it']:.3f} | {r['quartiles'][0]:.3f} to {r['quartiles'][1]:.3f} |" in README
