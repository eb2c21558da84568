"""support/report.py: the tables that are printed, and what the figures contain."""
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure

from support import report


@pytest.fixture
def figures(monkeypatch):
    """{path: figure} of the figures that are saved; they are drawn, but not written."""
    saved = {}

    def keep(figure, path, **options):
        figure.canvas.draw()
        saved[path] = figure

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def run(name, seed=None, **saved):
    """As much of a Deltas as is needed here."""
    identity = {"checkpoint": name, "seed": seed, "method": "lora"}
    return SimpleNamespace(identity=identity, saved=saved)


def line(checkpoint, real, null=(), panel="q", method="lora"):
    """A line of a figure, with x = 1, 2, ..."""
    return {
        "checkpoint": checkpoint,
        "method": method,
        "panel": panel,
        "x": list(range(1, len(real) + 1)),
        "real": real,
        "null": null,
    }


def drawn(ax):
    """The values of the lines in a panel; those for the legend are empty."""
    values = [line.get_ydata() for line in ax.get_lines()]
    return [list(y) for y in values if len(y)]


def losses(a, b):
    """The results of two tasks."""
    return {"a": {"loss": a}, "b": {"loss": b}}


def words(text):
    return [" ".join(line.split()) for line in text.splitlines()]


# In a terminal

def test_mean_and_standard_deviation_as_text():
    assert report.mean_and_std([], 2) == "-"
    assert report.mean_and_std([1 / 3], 2) == "0.33"
    assert report.mean_and_std([1.0, 3.0], 1) == "2.0±1.4"
    assert report.mean_and_std([100.0, 300.0], 1) == "200±141"


def test_the_summary_has_means_over_matrices_over_seeds_and_of_the_null(capsys):
    runs = []
    records = []
    for seed, loss in (("0", 1.0), ("1", 3.0)):
        rows = {"loss": loss, "exact": loss / 4}
        text = {"loss": 3 * loss}
        runs.append(run("lora", seed, parameters=1234, after={"rows": rows, "text": text}))
        for stable_rank in (loss, loss + 2):
            null = {"top1": 0.5, "stable_rank": 6.0}
            values = {"top1": 0.25, "stable_rank": stable_rank, "null": null}
            records.append(runs[-1].identity | values)
    runs.append(run("bare", parameters=1, after=None))
    records.append(runs[-1].identity | {"top1": 1.0, "null": {}})
    report.summary(runs, records)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert words(out)[1:-1] == [
        "lora 1,234 0.25±0.00 - 3.0±1.6 -",
        "seeds 0.25±0.00 - 3.0±1.4 -",
        "Gaussian 0.50±0.00 - 6.0±0.0 -",
        "bare 1 1.00 - - -",
        "Gaussian - - - -",
        "",
        "results, mean over tasks loss exact match",
        "lora 4.000±2.828 0.500±0.354"]         # the exact match is that of rows; bare has none


def test_names_are_never_cut_in_a_table(capsys):
    long = "a name of more than twenty-four characters"
    report.table(["name", "n"], [[long, "12"], ["b", "3"]], width=4)
    assert capsys.readouterr().out.splitlines()[1:] == [f"{long}   12", f"{'b':42}    3", ""]


def test_the_table_of_ranks_has_a_line_for_each_layer_and_a_column_for_each_target():
    ranks = {
        "h.0.attn.q": 3,
        "h.0.mlp.up": 12,
        "h.1.mlp.up": 1,
        "model.layers.2.mlp.gate_proj": 4,
    }
    table = report.rank_table(ranks)
    assert words(table) == ["ranks q up gate_proj", "h.0 3 12 -", "h.1 - 1 -",
                            "model.layers.2 - - 4"]
    assert len(set(map(len, table.splitlines()))) == 1


# Figures

def test_a_figure_has_means_ranges_and_nulls_by_panel_and_checkpoint(figures):
    report.figure("f", "title", [
        line("a", [1, 2], [4, 4]),
        line("a", [3, 4, 8], [6, 4, 2]),
        line("a", [5], [5], panel="v"),
        line("b", [1], [2], panel="v"),
    ])
    q, v = figures["f"].axes
    assert [q.get_title(), v.get_title()] == ["q", "v"]
    assert drawn(q) == [[2, 3, 8], [5, 4, 2]]       # a line does not count after its end
    assert drawn(v) == [[5], [5], [1], [2]]
    band = q.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (1, 8)


def test_every_checkpoint_has_its_own_colour_or_dash():
    names = [f"{method}{i}" for method in report.COLORS for i in range(5)]
    lines = [line(name, [1], method=name[:-1]) for name in names]
    styles = report.line_styles(lines)
    assert list(styles) == names
    assert len(set(styles.values())) == len(names)


def test_any_file_name_can_be_in_a_figure(figures):
    names = ["_x", "$^$"]               # matplotlib hides labels with _, and reads $ as a formula
    report.figure("f", "title", [line(name, [1], [1]) for name in names])
    report.maps("m", "$^$", [("q", torch.eye(2))], columns=1)
    report.search_figure("s", "$^$", {"h.0.attn.q": 1}, [1], torch.ones(1, 1, 1))
    legend = [text.get_text() for text in figures["f"].legends[0].get_texts()]
    legend = [text.replace("\\", "").strip() for text in legend]
    assert legend == [*names, "dotted: Gaussian ΔW"]


def test_a_map_shows_i_to_the_right_and_j_upwards(figures):
    phi = torch.arange(6.0).view(2, 3) / 6
    report.maps("m", "title", [("q", phi), ("v", phi)], columns=2)
    image, = figures["m"].axes[0].get_images()
    assert image.get_array().tolist() == phi.T.tolist()
    assert image.origin == "lower"
    assert list(image.get_extent()) == [0.5, 2.5, 0.5, 3.5]
    assert image.get_clim() == (0, 1)


def test_the_figure_of_a_search_has_its_ranks_and_largest_selection_variables(figures):
    q = torch.tensor([[0.5, 0.5], [1.0, 0.0]])                          # (steps, k)
    v = torch.tensor([[0.25, 0.75], [0.125, 0.875]])
    ranks = {"h.0.attn.q": 1, "h.1.attn.v": 2}
    report.search_figure("s", "title", ranks, [10, 20], torch.stack([q, v], 1))
    left, right = figures["s"].axes[:2]
    grid = left.get_images()[0].get_array()
    assert grid.filled(0).tolist() == [[1, 0], [0, 2]]
    assert [text.get_text() for text in left.texts] == ["1", "-", "-", "2"]
    assert right.get_lines()[0].get_xdata().tolist() == [10, 20]
    assert drawn(right) == [[0.5, 1], [0.75, 0.875], [0.5, 0.5]]        # the last line is 1/k


def test_curves_begin_with_the_first_evaluation_and_end_with_the_last(figures):
    history = {"loss": [4.0] * 60 + [2.0] * 60, "valid": [(50, losses(5.0, 7.0))]}
    c = run("lora", history=history, before=losses(8.0, 9.0), after=losses(1.0, 2.0))
    adapter = run("peft", history={"loss": []})
    report.curves([adapter], "none")
    report.curves([c, adapter], "c")
    assert figures.keys() == {"c"}
    train, valid = figures["c"].axes
    steps = train.get_lines()[0].get_xdata()
    assert (steps[0], steps[-1]) == (2, 120)                            # means of two steps
    assert drawn(train) == [[4] * 59 + [3] + [2] * 59]
    assert valid.get_lines()[0].get_xdata().tolist() == [0, 50, 120]
    assert drawn(valid) == [[8.5, 6, 1.5]]
