"""
The picture of the three rules for s, and that of the claims and their intervals:

    python experiments/figures.py
"""
from statistics import mean

import matplotlib
from matplotlib.patches import Rectangle

import claims
from results import ROOT

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FIGURES = ROOT / "experiments" / "figures"
COLORS = {"holds": "#0072b2", "does not hold here": "#d55e00", "undecided": "#999999"}
LIMIT = 60                                                      # of what is drawn, in units of δ
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


def forest(path):
    """
    Each claim's gain with its 95 % interval, in units of its own δ: the gray band is ± δ, and the
    color the verdict. A line is drawn between papers.
    """
    rows = claims.rows()
    fig, ax = plt.subplots(figsize=(8.5, 0.235 * len(rows) + 1), layout="constrained")
    for y, (_, row) in enumerate(rows):
        claim = row.claim
        center, low, high = (clipped(value / claim.delta) for value in claim.interval())
        color = COLORS[claim.verdict()]
        ax.plot([low, high], [y, y], color=color, linewidth=1.5)
        ax.plot(center, y, "o", color=color, markersize=4)
        if claim.kind != "better":              # what its interval should be on the side of
            limits = [-1, 1] if claim.kind == "equal" else [-1]
            ax.plot(limits, [y] * len(limits), "|", color="#555555", markersize=7)
    for y, (one, two) in enumerate(zip(rows, rows[1:])):
        if one[1].paper != two[1].paper:
            ax.axhline(y + 0.5, color="#cccccc", linewidth=0.8)
    ax.axvline(0, color="#555555", linewidth=0.8)
    ax.axvspan(-1, 1, color="#eeeeee", zorder=0)
    ax.set_yticks(range(len(rows)), [row.claim.name for _, row in rows], fontsize=7)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xscale("symlog", linthresh=2)
    ax.set_xlim(-LIMIT, LIMIT)
    ax.set_xticks([-50, -10, -2, -1, 0, 1, 2, 10, 50], "-50 -10 -2 -1 0 1 2 10 50".split())
    ax.minorticks_off()
    ax.set_xlabel("gain in the direction of the claim, in units of δ", fontsize=8)
    for word, color in COLORS.items():
        ax.plot([], [], "o-", color=color, markersize=4, label=word)
    fig.legend(frameon=False, fontsize=8, ncols=3, loc="outside upper right")
    fig.savefig(path, dpi=150)
    plt.close(fig)


def clipped(value):
    return min(max(value, -LIMIT), LIMIT)


if __name__ == "__main__":
    FIGURES.mkdir(exist_ok=True)
    rules(FIGURES / "rules.png")
    forest(FIGURES / "claims.png")
