"""
The claims of the three papers that these experiments can test: what was found, beside its control,
and a verdict by who read the numbers. † marks those about bench.py's model; the others are nano's.
"""
import random
from itertools import combinations
from statistics import correlation, mean, stdev

import smollm_claims
from adapters import of_claim
from results import (BENCH, ahead, column, over_seeds, planted_ranks, quartiles, read_csv, seeds,
                     spread, where)

METHODS, SUBSPACES = read_csv("nano_methods.csv"), read_csv("nano_subspaces.csv")
PAIRS = read_csv("nano_subspaces_pairs.csv")
STEPS, LATENCY = BENCH["training"], BENCH["latency"]
SEARCH = "AutoLoRA's search, forward"
R8_AND_R64, R64 = "lora-qv-r8 and lora-qv-r64", "lora-qv-r64 and lora-qv-r64"


# What a cell says --------------------------------------------------------------------------------

def time(row):
    return f"{row['ratio']:.2f} ({quartiles(row, 2)})"


def size(name):
    step = STEPS[name]
    return (f"{step['parameters']:,} trained, AdamW {step['optimizer_MB']:,.1f} MB, "
            f"file {step['file_MB']:,.1f} MB")


def phi(pair, side, which):
    """φ of the "first" direction of two ΔW or of "all": mean over matrices ± over pairs of runs."""
    by_pair = {}
    for row in where(PAIRS, pair=pair):
        by_pair.setdefault((row["a"], row["b"]), []).append(row[f"{side}.{which}"])
    return spread(map(mean, by_pair.values()), 2)


def both(pair, which):
    return f"{phi(pair, 'input', which)} (input), {phi(pair, 'output', which)} (output)"


def table_7(what):
    """LoRA's table 7 for q at r = 8: mean over the layers ± over the seeds."""
    means = []
    for seed in range(3):
        rows = where(SUBSPACES, checkpoint="lora-qv-r8", seed=seed, target="q")
        means.append(mean(row[what] for row in rows))
    return spread(means, 1)


def rank_of_q_over_v(name):
    """Effective rank of ΔW_q less that of ΔW_v: mean over the layers ± over the seeds."""
    gaps = []
    for seed in range(3):
        q, v = (where(SUBSPACES, checkpoint=name, seed=seed, target=t) for t in "qv")
        gaps.append(mean(a["effective_rank"] - b["effective_rank"] for a, b in zip(q, v)))
    return spread(gaps, 2)


def top(method):
    """σ₁ / Σσ of each seed, mean over its matrices."""
    means = []
    for seed in range(5):
        rows = where(METHODS, checkpoint=method, seed=seed)
        means.append(mean(row["top1"] for row in rows))
    return means


def gaussian_top(method):
    return mean(row["null.top1"] for row in where(METHODS, checkpoint=method))


def times_gaussian(method):
    return f"{mean(top(method)) / gaussian_top(method):.1f}"


def alone(method, task):
    """Exact match of the runs of one task alone; LoRA's at the better of two learning rates."""
    found = column(f"{method}-{task}")
    if method == "lora":
        found = max(found, column(f"lora-{task}-lr3e-3"), key=mean)
    return mean(found)


def gain(task):
    """MultiLoRA's over LoRA in the mixture, and alone."""
    own = f"{task}.exact.after"
    mixed = mean(column("multilora", own)) - mean(column("lora", own))
    return f"{task} {mixed:+.3f}, {alone('multilora', task) - alone('lora', task):+.3f}"


def ranks(name):
    """The ranks that each seed's search found."""
    return [[int(r) for r in run["ranks"].split()] for run in seeds(name)]


def likeness(lists):
    """Mean correlation of every two of these lists."""
    return mean(correlation(a, b) for a, b in combinations(lists, 2))


def alike(name, draws=2000):
    """Likeness of the ranks of two seeds, and its spread and share where they are shuffled."""
    dice, found, shuffled = random.Random(0), ranks(name), []
    for _ in range(draws):
        shuffled.append(likeness([dice.sample(r, len(r)) for r in found]))
    p = mean(value >= likeness(found) for value in shuffled)
    return f"{likeness(found):.2f} (by chance 0 ± {stdev(shuffled):.2f}; p = {p:.3f})"


def planted(search):
    """The ranks found after 300 steps."""
    return " ".join(f"{mean(found):.1f}" for found in planted_ranks(search, 300))


# The claims: claim, here, control, verdict, the script that measures it ---------------------------

