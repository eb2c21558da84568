"""
The claims that nano's runs can test, by the rule of verdicts.py; smollm_claims.py has those of a
language model. To see the claims of one part of nano.sh, from its results in a folder:

    python experiments/claims.py ranks out/nano/results

What is compared is the logarithm of the loss on test rows, unless a claim says otherwise: it has no
ceiling, and a δ of 0.1 is a tenth of the loss.
"""
import re
import sys
from dataclasses import dataclass
from math import exp, log, log2
from operator import itemgetter
from pathlib import Path
from statistics import StatisticsError, correlation, mean

import results
from results import BENCH, column, of_study, phi, where
from verdicts import Claim, Ratio

# δ
OF_LOSS = 0.1               # of its logarithm: a tenth
OF_PHI = 0.05               # and of ‖UᵀWV‖
OF_SHARE, OF_RATIO = 0.01, 0.1          # of σ₁ / Σσ, and of it by its Gaussian's
OF_CORRELATION = 0.1
OF_PLANTED = 0.2            # of a rank of 1 to 8
OF_INTRUDERS = 0.2          # of ten singular vectors
OF_RATE = 1.0               # of log₂ of a learning rate: a factor of 2
METHODS, SUBSPACES = "nano_methods.csv", "nano_subspaces.csv"
PAIRS, FORGETTING = "nano_subspaces_pairs.csv", "nano_forgetting_intruders.csv"
SUMMED = "nano_summed.csv"
R8_AND_R64 = "lora-qv-r8 and lora-qv-r64"
R8, R64 = "lora-qv-r8 and lora-qv-r8", "lora-qv-r64 and lora-qv-r64"
PAPERS = {
    "LoRA": "2106.09685",
    "MultiLoRA": "2311.11501",
    "AutoLoRA": "2403.09113",
    "LoRA Without Regret": "Schulman et al. 2025",
    "LoRA learns less and forgets less": "2405.09673",
    "Task arithmetic": "2212.04089",
    "Intruder dimensions": "2410.21228",
}
TASKS = ("instruct", "arith", "infer", "facts", "data2text")
FORGOTTEN = (               # kinds of runs on instruct alone; without a rate, at the pilot's best
    "lora-instruct-lr1.2e-3", "lora-instruct-lr2.5e-3", "lora-instruct", "lora-instruct-lr1e-2",
    "lora-instruct-r1", "lora-instruct-r64", "multilora-instruct-lr1e-2", "multilora-instruct",
    "multilora-instruct-lr4e-2", "full-instruct-lr2.5e-4", "full-instruct-lr5e-4", "full-instruct",
    "full-instruct-lr2e-3")
AS_GOOD = "full-instruct-lr5e-4"                # as LoRA's, by the pilot's held-out loss
STOPS = {"default": 1000, "sigmoid": 100, "none": 300}      # steps, of planted.py: see there


@dataclass
class Row:
    """One claim of the table."""
    paper: str
    says: str                   # the statement, and where it stands in the paper
    claim: Claim
    found: str = ""             # numbers of the two groups, if not their means
    smollm: tuple = ()          # names of smollm_claims.py's
    by: str = ""                # the script that makes it, if not nano.sh

    def shown(self):
        return f"{self.claim.groups}: {self.found or means(self.claim)}"


def number(value, sign=""):
    return f"{value:{sign}.{3 if abs(value) < 10 else 1}f}"


def means(claim):
    return f"{number(mean(claim.ours))} and {number(mean(claim.control))}"


def gain(claim):
    """How far ours are on the claim's side: mean, interval, seeds; and what is asked of it."""
    center, low, high = (number(value, "+") for value in claim.interval())
    asked = ""
    if claim.kind == "no worse":
        asked = f", −{claim.delta:g} allowed"
    elif claim.kind == "equal":
        asked = f", within ±{claim.delta:g}"
    if len(claim.ours) == 1:
        return f"{center} (one couple of seeds){asked}"
    return f"{center} ({low} to {high}; {len(claim.ours)}){asked}"


