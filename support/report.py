"""
How results are shown: tables in a terminal, figures in files.

A record is a dict. A line of a figure is a record with `panel`, `x`, `real` and `null`: in which
panel it is drawn, its values, and those of its Gaussian null.
"""
import math
import sys

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

plt.rcParams.update({"legend.frameon": False, "legend.fontsize": 8, "lines.markersize": 4,
                     "axes.titlesize": 9, "axes.labelsize": 9, "figure.titlesize": 10,
                     "xtick.labelsize": 8, "ytick.labelsize": 8})
COLORS = {"full": "#000000", "lora": "#0072b2", "multilora": "#d55e00", "autolora": "#009e73"}
MARKERS = {"full": "s", "lora": "o", "multilora": "^", "autolora": "D"}
DASHES = ["-", "--", "-.", (0, (6, 1, 1, 1, 1, 1))]           # dotted lines are nulls
GREY = "#999999"
FIGURES = []        # the paths of the figures written so far
DIGITS = {"top1": 2, "effective_rank": 1, "stable_rank": 1, "amplification": 1}


# Records

def select(records, **values):
    """The records that have these values."""
    return [r for r in records if all(r[key] == value for key, value in values.items())]


def pluck(records, path):
    """One value of each record that has it: pluck(records, "null.top1")."""
    for key in path.split("."):
        records = [r[key] for r in records if key in r]
    return records


# In a terminal

def progress(text):
    """Show a line that the next one overwrites."""
    if sys.stderr.isatty():
        print(f"\r{text[:78]:78}", end="\r", file=sys.stderr, flush=True)


def mean_and_std(values, digits):
    """Mean ± standard deviation as text, with these digits after the point; with one significant
    digit if they would all be 0, and with none if the mean is 100 or more."""
    if len(values) == 0:
        return "-"
    mean = np.mean(values)
    form = f".{digits}f"
    if mean >= 100:
        form = ".0f"
    elif 0 < mean < 10 ** -digits / 2:
        form = ".0e"
    text = format(mean, form)
    if len(values) > 1:
        text += f"±{np.std(values, ddof=1):{form}}"
    return text


def table(heads, rows, width=10):
    """Print rows, each a list of a name and its cells, under their heads."""
    first = max([24, *[len(row[0]) for row in rows]])
    for name, *cells in [heads, *rows]:
        line = f"{name:{first}}"
        for text in cells:
            line += f" {text:>{width}}"
        print(line)
    print()


def summary(checkpoints, records):
    """Print each checkpoint's measures, their means by seed, and those of the Gaussians; then the
    results of the runs."""
    measures = []
    results = []
    for name in dict.fromkeys(pluck(records, "checkpoint")):
        of_name = select(records, checkpoint=name)
        runs = [c for c in checkpoints if c.identity["checkpoint"] == name]
        parameters = np.mean([c.saved["parameters"] for c in runs])
        matrices = [name, f"{parameters:,.0f}"]
        seeds = ["  seeds", ""]
        null = ["  Gaussian", ""]
        for key, digits in DIGITS.items():
            matrices.append(mean_and_std(pluck(of_name, key), digits))
            null.append(mean_and_std(pluck(of_name, f"null.{key}"), digits))
            of_seeds = [pluck(select(of_name, **c.identity), key) for c in runs]
            seeds.append(mean_and_std([np.mean(v) for v in of_seeds if v], digits))
        measures.append(matrices)
        if len(runs) > 1:
            measures.append(seeds)
        measures.append(null)
        loss = task_means(runs, "loss")
        if loss:
            exact = task_means(runs, "exact")
            results.append([name, mean_and_std(loss, 3), mean_and_std(exact, 3)])
    table(["mean ± std over matrices", "parameters", "top-1", "eff. rank", "st. rank", "amplif."],
          measures)
    if len({tuple(c.saved["after"]) for c in checkpoints if c.saved["after"]}) > 1:
        print("note: the results below are those of different tasks")
    if results:
        table(["results, mean over tasks", "loss", "exact match"], results, 13)


def task_means(runs, measure):
    """For each run that has results, the mean of a measure over its tasks."""
    means = []
    for c in runs:
        values = pluck((c.saved["after"] or {}).values(), measure)
        if values:
            means.append(np.mean(values))
    return means


def rank_grid(ranks):
    """{layer of the model: {target: rank}} of {module name: rank}, and all targets."""
    grid = {}
    targets = {}
    for name, rank in ranks.items():
        layer, _, target = name.rpartition(".")
        grid.setdefault(layer.rpartition(".")[0], {})[target] = rank
        targets[target] = None
    return grid, list(targets)


