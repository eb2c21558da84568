"""support/report.py: the tables that are printed, and what the figures contain."""
import math
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


def run(name, seed=None, method="lora", **saved):
    """As much of a Deltas as is needed here."""
    identity = {"checkpoint": name, "seed": seed, "method": method}
    return SimpleNamespace(identity=identity, saved=saved)


def line(checkpoint, real, null=(), panel="q"):
    """A line of a figure, with x = 1, 2, ..."""
    return {
        "checkpoint": checkpoint,
        "panel": panel,
        "x": list(range(1, len(real) + 1)),
        "real": real,
        "null": null,
    }


def figure(lines, **options):
    """Draw a figure "f" of these lines, whose checkpoints are LoRAs."""
    names = [line["checkpoint"] for line in lines]
    report.figure("f", "title", lines, report.line_styles(map(run, names)), **options)


def in_panel(ax):
    """The lines in a panel without those for the legend, which are empty."""
    return [line for line in ax.get_lines() if len(line.get_xdata())]


def drawn(ax):
    """The values of the lines in a panel."""
    return [list(line.get_ydata()) for line in in_panel(ax)]


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
    assert report.mean_and_std([0.0002, 0.0004], 1) == "3e-04±1e-04"        # not 0.0±0.0
    assert report.mean_and_std([0.0], 1) == "0.0"


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
    figure([
        line("a", [3, 4, 8], [6, 4, 2]),
        line("a", [1, 2], [4, 4]),
        line("a", [5], [7], panel="v"),
        line("b", [1], [2], panel="v"),
    ])
    q, v = figures["f"].axes
    assert [q.get_title(), v.get_title()] == ["q", "v"]
    assert drawn(q) == [[2, 3], [5, 4]]             # as far as every line goes
    assert drawn(v) == [[5], [7], [1], [2]]
    for ax in (q, v):
        real, null = in_panel(ax)[:2]
        assert (real.get_linestyle(), null.get_linestyle()) == ("-", ":")
        assert real.get_xdata().tolist() == null.get_xdata().tolist() == [1, 2][:len(drawn(ax)[0])]
        assert real.get_marker() == null.get_marker() == "o"        # one point alone can be seen
    band = q.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (1, 4)
    assert in_panel(v)[0].get_color() != in_panel(v)[2].get_color()


def test_a_figure_without_lines_is_not_drawn(figures):
    report.figure("f", "title", [], {})
    assert not figures


def test_the_numbers_of_a_logarithmic_axis_are_not_powers(figures):
    for high, texts in ((7, ["2", "3", "4", "5", "6"]), (60, ["2", "5", "10", "20", "50"]),
                        (3000, ["10", "100", "1000"])):
        figure([line("a", [2, high])], yscale="log", ylim=(1.9, high))
        labels = [text.get_text() for text in figures["f"].axes[0].get_yticklabels(which="both")]
        assert set(texts) <= set(labels) and not any("^" in text for text in labels)


def test_titles_and_legends_fit_and_titles_are_larger_than_those_of_panels(figures):
    names = " of several words" * 6
    labels = ["gpt2-shakespeare-run1", "gpt2-shakespeare-run2", "c" * 60]
    report.figure("f", f"A title{names}", [line(label, [1], [2]) for label in labels],
                  report.line_styles(map(run, labels)))
    legend = figures["f"].legends[0].get_window_extent()
    assert 0 <= legend.x0 and legend.x1 <= figures["f"].bbox.width
    report.maps("m", f"A title{names}", [("q", torch.eye(2))], columns=1)
    for drawing in figures.values():
        title = drawing._suptitle
        box = title.get_window_extent()
        assert 0 <= box.x0 and box.x1 <= drawing.bbox.width
        assert title.get_fontsize() > drawing.axes[0].title.get_fontsize()


def test_every_checkpoint_has_its_own_style_and_every_method_its_own_marker():
    runs = []
    for method in report.COLORS:
        for i in range(7):
            runs += [run(f"{method}{i}", seed, method) for seed in "01"]
    styles = report.line_styles(runs)
    assert set(styles) == {c.identity["checkpoint"] for c in runs}
    assert len(set(map(repr, styles.values()))) == len(styles) == 28
    markers = {}
    for c in runs:
        style = styles[c.identity["checkpoint"]]
        markers.setdefault(c.identity["method"], set()).add(style["marker"])
    assert all(len(of_method) == 1 for of_method in markers.values())
    assert len(set.union(*markers.values())) == 4


def test_any_file_name_can_be_in_a_figure(figures):
    names = ["_x", "$^$"]               # matplotlib hides labels with _, and reads $ as a formula
    figure([line(name, [1], [1]) for name in names])
    report.maps("m", "$^$", [("q", torch.eye(2))], columns=1)
    report.search_figure("s", "$^$", {"h.0.attn.q": 1}, [1], torch.ones(1, 1, 1))
    legend = [text.get_text() for text in figures["f"].legends[0].get_texts()]
    legend = [text.replace("\\", "").strip() for text in legend]
    assert legend == [*names, "dotted: Gaussian ΔW"]


