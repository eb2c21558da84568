"""
The figures that are drawn from experiments/results, by pages.py. The others in experiments/figures
are drawn from checkpoints by analyze.py, and rules.png is a diagram.
"""
from statistics import mean

import claims
import results
from results import column, read_csv, select

import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter

from support.report import COLORS as METHOD_COLORS
from support.report import plain_ticks

FIGURES = results.ROOT / "experiments" / "figures"
COLORS = {"supported": "#0072b2", "negligible": "#777777", "contradicted": "#d55e00",
          "inconclusive": "#cc9900"}
MARKERS = {"nano": "o", "e2e": "s", "mixture": "D"}
METHOD_NAMES = {"lora": "LoRA", "multilora": "MultiLoRA", "autolora": "AutoLoRA",
                "full": "full fine-tuning"}
SWEEPS = (          # title, file, sweep of each method, suffix of the runs that use its result
    ("nano, mixture, 300 steps", "nano_runs.csv",
     {"lora": "pilot-r8", "multilora": "pilot-multilora", "full": "pilot-full"}, ""),
    ("SmolLM2-135M, E2E, 60 steps", "smollm_runs.csv",
     {method: f"sweep-{method}" for method in METHOD_NAMES}, ""),
    ("SmolLM2-135M, mixture, 100 steps", "smollm_runs.csv",
     {method: f"sweep-mixture-{method}" for method in METHOD_NAMES}, "-mixture"))
LIMIT = 12          # of the forest plot's axis, in units of δ


def draw_all(tests):
    drawn = {"claims": forest(tests), "learning-rates": learning_rates(),
             "forgetting": forgetting(), "planted": planted(),
             "adapters-medium": authors_adapter()}
    for name, fig in drawn.items():
        fig.savefig(FIGURES / f"{name}.png", dpi=150)
        plt.close(fig)


# The main findings -------------------------------------------------------------------------------

def forest(tests):
    """Effects and intervals in units of δ, and in numbers. Arrows mark values outside the axis."""
    rows = [test for test in tests if test.claim["finding"] and test.n]
    fig, ax = plt.subplots(figsize=(11.5, 0.26 * len(rows) + 2.6), layout="constrained")
    y = 0
    paper = finding = None
    for test in rows:
        if test.claim["paper"] != paper:
            paper = test.claim["paper"]
            beside(ax, y + 0.5, paper, "left", fontweight="bold")
            y += 1.5
        if test.claim["finding"] != finding:
            finding = test.claim["finding"]
            beside(ax, y, finding, "left")
        draw_effect(ax, test, y)
        name = claims.SETTINGS[test.setting]
        beside(ax, y, f"{name}: {effect(test)}, {units(test)}", "right")
        y += 1
    ax.axvspan(-1, 1, color="#e8e8e8", zorder=0)
    ax.axvline(0, color="#555555", linewidth=0.8, zorder=1)
    ax.set(yticks=[], xlim=(-LIMIT, LIMIT), ylim=(y, -0.2))
    ax.set_xlabel("effect in the direction of the claim and 95 % interval, in units of δ\n"
                  "grey band: ±δ, the smallest effect of interest; triangle: outside the axis",
                  fontsize=8.5)
    for verdict, color in COLORS.items():
        ax.plot([], [], "-", linewidth=3, color=color, label=verdict)
    for setting in dict.fromkeys(test.setting for test in rows):
        ax.plot([], [], MARKERS[setting], color="#333333", markersize=5, linestyle="",
                label=claims.SETTINGS[setting])
    fig.legend(frameon=False, fontsize=8.5, ncols=7, loc="outside upper center")
    ax.spines[["top", "right", "left"]].set_visible(False)
    return fig


def beside(ax, y, text, side, **style):
    """Text left or right of the axes."""
    x, align = (-0.03, "right") if side == "left" else (1.03, "left")
    ax.text(x, y, text, transform=ax.get_yaxis_transform(), ha=align, va="center", fontsize=8.5,
            **style)


def effect(test):
    """The effect and its interval as text."""
    text = f"{test.effect:+.3f}"
    if test.n > 1:
        text += f" [{test.low:+.3f}, {test.high:+.3f}]"
    return text.replace("-", "−")


def units(test):
    """The number of seeds, or of other units, as text."""
    unit = test.comparison.unit
    if test.n == 1:
        unit = unit.removesuffix("s")
    return f"{test.n} {unit}"


def draw_effect(ax, test, y):
    color = COLORS[test.verdict]
    center, low, high = (value / test.comparison.delta
                         for value in (test.effect, test.low, test.high))
    if high > -LIMIT and low < LIMIT:
        ax.plot([max(low, -LIMIT), min(high, LIMIT)], [y, y], color=color, linewidth=1.6)
    if low < -LIMIT:
        ax.plot(-LIMIT, y, "<", color=color, markersize=6, clip_on=False)
    if high > LIMIT:
        ax.plot(LIMIT, y, ">", color=color, markersize=6, clip_on=False)
    if abs(center) < LIMIT:
        ax.plot(center, y, MARKERS[test.setting], color=color, markersize=5)