# The measures: one number a seed -----------------------------------------------------------------

def log_loss(name, task="mean", file="nano_runs.csv"):
    return [log(value) for value in column(name, f"test.{task}.loss", file)]


def same_seeds(*groups):
    """Groups that have fewer seeds than others have the first ones."""
    fewest = min(map(len, groups))
    return [group[:fewest] for group in groups]


def lower(name, ours, control, **more):
    """That the loss of the runs of one name is lower than that of another's."""
    groups = same_seeds(log_loss(ours), log_loss(control))
    return Claim(name, f"{ours} and {control}", *groups, OF_LOSS, smaller=True, **more)


def compared(paper, name, says, ours, control, smollm=(), **more):
    """The row of a claim about the losses of two groups of runs, with their exact match."""
    claim = lower(name, ours, control, **more)
    found = []
    for measure, label in (("loss", "loss"), ("exact", "exact match")):
        groups = same_seeds(*(column(name, f"test.mean.{measure}") for name in (ours, control)))
        found.append("{} {:.3f} and {:.3f}".format(label, *map(mean, groups)))
    return Row(paper, says, claim, "; ".join(found), smollm)


def best_rate(start):
    """
    log₂ of each pilot seed's best learning rate: where a parabola through the lowest held-out loss
    and its two neighbours is lowest, or at the end of the sweep, if that is best.
    """
    losses = {}                                 # {seed: {log₂ of the rate: log of the loss}}
    for run in results.runs().values():
        named = re.fullmatch(rf"pilot-{start}-lr[\d.e-]+-seed(\d+)", run["name"])
        if named:
            own = losses.setdefault(int(named[1]), {})
            own[log2(run["lr"])] = log(run["mean.loss.after"])
    return [lowest(sorted(losses[seed].items())) for seed in sorted(losses)]


def lowest(points):
    """The x where the parabola through the lowest of these (x, y) and its neighbours is lowest."""
    at = min(range(len(points)), key=lambda i: points[i][1])
    if at in (0, len(points) - 1):
        return points[at][0]
    (a, ya), (b, yb), (c, yc) = points[at - 1:at + 2]
    left, right = (b - a) * (yb - yc), (b - c) * (yb - ya)
    return b - 0.5 * ((b - a) * left - (b - c) * right) / (left - right)


def log_alone(name):
    """Of runs on each task alone: the logarithm of their mean loss over the tasks, by seed."""
    losses = [column(f"{task}-{name}-fresh", f"test.{task}.loss") for task in TASKS]
    return [log(mean(values)) for values in zip(*losses)]


def differences(a, b):
    return [x - y for x, y in zip(a, b)]


def alike(name):
    """
    How alike the ranks of two searches are: the mean correlation over all couples of seeds, as
    jackknife's pseudo-values, one a seed. They have that mean, and an interval that knows that
    every seed is in many couples.
    """
    ranks = [[int(r) for r in text.split()] for text in column(name, "ranks")]
    n, with_others = len(ranks), []
    for i in range(n):
        own = [correlation_or_none(ranks[i], ranks[j]) for j in range(n) if j != i]
        with_others.append(mean(own))
    of_all = mean(with_others)
    return [(2 * (n - 1) * each - n * of_all) / (n - 2) for each in with_others]


def off_planted(search):
    """How far the ranks found are from those that planted.py planted, on average, by seed."""
    found = results.planted_ranks(search, STOPS[search])
    return [off(ranks) for ranks in zip(*found)]


def off(ranks):
    """A rank of 1 is right where 0 was planted: no search finds less."""
    return mean(abs(rank - max(1, planted)) for rank, planted in zip(ranks, results.PLANTED_RANKS))


def correlation_or_none(a, b):
    """0 where one of them is the same throughout."""
    try:
        return correlation(a, b)
    except StatisticsError:
        return 0.0


def intruders(name, kind="real"):
    rows = where(results.read_csv(FORGETTING), checkpoint=name)
    return [row[kind] for row in sorted(rows, key=itemgetter("seed"))]


