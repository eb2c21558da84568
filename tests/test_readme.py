"""The README: its commands are spelled right, the main ones and its Python run; its links hold."""
import importlib
import re
import shlex

import pytest

import analyze
import evaluate
import train
from conftest import ROOT
from model import NANO, read

PAGES = [ROOT / "README.md", ROOT / "experiments" / "README.md"]
README = PAGES[0].read_text()


def commands(script):
    """The arguments of every indented line that calls this script, on both pages."""
    found = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        found += re.findall(rf"^    (?:python|torchrun.*?) {script}\b([^\n#]*)", text, re.M)
    return [shlex.split(arguments) for arguments in dict.fromkeys(found)]


TRAIN = commands("train.py")


@pytest.mark.parametrize("script", [train, evaluate, analyze])
def test_every_command_is_spelled_right(script):
    found = commands(f"{script.__name__}.py")
    assert len(found) >= 3
    for arguments in found:
        script.parse(arguments)


@pytest.mark.parametrize("method", ["lora", "multilora", "autolora", "full"])
def test_the_first_commands_run(method, tmp_path, monkeypatch, capsys):
    """As they stand in the README, but for a few steps and rows."""
    monkeypatch.chdir(tmp_path)
    flags = next(f for f in TRAIN if f[:2] == ["--method", method] or method == "lora" and not f)
    small = "--steps 2 --batch_size 10 --eval_rows 2".split()
    if method == "autolora":
        small += ["--search_steps", "2"]
    results = train.main([*flags, *small])
    assert set(results) == {"instruct", "arith", "infer", "facts", "data2text"}
    said = capsys.readouterr().out
    assert f"next     python evaluate.py out/{method}.pt" in said


def test_the_python_prints_what_it_says(capsys):
    for code in re.findall(r"```python\n(import.*?)```", README, re.S):
        exec(code, {})
        assert capsys.readouterr().out.split() == re.findall(r"print\(.*# (.*)", code)


@pytest.mark.parametrize("page", PAGES, ids=["door", "evidence"])
def test_every_link_leads_somewhere(page):
    text = page.read_text()
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    anchors = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
    for target in re.findall(r"\]\(([^)]+)\)", text):
        file, _, anchor = target.partition("#")
        if not file:
            assert anchor in anchors, target
        elif not file.startswith("https:"):
            assert (page.parent / file).exists(), target


def test_every_equation_is_where_the_map_says():
    found = re.findall(r"\| `([\w.]+)` in `(\w+)\.py` \|", README)
    assert len(found) >= 10
    for name, module in found:
        value = importlib.import_module(module)
        for part in name.split("."):
            value = vars(value)[part]       # its own, not inherited
        assert callable(value)


def test_nano_is_what_its_command_makes():
    flags = next(f for f in TRAIN if "--scratch" in f)
    settings, _ = train.parse(flags)
    saved = read(NANO)
    settled = {"block_size", "dtype", "out"}
    for name in vars(settings).keys() - settled:
        assert saved["settings"][name] == getattr(settings, name), name
    exact = [r["exact"] for r in saved["after"].values()]
    assert f"to {sum(exact) / len(exact):.3f} mean exact match" in " ".join(README.split())
