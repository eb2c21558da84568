"""
The results in experiments/results, as tables.py, claims.py and figures.py need them.
"""
import csv
import json
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"
EXACT, LOSS = "mean.exact.after", "mean.loss.after"


def read_csv(file):
    """[{column: value}] of a CSV's rows, without their empty cells."""
    rows = []
    with open(RESULTS / file, newline="") as f:
        for line in csv.DictReader(f):
            row = {}
            for column, text in line.items():
                if text:
                    row[column] = number(text)
            rows.append(row)
    return rows


def read_runs(file):
    return {run["name"]: run for run in read_csv(file)}


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


NANO, E2E = read_runs("nano_runs.csv"), read_runs("e2e_runs.csv")
BENCH = read_json("bench_cpu.json")
PLANTED_RANKS = (0, 1, 2, 4, 6)


def where(rows, **wanted):
    """The rows that have these values."""
    return [row for row in rows if wanted.items() <= row.items()]


def seeds(name):
    """nano's runs of a name, in the order of their seeds."""
    found = []
    while f"{name}-seed{len(found)}" in NANO:
        found.append(NANO[f"{name}-seed{len(found)}"])
    if len(found) < 3:
        raise KeyError(f"{name}: three seeds are wanted at least, and there are {len(found)}")
    return found


def column(name, of=EXACT):
    """One column of the runs of a name."""
    return [run[of] for run in seeds(name)]


def spread(values, digits=3):
    """Mean ± standard deviation; of equal whole numbers the mean alone."""
    values = list(values)
    text = f"{mean(values):,.{digits}f} ± {stdev(values):,.{digits}f}"
    return text.removesuffix(" ± 0")


def over_seeds(name, of=EXACT, digits=3):
    return spread(column(name, of), digits)


def ahead(name, other):
    """How far the first runs' exact match is above the second's, and on how many seeds it is."""
    gaps, wins = [], 0
    for one, two in zip(column(name), column(other)):
        gaps.append(one - two)
        wins += one > two
    return f"{mean(gaps):+.3f} ± {stdev(gaps):.3f}, on {wins} of {len(gaps)} seeds"


def quartiles(row, digits=3):
    """Of one of bench.py's ratios."""
    low, high = row["quartiles"]
    return f"{low:.{digits}f} to {high:.{digits}f}"


def planted_ranks(search, step):
    """For each planted rank, the ranks that planted.py's search found after so many steps."""
    rows, found = where(read_csv("planted.csv"), search=search, step=step), []
    for planted in PLANTED_RANKS:
        found.append([row[f"rank of {planted}"] for row in rows])
    return found