# Learning rates, forgetting, planted ranks -------------------------------------------------------

def learning_rates():
    """Validation loss by learning rate, mean over the seeds of each sweep."""
    found = []
    for title, file, sweeps, _ in SWEEPS:
        curves = {method: sweep(file, name) for method, name in sweeps.items()}
        if any(curves.values()):
            found.append((title, curves))
    fig, axes = plt.subplots(1, len(found), figsize=(4 * len(found), 3.2), layout="constrained")
    for ax, (title, curves) in zip(axes, found):
        for method, curve in curves.items():
            if curve:
                ax.plot(curve.keys(), curve.values(), "o-", markersize=4,
                        label=METHOD_NAMES[method], color=METHOD_COLORS[method])
        ax.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="validation loss")
        ax.set_title(title, fontsize=10)
        plain_ticks(ax.yaxis)
        ax.xaxis.set_minor_formatter(NullFormatter())
    axes[1].legend(frameon=False, fontsize=8)
    return fig


def sweep(file, name):
    """{learning rate: mean validation loss over the seeds}"""
    found = {}
    for rate, runs in results.sweep(name, file).items():
        found[rate] = mean(run["mean.loss.after"] for run in runs.values())
    return found


def forgetting():
    """Loss on the new task and on the old skills, by learning rate."""
    fig, ax = plt.subplots(figsize=(5.4, 3.6), layout="constrained")
    for method in ("lora", "multilora", "full"):
        points = []
        for name in claims.forgetting_kinds():
            if name.startswith(f"{method}-") and not name.endswith(("-r1", "-r64")):
                rates = column(name, "lr", "nano_runs.csv")
                learned, lost = (mean(claims.losses("nano", name, task).values())
                                 for task in ("instruct", "skills"))
                points.append((rates[0], learned, lost))
        rates, learned, lost = zip(*sorted(points))
        ax.plot(learned, lost, "o-", markersize=4, color=METHOD_COLORS[method],
                label=METHOD_NAMES[method])
        for rate, *point in points:
            ax.annotate(f"{rate:g}", point, fontsize=7, xytext=(4, 3), textcoords="offset points")
    ax.margins(0.12)
    ax.set(xlabel="loss on the new task (test set)", ylabel="loss on pretraining skills")
    ax.legend(frameon=False, fontsize=8, title="each point: one learning rate", title_fontsize=8)
    return fig


def planted():
    """Ranks found by planted rank, mean ± standard deviation over the seeds."""
    fig, ax = plt.subplots(figsize=(5.4, 3.4), layout="constrained")
    names = {"default": "softmax (AutoLoRA), 1000 steps", "sigmoid": "sigmoid, 100 steps",
             "none": "β itself, 300 steps"}
    styles = {"default": ("o", METHOD_COLORS["autolora"]), "sigmoid": ("s", "#cc79a7"),
              "none": ("D", "#999999")}
    for i, (search, label) in enumerate(names.items()):
        found = list(claims.planted_ranks(search, claims.PLANTED_STEPS[search]).values())
        columns = list(zip(*found))
        marker, color = styles[search]
        x = [planted + 0.1 * (i - 1) for planted in claims.PLANTED_RANKS]
        ax.errorbar(x, list(map(mean, columns)), list(map(results.deviation, columns)),
                    marker=marker, color=color, markersize=4, linewidth=1.2, capsize=2, label=label)
    ax.plot([0, 1, 6], [1, 1, 6], ":", color="#555555", label="planted rank (at least 1)")
    ax.set(xlabel="planted rank", ylabel="rank found", xticks=claims.PLANTED_RANKS)
    ax.legend(frameon=False, fontsize=8)
    return fig


# Singular values of the LoRA authors' adapter ----------------------------------------------------

def authors_adapter():
    rows = read_csv("adapters_medium.csv")
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True, layout="constrained")
    blue = plt.get_cmap("Blues")
    for ax, target in zip(axes, ("q", "v")):
        own = select(rows, target=target)
        layers = [row["layer"] for row in own]
        for i, name in enumerate("σ₁ σ₂ σ₃ σ₄".split()):
            ax.plot(layers, shares(own, "S", i), "o-", markersize=3, label=name,
                    color=blue(0.95 - 0.2 * i))
            ax.plot(layers, shares(own, "null.S", i), ":", color="#999999")
        ax.plot([], [], ":", color="#999999", label="Gaussian ΔW")
        ax.set(title=f"ΔW of {target}", xlabel="layer", ylim=(0, 0.6))
    axes[0].set_ylabel("share of the sum, σᵢ / Σσ")
    axes[1].legend(frameon=False, fontsize=8, ncols=5, loc="lower center")
    fig.suptitle("The LoRA authors' GPT-2 medium on E2E, r = 4", fontsize=11)
    return fig


def shares(rows, key, i):
    found = []
    for row in rows:
        values = [float(value) for value in row[key].split()]
        found.append(values[i] / sum(values))
    return found
