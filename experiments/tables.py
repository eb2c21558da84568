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
import claims
import smollm_claims
from results import (BENCH, LOSS, PLANTED_RANKS, RESULTS, ROOT, column, over_seeds, planted_ranks,
                     quartiles, read_json, runs, seeds, spread)
from verdicts import holm

READMES = (ROOT / "README.md", ROOT / "experiments" / "README.md")
METHODS = ("lora", "multilora", "autolora", "full")


def table(head, lines):
    """In Markdown."""
    rows = []
    for line in (head, ["---"] * len(head), *lines):
        rows.append(f"| {' | '.join(map(str, line))} |")
    return "\n".join(rows)


# The claims --------------------------------------------------------------------------------------

def chances(rows):
    """[a row's p, and Holm's over all of them]"""
    ps = [row.claim.p() for _, row in rows]
    return [f"{short(p)}; {short(corrected)}" for p, corrected in zip(ps, holm(ps))]


def short(p):
    return f"{p:.3f}" if p >= 0.001 else "<0.001"


def all_claims():
    known, rows, lines = smollm_claims.claims(), claims.rows(), []
    paper = ""
    for (part, row), p in zip(rows, chances(rows)):
        if row.paper != paper:
            paper = row.paper
            lines.append([f"**{paper}** ({claims.PAPERS[paper]})", *[""] * 6])
        there = [known[name].verdict() for name in row.smollm]
        minutes = claims.MINUTES[row.by or part]
        lines.append([row.says, row.shown(), claims.gain(row.claim), p,
                      f"**{row.claim.verdict()}**", ", ".join(there),
                      f"`{row.by or 'nano.sh ' + part}`, {minutes} min"])
    return table(("claim", "ours and control", "gain (95 %; seeds)", "p; Holm's", "verdict",
                  "on SmolLM2", "made by"), lines)


def of_smollm():
    lines = []
    for claim in smollm_claims.claims().values():
        lines.append((f"{claim.groups}: {claims.means(claim)}", claims.gain(claim),
                      f"**{claim.verdict()}**"))
    return table(("ours and control", "gain (95 %; seeds)", "verdict"), lines)


def of_speed():
    lines = []
    for ratio in claims.speed():
        quarter = f"{ratio.value:.3f} ({quartiles({'quartiles': ratio.quartiles})})"
        lines.append((ratio.name, ratio.groups, quarter, f"{ratio.limit:g}",
                      f"**{ratio.verdict()}**"))
    return table(("claim", "ratio of", "median (quartiles)", "limit", "verdict"), lines)


def others():
    return table(("adapter", "ΔW of", "r", "σ₁ / Σσ", "Gaussian", "effective rank", "Gaussian",
                  "‖UᵀWV‖", "Gaussian", "amplification", "Gaussian"), adapters.lines())


# nano --------------------------------------------------------------------------------------------

VARIANTS = {"learned-s": "LoRA with a learned s", "random-b": "LoRA with a random B"}
TEST_LOSS, TEST_EXACT = "test.mean.loss", "test.mean.exact"


def both(name):
    """Loss and exact match on test rows, over the seeds."""
    return over_seeds(name, TEST_LOSS), over_seeds(name, TEST_EXACT)


def methods():
    lines = []
    for task in (*claims.TASKS, "mean"):
        line = [task]
        for name in METHODS:
            line.append(over_seeds(name, f"test.{task}.exact"))
        lines.append(line)
    lines.append(["loss", *(over_seeds(name, TEST_LOSS) for name in METHODS)])
    lines.append(["trained", *(over_seeds(name, "parameters", 0) for name in METHODS)])
    return table(("task", "LoRA, r = 8", "MultiLoRA, r = 8, n = 4", "AutoLoRA, k = 8",
                  "full fine-tuning"), lines)


def pilot():
    """Held-out loss of each learning rate, mean over the pilot's seeds."""
    losses = {}                                             # {what: {rate: [loss]}}
    for run in runs().values():
        named = re.fullmatch(r"pilot-(.*)-lr[\d.e-]+-seed\d+", run["name"])
        if named:
            own = losses.setdefault(named[1], {})
            own.setdefault(run["lr"], []).append(run[LOSS])
    lines = []
    for what, own in losses.items():
        rates = [f"{lr:g}: {spread(own[lr])}" for lr in sorted(own)]
        label = re.sub(r"^r(\d+)", r"LoRA, r = \1", what.replace("-", ", "))
        label = VARIANTS.get(what, label)
        lines.append((label, "; ".join(rates)))
    return table(("runs", "learning rate: held-out loss"), lines)


