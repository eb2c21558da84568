"""
How the studies are shown: tables in a terminal, figures in files. A record is a dict; a line of a
figure is a record that says its panel, x, real and null.
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
MEASURES = {"top1": 2, "effective_rank": 1, "stable_rank": 1, "amplification": 1}   # digits


def plain(text):
    """A file's name may have a $ in it, which is no formula."""
    return text.replace("$", r"\$")


def progress(text):
    """A line on the terminal that the next one overwrites."""
    if sys.stderr.isatty():
        print(f"\r{text[:78]:78}", end="\r", file=sys.stderr, flush=True)


def where(records, **wanted):
    """The records that have these values."""
    found = []
    for r in records:
        if all(r[key] == value for key, value in wanted.items()):
            found.append(r)
    return found


def column(records, path):
    """A list of one value of each record that has it: column(records, "null.top1")."""
    for key in path.split("."):
        records = [r[key] for r in records if key in r]
    return records


def cell(values, digits):
    """mean ± standard deviation, as text"""
    if len(values) == 0:
        return "-"
    digits = digits if np.mean(values) < 100 else 0
    text = f"{np.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f"±{np.std(values, ddof=1):.{digits}f}"
    return text


def table(heads, rows, width=10):
    """Print rows, lists of a name and cells, under their heads."""
    names = [row[0] for row in rows]
    first = max(24, *map(len, names))
    for name, *texts in [heads, *rows]:
        line = f"{name:{first}}"
        for text in texts:
            line += f" {text:>{width}}"
        print(line)
    print()


def summary(checkpoints, records):
    """By name: over the matrices, over the seeds' means, and the Gaussians; then the results."""
    rows, results = [], []
    for name in dict.fromkeys(column(records, "checkpoint")):
        own = where(records, checkpoint=name)
        runs = [c for c in checkpoints if c.id["checkpoint"] == name]
        parameters = np.mean([c.parameters for c in runs])
        matrices = [name, f"{parameters:,.0f}"]
        seeds, null = ["  seeds", ""], ["  Gaussian", ""]
        for key, digits in MEASURES.items():
            matrices.append(cell(column(own, key), digits))
            null.append(cell(column(own, f"null.{key}"), digits))
            of_seeds = [column(where(own, **c.id), key) for c in runs]
            seeds.append(cell([np.mean(values) for values in of_seeds if values], digits))
        rows += [matrices, seeds, null] if len(runs) > 1 else [matrices, null]
        loss, exact = [], []
        for c in runs:
            tasks = list((c.after or {}).values())
            if tasks:
                loss.append(np.mean(column(tasks, "loss")))
            measured = [r["exact"] for r in tasks if "exact" in r]
            if measured:
                exact.append(np.mean(measured))
        if loss:
            results.append([name, cell(loss, 3), cell(exact, 3)])
    heads = ["mean ± std over matrices", "parameters", "top-1", "eff. rank", "st. rank", "amplif."]
    table(heads, rows)
    if results:
        table(["results, mean over tasks", "loss", "exact match"], results, 13)


def figure(path, title, lines, size=(3.2, 2.6), band=True, **options):
    """
    A panel for each `panel` of the lines; in it, for each checkpoint, the mean of its lines, with
    `band` their range, and dotted the mean of their nulls.
    """
    panels = list(dict.fromkeys(column(lines, "panel")))
    width = min(3, len(panels))
    height = math.ceil(len(panels) / width)
    fig, grid = plt.subplots(height, width, squeeze=False, sharex=True, sharey=True,
                             layout="constrained")
    fig.set_size_inches(size[0] * width, size[1] * height + 0.6)
    fig.suptitle(title, fontsize=11)
    key = grid[0, 0]
    for name, (color, dash) in looks(lines).items():
        for ax, panel in zip(grid.flat, panels):
            own = where(lines, panel=panel, checkpoint=name)
            if own:
                draw(ax, own, color, dash, band)
            ax.set(title=panel, **options)
            ax.label_outer()
        key.plot([], [], color=color, linestyle=dash, label=f" {plain(name)}")  # "_x" is no label
    if any(map(len, column(lines, "null"))):
        key.plot([], [], color=GREY, linestyle=":", label="dotted: Gaussian ΔW")
    for ax in grid.flat[len(panels):]:
        ax.axis("off")
    for ax in grid.flat[max(0, len(panels) - width):len(panels)]:       # with none below
        ax.tick_params(labelbottom=True)
        ax.set_xlabel(options.get("xlabel", ""))
    fig.legend(loc="outside lower center", ncols=width + 2)
    save(fig, path)


def looks(lines):
    """{checkpoint: (colour, dash)}: a colour of the method's, and where they end, another dash."""
    found, count = {}, dict.fromkeys(COLORS, 0)
    for line in lines:
        name, method = line["checkpoint"], line["method"]
        if name not in found:
            turn, i = divmod(count[method], len(COLORS[method]))
            found[name] = COLORS[method][i], DASHES[turn % len(DASHES)]
            count[method] += 1
    return found


