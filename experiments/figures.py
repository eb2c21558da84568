"""
The picture of the three rules for s, and the plots of what nano.sh swept over:

    python experiments/figures.py
"""
from statistics import mean

import matplotlib
from matplotlib.patches import Rectangle

from results import ROOT, column

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FIGURES = ROOT / "experiments" / "figures"
LORA, MULTILORA, FULL = "#0072b2", "#d55e00", "#000000"         # as in analyze.py
LEARNED = (0.7, 0.35, 0.9, 0.5)                                 # made up, for the picture
SELECTED = (0.9, 0.25, 0.6, 0.12, 0.75, 0.18, 0.4, 0.1)
CENTER = {"ha": "center", "va": "center"}


def rules(path):
    """
    W and, beside it, B, s and A of each method: a column of B, its factor and its row of A have
    one colour, and what AutoLoRA cuts is pale.
    """
    fig, axes = plt.subplots(1, 3, figsize=(11, 2.5), layout="constrained")
    blue, viridis, green = map(plt.get_cmap, ("Blues", "viridis", "Greens"))

    panel(axes[0], "LoRA", "s = α/r, a constant")
    for i in range(8):
        component(axes[0], i, 0.5, blue(0.6))

    panel(axes[1], "MultiLoRA", "s: a learned number for each block")
    for i in range(8):
        block = i // 2
        component(axes[1], i, LEARNED[block], viridis(0.15 + 0.25 * block))

    panel(axes[2], "AutoLoRA", "s = α · softmax(β); what is small is cut")
    for i, a in enumerate(SELECTED):
        shade = 0.8 if a >= mean(SELECTED) else 0.25
        component(axes[2], i, a, green(shade))
    fig.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(fig)


def panel(ax, method, rule):
    """W, and what is written around it and what will stand beside it."""
    ax.set_xlim(-0.2, 15.4)
    ax.set_ylim(-3.1, 4.1)
    ax.set_aspect("equal")
    ax.set_title(method, fontsize=12)
    ax.axis("off")
    box(ax, 0, 0, 4, 4, "#dddddd")
    ax.text(4.8, 2, "+", fontsize=16, **CENTER)
    ax.text(7.8, 2, "∘", fontsize=12, **CENTER)
    ax.text(10.6, 2, "·", fontsize=16, **CENTER)
    label(ax, 2, "W, frozen", "(d_out, d_in)")
    label(ax, 6.4, "B", "(d_out, r)")
    label(ax, 9.3, "s", "(r)")
    label(ax, 13.2, "A", "(r, d_in)")
    ax.text(7.6, -2.7, rule, fontsize=10, **CENTER)


def label(ax, x, name, shape):
    ax.text(x, -0.6, name, fontsize=10, **CENTER)
    ax.text(x, -1.4, shape, fontsize=8, color="#555555", **CENTER)


def component(ax, i, s, color):
    """The i-th column of B, its factor, and its row of A."""
    at = 0.2 * i
    box(ax, 5.6 + at, 0, 0.2, 4, color)
    box(ax, 8.5 + at, 2.4, 0.2, 1.6 * s, color)
    box(ax, 11.2, 3.8 - at, 4, 0.2, color)


def box(ax, x, y, width, height, color):
    look = {"facecolor": color, "edgecolor": "white", "linewidth": 0.8}
    ax.add_patch(Rectangle((x, y), width, height, **look))


def points(ax, at, name, color):
    """A point for each seed; returns their mean."""
    exact = column(name)
    at = [at] * len(exact)
    ax.plot(at, exact, "o", color=color, markersize=4, alpha=0.5)
    return mean(exact)


def line(ax, names, color, **look):
    """The seeds' points over {x: name of the runs}, and a line through their means."""
    means = [points(ax, x, name, color) for x, name in names.items()]
    ax.plot(list(names), means, color=color, **look)
    ax.set_xscale("log")
    ax.set_xticks(list(names), names)
    ax.minorticks_off()


def named(start, numbers):
    return {n: f"{start}{n}" for n in numbers}


def sweeps(path):
    """Exact match over LoRA's rank, its targets, and MultiLoRA's blocks."""
    fig, axes = plt.subplots(1, 3, figsize=(10, 3), sharey=True, layout="constrained")
    by_rank, by_target, by_block = axes
    for ax in axes:
        full = mean(column("full"))
        ax.axhline(full, color=FULL, linewidth=1, label="full fine-tuning")

    some = named("lora-qv-r", (1, 2, 4, 8, 64))
    every = named("lora-all-r", (1, 2, 4, 8, 16, 64)) | {16: "lora"}
    line(by_rank, some, LORA, linestyle="--", label="q, v")
    line(by_rank, every, LORA, label="all six")
    by_rank.set(title="LoRA's rank", xlabel="rank r", ylim=(0, 1.03))
    by_rank.set_ylabel("exact match, mean over tasks")
    by_rank.legend(frameon=False, fontsize=8)

    names = "q-r16 k-r16 v-r16 o-r16 qv-r8 qkvo-r4".split()
    for i, name in enumerate(names):
        height = points(by_target, i, f"lora-{name}", LORA)
        by_target.bar(i, height, color=LORA, alpha=0.4)
    by_target.set_xticks(range(len(names)), "q k v o qv qkvo".split())
    by_target.set(title="LoRA, as many parameters on", xlabel="targets")

    blocks = named("multilora-n", (1, 2, 4, 8)) | {4: "multilora"}
    line(by_block, blocks, MULTILORA)
    by_block.set(title="MultiLoRA's blocks, rank 16 in all", xlabel="n")
    fig.savefig(path, dpi=150)
    plt.close(fig)


if __name__ == "__main__":
    FIGURES.mkdir(exist_ok=True)
    rules(FIGURES / "rules.png")
    sweeps(FIGURES / "sweeps.png")