def go_with_forgetting():
    """Over methods, correlation of the number of intruders with what was forgotten, by seed."""
    numbers = zip(*map(intruders, FORGOTTEN))
    losses = zip(*(log_loss(name, "skills") for name in FORGOTTEN))
    return [correlation_or_none(n, lost) for n, lost in zip(numbers, losses)]


# The claims of each part of nano.sh --------------------------------------------------------------

def pilot():
    paper = "LoRA Without Regret"
    rates = {name: best_rate(name) for name in ("r1", "r8", "r64", "full")}
    shown = {name: f"{2 ** mean(logs):.1e}" for name, logs in rates.items()}
    ten_times = [rate + log2(10) for rate in rates["full"]]
    tenfold = Claim("LoRA's rate is ten times full's", "best learning rate, LoRA and full",
                    rates["r8"], ten_times, OF_RATE, kind="equal")
    of_ranks = Claim("one rate for all ranks", "best learning rate, r = 1 and r = 64",
                     rates["r1"], rates["r64"], OF_RATE, kind="equal")
    return [
        Row(paper, "LoRA's best learning rate is ten times full's, within a factor of 2", tenfold,
            f"{shown['r8']} and {shown['full']}"),
        Row(paper, "and the same for all ranks under α/r, within a factor of 2", of_ranks,
            f"{shown['r1']} and {shown['r64']}"),
    ]


def methods():
    def top1(name, over=None):
        return of_study(METHODS, name, "top1", over)

    multilora = Claim("MultiLoRA's ΔW less concentrated", "σ₁ / Σσ, MultiLoRA and LoRA",
                      top1("multilora"), top1("lora"), OF_SHARE, smaller=True)
    full = Claim("full's ΔW less concentrated", "σ₁ / Σσ, full and LoRA",
                 top1("full"), top1("lora"), OF_SHARE, smaller=True)
    of_its_rank = Claim("the same, each by its Gaussian", "σ₁ / Σσ by a Gaussian's, full and LoRA",
                        top1("full", "null.top1"), top1("lora", "null.top1"), OF_RATIO,
                        smaller=True)
    return [
        compared("LoRA", "LoRA as good as full", "as good as full fine-tuning (tables 2 to 4)",
                 "lora", "full", ("as good as full",), kind="no worse"),
        compared("MultiLoRA", "MultiLoRA over LoRA",
                 "better than LoRA of as many parameters on a mixture",
                 "multilora", "lora", ("MultiLoRA better",)),
        Row("MultiLoRA", "its ΔW is less concentrated than LoRA's", multilora,
            smollm=("less concentrated",)),
        Row("MultiLoRA", "full fine-tuning's ΔW is less concentrated than LoRA's", full,
            smollm=("full: less concentrated",)),
        Row("MultiLoRA", "also where each is measured by a Gaussian of its shape", of_its_rank,
            smollm=("full: less for its rank",)),
    ]


def ranks():
    return [
        compared("LoRA", "all six: r = 1 as good as 64",
                 "r = 1 is as good as r = 64, on all six linears (table 6)",
                 "lora-r1", "lora-r64", ("all: r = 1 enough",), kind="no worse"),
        compared("LoRA", "LoRA of r = 64 as good as full", "at r = 64: as good as full fine-tuning",
                 "lora-r64", "full", kind="no worse"),
    ]


def targets():
    return [
        compared("LoRA", "q, v: r = 1 as good as 64",
                 "r = 1 is as good as r = 64, on q and v (table 6: 73.4 and 73.5)",
                 "lora-qv-r1", "lora-qv-r64", ("q, v: r = 1 enough",), kind="no worse"),
        compared("LoRA", "q, v over v alone",
                 "q, v beat v alone of as many parameters (table 5: 73.7 and 73.0)",
                 "lora-qv-r8", "lora-v-r16"),
        compared("LoRA", "q, v over o alone", "and o alone (73.2)", "lora-qv-r8", "lora-o-r16"),
        compared("LoRA", "q, k, v, o as good as q, v",
                 "q, k, v, o are as good as q, v of as many parameters (both 73.7)",
                 "lora-qkvo-r4", "lora-qv-r8", kind="no worse"),
        compared("LoRA Without Regret", "MLP over attention",
                 "MLP only is better than attention only of as many parameters",
                 "lora-mlp", "lora-attention", ("MLP better",)),
    ]


