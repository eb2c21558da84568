"""
The results in experiments/results, as tables.py, claims.py and figures.py need them.
"""
import csv
import json
import re
from functools import cache
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"
LOSS = "mean.loss.after"


def read_csv(file):
    """[{column: value}] of a CSV's rows, without their empty cells."""
    return rows_of(RESULTS / file)


@cache
def rows_of(path):
    rows = []
    with open(path, newline="") as f:
        for line in csv.DictReader(f):
            row = {}
            for column, text in line.items():
                if text:
                    row[column] = number(text)
            rows.append(row)
    return rows


def number(text):
    """The number that `text` is, or the text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def read_json(file):
    return json.loads((RESULTS / file).read_text())


BENCH = read_json("bench_cpu.json")
PLANTED_RANKS = (0, 1, 2, 4, 6)


def where(rows, **wanted):
    """The rows that have these values."""
    return [row for row in rows if wanted.items() <= row.items()]


def runs(file="nano_runs.csv"):
    return {run["name"]: run for run in read_csv(file)}


def seeds(name, file="nano_runs.csv"):
    """The runs of a name, of seeds 0, 1, 2 ... Raises KeyError where one is missing."""
    known = runs(file)
    count = sum(re.fullmatch(rf"{name}-seed\d+", run) is not None for run in known)
    return [known[f"{name}-seed{seed}"] for seed in range(max(1, count))]


def column(name, of, file="nano_runs.csv"):
    """One column of the runs of a name."""
    return [run[of] for run in seeds(name, file)]


def spread(values, digits=3):
    """Mean ± standard deviation; of equal whole numbers the mean alone."""
    values = list(values)
    text = f"{mean(values):,.{digits}f} ± {stdev(values):,.{digits}f}"
    return text.removesuffix(" ± 0")


def over_seeds(name, of, digits=3):
    return spread(column(name, of), digits)


def quartiles(row, digits=3):
    """Of one of bench.py's ratios."""
    low, high = row["quartiles"]
    return f"{low:.{digits}f} to {high:.{digits}f}"


def of_study(file, name, what, over=None, **wanted):
    """Of each seed, the mean over the matrices of a measure, or of its ratio to another."""
    groups = {}
    for row in where(read_csv(file), checkpoint=name, **wanted):
        value = row[what] / row[over] if over else row[what]
        groups.setdefault(row["seed"], []).append(value)
    return [mean(groups[seed]) for seed in sorted(groups)]


def phi(file, pair, which, side="input", target=None):
    """φ of "first" or of "all" directions, of all matrices or of one target's: a mean for each
    couple of seeds (flatten.py has kept 0 and 1, 2 and 3 ...)."""
    found = {}
    for row in where(read_csv(file), pair=pair):
        if target is None or row["name"].endswith(f".{target}"):
            first = min(int(row[run].rpartition("-seed")[2]) for run in "ab")
            found.setdefault(first, []).append(row[f"{side}.{which}"])
    return [mean(found[seed]) for seed in sorted(found)]


def planted_ranks(search, step):
    """For each planted rank, the ranks that planted.py's search found after so many steps."""
    rows, found = where(read_csv("planted.csv"), search=search, step=step), []
    for planted in PLANTED_RANKS:
        found.append([row[f"rank of {planted}"] for row in rows])
    return found