def rank_table(ranks):
    """The ranks as text: one line per layer of the model, one column per target."""
    grid, targets = rank_grid(ranks)
    first = max(15, *map(len, grid))
    lines = []
    for layer, row in {"ranks": dict(zip(targets, targets)), **grid}.items():
        line = layer.ljust(first)
        for target in targets:
            line += " " + str(row.get(target, "-")).rjust(max(5, len(target)))
        lines.append(line)
    return "\n".join(lines)


# Figures

def figure(path, title, lines, styles, size=(3.2, 2.6), band=True, share=True, **options):
    """
    Draw one panel for each `panel` of the lines; they share their axes if `share`. In it each
    checkpoint has the mean of its lines, up to the end of the shortest, their range if `band`, and,
    dotted, the mean of their nulls. `styles` are those of `line_styles`.
    """
    if not lines:
        return
    panels = list(dict.fromkeys(pluck(lines, "panel")))
    width = min(3, len(panels))
    height = math.ceil(len(panels) / width)
    fig, grid = plt.subplots(height, width, squeeze=False, sharex=share, sharey=share,
                             layout="constrained")
    inches = max(4.8, size[0] * width)
    fig.set_size_inches(inches, size[1] * height + 0.6)
    fig.suptitle(title, wrap=True)
    for name in dict.fromkeys(pluck(lines, "checkpoint")):
        for ax, panel in zip(grid.flat, panels):
            here = select(lines, panel=panel, checkpoint=name)
            if here:
                draw_mean(ax, here, styles[name], band)
            ax.set(title=panel, **options)
            if share:
                ax.label_outer()
        label = f" {escape_dollar(name)}"           # matplotlib ignores a label that begins with _
        grid[0, 0].plot([], [], label=label, **styles[name])
    for axis in (grid[0, 0].xaxis, grid[0, 0].yaxis):
        if axis.get_scale() == "log":
            plain_ticks(axis)
    if any(map(len, pluck(lines, "null"))):
        grid[0, 0].plot([], [], color=GREY, linestyle=":", label="dotted: Gaussian ΔW")
    for ax in grid.flat[len(panels):]:
        ax.axis("off")
    for ax in grid.flat[len(panels) - width:len(panels)]:               # the last in each column
        ax.tick_params(labelbottom=True)
        ax.set_xlabel(options.get("xlabel", ""))
    longest = max(18, *map(len, pluck(lines, "checkpoint")))
    fig.legend(loc="outside lower center", ncols=max(1, int(inches / (0.08 * longest + 0.5))))
    save(fig, path)


def line_styles(checkpoints):
    """{checkpoint: keyword arguments of plot}, the same in all figures of an analysis. A method has
    a colour and a marker; its checkpoints differ in lightness and dash."""
    identities = [c.identity for c in checkpoints]
    styles = {}
    for method in COLORS:
        color = np.array(matplotlib.colors.to_rgb(COLORS[method]))
        names = dict.fromkeys(pluck(select(identities, method=method), "checkpoint"))
        for i, name in enumerate(names):
            lightness = 0.65 * i / len(names)
            styles[name] = {"color": tuple(color + (1 - color) * lightness),
                            "marker": MARKERS[method], "linestyle": DASHES[i % len(DASHES)]}
    return styles


def plain_ticks(axis):
    """Numbers such as 6 and 0.05 on a logarithmic axis instead of powers of ten."""
    low, high = axis.get_view_interval()
    digits = [1]
    if high < 8 * low:
        digits = range(1, 10)
    elif high < 1000 * low:
        digits = [1, 2, 5]
    axis.set_major_locator(LogLocator(subs=digits))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))