def subspaces():
    def of(what):
        return of_study(SUBSPACES, "lora-qv-r8", what, target="q")

    first = phi(PAIRS, R8_AND_R64, "first")
    top_shared = Claim("r = 8 and 64 share the top direction",
                       "φ(1, 1) of inputs, theirs and random ones'",
                       first, phi(PAIRS, R8_AND_R64, "first", "random"), OF_PHI)
    half = Claim("φ(1, 1) above 0.5", "φ(1, 1) of inputs, and 0.5", first, [0.5] * len(first),
                 OF_PHI)
    one_shared = [(1 + 7 * chance) / 8 for chance in phi(PAIRS, R8_AND_R64, "all", "random")]
    no_others = Claim("and share no others",
                      "φ(8, 64) of inputs, theirs and that of 1 shared and 7 random",
                      phi(PAIRS, R8_AND_R64, "all"), one_shared, OF_PHI, smaller=True,
                      kind="no worse")
    seeds_share = Claim("two seeds share the top direction",
                        "φ(1, 1) of inputs, theirs and random ones'",
                        phi(PAIRS, R64, "first"), phi(PAIRS, R64, "first", "random"), OF_PHI)
    q_over_v = Claim("two seeds share more of ΔW_q", "φ(8, 8) of inputs, q and v",
                     phi(PAIRS, R8, "all", target="q"), phi(PAIRS, R8, "all", target="v"), OF_PHI)
    of_W = Claim("ΔW_q has more of W_q than random", "‖UᵀWV‖ at r = 8, ΔW's and a Gaussian's",
                 of("projection"), of("null.projection"), OF_PHI)
    not_top = Claim("but not W_q's top directions", "‖UᵀWV‖, ΔW's and half of W's",
                    of("projection"), [top / 2 for top in of("top_W")], OF_PHI, smaller=True)
    return [
        Row("LoRA", "r = 8 and r = 64 share their top direction: more than chance (figure 3)",
            top_shared, smollm=("top direction shared",)),
        Row("LoRA", "and by φ(1, 1) > 0.5", half, smollm=("φ above 0.5",)),
        Row("LoRA", "they share no other directions", no_others, smollm=("no others shared",)),
        Row("LoRA", "two seeds of r = 64 share top directions (figure 4)", seeds_share,
            smollm=("seeds share",)),
        Row("LoRA", "and more of them for ΔW_q than for ΔW_v, so that its rank is higher", q_over_v,
            smollm=("more for q",)),
        Row("LoRA", "ΔW_q has to do with W_q, more than a random one has (table 7)", of_W,
            smollm=("more of W than random",)),
        Row("LoRA", "but not with its top directions (table 7: 0.32 of 21.67)", not_top,
            smollm=("not W's top",)),
    ]


def blocks():
    return [
        compared("MultiLoRA", "8 blocks over 1",
                 "more blocks do better, each n at its best learning rate: 8 than 1",
                 "multilora-n8", "multilora-n1"),
        compared("MultiLoRA", "4 blocks over 1", "and 4 than 1", "multilora", "multilora-n1"),
        compared("MultiLoRA", "LoRA with a learned s", "of its changes, a learned s alone helps",
                 "lora-learned-s", "lora"),
        compared("MultiLoRA", "LoRA with a random B", "or a random B alone",
                 "lora-random-b", "lora"),
        compared("MultiLoRA", "both: 1 block over LoRA", "or both, with s from 0: one block",
                 "multilora-n1", "lora"),
    ]


