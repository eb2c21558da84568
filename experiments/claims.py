"""
The rule that decides a claim, and what it compares. claims.csv is the table of all claims.

    python experiments/claims.py                                # from the published results
    python experiments/claims.py --results out/nano/results     # from your own

A claim compares two groups of runs, paired by seed. Its effect is the mean paired difference in the
claim's direction, with a 95 % confidence interval (Student's t). δ is the smallest effect of
interest. The verdict depends on where the interval lies:

    kind        supported               negligible      contradicted            otherwise
    better      > 0, not inside ±δ      inside ±δ       < 0, not inside ±δ      inconclusive
    no worse    > −δ                    -               < −δ                    inconclusive
    equal       inside ±δ               -               outside ±δ              inconclusive

In claims.csv, "loss lora full" in the column nano calls loss("nano", "lora", "full") of this file.
"""
import argparse
import csv
from dataclasses import dataclass
from itertools import combinations
from math import inf, isnan, log, log2
from pathlib import Path
from statistics import StatisticsError, correlation, mean

import numpy as np
from scipy import stats

import results
from results import column, read_csv, select, study

SETTINGS = {"nano": "nano", "e2e": "SmolLM2, E2E", "mixture": "SmolLM2, mixture"}
MODEL = {"nano": "nano", "e2e": "smollm", "mixture": "smollm"}      # names of its results files
INTRUDERS_OF = "nano_forgetting_intruders.csv"
TASKS = ("instruct", "arith", "infer", "facts", "data2text")
PLANTED_RANKS = (0, 1, 2, 4, 6)
PLANTED_STEPS = {"default": 1000, "sigmoid": 100, "none": 300}      # when each search is stopped

# δ, the smallest effect of interest, by measure
LOG_LOSS = 0.1          # the logarithm of the loss: about a tenth of it
NATS = 0.01             # the loss of SmolLM2 on E2E and on novels, in nats per token
OVERLAP = 0.05          # φ, and ‖UᵀWV‖
SHARE = 0.01            # σ₁ / Σσ
RATIO = 0.1             # σ₁ / Σσ relative to a Gaussian's
CORRELATION = 0.1
RANK_ERROR = 0.2        # ranks of 1 to 8
INTRUDERS = 0.2         # of ten singular vectors
FACTOR = 1.0            # log₂ of a learning rate: a factor of 2
AMPLIFICATION = 1.0     # ‖ΔW‖ / ‖UᵀWV‖
BLOCK = 0.1             # n times a block's share of ‖ΔW‖, which is 1 if all blocks are equal


@dataclass(frozen=True)
class Comparison:
    """Two groups, {unit: value}. The claim says that ours are smaller, or larger if
    `smaller` is False."""
    ours: dict
    control: dict
    delta: float
    smaller: bool = True
    unit: str = "seeds"
    transform: object = None            # applied before the comparison; means are without it

    def units(self):
        return sorted(self.ours.keys() & self.control.keys())

    def effects(self):
        found = []
        for unit in self.units():
            ours, control = self.ours[unit], self.control[unit]
            if self.transform:
                ours, control = self.transform(ours), self.transform(control)
            found.append(control - ours if self.smaller else ours - control)
        return found

    def means(self):
        units = self.units()
        return mean(map(self.ours.get, units)), mean(map(self.control.get, units))


@dataclass(frozen=True)
class Test:
    """A claim in one setting: what is compared, and the outcome."""
    claim: dict
    setting: str
    names: list                         # what is compared: ["lora", "full"]
    comparison: Comparison
    n: int                              # number of units; 0 if not run yet (then p is 1)
    effect: float
    low: float
    high: float
    p: float
    verdict: str

    def label(self):
        groups = [name for name in self.names if name not in ("skills", "text")]    # tasks
        return f"{self.claim['measure']}: {', '.join(groups)}"


# The rule ----------------------------------------------------------------------------------------

