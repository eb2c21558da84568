"""
The rule that decides a claim:

    one number a seed for each of two groups of runs, paired by seed; d, the differences in the
    direction of the claim; their mean with its 95 % confidence interval (Student), and p

    holds               the interval is above 0
    does not hold here  if not, and it is below δ: there is no gain worth δ
    undecided           neither

δ is the measure's own: of a loss's logarithm 0.1, a tenth of the loss. A claim of "no worse" has
the interval above -δ to hold, and below -δ not to. A claim of "equal" has it within ± δ to hold,
and outside not to. What is undecided after the first seeds gets more, up to 20. Holm's correction,
over all claims, says which p would stand beside the others.
"""
import math
from dataclasses import dataclass
from statistics import mean, stdev

import numpy as np

DELTA = 0.01


@dataclass
class Claim:
    """That the numbers `ours` are larger than `control`: one a seed, paired by seed."""
    name: str                   # in a few words
    groups: str                 # "exact match, LoRA and full fine-tuning"
    ours: list
    control: list
    delta: float = DELTA
    smaller: bool = False       # claimed is that ours are smaller, as losses should be
    kind: str = "better"        # or "no worse", or "equal"

    def gains(self):
        """How much ours are on the claim's side of control, seed by seed."""
        sign = -1 if self.smaller else 1
        return [sign * (a - b) for a, b in zip(self.ours, self.control, strict=True)]

    def interval(self):
        """(mean gain, lowest, highest)"""
        center, half = interval(self.gains())
        return center, center - half, center + half

    def verdict(self):
        _, low, high = self.interval()
        if self.kind == "equal":
            holds = -self.delta < low and high < self.delta
            fails = low > self.delta or high < -self.delta
        elif self.kind == "no worse":
            holds, fails = low > -self.delta, high < -self.delta
        else:
            holds, fails = low > 0, high < self.delta
        if holds:
            return "holds"
        return "does not hold here" if fails else "undecided"

    def p(self):
        """Of a mean gain of 0, or of "no worse" of -δ (two-sided); of "equal" the larger of two."""
        gains = self.gains()
        if self.kind == "better":
            return p_of(gains)
        limits = [-self.delta] if self.kind == "no worse" else [-self.delta, self.delta]
        return max(p_of([gain - limit for gain in gains]) for limit in limits)


@dataclass
class Ratio:
    """That a ratio of bench.py is below a limit. In the place of seeds stand its rounds: the claim
    holds where their quartiles do."""
    name: str
    groups: str
    value: float
    quartiles: tuple
    limit: float

    def verdict(self):
        if max(self.quartiles) < self.limit:
            return "holds"
        return "undecided" if min(self.quartiles) < self.limit else "does not hold here"


def student_cdf(t, df):
    """P(T ≤ t) of Student's distribution with df degrees of freedom, by Simpson's rule."""
    x = np.linspace(0, abs(t), 20_001)
    log_scale = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi)
    density = np.exp(log_scale - (df + 1) / 2 * np.log1p(x * x / df))
    weights = np.ones_like(x)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    half = float(density @ weights) * abs(t) / 20_000 / 3
    return 0.5 + math.copysign(half, t)


def student_quantile(df, share=0.975):
    """The t with P(T ≤ t) = share, by bisection."""
    low, high = 0.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        if student_cdf(middle, df) < share:
            low = middle
        else:
            high = middle
    return middle


def standard_error(values):
    return stdev(values) / math.sqrt(len(values))


def interval(values):
    """(mean, half the width of its 95 % confidence interval); of one value that is infinite."""
    if len(values) < 2:
        return values[0], math.inf
    return mean(values), student_quantile(len(values) - 1) * standard_error(values)


def p_of(values):
    """Two-sided p of a mean of 0."""
    if len(values) < 2:
        return 1.0
    error = standard_error(values)
    if error == 0:
        return float(mean(values) == 0)
    t = min(abs(mean(values)) / error, 1000)            # beyond, the sum below has no digits left
    return max(0.0, 2 * (1 - student_cdf(t, len(values) - 1)))


def holm(ps):
    """The p of many tests, each corrected for its being one of them (Holm 1979)."""
    corrected, largest = [0.0] * len(ps), 0.0
    for place, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - place) * ps[i]))
        corrected[i] = largest
    return corrected