def single():
    mixed = differences(log_loss("lora-fresh"), log_loss("multilora-fresh"))
    alone = differences(log_alone("lora"), log_alone("multilora"))
    more = Claim("gains more on a mixture", "gain over LoRA in log loss, mixed and alone", mixed,
                 alone, OF_LOSS)
    rows = [Row("MultiLoRA", "by more on the mixture of five than on each alone", more)]
    for label, name in (("LoRA", "lora"), ("MultiLoRA", "multilora")):
        summed, mixture = same_seeds(log_loss(f"{name}-summed", file=SUMMED), log_loss(name))
        claim = Claim(f"{label}s added up as good as one", f"{name}, summed and mixed", summed,
                      mixture, OF_LOSS, smaller=True, kind="no worse")
        says = f"adapters of single tasks, added up, are as good as one of the mixture: {label}"
        losses = [mean(map(exp, group)) for group in (summed, mixture)]
        rows.append(Row("Task arithmetic", says, claim, "loss {:.3f} and {:.3f}".format(*losses)))
    return rows


def autolora():
    repeated, zeros = alike("autolora"), [0] * len(alike("autolora"))
    agree = Claim("two searches agree", "correlation of two seeds' ranks, over all couples, and 0",
                  repeated, zeros, OF_CORRELATION)
    softmax, sigmoid, none = map(off_planted, STOPS)
    one_for_all = min(off([rank] * len(results.PLANTED_RANKS)) for rank in range(1, 9))
    planted = Claim("finds planted ranks", "how far ranks are off, and half of one rank for all",
                    softmax, [one_for_all / 2] * len(softmax), OF_PLANTED, smaller=True)
    over_sigmoid = Claim("softmax over σ", "how far ranks are off, softmax and σ", softmax,
                         sigmoid, OF_PLANTED, smaller=True)
    over_none = Claim("softmax over β", "how far ranks are off, softmax and β", softmax,
                      none, OF_PLANTED, smaller=True)
    return [
        compared("AutoLoRA", "found ranks over equal ones",
                 "the ranks found are better than equal ones", "autolora", "uniform"),
        compared("AutoLoRA", "over random ones", "than random ones", "autolora", "random"),
        compared("AutoLoRA", "over shuffled ones", "than their own, dealt out anew",
                 "autolora", "shuffled"),
        compared("AutoLoRA", "over those by chance", "than those read off a β that learned nothing",
                 "autolora", "chance"),
        compared("AutoLoRA", "over those of a null search",
                 "than those of a search by rows with others' answers", "autolora", "null"),
        compared("AutoLoRA", "over equal ones, scales held",
                 "than equal ones, where every scale is held at α/k",
                 "fixed-found", "fixed-uniform"),
        compared("AutoLoRA", "as good as r = k everywhere",
                 "they are as good as r = k everywhere (not the paper's claim)",
                 "autolora", "lora", ("as good as r = k",), kind="no worse"),
        compared("AutoLoRA", "needs the second term",
                 "it needs the second term of its gradient (η = 0.01)", "autolora", "first-order"),
        Row("AutoLoRA", "it finds what layers need: the searches of all seeds agree", agree),
        Row("AutoLoRA", "it finds planted ranks: off by less than half of what one rank for all is",
            planted, by="planted.py"),
        Row("AutoLoRA", "and by softmax better than by σ (its ablation)", over_sigmoid,
            by="planted.py"),
        Row("AutoLoRA", "or by β itself", over_none, by="planted.py"),
    ]


