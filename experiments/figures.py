"""
The README's picture of the three rules, and its plots of what nano.sh swept over:

    python experiments/figures.py
"""
import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

from analyze import COLORS
from tables import ROOT, exact, runs

FIGURES = ROOT / "experiments" / "figures"


def rules():
    """W and, beside it, B, s and A of each method: columns of B, factors and rows of A that belong together share a colour."""
    blues, many = [plt.cm.Blues(0.55)] * 8, [plt.cm.viridis(v) for v in (0.15, 0.4, 0.65, 0.9)]
    a = [0.9, 0.25, 0.6, 0.12, 0.75, 0.18, 0.4, 0.1]
    panels = (("LoRA", "s = α/r, a constant", blues, [0.5] * 8),
              ("MultiLoRA", "s: a learned number for each block", [many[i // 2] for i in range(8)], [0.7, 0.7, 0.35, 0.35, 0.9, 0.9, 0.5, 0.5]),
              ("AutoLoRA", "s = α · softmax(β): small ones are cut", [plt.cm.Greens(0.35 + 0.5 * v) for v in a], a))
    fig, axes = plt.subplots(1, 3, figsize=(10, 2.15), layout="constrained")
    for ax, (name, rule, colors, s) in zip(axes, panels):
        def box(x, y, w, h, **kw):
            ax.add_patch(Rectangle((x, y), w, h, edgecolor="white", linewidth=0.8, **kw))
        box(0, 0, 4, 4, facecolor="#dddddd")
        ax.text(2, 2, "W\nfrozen", ha="center", va="center", fontsize=11)
        ax.text(4.5, 2, "+", ha="center", va="center", fontsize=16)
        for i, (color, v) in enumerate(zip(colors, s)):
            cut = dict(alpha=0.35) if name == "AutoLoRA" and v < mean(a) else {}
            box(5 + 0.2 * i, 0, 0.2, 4, facecolor=color, **cut)
            box(7.3 + 0.2 * i, 2.8, 0.2, 1.2 * v, facecolor=color, **cut)
            box(9.4, 3.8 - 0.2 * i, 4, 0.2, facecolor=color, **cut)
        for x, text in ((2, "(d_out, d_in)"), (5.8, "B (d_out, r)"), (8.1, "s"), (11.4, "A (r, d_in)")):
            ax.text(x, -0.45, text, ha="center", va="center", fontsize=8)
        ax.text(6.7, -1.3, rule, ha="center", fontsize=10)
        ax.set(xlim=(-0.2, 13.6), ylim=(-1.6, 4.3), aspect="equal", title=name)
        ax.axis("off")
    fig.savefig(FIGURES / "rules.png", dpi=150)


def sweeps():
    """Exact match over LoRA's rank, its targets and MultiLoRA's blocks: every seed a point, and the mean."""
    fig, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained", sharey=True)

    def points(ax, at, name, color):
        values = [exact(r) for r in runs(name)]
        ax.plot([at] * len(values), values, "o", color=color, markersize=4, alpha=0.5)
        return mean(values)

    for text, names, look in (("q, v", {r: f"lora-qv-r{r}" for r in (1, 2, 4, 8, 64)}, "--"),
                              ("all six", {r: f"lora-all-r{r}" if r != 16 else "lora" for r in (1, 2, 4, 8, 16, 64)}, "-")):
        means = [points(axes[0], r, name, COLORS["lora"]) for r, name in names.items()]
        axes[0].plot(list(names), means, look, color=COLORS["lora"], label=text)
    full = mean(exact(r) for r in runs("full"))
    for ax in axes:
        ax.axhline(full, color=COLORS["full"], linewidth=1, label="full fine-tuning")
    axes[0].set(xscale="log", xticks=[1, 2, 4, 8, 16, 64], xticklabels=[1, 2, 4, 8, 16, 64], xlabel="rank r", title="LoRA's rank",
                ylabel="exact match, mean over tasks", ylim=(0, 1.03))
    axes[0].minorticks_off()
    axes[0].legend(frameon=False, fontsize=8)
    names = {"q": "lora-q-r16", "k": "lora-k-r16", "v": "lora-v-r16", "o": "lora-o-r16", "q v": "lora-qv-r8", "q k v o": "lora-qkvo-r4"}
    axes[1].bar(list(names), [points(axes[1], i, n, COLORS["lora"]) for i, n in enumerate(names.values())], color=COLORS["lora"], alpha=0.4)
    axes[1].set(title="LoRA, as many parameters on", xlabel="targets")
    names = {1: "multilora-n1", 2: "multilora-n2", 4: "multilora", 8: "multilora-n8"}
    axes[2].plot(list(names), [points(axes[2], n, name, COLORS["multilora"]) for n, name in names.items()], color=COLORS["multilora"])
    axes[2].set(title="MultiLoRA's blocks, rank 16 in all", xlabel="n", xscale="log", xticks=list(names), xticklabels=list(names))
    axes[2].minorticks_off()
    fig.savefig(FIGURES / "sweeps.png", dpi=150)


if __name__ == "__main__":
    FIGURES.mkdir(exist_ok=True)
    rules()
    sweeps()
