"""
Adapters that others trained: what the pages say of them, from what adapters.sh left in results, and
the picture of the LoRA authors' GPT-2 medium:

    python experiments/adapters.py out/adapters/adapters_medium FIGURE.png
"""
import json
import sys
from pathlib import Path
from statistics import mean

import matplotlib

from results import read_csv, spread, where

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MEDIUM, ROBERTA = "gpt2_md_lora_e2e", "roberta_base_lora_mnli"
GPT2 = ("gpt2-great", "gpt2-tigrinya", "gpt2-chat")
NAMES = {MEDIUM: "GPT-2 medium on E2E, by LoRA's authors",
         ROBERTA: "RoBERTa base on MNLI, by them too",
         "gpt2-great": "GPT-2, rows of a table", "gpt2-tigrinya": "GPT-2, Tigrinya",
         "gpt2-chat": "GPT-2, a demo"}
SHORT = {MEDIUM: "GPT-2 medium", ROBERTA: "RoBERTa", "gpt2-great": "table rows",
         "gpt2-tigrinya": "Tigrinya", "gpt2-chat": "demo"}
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


def beside(key, digits, names=NAMES):
    """Of each adapter the mean of a measure, and its Gaussian's: "GPT-2 medium 0.35 (0.26)"."""
    texts = []
    for name in names:
        rows = where(RECORDS, checkpoint=name)
        real = mean(row[key] for row in rows if key in row)
        null = mean(row[f"null.{key}"] for row in rows if key in row)
        texts.append(f"{SHORT[name]} {real:.{digits}f} ({null:.{digits}f})")
    return "; ".join(texts)


def rank_of_q_over_v():
    """Effective rank of ΔW_q less that of ΔW_v, layer by layer."""
    texts = []
    for name in (MEDIUM, ROBERTA, *GPT2):
        q, v = ("query", "value") if name == ROBERTA else ("q", "v")
        gaps = []
        for row in where(RECORDS, checkpoint=name, target=q):
            other, = where(RECORDS, checkpoint=name, target=v, layer=row["layer"])
            gaps.append(row["effective_rank"] - other["effective_rank"])
        higher = sum(gap > 0 for gap in gaps)
        texts.append(f"{SHORT[name]} {mean(gaps):+.2f} (higher in {higher} of {len(gaps)} layers)")
    return "; ".join(texts)


def of_claim(claim):
    """What these adapters say of one of claims.py; "" where they say nothing."""
    if claim.startswith("r = 1 or 2"):
        return (f"effective rank: {beside('effective_rank', 1)}. Does not hold: of four directions "
                "all are used, of eight four or more")
    if claim.startswith("ΔW_q amplifies"):
        return (f"‖UᵀWV‖: {beside('projection', 2, GPT2)}; amplification: "
                f"{beside('amplification', 1, GPT2)}. Weaker: ΔW has a little more of W than a "
                "random one, and amplifies less")
    if claim.startswith("ΔW_q has a higher rank"):
        return f"{rank_of_q_over_v()}. Undecided: they differ"
    if claim.startswith("LoRA's ΔW is dominated"):
        return (f"σ₁ / Σσ: {beside('top1', 2)}. Holds, but little in GPT-2 medium, where all is "
                "above chance")
    return ""


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