def forgetting():
    def forgets(name, says, control, smollm=()):
        """The row of a claim that LoRA's loss on the base's skills is lower."""
        losses = {}
        for task in ("skills", "instruct"):
            both = (log_loss(run, task) for run in ("lora-instruct", control))
            losses[task] = same_seeds(*both)
        claim = Claim(name, f"lora-instruct and {control}", *losses["skills"], OF_LOSS,
                      smaller=True)
        found = []
        for task, label in (("skills", "loss on skills"), ("instruct", "on instruct")):
            averages = [mean(map(exp, group)) for group in losses[task]]
            found.append("{} {:.2f} and {:.2f}".format(label, *averages))
        return Row("LoRA learns less and forgets less", says, claim, "; ".join(found), smollm)

    paper = "Intruder dimensions"
    ours, gaussians = (intruders("lora-instruct", kind) for kind in ("real", "null"))
    over_full = Claim("more intruders than full", "of ten vectors, LoRA's and full's",
                      *same_seeds(ours, intruders("full-instruct")), OF_INTRUDERS)
    over_chance = Claim("more intruders than a Gaussian", "of ten vectors, LoRA's and a Gaussian's",
                        ours, gaussians, OF_INTRUDERS)
    found = go_with_forgetting()
    together = Claim("intruders go with forgetting", "correlation over 13 kinds of runs, and 0",
                     found, [0] * len(found), OF_CORRELATION)
    return [
        forgets("forgets less than full", "LoRA forgets less than full fine-tuning",
                "full-instruct", ("forgets less",)),
        forgets("also at equal loss",
                "also than full fine-tuning at a rate that learns as much, by the pilot", AS_GOOD),
        Row(paper, "LoRA has more of them than full fine-tuning", over_full),
        Row(paper, "and more than a Gaussian ΔW as large", over_chance),
        Row(paper, "their number goes with what was forgotten", together),
    ]


def exactly(ratio):
    """And its quartiles, of a ratio of sizes."""
    return ratio, (ratio, ratio)


def speed():
    """Of bench.py's model, by the quartiles of its rounds."""
    steps, merged = BENCH["training"], next(iter(BENCH["latency"].values()))["LoRA, merged"]
    full, search = steps["full fine-tuning"], steps["AutoLoRA's search, forward"]
    inverse = sorted(1 / ratio for ratio in full["quartiles"])
    blocks = steps["MultiLoRA, n = 4"]
    smaller = {what: steps["LoRA"][what] / full[what] for what in ("optimizer_MB", "file_MB")}
    tried = [(1 + ratio / 2) / 8 for ratio in (search["ratio"], *search["quartiles"])]
    return [
        Ratio("LoRA's optimizer state is smaller (of GPT-3: 10,000 times fewer parameters)",
              "AdamW's moments, LoRA / full", *exactly(smaller["optimizer_MB"]), 1.0),
        Ratio("and so is its file", "LoRA / full", *exactly(smaller["file_MB"]), 1.0),
        Ratio("LoRA's steps are faster than full fine-tuning's (25 % for GPT-3)",
              "a step, LoRA / full", 1 / full["ratio"], inverse, 1.0),
        Ratio("LoRA, once merged, has no latency (table 1)",
              "a forward pass, merged / the base", merged["ratio"], merged["quartiles"], 1.02),
        Ratio("MultiLoRA is as fast as LoRA", "a step, MultiLoRA / LoRA", blocks["ratio"],
              blocks["quartiles"], 1.05),
        Ratio("a step of AutoLoRA's search costs little more than three of LoRA",
              "a step of the search / LoRA's", search["ratio"], search["quartiles"], 3.3),
        Ratio("a search is cheaper than trying its eight ranks one by one",
              "a run and half as many steps of search / eight runs", tried[0], tried[1:], 1.0),
    ]


PARTS = {f.__name__: f for f in (pilot, methods, ranks, targets, subspaces, blocks, single,
                                 autolora, forgetting)}
MINUTES = {"pilot": 73, "methods": 18, "ranks": 4, "targets": 12, "subspaces": 10, "blocks": 24,
           "single": 64, "autolora": 60, "forgetting": 20, "planted.py": 9}     # on two cores


def rows():
    """[(part of nano.sh, its Row)], paper by paper."""
    found = [(part, row) for part, claims in PARTS.items() for row in claims()]
    order = list(PAPERS)
    return sorted(found, key=lambda pair: order.index(pair[1].paper))


def main(part, folder):
    results.RESULTS = Path(folder)
    for row in PARTS[part]():
        print(row.says)
        print(f"    {row.shown()}")
        print(f"    gain {gain(row.claim)} seeds: {row.claim.verdict()}")


if __name__ == "__main__":
    main(*sys.argv[1:])
