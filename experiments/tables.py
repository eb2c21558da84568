"""
The tables of README.md and experiments/README.md, written from experiments/results into the places
that <!-- name --> and <!-- end --> mark:

    python experiments/tables.py
"""
import re
import textwrap
from functools import partial
from statistics import mean

import adapters
from claims import claims
from results import (BENCH, EXACT, LOSS, PLANTED_RANKS, RESULTS, ROOT, ahead, column, over_seeds,
                     planted_ranks, quartiles, read_csv, read_json, runs, seeds, spread)

READMES = (ROOT / "README.md", ROOT / "experiments" / "README.md")
TASKS = ("instruct", "arith", "infer", "facts", "data2text")


def table(head, lines):
    """In Markdown."""
    rows = []
    for line in (head, ["---"] * len(head), *lines):
        rows.append(f"| {' | '.join(map(str, line))} |")
    return "\n".join(rows)


def all_claims():
    return table(("method", "claim", "here", "control", "verdict",
                  "SmolLM2-135M on real text",
                  "adapters that others trained (Gaussians)", "made by"), claims())


def others():
    return table(("adapter", "ΔW of", "r", "σ₁ / Σσ", "Gaussian", "effective rank", "Gaussian",
                  "‖UᵀWV‖", "Gaussian", "amplification", "Gaussian"), adapters.lines())


# Exact match of nano -----------------------------------------------------------------------------

def methods():
    lines = []
    for task in (*TASKS, "mean"):
        line = [task, f"{runs()['lora-seed0'][f'{task}.exact.before']:.3f}"]
        for name in ("lora", "multilora", "autolora", "full"):
            line.append(over_seeds(name, f"{task}.exact.after"))
        lines.append(line)
    return table(("task", "before", "LoRA, r = 16", "MultiLoRA, r = 16, n = 4", "AutoLoRA, k = 16",
                  "full fine-tuning"), lines)


def tried_rates(method, what="lr"):
    """{learning rate: mean exact match} of seed 0; `what` may be β's, "beta_lr"."""
    name = re.compile(rf"{method}(-{what}\de-\d)?(-seed0)?")
    return {run[what]: run[EXACT] for run in runs().values() if name.fullmatch(run["name"])}


def learning_rates():
    lines = []
    for label, method, what in (("lora", "lora", "lr"), ("multilora", "multilora", "lr"),
                                ("full", "full", "lr"), ("autolora", "autolora", "lr"),
                                ("autolora, β", "autolora", "beta_lr")):
        rates = sorted(tried_rates(method, what).items())
        lines.append((label, ", ".join(f"{lr:g}: {exact:.3f}" for lr, exact in rates)))
    return table(("method", "learning rate: mean exact match"), lines)


def ranks():
    lines = []
    for r in (1, 2, 4, 8, 64):
        lines.append((r, over_seeds(f"lora-qv-r{r}"), over_seeds(f"lora-all-r{r}")))
    lines.insert(4, (16, "", over_seeds("lora")))
    return table(("rank r", "on q and v", "on all six"), lines)


def targets():
    lines = []
    for label, r, name in (("q", 16, "q"), ("k", 16, "k"), ("v", 16, "v"), ("o", 16, "o"),
                           ("q, v", 8, "qv"), ("q, k, v, o", 4, "qkvo")):
        name = f"lora-{name}-r{r}"
        parameters = f"{seeds(name)[0]['parameters']:,}"
        lines.append((label, r, parameters, over_seeds(name, LOSS), over_seeds(name)))
    return table(("targets", "rank", "parameters", "held-out loss", "exact match"), lines)


def blocks():
    lines = []
    for label, name in (("LoRA", "lora"), ("n = 1", "multilora-n1"), ("n = 2", "multilora-n2"),
                        ("n = 4", "multilora"), ("n = 8", "multilora-n8"),
                        ("n = 4, a vector s", "multilora-vector")):
        lines.append((label, over_seeds(name, LOSS), over_seeds(name)))
    return table(("MultiLoRA, rank 16 in all", "held-out loss", "exact match"), lines)


