"""
Adapters that others trained: what the pages say of them, from what adapters.sh left in results, and
the picture of the LoRA authors' GPT-2 medium:

    python experiments/adapters.py out/adapters/adapters_medium FIGURE.png
"""
import json
import sys
from pathlib import Path

import matplotlib

from results import read_csv, spread, where

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MEDIUM, ROBERTA = "gpt2_md_lora_e2e", "roberta_base_lora_mnli"
NAMES = {MEDIUM: "GPT-2 medium on E2E, by LoRA's authors",
         ROBERTA: "RoBERTa base on MNLI, by them too",
         "gpt2-great": "GPT-2, rows of a table", "gpt2-tigrinya": "GPT-2, Tigrinya",
         "gpt2-chat": "GPT-2, a demo"}
MEASURES = (("top1", 2), ("effective_rank", 1), ("projection", 2), ("amplification", 1))


RECORDS = []
for name in ("medium", "roberta", "gpt2"):
    RECORDS += read_csv(f"adapters_{name}.csv")


def cell(rows, key, digits=2):
    """Mean ± standard deviation over matrices; "" where none has it."""
    values = [row[key] for row in rows if key in row]
    return spread(values, digits) if values else ""


def lines():
    """For each adapter and target: its measures, each beside its Gaussian's."""
    found = []
    for name, label in NAMES.items():
        own = where(RECORDS, checkpoint=name)
        for target in dict.fromkeys(row["target"] for row in own):
            rows = where(own, target=target)
            line = [label, target, rows[0]["r"]]
            for key, digits in MEASURES:
                line.append(cell(rows, key, digits))
                line.append(cell(rows, f"null.{key}", digits))
            found.append(line)
            label = ""
    return found


def picture(folder, path):
    """The four singular values of each ΔW by layer, and those of Gaussians as large."""
    found = json.loads((Path(folder) / "analysis.json").read_text())["records"]
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True, layout="constrained")
    blue = plt.get_cmap("Blues")
    for ax, target in zip(axes, ("q", "v")):
        rows = [r for r in found if r["target"] == target]
        layers = [r["layer"] for r in rows]
        for i in range(rows[0]["r"]):
            share = [r["S"][i] / sum(r["S"]) for r in rows]
            null = [r["null"]["S"][i] / sum(r["null"]["S"]) for r in rows]
            ax.plot(layers, share, "o-", markersize=3, color=blue(0.95 - 0.2 * i),
                    label=f"σ{'₁₂₃₄'[i]}")
            ax.plot(layers, null, ":", color="#999999")
        ax.plot([], [], ":", color="#999999", label="Gaussians")
        ax.set(title=f"ΔW of {target}", xlabel="layer", ylim=(0, 0.6))
    axes[0].set_ylabel("σᵢ / Σσ")
    axes[1].legend(frameon=False, fontsize=8, ncols=5, loc="lower center")
    fig.suptitle("The LoRA authors' GPT-2 medium on E2E, r = 4", fontsize=11)
    fig.savefig(path, dpi=150)


if __name__ == "__main__":
    picture(*sys.argv[1:])