def draw(ax, lines, color, dash, band):
    """The mean of lines, of those that go so far, and their range; dotted, the nulls' mean."""
    x = max(column(lines, "x"), key=len)
    real = rectangle(column(lines, "real"), len(x))
    ax.plot(x, np.nanmean(real, 0), color=color, linestyle=dash)
    if band:
        low, high = np.nanmin(real, 0), np.nanmax(real, 0)
        ax.fill_between(x, low, high, color=color, alpha=0.12)
    if len(lines[0]["null"]):
        null = rectangle(column(lines, "null"), len(x))
        ax.plot(x, np.nanmean(null, 0), color=color, linestyle=":", linewidth=1)


def rectangle(rows, width):
    """Rows of values as one array, with NaN behind the shorter ones."""
    filled = np.full((len(rows), width), math.nan)
    for i, row in enumerate(rows):
        filled[i, :len(row)] = row
    return filled


def maps(path, title, panels, columns):
    """φ(i, j) as colours: `panels` are (title, φ) in reading order."""
    rows = len(panels) // columns
    fig, grid = plt.subplots(rows, columns, squeeze=False, layout="constrained")
    fig.set_size_inches(2.3 * columns, 2.3 * rows)
    fig.suptitle(plain(title), fontsize=11)
    for ax, (text, phi) in zip(grid.flat, panels):
        n, m = phi.shape
        extent = (0.5, n + 0.5, 0.5, m + 0.5)
        image = ax.imshow(phi.T.cpu().numpy(), vmin=0, vmax=1, aspect="auto", origin="lower",
                          extent=extent)
        ax.set_title(text, fontsize=8)
        ax.tick_params(labelsize=7)
    fig.supxlabel("i", fontsize=9)
    fig.supylabel("j", fontsize=9)
    fig.colorbar(image, ax=grid, shrink=0.6, label="φ")
    save(fig, path)


def search(path, title, ranks, steps, a):
    """Ranks {name: r} by layer and target, and over the search the largest of a (steps, ΔW, k)."""
    layers, targets = {}, {}
    for name in ranks:
        layer, _, target = name.rpartition(".")
        layers.setdefault(layer.rpartition(".")[0], len(layers))
        targets.setdefault(target, len(targets))
    grid = np.zeros((len(layers), len(targets)), int)
    for name, rank in ranks.items():
        layer, _, target = name.rpartition(".")
        grid[layers[layer.rpartition(".")[0]], targets[target]] = rank
    fig, (left, right) = plt.subplots(1, 2, layout="constrained")
    fig.set_size_inches(8, 0.18 * len(layers) + 2.8)
    fig.colorbar(left.imshow(grid, aspect="auto", vmin=0), ax=left, label="rank")
    box = {"color": "white", "alpha": 0.6, "pad": 1}
    for (row, at), rank in np.ndenumerate(grid):
        left.text(at, row, rank, ha="center", va="center", fontsize=7, bbox=box)
    upright = 90 if max(map(len, targets)) > 5 else 0
    left.set_xticks(range(len(targets)), targets, rotation=upright)
    left.set_yticks(range(len(layers)), layers)
    left.set_title(plain(title))
    largest = a.amax(-1).numpy()
    right.plot(steps, largest, color=COLORS["autolora"][0], linewidth=0.6, alpha=0.6)
    right.axhline(1 / a.size(-1), color=GREY, linestyle=":")
    right.set(xlabel="search step", ylabel="largest selection variable (dotted: 1/k)",
              ylim=(0, None))
    save(fig, path)


def curves(checkpoints, path):
    """Loss over the steps: of the training rows, as a running mean, and of the held-out ones."""
    lines = []
    for c in checkpoints:
        loss = np.array(c.history["loss"])
        if len(loss) == 0:
            continue
        width = max(1, len(loss) // 50)
        smooth = np.convolve(loss, np.ones(width) / width, "valid")
        x = np.arange(len(smooth)) + width
        lines.append({**c.id, "panel": "training rows, running mean", "null": [],
                      "x": x, "real": smooth})
        steps, means = [], []
        for step, tasks in [(0, c.before), *c.history["valid"], (len(loss), c.after)]:
            if tasks:
                steps.append(step)
                means.append(np.mean(column(tasks.values(), "loss")))
        lines.append({**c.id, "panel": "held-out rows, mean over tasks", "null": [],
                      "x": steps, "real": means})
    if lines:
        figure(path, "Loss over the steps, nats a token", lines, size=(4, 3), xlabel="step",
               yscale="log")


def save(fig, path):
    fig.savefig(path, dpi=150)
    plt.close(fig)