def single():
    lines = []
    for task in ("instruct", "arith", "infer"):
        line = [task]
        for name in (f"lora-{task}", f"lora-{task}-lr3e-3", f"multilora-{task}"):
            line.append(over_seeds(name))
        for name in ("lora", "multilora"):
            line.append(over_seeds(name, f"{task}.exact.after"))
        lines.append(line)
    return table(("task", "LoRA, alone, learning rate 0.01", "0.003", "MultiLoRA, alone",
                  "LoRA, in the mixture", "MultiLoRA, in the mixture"), lines)


def found_ranks():
    kinds = [("found", "autolora"), ("equal", "uniform"), ("random", "random"),
             ("found, shuffled", "shuffled")]
    slow = [*kinds, ("found, first-order", "autolora-first-order"), ("16 everywhere", "lora")]
    fast = [(label, f"{name}-beta_lr3e-2") for label, name in kinds]
    lines = []
    for rate, rows in (("0.01", slow), ("0.03", fast)):
        found = rows[0][1]
        for label, name in rows:
            parameters = over_seeds(name, "parameters", 0)
            line = [rate, label, parameters, over_seeds(name, LOSS), over_seeds(name)]
            line.append("" if name == found else ahead(found, name))
            lines.append(line)
            rate = ""
    return table(("β's rate", "ranks", "parameters", "held-out loss", "exact match",
                  "found is ahead by"), lines)


def planted():
    lines = []
    for search in ("default", "first-order", "beta_lr 0.03", "64 rows", "sigmoid", "none"):
        for step in (30, 100, 300, 1000):
            if search == "default" or step in (100, 300):
                found = [spread(ranks, 1) for ranks in planted_ranks(search, step)]
                lines.append((f"{search}, {step} steps", *found))
    return table(("search", *(f"planted {r}" for r in PLANTED_RANKS)), lines)


def intruders():
    found, lines = read_csv("nano_methods_intruders.csv"), []
    for label, kind in (("trained", "real"), ("a Gaussian ΔW", "null")):
        line = [label]
        for method in ("lora", "multilora", "full"):
            counts = [row[kind] for row in found if row["checkpoint"] == method]
            line.append(f"{mean(counts):.2f}")
        lines.append(line)
    return table(("of ten singular vectors of W + ΔW, none of W's", "LoRA", "MultiLoRA",
                  "full fine-tuning"), lines)


# SmolLM2 on real text ----------------------------------------------------------------------------

SMOLLM = "smollm_runs.csv"
SCORES = (("valid_loss", 3, 1), ("bleu", 1, 1), ("slots", 1, 100), ("text_loss", 3, 1))


def smollm_scores():
    """E2E: each method, and the model before."""
    base = runs(SMOLLM)["lora-seed0"]
    lines = [["before", "", ""]]
    for score, digits, unit in SCORES:
        lines[0].append(f"{unit * base[f'untrained.{score}']:.{digits}f}")
    for label, name in (("LoRA", "lora"), ("MultiLoRA, n = 4", "multilora"),
                        ("AutoLoRA, k = 16", "autolora"), ("full fine-tuning", "full")):
        own = seeds(name, SMOLLM)
        line = [label, f"{own[0]['lr']:g}", spread([run["parameters"] for run in own], 0)]
        for score, digits, unit in SCORES:
            values = [unit * run[f"score.{score}"] for run in own]
            line.append(spread(values, digits))
        lines.append(line)
    return table(("E2E", "learning rate", "trained", "loss", "BLEU", "values named, %",
                  "loss on novels"), lines)


def smollm_rates():
    lines = []
    for method in ("lora", "multilora", "autolora", "full"):
        found = {}
        for run in runs(SMOLLM).values():
            if run["name"].startswith(f"sweep-{method}-"):
                found[run["lr"]] = run["mean.loss.after"]
        rates = [f"{lr:g}: {found[lr]:.3f}" for lr in sorted(found)]
        lines.append((method, ", ".join(rates)))
    return table(("method", "learning rate: loss on 32 rows after 60 steps"), lines)


