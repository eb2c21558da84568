"""The pages of the evidence: tables, numbers in the text, links, figures and commands."""
import re
import shlex

import pytest

pytest.importorskip("scipy", reason="the evidence needs scipy: experiments/requirements.txt")

import pages
import results
import runs
from conftest import ROOT

EVIDENCE = ROOT / "experiments" / "README.md"


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_tables_are_those_of_the_results(page):
    text = page.read_text()
    assert "<!-- end -->" in text or page.name == "figures.md"
    assert pages.fill(text) == text


def test_every_decimal_number_in_the_text_is_in_a_generated_table():
    text = EVIDENCE.read_text()
    protocol = text[text.index("## Protocol"):text.index("## LoRA")]
    tables = "".join(re.findall(r"<!-- \w+ -->.*?<!-- end -->", "".join(
        page.read_text() for page in pages.PAGES), flags=re.S))
    prose = re.sub(r"<!-- \w+ -->.*?<!-- end -->", "", text.replace(protocol, ""), flags=re.S)
    prose = re.sub(r"\]\([^)]*\)", "]", prose)
    numbers = set(re.findall(r"\d+\.\d+", prose)) - FROM_ELSEWHERE
    assert len(numbers) > 10
    for number in numbers:
        assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", tables), number


FROM_ELSEWHERE = {"0.9", "70.4", "0.5"}         # nano's size, the papers' numbers


@pytest.mark.parametrize("page", [EVIDENCE, *results.RESULTS.glob("*.md")], ids=lambda p: p.name)
def test_every_link_leads_somewhere(page):
    text = page.read_text()
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    anchors = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        if file:
            assert file.startswith("https:") or (page.parent / file).exists(), target
        elif anchor:
            assert anchor in anchors, target


def test_every_figure_is_on_a_page():
    text = "".join(page.read_text() for page in pages.PAGES)
    for path in (ROOT / "experiments" / "figures").glob("*.png"):
        assert f"figures/{path.name}" in text, path.name


def test_the_commands_of_the_page_are_understood():
    text = EVIDENCE.read_text()
    grid = runs.read_grid(["nano", "e2e", "mixture"])
    found = re.findall(r"python experiments/runs\.py ([^`\n]*)", text)
    assert len(found) >= 4
    for arguments in found:
        args = runs.parse(shlex.split(arguments))
        for pattern in args.groups:
            assert runs.choose(grid, [pattern]) or args.experiment == "adapters", pattern
