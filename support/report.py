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

plt.rcParams.update({"legend.frameon": False, "legend.fontsize": 8})
COLORS = {"full": ["#000000", "#777777"], "lora": ["#0072b2", "#56b4e9", "#003355"],
          "multilora": ["#d55e00", "#f0a070"], "autolora": ["#009e73", "#80d0b0"]}
DASHES = ["-", "--", "-."]
GREY = "#999999"
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
    """Mean ± standard deviation as text."""
    if len(values) == 0:
        return "-"
    digits = digits if np.mean(values) < 100 else 0
    text = f"{np.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f"±{np.std(values, ddof=1):.{digits}f}"
    return text


def table(heads, rows, width=10):
    """Print rows, each a list of a name and its cells, under their heads."""
    first = max(24, *[len(row[0]) for row in rows])
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

def figure(path, title, lines, size=(3.2, 2.6), band=True, **options):
    """
    Draw one panel for each `panel` of the lines. In it each checkpoint has the mean of its lines,
    their range if `band`, and, dotted, the mean of their nulls.
    """
    panels = list(dict.fromkeys(pluck(lines, "panel")))
    width = min(3, len(panels))
    height = math.ceil(len(panels) / width)
    fig, grid = plt.subplots(height, width, squeeze=False, sharex=True, sharey=True,
                             layout="constrained")
    fig.set_size_inches(size[0] * width, size[1] * height + 0.6)
    fig.suptitle(title, fontsize=11)
    for name, (color, dash) in line_styles(lines).items():
        for ax, panel in zip(grid.flat, panels):
            here = select(lines, panel=panel, checkpoint=name)
            if here:
                draw_mean(ax, here, color, dash, band)
            ax.set(title=panel, **options)
            ax.label_outer()
        label = f" {escape_dollar(name)}"           # matplotlib ignores a label that begins with _
        grid[0, 0].plot([], [], color=color, linestyle=dash, label=label)
    if any(map(len, pluck(lines, "null"))):
        grid[0, 0].plot([], [], color=GREY, linestyle=":", label="dotted: Gaussian ΔW")
    for ax in grid.flat[len(panels):]:
        ax.axis("off")
    for ax in grid.flat[max(0, len(panels) - width):len(panels)]:       # the last in each column
        ax.tick_params(labelbottom=True)
        ax.set_xlabel(options.get("xlabel", ""))
    fig.legend(loc="outside lower center", ncols=width + 2)
    save(fig, path)


def line_styles(lines):
    """{checkpoint: (colour, dash)}: each method has its colours; after the last, another dash."""
    styles = {}
    count = dict.fromkeys(COLORS, 0)
    for line in lines:
        name = line["checkpoint"]
        method = line["method"]
        if name not in styles:
            repeat, i = divmod(count[method], len(COLORS[method]))
            styles[name] = COLORS[method][i], DASHES[repeat % len(DASHES)]
            count[method] += 1
    return styles


def draw_mean(ax, lines, color, dash, band):
    """Draw the mean of lines, which may differ in length, their range, and their nulls' mean."""
    x = max(pluck(lines, "x"), key=len)
    real = pad_with_nan(pluck(lines, "real"), len(x))
    ax.plot(x, np.nanmean(real, 0), color=color, linestyle=dash)
    if band:
        ax.fill_between(x, np.nanmin(real, 0), np.nanmax(real, 0), color=color, alpha=0.12)
    if len(lines[0]["null"]):
        null = pad_with_nan(pluck(lines, "null"), len(x))
        ax.plot(x, np.nanmean(null, 0), color=color, linestyle=":", linewidth=1)


def pad_with_nan(rows, width):
    """Rows of values as one array (rows, width), with NaN after the end of the shorter ones."""
    filled = np.full((len(rows), width), math.nan)
    for i, row in enumerate(rows):
        filled[i, :len(row)] = row
    return filled


def maps(path, title, panels, columns):
    """Draw φ(i, j) as colours: `panels` are (title, φ) in reading order."""
    rows = len(panels) // columns
    fig, grid = plt.subplots(rows, columns, squeeze=False, layout="constrained")
    fig.set_size_inches(2.3 * columns, 2.3 * rows)
    fig.suptitle(escape_dollar(title), fontsize=11)
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
    right.plot(steps, largest, color=COLORS["autolora"][0], linewidth=0.6, alpha=0.6)
    right.axhline(1 / a.size(-1), color=GREY, linestyle=":")
    right.set(xlabel="search step", ylabel="largest selection variable (dotted: 1/k)",
              ylim=(0, None))
    save(fig, path)


def curves(checkpoints, path):
    """Draw the training loss, as a running mean, and the held-out loss over the steps."""
    lines = []
    for c in checkpoints:
        history = c.saved["history"]
        loss = np.array(history["loss"])
        if len(loss) == 0:
            continue
        width = max(1, len(loss) // 50)
        smooth = np.convolve(loss, np.ones(width) / width, "valid")
        lines.append({**c.identity, "panel": "training rows, running mean", "null": [],
                      "x": np.arange(len(smooth)) + width, "real": smooth})
        held_out = {**c.identity, "panel": "held-out rows, mean over tasks", "null": [],
                    "x": [], "real": []}
        for step, tasks in [(0, c.saved["before"]), *history["valid"],
                            (len(loss), c.saved["after"])]:
            if tasks:
                held_out["x"].append(step)
                held_out["real"].append(np.mean(pluck(tasks.values(), "loss")))
        lines.append(held_out)
    if lines:
        figure(path, "Loss in nats per token", lines, size=(4, 3), xlabel="step", yscale="log")


def escape_dollar(text):
    """matplotlib would read a $ in a file's name as the beginning of a formula."""
    return text.replace("$", r"\$")


def save(fig, path):
    fig.savefig(path, dpi=150)
    plt.close(fig)
