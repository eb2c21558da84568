"""
What the claims become on SmolLM2-135M and real text: smollm.sh's runs, by the rule in verdicts.py.
"""
import math
from itertools import combinations
from statistics import correlation, mean

from results import column, of_study
from verdicts import Claim

RUNS, METHODS = "smollm_runs.csv", "smollm_methods.csv"
# δ of what is no loss
OF_SHARE, OF_RATIO = 0.01, 0.1


def loss(name):
    """On 400 held-out rows of E2E."""
    return column(name, "score.valid_loss", RUNS)


def claims():
    """{name: the claim}"""
    return {claim.name: claim for claim in [*of_losses(), *of_methods()]}


def of_losses():
    def lower(name, groups, ours, control, **more):
        return Claim(name, groups, ours, control, smaller=True, **more)

    novels, mixture = "score.text_loss", "mean.loss.after"
    return [
        lower("as good as full", "loss, r = 16 and full", loss("lora"), loss("full"),
              kind="no worse"),
        lower("MultiLoRA better", "loss on five tasks, MultiLoRA and LoRA",
              column("multilora-mixture", mixture, RUNS), column("lora-mixture", mixture, RUNS)),
        lower("as good as r = k", "loss, found ranks and 16 everywhere", loss("autolora"),
              loss("lora"), kind="no worse"),
        lower("forgets less", "loss on novels (at whatever loss on E2E), LoRA and full",
              column("lora", novels, RUNS), column("full", novels, RUNS)),
    ]


def of_methods():
    def top1(name, over=None):
        return of_study(METHODS, name, "top1", over)

    return [
        Claim("less concentrated", "σ₁ / Σσ, MultiLoRA and LoRA", top1("multilora"), top1("lora"),
              OF_SHARE, smaller=True),
        Claim("full: less for its rank", "σ₁ / Σσ over its Gaussian's, full and LoRA",
              top1("full", "null.top1"), top1("lora", "null.top1"), OF_RATIO, smaller=True),
    ]


# In words ----------------------------------------------------------------------------------------

SAME = {    # how a claim of the table begins: what is tested of it here
    "on par with full": ["as good as full"],
    "LoRA's ΔW is dominated": ["less concentrated", "full: less for its rank"],
    "better than LoRA of as many": ["MultiLoRA better"],
    "ranks found are no worse": ["as good as r = k"],
    "LoRA forgets less": ["forgets less"],
}


def number(value, sign=""):
    return f"{value:{sign}.{3 if abs(value) < 10 else 1}f}"


def in_words(claim):
    """The two means, how far ours are on the claim's side, the interval, and the verdict."""
    center, low, high = (number(value, "+") for value in claim.interval())
    means = f"{number(mean(claim.ours))} and {number(mean(claim.control))}"
    asked = f", −{claim.delta:g} allowed" if claim.kind == "no worse" else ""
    return f"{claim.groups}: {means}; {center} ({low} to {high}{asked}): **{claim.verdict()}**"


def ranks_alike():
    """Correlations of the ranks that two seeds of AutoLoRA's search found."""
    found = [[int(r) for r in ranks.split()] for ranks in column("autolora", "ranks", RUNS)]
    pairs = [number(correlation(a, b), "+") for a, b in combinations(found, 2)]
    chance = 1 / math.sqrt(len(found[0]))
    return f"correlations of two seeds' ranks {', '.join(pairs)} (by chance 0 ± {chance:.3f})"


def of_claim(text):
    """What became of a claim of the table; "" where nothing was tested."""
    known = claims()
    if text.startswith("layers need different ranks"):
        return ranks_alike()
    for start, names in SAME.items():
        if text.startswith(start):
            return ". ".join(in_words(known[name]) for name in names)
    return ""
