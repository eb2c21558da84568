"""The README's commands, Python, links, numbers and exercises are those of the code."""
import importlib
import re
import shlex

import numpy as np
import pytest
import torch
import torch.nn as nn

import analyze
import evaluate
import lora
import mutations
import train
from conftest import ROOT
from model import NANO, read
from multilora import MultiLoRALinear
from results import read_csv

PAGES = [ROOT / "README.md", ROOT / "experiments" / "README.md"]
README = PAGES[0].read_text()
EXERCISES = re.findall(r"^\| \d\. \[.*", README, re.M)
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)


def section(heading):
    return README.split(f"\n## {heading}")[1].split("\n## ")[0]


def commands(script):
    """The arguments of every call of this script on both pages, in a line or in a table."""
    found = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        call = rf"(?:^    |`|&& )(?:python|torchrun.*?) {script}\b([^\n#`&]*)"
        found += re.findall(call, text, re.M)
    return [shlex.split(arguments) for arguments in dict.fromkeys(found)]


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 230
    for line in lines:
        assert len(line) <= 100 or line.startswith("| "), line


# commands

@pytest.mark.parametrize("script", [train, evaluate, analyze])
def test_every_command_has_valid_arguments(script):
    found = commands(f"{script.__name__}.py")
    assert len(found) >= 2
    for arguments in found:
        script.parse(arguments)


def test_every_command_for_smollm2_has_valid_arguments():
    checked = 0
    for part, *arguments in commands("experiments/smollm.py"):
        if part == "train":
            train.parse(arguments)
            checked += 1
    assert checked


@pytest.mark.parametrize("method", ["lora", "multilora", "autolora", "full"])
def test_the_first_commands_run(method, tmp_path, monkeypatch, capsys):
    """As they are in the README, except for a few steps and rows."""
    monkeypatch.chdir(tmp_path)
    first_words = [] if method == "lora" else ["--method", method]
    flags = next(words for words in commands("train.py") if words[:2] == first_words)
    small = "--steps 2 --batch_size 10 --eval_rows 2".split()
    if method == "autolora":
        small += ["--search_steps", "2"]
    results = train.main([*flags, *small])
    assert set(results) == {"instruct", "arith", "infer", "facts", "data2text"}
    assert f"next     python evaluate.py out/{method}.pt" in capsys.readouterr().out


def test_nano_was_trained_by_its_command():
    flags = next(words for words in commands("train.py") if "--scratch" in words)
    settings, _ = train.parse(flags)
    saved = read(NANO)
    renamed = {"ranks_from": "ranks", "search_split": "split"}      # in an earlier version
    depend_on_the_machine = {"block_size", "dtype", "out"}
    for name in vars(settings).keys() - depend_on_the_machine:
        assert saved["settings"][renamed.get(name, name)] == getattr(settings, name), name
    exact = np.mean([results["exact"] for results in saved["after"].values()])
    assert f"to {exact:.3f} mean exact match" in README


# Python

def check_output(code, printed):
    """Each print must be followed by a comment that begins with what it prints."""
    comments = re.findall(r"print\(.*# (.*)", code)
    assert len(comments) > 1
    for comment, line in zip(comments, printed.splitlines(), strict=True):
        assert comment.split("  ")[0] == line


def test_the_example_by_hand_and_the_product_compute_the_same(capsys):
    names = {}
    exec(PYTHON[0], names)
    check_output(PYTHON[0], capsys.readouterr().out)
    example = names["layer"]
    layers = [lora.LoRALinear(example.base, 2, alpha=4), MultiLoRALinear(example.base, 2, 2)]
    layers[1].s.data = example.scale()
    for layer, h in zip(layers, ([11, 23], [11, 17])):
        layer.A.data = example.A.data
        layer.B.data = example.B.data
        layer.eval()
        assert layer(names["x"]).tolist() == h
        layer.merge()
        assert layer(names["x"]).tolist() == h


def test_the_python_prints_what_its_comments_say(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main("--steps 2 --batch_size 10 --eval_rows 2".split())       # writes out/lora.pt
    capsys.readouterr()
    exec(PYTHON[1], {})
    check_output(PYTHON[1], capsys.readouterr().out)


def test_the_recipe_for_transformers_keeps_the_logits():
    transformers = pytest.importorskip("transformers")
    import transformers.pytorch_utils
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_layer=2, n_head=2, n_embd=16)).eval()
    idx = torch.arange(10)[None]
    logits = model(idx).logits
    exec(PYTHON[2], {"model": model, "nn": nn, "transformers": transformers})
    assert torch.allclose(model(idx).logits, logits, atol=1e-5)
    [call] = re.findall(r"`lora\.(inject\(model, \"c_attn.*?\))`", README)
    eval(f"lora.{call}", {"lora": lora, "model": model})
    assert len(lora.adapters(model)) == 6