def judge(kind, comparison):
    """
    {"n": number of units, "effect": ..., "low": ..., "high": ..., "p": ..., "verdict": ...}. p is
    two-sided and tests an effect of 0 (for "no worse" −δ, for "equal" the nearer of ±δ).
    """
    effects = comparison.effects()
    delta = comparison.delta
    effect = mean(effects) if effects else 0.0
    low, high, p = -inf, inf, 1.0
    if len(effects) > 1:
        low, high = map(float, stats.ttest_1samp(effects, 0).confidence_interval(0.95))
        limits = {"better": [0], "no worse": [-delta], "equal": [-delta, delta]}[kind]
        ps = [float(stats.ttest_1samp(effects, limit).pvalue) for limit in limits]
        p = max(1.0 if isnan(q) else q for q in ps)         # NaN: all effects are at the limit
    verdict = verdict_of(kind, low, high, delta) if effects else "not run yet"
    return {"n": len(effects), "effect": effect, "low": low, "high": high, "p": p,
            "verdict": verdict}


def verdict_of(kind, low, high, delta):
    inside = -delta < low and high < delta
    if kind == "better":
        if inside:
            return "negligible"
        supported, contradicted = low > 0, high < 0
    elif kind == "no worse":
        supported, contradicted = low > -delta, high < -delta
    else:
        supported, contradicted = inside, low > delta or high < -delta
    if supported:
        return "supported"
    return "contradicted" if contradicted else "inconclusive"


def holm(ps):
    """The p-values corrected for multiple tests (Holm 1979)."""
    corrected = [0.0] * len(ps)
    largest = 0.0
    for place, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - place) * ps[i]))
        corrected[i] = largest
    return corrected


# Losses ------------------------------------------------------------------------------------------

def runs_column(setting, name, wanted):
    return column(name, wanted, f"{MODEL[setting]}_runs.csv")


def losses(setting, name, task="mean"):
    """Test-set losses; for E2E, losses on 400 validation rows."""
    return runs_column(setting, name, f"test.{task}.loss")


def loss(setting, ours, control, task="mean"):
    """The logarithm of the loss, or the loss of SmolLM2 on E2E and on novels, the task `text`."""
    groups = losses(setting, ours, task), losses(setting, control, task)
    if setting == "e2e" or task == "text":
        return Comparison(*groups, NATS)
    return Comparison(*groups, LOG_LOSS, transform=log)


def alone(pattern):
    """{seed: mean loss over the tasks} of runs on each task alone; * stands for the task."""
    by_seed = {}
    for task in TASKS:
        for seed, value in losses("nano", pattern.replace("*", task), task).items():
            by_seed.setdefault(seed, []).append(value)
    return {seed: mean(v) for seed, v in by_seed.items() if len(v) == len(TASKS)}


def loss_alone(setting, ours, control):
    return Comparison(alone(ours), alone(control), LOG_LOSS, transform=log)


def gain_on_mixture(setting, lora, multilora, lora_alone, multilora_alone):
    """MultiLoRA's gain over LoRA in log loss, on the mixture and on single tasks."""
    mixed = loss(setting, multilora, lora)
    single = loss_alone(setting, multilora_alone, lora_alone)
    gains = [dict(zip(both.units(), both.effects())) for both in (mixed, single)]
    return Comparison(*gains, LOG_LOSS, smaller=False)


# Learning rates ----------------------------------------------------------------------------------

def best_rate(setting, ours, control, factor):
    """The best learning rates of two sweeps. The first should be `factor` times the second."""
    expected = {seed: int(factor) * rate for seed, rate in best_rates(control).items()}
    return Comparison(best_rates(ours), expected, FACTOR, smaller=False, transform=log2)


def best_rates(sweep):
    """
    {seed: best learning rate}: the minimum of a parabola (in logarithms) through the lowest
    validation loss and its two neighbours, or the end of the sweep if that is lowest.
    """
    points = {}
    for rate, runs in results.sweep(sweep, "nano_runs.csv").items():
        for seed, run in runs.items():
            points.setdefault(seed, []).append((log2(rate), log(run["mean.loss.after"])))
    return {seed: 2 ** minimum(points[seed]) for seed in sorted(points)}


def minimum(points):
    lowest = min(range(len(points)), key=lambda i: points[i][1])
    if lowest in (0, len(points) - 1):
        return points[lowest][0]
    x, y = zip(*points[lowest - 1:lowest + 2])
    a, b, _ = np.polyfit(x, y, 2)               # a x² + b x + c
    return float(-b / (2 * a))


# ΔW ----------------------------------------------------------------------------------------------