def of_lora():
    shape, late = next(iter(LATENCY.items()))
    one_target = [f"{target}: {over_seeds(f'lora-{target}-r16')}" for target in "qkvo"]
    return [
        ("on par with full fine-tuning or better (tables 2 to 4)",
         f"r = 16: {over_seeds('lora')}; r = 64: {over_seeds('lora-all-r64')}",
         f"full: {over_seeds('full')}; ahead of r = 16 by {ahead('full', 'lora')}, "
         f"of r = 64 by {ahead('full', 'lora-all-r64')}",
         "does not hold here at r = 16; at r = 64 little is missing", "nano.sh"),

        ("fewer trained parameters (1/10,000 of GPT-3's), smaller optimizer state and checkpoint †",
         size("LoRA"), f"full: {size('full fine-tuning')}", "holds", "bench.py"),

        ("faster steps (25 % for GPT-3) †", "1", f"full: {time(STEPS['full fine-tuning'])}",
         "holds", "bench.py"),

        (f"no latency once merged (table 1); forward pass of {shape}, time / the base's †",
         time(late["LoRA, merged"]),
         f"adapter layers: {time(late['adapter layers'])}; LoRA unmerged: {time(late['LoRA'])}",
         "holds, by construction; adapter layers cost a little, LoRA that is not merged more",
         "bench.py"),

        ("r = 1 or 2 is enough (table 6: q and v 73.4 at r = 1, 73.5 at 64)",
         f"q and v, r = 1, 2: {over_seeds('lora-qv-r1')}, {over_seeds('lora-qv-r2')}; "
         f"all six: {over_seeds('lora-all-r1')}, {over_seeds('lora-all-r2')}",
         f"r = 64: q and v {over_seeds('lora-qv-r64')}; all six {over_seeds('lora-all-r64')}",
         "does not hold here: more rank helps", "nano.sh"),

        ("q and v together beat one matrix at equal parameters "
         "(table 5: 73.7; q 70.4, k 70.0, v 73.0, o 73.2; all four 73.7)",
         f"q, v: {over_seeds('lora-qv-r8')}",
         f"{'; '.join(one_target)}; all four: {over_seeds('lora-qkvo-r4')}",
         "holds, and all four are within its spread", "nano.sh"),
    ]


def of_lora_weights():
    return [
        ("r = 8 and r = 64 share their top direction (figure 3: φ(1, 1) > 0.5)",
         f"φ(1, 1): {both(R8_AND_R64, 'first')}",
         f"random directions: {phi(R8_AND_R64, 'random', 'first')}",
         "weaker here: above chance, below 0.5", "nano.sh"),

        ("and no others", f"φ(8, 64): {both(R8_AND_R64, 'all')}",
         f"random directions: {phi(R8_AND_R64, 'random', 'all')}",
         "does not hold here: more than chance (but 64 of 128 directions hold half of any)",
         "nano.sh"),

        ("two seeds of r = 64 share top directions (figure 4)",
         f"φ(1, 1): {both(R64, 'first')}", f"random directions: {phi(R64, 'random', 'first')}",
         "holds weakly: above chance, far from 1", "nano.sh"),

        ("ΔW_q has a higher rank than ΔW_v (section 7.2)",
         f"effective rank, q less v: r = 8 {rank_of_q_over_v('lora-qv-r8')}; "
         f"r = 64 {rank_of_q_over_v('lora-qv-r64')}", "0",
         "undecided: by little at r = 8, within the spread at r = 64", "nano.sh"),

        ("ΔW_q amplifies directions that W does not emphasise (table 7, r = 4: ‖ΔW‖ = 6.91 is 21.6 "
         "times ‖UᵀWV‖ = 0.32; with W's top directions for U and V that is 21.67, with random ones "
         "0.02)",
         f"r = 8: {table_7('amplification')} times ‖UᵀWV‖ = {table_7('projection')}; "
         f"with W's {table_7('top_W')}",
         f"Gaussian ΔW: {table_7('null.amplification')} times ‖UᵀWV‖ = "
         f"{table_7('null.projection')}",
         "holds, but weaker: W's are 5 times ΔW's (there 68), ΔW's 3 times random ones (16). A "
         "random ΔW amplifies more, as it would there", "nano.sh"),
    ]


