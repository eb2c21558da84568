"""
The rule that decides a claim, fixed before its runs were looked at:

    one number a seed for each of two groups of runs, paired by seed; d, the differences in the
    direction of the claim; their mean with its 95 % confidence interval (Student), and p

    holds               the interval is above 0
    does not hold here  it is below 0, or within ± δ: there is no gain worth δ
    undecided           neither: more seeds are needed, up to 20

δ is 0.01 of exact match, or the measure's own. A claim of "no worse than" adds δ to d. Over all
claims Holm's correction says which p would stand beside the others.
"""
import math
from statistics import mean, stdev

import numpy as np

DELTA = 0.01


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


def interval(differences):
    """(mean, half the width of its 95 % confidence interval, two-sided p of a mean of 0)."""
    n, center = len(differences), mean(differences)
    error = stdev(differences) / math.sqrt(n)
    if error == 0:
        return center, 0.0, float(center == 0)
    p = 2 * (1 - student_cdf(abs(center) / error, n - 1))
    return center, student_quantile(n - 1) * error, p


def verdict(differences, delta=DELTA):
    """"holds", "does not hold here" or "undecided", of one difference a seed."""
    center, half, _ = interval(differences)
    low, high = center - half, center + half
    if low > 0:
        return "holds"
    if high < 0 or (-delta < low and high < delta):
        return "does not hold here"
    return "undecided"


def holm(ps):
    """The p of many tests, each corrected for its being one of them (Holm 1979)."""
    corrected, largest = [0.0] * len(ps), 0.0
    for place, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - place) * ps[i]))
        corrected[i] = largest
    return corrected
