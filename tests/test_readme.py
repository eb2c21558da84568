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


@pytest.mark.parametrize("flags", ["", "--method full", "--method multilora --n_blocks 4", "--method autolora"])
def test_the_main_commands_run(flags, tmp_path, monkeypatch, capsys):
    assert flags.split() in COMMANDS and len(COMMANDS) > 12
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


# every number of a table is in a results file

METHODS = ["lora", "multilora", "autolora", "full"]
RESULTS = {name: json.loads((ROOT / f"experiments/results/{name}.json").read_text())
           for name in ("nano", "e2e", "planted", "bench_cpu")}
NANO_RUNS, E2E = (RESULTS[name]["runs"] for name in ("nano", "e2e"))


def exact(result, task="mean"):
    return mean(r["exact"] for r in result.values()) if task == "mean" else result[task]["exact"]


def over_seeds(name, of, digits=3):
    values = [of(NANO_RUNS[f"{name}-seed{s}"]) for s in range(3)]
    return f"{mean(values):,.{digits}f} ± {stdev(values):,.{digits}f}"


@pytest.mark.parametrize("task", ["instruct", "arith", "infer", "facts", "data2text", "mean"])
def test_the_table_of_nano(task):
    cells = [f"{exact(NANO_RUNS['lora-seed0']['before'], task):.3f}"]
    cells += [over_seeds(method, lambda r: exact(r["after"], task)) for method in METHODS]
    assert f"| {task} | {' | '.join(cells)} |" in README


@pytest.mark.parametrize("method, rates", [("lora", ["5e-3", "", "2e-2"]), ("multilora", ["5e-3", "1e-2", "", "4e-2", "8e-2"]),
                                           ("autolora", ["5e-3", "", "2e-2"]), ("full", ["5e-4", "", "2e-3"])])
def test_the_table_of_learning_rates(method, rates):
    got = [NANO_RUNS[f"{method}-lr{rate}" if rate else f"{method}-seed0"] for rate in rates]
    cells = [f"{r['lr']:g}: {exact(r['after']):.3f}" for r in got]
    assert f"| {method} | {', '.join(cells)} |" in README
    assert got[rates.index("")]["lr"] == train.METHODS[method][-2]


@pytest.mark.parametrize("name, label", [("autolora", "found"), ("uniform", "uniform"), ("random", "random"), ("lora", "16 everywhere")])
def test_the_table_of_ranks(name, label):
    cells = [over_seeds(name, lambda r: r["parameters"], 0).removesuffix(" ± 0"),
             over_seeds(name, lambda r: mean(t["loss"] for t in r["after"].values())), over_seeds(name, lambda r: exact(r["after"]))]
    assert f"| {label} | {' | '.join(cells)} |" in README


@pytest.mark.parametrize("name", ["autolora-beta_lr0.01", "autolora-seed0", "autolora-beta_lr0.1"])
def test_the_table_of_the_search(name):
    r = NANO_RUNS[name]
    last = [r["search"]["kept"][-1], r["search"]["top"][-1]]
    assert f"| {r['beta_lr']:g} | {last[0]:.1f} | {last[1]:.2f} | {r['parameters']:,} | {exact(r['after']):.3f} |" in README


@pytest.mark.parametrize("name", ["default", "first-order", "beta_lr 0.003", "64 rows", "sigmoid", "none"])
def test_the_table_of_planted_ranks(name):
    held = RESULTS["planted"]
    for step in (30, 100, 300, 1000) if name == "default" else (100, 300):
        rows = [next(h for h in s if h["step"] == step) for s in held["runs"][name]["seeds"]]
        cells = [f"{mean(ranks):.1f} ± {stdev(ranks):.1f}" for ranks in zip(*[r["rank"] for r in rows])]
        assert f"| {name}, {step} steps | {' | '.join(cells)} |" in README
    null = held["random_beta"]
    assert f"{null['mean']:.1f} ± {null['std']:.1f}" in README


def test_what_is_said_of_nano():
    held = read(NANO)
    assert f"to {exact(held['after']):.3f} mean exact match" in README.replace("\n", " ")
    flags = next(c for c in COMMANDS if "pretrained/nano.pt" in c)
    now = vars(train.parse(flags)[0]) | {"dtype": "fp32", "block_size": 512}
    assert {k: now[k] for k in held["args"]} == held["args"]            # it is what that command makes


def test_the_table_of_real_text():
    for name, r in E2E.items():
        before, *_ = r["before"].values()
        after, *_ = r["after"].values()
        if name not in ("small", "read", "multi-small"):
            assert f"| {before['loss']:.3f} | {after['loss']:.3f} |" in README
    for task, after in E2E["multi-small"]["after"].items():
        assert f"| {task} | {E2E['multi-small']['before'][task]['loss']:.3f} | {after['loss']:.3f} | {after['exact']:.3f} |" in README
    for line in E2E["lora-read"]["samples"] + E2E["full-nano"]["samples"]:
        assert line in README


def test_the_table_of_speed():
    for name, r in RESULTS["bench_cpu"]["rows"].items():
        if name != "LoRA":
            assert f"| {name} | {r['over_lora']:.3f} | {r['quartiles'][0]:.3f} to {r['quartiles'][1]:.3f} |" in README