def of_multilora():
    step = STEPS["MultiLoRA, n = 4"]
    shares, nulls, times = [], [], []
    for method in ("lora", "multilora", "full"):
        shares.append(spread(top(method)))
        nulls.append(f"{gaussian_top(method):.3f}")
        times.append(times_gaussian(method))
    return [
        ("LoRA's ΔW is dominated by its top singular vectors, MultiLoRA's and full fine-tuning's "
         "less",
         "σ₁ / Σσ: LoRA {}, MultiLoRA {}, full {}".format(*shares),
         "Gaussians: {}; so {}, {} and {} times".format(", ".join(nulls), *times),
         "holds, for MultiLoRA by little; full's share is small because its rank is large: for its "
         "rank it is the most concentrated", "nano.sh"),

        ("better than LoRA of as many parameters on a mixture", over_seeds("multilora"),
         f"LoRA: {over_seeds('lora')}; MultiLoRA is ahead by {ahead('multilora', 'lora')}",
         "undecided: within the spread", "nano.sh"),

        ("by more than on single tasks",
         f"gain over LoRA, in the mixture and alone: {gain('instruct')}; {gain('arith')}; "
         f"{gain('infer')}",
         "alone, LoRA at the better of two learning rates; spreads below",
         "undecided: within the spread", "nano.sh"),

        ("more blocks do better",
         f"n = 2: {over_seeds('multilora-n2')}; 4: {over_seeds('multilora')}; "
         f"8: {over_seeds('multilora-n8')}",
         f"n = 1: {over_seeds('multilora-n1')}; n = 8 is ahead of it by "
         f"{ahead('multilora-n8', 'multilora-n1')}",
         "undecided: within the spread", "nano.sh"),

        ("as fast as LoRA, at more memory †",
         f"step {time(step)}; saved for backward {step['saved_MB']:,.1f} MB",
         f"LoRA: 1; {STEPS['LoRA']['saved_MB']:,.1f} MB",
         "time holds; no more memory in this form", "bench.py"),
    ]


def of_autolora():
    found = ranks("autolora")
    fewest, most = min(map(min, found)), max(map(max, found))
    return [
        ("layers need different ranks, and it finds them",
         f"{fewest} to {most} of 16; correlation of two seeds' ranks {alike('autolora')}",
         f"β's rate 0.03: {alike('autolora-beta_lr3e-2')}",
         "does not hold here: they differ, but other seeds find others", "nano.sh"),

        ("beats LoRA of equal and of random ranks",
         f"{over_seeds('autolora')}; β's rate 0.03: {over_seeds('autolora-beta_lr3e-2')}",
         f"equal: {over_seeds('uniform')}; {over_seeds('uniform-beta_lr3e-2')}. "
         f"random: {over_seeds('random')}; {over_seeds('random-beta_lr3e-2')}",
         "undecided: over equal ranks no gain beyond the spread", "nano.sh"),

        ("needs the hypergradient's second term", over_seeds("autolora"),
         f"first-order: {over_seeds('autolora-first-order')}; the second term is ahead by "
         f"{ahead('autolora', 'autolora-first-order')}",
         "undecided: within the spread", "nano.sh"),

        ("softmax is better than σ or neither (ablation); here: ranks found in 300 steps where "
         "0, 1, 2, 4, 6 are planted",
         planted("default"), f"σ: {planted('sigmoid')}; neither: {planted('none')}",
         "does not hold here: without softmax they follow the planted ones better", "planted.py"),

        ("cheaper than trying ranks one by one †",
         f"a search step is {time(STEPS[SEARCH])} of LoRA's, so 200 cost as much as a run of 600",
         f"six ranks: six runs; rank 16 everywhere: {over_seeds('lora')}",
         "holds; but rank 16 everywhere is as good", "bench.py"),
    ]


def of_today():
    """Tested on SmolLM2 alone."""
    says = ("ranks found are no worse than the full rank everywhere (not AutoLoRA's claim)",
            "attention only is worse than MLP only at equal parameters (LoRA Without Regret)",
            "LoRA forgets less (2405.09673, of benchmarks and long training)")
    return [(claim, "", "", "", "smollm.sh") for claim in says]


def claims():
    """[(method, claim, here, control, verdict, on SmolLM2, others' adapters, script)]"""
    rows = []
    for method, found in (("LoRA", of_lora() + of_lora_weights()), ("MultiLoRA", of_multilora()),
                          ("AutoLoRA", of_autolora()), ("later papers", of_today())):
        for claim, here, control, verdict, script in found:
            rows.append((method, claim, here, control, verdict, smollm_claims.of_claim(claim),
                         of_claim(claim), script))
            method = ""
    return rows