def test_a_map_shows_i_to_the_right_and_j_upwards(figures):
    phi = torch.arange(6.0).view(2, 3) / 6
    report.maps("m", "title", [("q", phi), ("v", phi / 2), ("o", phi), ("up", phi)], columns=2)
    axes = figures["m"].axes[:4]
    image, = axes[0].get_images()
    assert image.get_array().tolist() == phi.T.tolist()
    assert image.origin == "lower"
    assert axes[0].get_ylim() == (0.5, 3.5)
    assert list(image.get_extent()) == [0.5, 2.5, 0.5, 3.5]
    assert image.get_clim() == (0, 1)
    assert axes[1].get_images()[0].get_array().tolist() == (phi / 2).T.tolist()
    assert [ax.get_title() for ax in axes] == ["q", "v", "o", "up"]
    right = [ax.get_position().x0 for ax in axes]
    above = [ax.get_position().y0 for ax in axes]
    assert right[0] == right[2] < right[1] and above[0] == above[1] > above[2]
    labels = figures["m"].get_supxlabel(), figures["m"].get_supylabel()
    assert labels == ("i", "j")


def test_the_figure_of_a_search_has_its_ranks_and_largest_selection_variables(figures):
    q = torch.tensor([[0.5, 0.25, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0]])    # (steps, k)
    v = torch.tensor([[0.25, 0.75, 0.0, 0.0], [0.125, 0.875, 0.0, 0.0]])
    ranks = {"h.0.attn.q": 1, "h.0.attn.v": 3, "h.1.attn.v": 2, "h.2.attn.q": 4}
    report.search_figure("s", "title", ranks, [10, 20], torch.stack([q, v], 1))
    left, right = figures["s"].axes[:2]
    grid = left.get_images()[0].get_array()
    assert grid.filled(0).tolist() == [[1, 3], [0, 2], [4, 0]]
    assert [text.get_text() for text in left.texts] == ["1", "3", "-", "2", "4", "-"]
    assert [text.get_position() for text in left.texts][:3] == [(0, 0), (1, 0), (0, 1)]
    assert [text.get_text() for text in left.get_xticklabels()] == ["q", "v"]
    assert [text.get_text() for text in left.get_yticklabels()] == ["h.0", "h.1", "h.2"]
    bottom, top = left.get_ylim()
    assert bottom > top and left.get_images()[0].origin == "upper"      # h.0 is at the top
    assert right.get_lines()[0].get_xdata().tolist() == [10, 20]
    assert drawn(right) == [[0.5, 1], [0.75, 0.875], [0.25, 0.25]]      # the last line is 1/k


def test_curves_begin_with_the_first_evaluation_and_end_with_the_last(figures):
    loss = [4.0] * 60 + [2.0] * 60
    history = {"loss": loss, "valid": [(50, losses(5.0, 7.0))]}
    c = run("lora", history=history, phase="train", step=120, before=losses(8.0, 9.0),
            after=losses(1.0, 2.0))
    adapter = run("peft", history={"loss": []}, phase="train", step=None)
    report.curves([adapter], "none")
    report.curves([c, adapter], "c")
    assert figures.keys() == {"c"}
    train, valid = figures["c"].axes
    assert curve(train) == [(i, (loss[i - 2] + loss[i - 1]) / 2) for i in range(2, 121)]
    assert curve(valid) == [(0, 8.5), (50, 6), (120, 1.5)]
    assert in_panel(valid)[0].get_marker() == "o"
    assert train.get_ylabel() == "nats per token"


def curve(ax):
    """The points of the first line in a panel, with None for a gap."""
    line = in_panel(ax)[0]
    points = []
    for x, y in zip(line.get_xdata().tolist(), line.get_ydata().tolist()):
        points.append(None if math.isnan(y) else (x, y))
    while points[-1] is None:
        points.pop()
    return points


@pytest.mark.parametrize("phase, step", [("train", 2), ("search", 5)])
def test_curves_have_a_gap_between_a_search_and_the_training_that_follows(figures, phase, step):
    history = {"loss": [9.0, 8.0, 7.0, 6.0, 5.0], "valid": [(2, losses(3.0, 3.0))]}
    c = run("auto", history=history, phase=phase, step=step, before=losses(8.0, 9.0), after=None)
    report.curves([c], "c")
    train, valid = figures["c"].axes
    if phase == "search":
        assert curve(train) == [(1, 9), (2, 8), (3, 7), (4, 6), (5, 5)]
        assert curve(valid) == [(0, 8.5), (2, 3)]
    else:
        assert curve(train) == [(1, 9), (2, 8), (3, 7), None, (4, 6), (5, 5)]
        assert curve(valid) == [(0, 8.5), (2, 3), None, (3, 8.5)]