def compared(groups, head):
    """Loss and exact match of {label: name of the runs}."""
    lines = []
    for label, name in groups.items():
        parameters = over_seeds(name, "parameters", 0)
        lines.append((label, parameters, *both(name), len(seeds(name))))
    return table((head, "trained", "loss", "exact match", "seeds"), lines)


def ranks():
    return compared({
        "q, v: r = 1": "lora-qv-r1", "8": "lora-qv-r8", "64": "lora-qv-r64",
        "all six: r = 1": "lora-r1", "8 ": "lora", "64 ": "lora-r64", "all weights": "full",
    }, "LoRA on")


def targets():
    return compared({
        "q, r = 16": "lora-q-r16", "k, 16": "lora-k-r16", "v, 16": "lora-v-r16",
        "o, 16": "lora-o-r16", "q, v, 8": "lora-qv-r8", "q, k, v, o, 4": "lora-qkvo-r4",
        "q, k, v, o, 10": "lora-attention", "up, down, 8": "lora-mlp",
    }, "LoRA on")


def blocks():
    return compared({
        "LoRA": "lora", "LoRA with a learned s": "lora-learned-s",
        "LoRA with a random B": "lora-random-b", "MultiLoRA, n = 1": "multilora-n1",
        "n = 4": "multilora", "n = 8": "multilora-n8",
    }, "rank 8 in all")


def single():
    lines = []
    for task in claims.TASKS:
        line = [task]
        for name in (f"lora-{task}", f"multilora-{task}"):
            line.append(over_seeds(name, f"test.{task}.loss"))
        for name in ("lora", "multilora"):
            line.append(over_seeds(name, f"test.{task}.loss"))
        lines.append(line)
    for measure, label in (("loss", "mean"), ("exact", "exact match")):
        line = [label]
        for name in ("lora-summed", "multilora-summed"):
            line.append(spread(column(name, f"test.mean.{measure}", claims.SUMMED)) + ", summed")
        for name in ("lora", "multilora"):
            line.append(over_seeds(name, f"test.mean.{measure}"))
        lines.append(line)
    return table(("loss", "LoRA, alone", "MultiLoRA, alone", "LoRA, in the mixture",
                  "MultiLoRA, in the mixture"), lines)


def found_ranks():
    return compared({
        "found": "autolora", "equal": "uniform", "random": "random", "found, shuffled": "shuffled",
        "of a β that learned nothing": "chance", "found with others' answers": "null",
        "found, first-order": "first-order", "found, all scales α/k": "fixed-found",
        "equal, all scales α/k": "fixed-uniform", "8 everywhere": "lora",
    }, "ranks")


def planted():
    lines = []
    for search in ("default", "first-order", "beta_lr 0.03", "64 rows", "sigmoid", "none"):
        for step in (30, 100, 300, 1000):
            if search == "default" or step in (100, 300):
                found = [spread(ranks, 1) for ranks in planted_ranks(search, step)]
                lines.append((f"{search}, {step} steps", *found))
    return table(("search", *(f"planted {r}" for r in PLANTED_RANKS)), lines)


def forgetting():
    lines = []
    for name in claims.FORGOTTEN:
        run = seeds(name)[0]
        label = f"{run['method']}, {run['lr']:g}"
        if "rank" in run:
            label += f", r = {run['rank']}"
        losses = [over_seeds(name, f"test.{task}.loss") for task in ("instruct", "skills")]
        counts = [spread(claims.intruders(name, kind), 2) for kind in ("real", "null")]
        lines.append((label, *losses, *counts))
    return table(("method, learning rate", "loss on instruct", "loss on skills",
                  "intruders, of ten", "a Gaussian's"), lines)


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


BLOCKS = {f.__name__: f for f in (methods, pilot, ranks, targets, blocks, single, found_ranks,
                                  planted, forgetting, of_smollm, smollm_scores, smollm_rates,
                                  smollm_ranks, smollm_mixture, smollm_samples, of_speed, steps,
                                  latency, generation, others)}
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