def concentration(setting, ours, control):
    """σ₁ / Σσ"""
    file = f"{MODEL[setting]}_methods.csv"
    return Comparison(study(file, ours, "top1"), study(file, control, "top1"), SHARE)


def relative_concentration(setting, *names):
    """σ₁ / Σσ, relative to that of a Gaussian of the same shape."""
    file = f"{MODEL[setting]}_methods.csv"
    return Comparison(*[study(file, name, "top1", "null.top1") for name in names], RATIO)


def constant(values, number):
    """{unit: number}, the same number for every unit of `values`."""
    return dict.fromkeys(values, float(number))


def pair_phi(setting, low, high, which, **wanted):
    """{first seed: mean over the matrices} of φ of two groups. `which` is a column of the table."""
    return study(f"{MODEL[setting]}_subspaces_pairs.csv", f"{low} and {high}", which, **wanted)


def first_shared(setting, low, high, control):
    """φ(1, 1) of the input directions of two runs, and that of Gaussians or a number."""
    first = pair_phi(setting, low, high, "input.first")
    if control == "Gaussian":
        other = pair_phi(setting, low, high, "random.first")
    else:
        other = constant(first, control)
    return Comparison(first, other, OVERLAP, smaller=False, unit="seed pairs")


def further_shared(setting, low, high):
    """φ of all directions, and what it would be if one were shared and the others were random."""
    rank = int(low.rpartition("-r")[2])
    expected = {}
    for seed, chance in pair_phi(setting, low, high, "random.all").items():
        expected[seed] = (1 + (rank - 1) * chance) / rank
    ours = pair_phi(setting, low, high, "input.all")
    return Comparison(ours, expected, OVERLAP, unit="seed pairs")


def q_and_v(setting, name, q, v):
    """φ of all directions of two seeds, of ΔW_q and of ΔW_v."""
    groups = [pair_phi(setting, name, name, "input.all", target=target) for target in (q, v)]
    return Comparison(*groups, OVERLAP, smaller=False, unit="seed pairs")


def overlap(setting, name, target, control):
    """‖UᵀWV‖ of ΔW, and that of a Gaussian ΔW or half of that of W's top directions."""
    file = f"{MODEL[setting]}_subspaces.csv"
    ours = study(file, name, "projection", target=target)
    if control == "Gaussian":
        other = study(file, name, "null.projection", target=target)
        return Comparison(ours, other, OVERLAP, smaller=False)
    top = study(file, name, "top_W", target=target)
    return Comparison(ours, {seed: value / 2 for seed, value in top.items()}, OVERLAP)


def amplification(setting, name, target):
    """‖ΔW‖ / ‖UᵀWV‖, compared with 1."""
    values = study(f"{MODEL[setting]}_subspaces.csv", name, "amplification", target=target)
    return Comparison(values, constant(values, 1), AMPLIFICATION, smaller=False)


def block_overlap(setting, name, side):
    """φ of all directions of two blocks of one ΔW, and that of Gaussian blocks."""
    file = f"{MODEL[setting]}_mixture_blocks.csv"
    ours = study(file, name, side)
    return Comparison(ours, study(file, name, f"null.{side}"), OVERLAP, smaller=False)


def smallest_block(setting, name):
    """n times the smallest block's share of ‖ΔW‖, and a half."""
    file = f"{MODEL[setting]}_mixture_blocks.csv"
    n = study(file, name, "n")
    values = {seed: n[seed] * share for seed, share in study(file, name, "smallest").items()}
    return Comparison(values, constant(values, 0.5), BLOCK, smaller=False)


# AutoLoRA's ranks --------------------------------------------------------------------------------

def agreement(setting, name):
    """Correlation of the ranks that two seeds find, over all pairs of seeds; compared with 0."""
    ranks = {}
    for seed, text in runs_column(setting, name, "ranks").items():
        ranks[seed] = [int(rank) for rank in text.split()]

    def of_seeds(seeds):
        pairs = combinations(seeds, 2)
        return mean(correlation_or_zero(ranks[a], ranks[b]) for a, b in pairs)

    values = jackknife(of_seeds, list(ranks))
    return Comparison(values, constant(values, 0), CORRELATION, smaller=False,
                      unit="seeds, jackknife")