# links, files and names

@pytest.mark.parametrize("page", PAGES, ids=["README", "evidence"])
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith("https:"):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            words = re.sub(r"[^\w\n -]", "", "\n".join(headings)).lower()
            assert anchor in words.replace(" ", "-").splitlines(), target


def test_every_equation_is_where_the_table_of_files_says():
    found = re.findall(r"^\| \[`(\w+)\.py`\].*?\|.*?\|(.*)\|$", README, re.M)
    count = 0
    for module, equations in found:
        for name in re.findall(r"`([\w.]+)`", equations):
            value = importlib.import_module(module)
            for part in name.split("."):
                value = vars(value)[part]       # defined there, not inherited
            assert callable(value)
            count += 1
    assert count >= 10


def test_every_file_is_in_the_table_of_files():
    names = set(re.findall(r"^\| \[`(\w+(?:\.py|/))`\]", README, re.M))
    folders = {"support/", "tests/", "experiments/", "pretrained/"}
    assert names == {path.name for path in ROOT.glob("*.py")} | folders


# exercises

@pytest.mark.parametrize("exercise", EXERCISES, ids=range(1, len(EXERCISES) + 1))
def test_an_exercise_names_code_and_tests_that_exist(exercise):
    file, code = re.search(r"\[`(\w+\.py)`\].*?: [^`]*`([^`]+)`", exercise).groups()
    if "remove" in exercise:
        code = re.search(r"from `([^`]+)`", exercise)[1]
    assert (ROOT / file).read_text().count(code) == 1
    tests = "".join(path.read_text() for path in ROOT.glob("tests/test_*.py"))
    names = re.findall(r"`(test_\w+)`", exercise)
    assert names
    for name in names:
        assert f"def {name}(" in tests, name


def test_the_number_of_planted_faults():
    assert len(EXERCISES) >= 8
    assert f"plants this fault and {len(mutations.FAULTS) - 1} others" in README


# numbers

@pytest.mark.parametrize("file, column, runs", [
    ("nano_runs.csv", "test.mean.loss", "full lora multilora"),
    ("nano_runs.csv", "test.mean.loss", "autolora uniform"),
    ("nano_runs.csv", "test.mean.loss", "lora-r1 lora-r64"),
    ("nano_runs.csv", "test.mean.loss", "lora-r1 lora-qv-r64"),
    ("smollm_runs.csv", "test.mean.loss", "lora full multilora"),
    ("smollm_runs.csv", "test.mean.loss", "autolora lora lora-all-r8"),
    ("smollm_runs.csv", "test.mean.loss", "lora-qv-r1 lora-qv-r4 lora-qv-r64"),
    ("smollm_runs.csv", "test.mean.loss", "lora-all-r1 lora-qv-r64")])
def test_what_to_choose_has_the_numbers_of_the_results(file, column, runs):
    """A cell that compares runs has their means over the seeds that all of them have."""
    losses = {run: {} for run in runs.split()}
    for row in read_csv(file):
        run, _, seed = row["name"].rpartition("-seed")
        if run in losses:
            losses[run][seed] = float(row[column])
    seeds = set.intersection(*map(set, losses.values()))
    wanted = {f"{len(seeds)} seeds"}
    for values in losses.values():
        wanted.add(f"{np.mean([values[seed] for seed in seeds]):.3f}")
    shown = []
    for cell in section("Choosing").split("|"):
        shown.append(set(re.findall(r"\d\.\d{3}|\d+ seeds", cell)))
    assert any(wanted <= numbers for numbers in shown), wanted


def test_the_default_learning_rates_are_those_of_train():
    text = section("Choosing")
    narrow = re.search(r"LoRA and AutoLoRA (\S+), MultiLoRA (\S+), full (\S+)\) were tuned", text)
    wide = re.search(r"LoRA and AutoLoRA (\S+), MultiLoRA (\S+), full (\S+)\); MultiLoRA's", text)
    methods = [train.METHODS[name] for name in ("lora", "multilora", "full")]
    assert [float(rate) for rate in narrow.groups()] == [m.lr for m in methods]
    assert [float(rate) for rate in wide.groups()] == [m.lr_wide for m in methods]
    auto = train.METHODS["autolora"]
    assert [auto.lr, auto.lr_wide] == [methods[0].lr, methods[0].lr_wide]


def test_multilora_diverges_at_four_times_its_default_learning_rate_for_wide_models():
    loss = {}
    untrained = {}
    for row in read_csv("smollm_runs.csv"):
        if row["name"].startswith("sweep-multilora"):
            loss[float(row["lr"])] = float(row["mean.loss.after"])
            untrained[float(row["lr"])] = float(row["mean.loss.before"])
    default = train.METHODS["multilora"].lr_wide
    assert loss[2 * default] < untrained[2 * default]
    assert loss[4 * default] > untrained[4 * default]