def draw_mean(ax, lines, style, band):
    """Draw the mean of lines, up to the end of the shortest, their range, and their nulls' mean."""
    n = min(map(len, pluck(lines, "x")))
    x = lines[0]["x"][:n]
    real = np.array([line["real"][:n] for line in lines])
    ax.plot(x, real.mean(0), markevery=max(1, n // 8), **style)
    if band:
        ax.fill_between(x, real.min(0), real.max(0), color=style["color"], alpha=0.12)
    if len(lines[0]["null"]):
        null = np.mean([line["null"][:n] for line in lines], 0)
        ax.plot(x, null, markevery=max(1, n // 8), **style | {"linestyle": ":"}, linewidth=1,
                markerfacecolor="none")


def maps(path, title, panels, columns):
    """Draw φ(i, j) as colours: `panels` are (title, φ) in reading order."""
    rows = len(panels) // columns
    fig, grid = plt.subplots(rows, columns, squeeze=False, layout="constrained")
    fig.set_size_inches(2.3 * columns, 2.3 * rows)
    fig.suptitle(escape_dollar(title), wrap=True)
    for ax, (text, phi) in zip(grid.flat, panels):
        n, m = phi.shape
        image = ax.imshow(phi.T.cpu().numpy(), vmin=0, vmax=1, aspect="auto", origin="lower",
                          extent=(0.5, n + 0.5, 0.5, m + 0.5))
        ax.set_title(text, fontsize=8)
        ax.tick_params(labelsize=7)
    fig.supxlabel("i", fontsize=9)
    fig.supylabel("j", fontsize=9)
    fig.colorbar(image, ax=grid, shrink=0.6, label="φ")
    save(fig, path)


def search_figure(path, title, ranks, steps, a):
    """Draw the ranks by layer and target, and over the search the largest selection variable of
    each ΔW; a is (steps, matrices, k)."""
    grid, targets = rank_grid(ranks)
    values = np.full((len(grid), len(targets)), math.nan)
    for i, row in enumerate(grid.values()):
        for target, rank in row.items():
            values[i, targets.index(target)] = rank
    fig, (left, right) = plt.subplots(1, 2, layout="constrained")
    fig.set_size_inches(8, 0.18 * len(grid) + 2.8)
    fig.colorbar(left.imshow(values, aspect="auto", vmin=0), ax=left, label="rank")
    box = {"color": "white", "alpha": 0.6, "pad": 1}
    for (i, j), rank in np.ndenumerate(values):
        text = "-" if math.isnan(rank) else f"{rank:.0f}"
        left.text(j, i, text, ha="center", va="center", fontsize=7, bbox=box)
    upright = 90 if max(map(len, targets)) > 5 else 0
    left.set_xticks(range(len(targets)), targets, rotation=upright)
    left.set_yticks(range(len(grid)), grid)
    left.set_title(escape_dollar(title))
    largest = a.amax(-1).numpy()
    marker = "." if len(steps) == 1 else ""
    right.plot(steps, largest, marker, color=COLORS["autolora"], linewidth=0.6, alpha=0.6)
    right.axhline(1 / a.size(-1), color=GREY, linestyle=":")
    right.set(xlabel="search step", ylabel="largest selection variable (dotted: 1/k)",
              ylim=(0, None))
    save(fig, path)


def curves(checkpoints, path):
    """Draw the training loss, as a running mean, and the held-out loss over the steps. Between
    AutoLoRA's search and its training, which begins again at the base model, there is a gap."""
    lines = []
    for c in checkpoints:
        done = len(c.saved["history"]["loss"])
        searched = done                                 # how many of these steps are a search's
        if done and c.saved["phase"] == "train":
            searched = done - c.saved["step"]
        parts = [(0, searched), (searched, done)]
        for panel, points in (("training rows, running mean", running_mean),
                              ("held-out rows, mean over tasks", held_out_loss)):
            line = {**c.identity, "panel": panel, "x": [], "real": [], "null": []}
            for first, last in parts:
                if first < last:
                    steps, losses = points(c.saved, first, last)
                    line["x"] += [*steps, last]
                    line["real"] += [*losses, math.nan]         # NaN leaves a gap
            if done:
                lines.append(line)
    figure(path, "Loss (for AutoLoRA: the search, a gap, and the training that follows)", lines,
           line_styles(checkpoints), size=(4, 3), xlabel="step", yscale="log",
           ylabel="nats per token")


def running_mean(saved, first, last):
    """Steps, and the mean of the losses up to each, over a fiftieth of the run."""
    loss = saved["history"]["loss"]
    width = min(max(1, len(loss) // 50), last - first)
    means = np.convolve(loss[first:last], np.ones(width) / width, "valid")
    return range(first + width, last + 1), means


def held_out_loss(saved, first, last):
    """Steps, and the mean over the tasks of the held-out loss at each."""
    results = {first: saved["before"]}
    results |= {step: tasks for step, tasks in saved["history"]["valid"] if first < step <= last}
    if saved["after"] and last == len(saved["history"]["loss"]):
        results[last] = saved["after"]
    return results, [np.mean(pluck(tasks.values(), "loss")) for tasks in results.values()]


def escape_dollar(text):
    """matplotlib would read a $ in a file's name as the beginning of a formula."""
    return text.replace("$", r"\$")


def save(fig, path):
    fig.savefig(path, dpi=150)
    plt.close(fig)
    FIGURES.append(path)