def jackknife(statistic, units):
    """
    {unit: pseudo-value}, for a statistic that is not a mean over the units, such as a correlation:
    their mean estimates it, and their interval is its interval. Needs three units.
    """
    n = len(units)
    if n < 3:
        return {}
    whole = statistic(units)
    found = {}
    for unit in units:
        found[unit] = n * whole - (n - 1) * statistic([u for u in units if u != unit])
    return found


def correlation_or_zero(a, b):
    """Pearson's; 0 if one of them is constant."""
    try:
        return correlation(a, b)
    except StatisticsError:
        return 0.0


def planted(setting, search, control):
    """The error of a search of planted.py, and another's or half of the best single rank's."""
    errors = planted_errors(search)
    if control in PLANTED_STEPS:
        return Comparison(errors, planted_errors(control), RANK_ERROR)
    best = min(rank_error([rank] * len(PLANTED_RANKS)) for rank in range(1, 9))
    return Comparison(errors, constant(errors, best / 2), RANK_ERROR)


def planted_errors(search):
    found = planted_ranks(search, PLANTED_STEPS[search])
    return {seed: rank_error(ranks) for seed, ranks in found.items()}


def planted_ranks(search, step):
    """{seed: [the rank found for each of PLANTED_RANKS]} after `step` steps."""
    found = {}
    for row in select(read_csv("planted.csv"), search=search, step=step):
        found[row["seed"]] = [row[f"rank of {planted}"] for planted in PLANTED_RANKS]
    return found


def rank_error(ranks):
    """Mean distance from PLANTED_RANKS. For 0, a rank of 1 is right: no search finds less."""
    return mean(abs(rank - max(1, planted)) for rank, planted in zip(ranks, PLANTED_RANKS))


# Intruder dimensions -----------------------------------------------------------------------------

def intruders(setting, ours, control):
    """Intruder dimensions of two groups, or of one group and its Gaussian ΔW."""
    if control == "Gaussian":
        other = study(INTRUDERS_OF, ours, "null")
    else:
        other = study(INTRUDERS_OF, control, "real")
    return Comparison(study(INTRUDERS_OF, ours, "real"), other, INTRUDERS, smaller=False)


def forgetting_kinds():
    """The kinds of runs on `instruct`."""
    return sorted({row["checkpoint"] for row in read_csv(INTRUDERS_OF)})


def intruders_and_forgetting(setting, *kinds):
    """Correlation over the kinds of runs on `instruct`, of means over their common seeds."""
    found = {}
    for name in forgetting_kinds():
        found[name] = study(INTRUDERS_OF, name, "real"), losses(setting, name, "skills")
    seeds = [counts.keys() & lost.keys() for counts, lost in found.values()]
    common = set.intersection(*seeds) if seeds else set()
    points = {}
    for name, (counts, lost) in found.items():
        if common:
            points[name] = mean(map(counts.get, common)), mean(map(log, map(lost.get, common)))

    def of_kinds(names):
        return correlation_or_zero(*zip(*[points[name] for name in names]))

    values = jackknife(of_kinds, list(points))
    return Comparison(values, constant(values, 0), CORRELATION, smaller=False,
                      unit="kinds of runs, jackknife")


# All of them -------------------------------------------------------------------------------------

def tests():
    """[Test]: every claim of claims.csv in every setting."""
    found = []
    with open(results.ROOT / "experiments" / "claims.csv", newline="") as f:
        for claim in csv.DictReader(f):
            for setting in SETTINGS:
                if claim[setting]:
                    name, *arguments = claim[setting].split()
                    comparison = globals()[name](setting, *arguments)
                    found.append(Test(claim, setting, arguments, comparison,
                                      **judge(claim["kind"], comparison)))
    return found


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--results", type=Path, default=results.RESULTS, help="folder of CSV files")
    results.RESULTS = p.parse_args().results
    for test in tests():
        if test.n:
            print(f"{test.claim['claim']}\n    {SETTINGS[test.setting]}, {test.label()}: "
                  f"{test.effect:+.3f} [{test.low:+.3f}, {test.high:+.3f}], {test.n} "
                  f"{test.comparison.unit}, δ = {test.comparison.delta:g}: {test.verdict}")


if __name__ == "__main__":
    main()