def smollm_ranks():
    lines = []
    for label, r, name in (("q, v", 1, "lora-qv-r1"), ("q, v", 4, "lora-qv-r4"),
                           ("q, v", 16, "lora-qv-r16"), ("q, v", 64, "lora-qv-r64"),
                           ("all seven", 1, "lora-all-r1"), ("all seven", 16, "lora"),
                           ("attention", 33, "lora-attention"), ("MLP", 20, "lora-mlp")):
        own = seeds(name, SMOLLM)
        losses = spread([run["score.valid_loss"] for run in own])
        lines.append((label, r, f"{own[0]['parameters']:,}", losses))
    return table(("LoRA on", "rank", "trained", "loss"), lines)


def smollm_mixture():
    lines = []
    for task in ("e2e", "cola", "wic", "rte", "copa", "mean"):
        line = [task]
        for measure in ("loss", "exact"):
            line.append(f"{runs(SMOLLM)['lora-mixture-seed0'][f'{task}.{measure}.before']:.3f}")
            for name in ("lora", "multilora"):
                values = column(f"{name}-mixture", f"{task}.{measure}.after", SMOLLM)
                line.append(spread(values))
        lines.append(line)
    return table(("task", "loss before", "LoRA", "MultiLoRA", "exact match before", "LoRA",
                  "MultiLoRA"), lines)


def smollm_samples(last=0):
    """Prompts and answers of LoRA's seed 0: all of them, or the last."""
    lines = []
    for line in read_json("smollm_samples.json")["lora-seed0"][-2 * last:]:
        lines.append(textwrap.fill(line, 92, subsequent_indent=7 * " "))
    return indented("\n".join(lines))


# Speed -------------------------------------------------------------------------------------------

def steps():
    lines = []
    for name, row in BENCH["training"].items():
        lines.append((name, f"{row['parameters']:,}", f"{row['ratio']:.3f}", quartiles(row),
                      f"{row['saved_MB']:.0f}", f"{row['optimizer_MB']:.1f}",
                      f"{row['file_MB']:.1f}"))
    return table(("a training step", "trained", "time / LoRA's", "quartiles",
                  "saved for backward, MB", "AdamW's state, MB", "file, MB"), lines)


def latency():
    shapes, lines = BENCH["latency"], []
    for name in next(iter(shapes.values())):
        rows = [found[name] for found in shapes.values()]
        lines.append((name, *(f"{row['ratio']:.3f} ({quartiles(row)})" for row in rows)))
    return table(("a forward pass, time / the base's", *shapes), lines)


def generation():
    lines = []
    for name, row in BENCH["generation"].items():
        lines.append((name, f"{row['ratio']:.2f}", quartiles(row, 2)))
    return table(("generation", "time / ours with the cache", "quartiles"), lines)


# Into the pages ----------------------------------------------------------------------------------

def printed(name):
    """What a command printed: analyze.py in nano.sh; last_screen is the end of train.py's."""
    return indented((RESULTS / f"{name}.txt").read_text().rstrip())


def indented(text):
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())


BLOCKS = {f.__name__: f for f in (methods, learning_rates, ranks, targets, blocks, single,
                                  found_ranks, planted, intruders, smollm_scores, smollm_rates,
                                  smollm_ranks, smollm_mixture, smollm_samples, steps, latency,
                                  generation, others)}
BLOCKS |= {"claims": all_claims, "smollm_sample": partial(smollm_samples, last=1)}
for name in ("nano_methods", "nano_subspaces", "smollm_methods", "smollm_subspaces",
             "last_screen"):
    BLOCKS[name] = partial(printed, name)


def fill(text):
    """
    `text` with every <!-- name --> ... <!-- end --> holding its table. Raises ValueError for a name
    that is none.
    """
    def block(match):
        if match[1] not in BLOCKS:
            raise ValueError(f"no table {match[1]}: choose from {' '.join(BLOCKS)}")
        return f"<!-- {match[1]} -->\n{BLOCKS[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- (?!end )([\w-]+) -->\n.*?<!-- end -->", block, text, flags=re.S)


if __name__ == "__main__":
    for path in READMES:
        if path.exists():
            path.write_text(fill(path.read_text()))
