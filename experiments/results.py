"""
The files in experiments/results: how runs.py writes them, and how claims.py and pages.py read them.

    nano_runs.csv, ...          a row for each finished run; measure.py has measured test.* on the
                                test set, or e2e.py (whose losses are on validation rows)
    STUDY.csv                   a row for each matrix that analyze.py studied
    STUDY_pairs.csv             φ of two runs, for each matrix; `checkpoint` names both groups
    STUDY_intruders.csv         intruder dimensions, mean over a run's matrices
    STUDY_blocks.csv            MultiLoRA's blocks, for each matrix

A run is called NAME-seedN. Readers return {seed: value}, so that groups are paired by seed.
"""
import csv
import json
import re
import sys
from functools import cache
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

RESULTS = ROOT / "experiments" / "results"
EPSILON = 0.6           # all cosines of an intruder with singular vectors of W are below this
# train.py's flags that all runs have, and those that only some methods have
COMMON = "method model data seed lr steps batch_size".split()
OWN = "targets rank n_blocks scaling search_steps hypergrad beta_lr".split()


# Reading -----------------------------------------------------------------------------------------

def read_csv(file):
    """[{column: value}] of a CSV file in RESULTS, without empty cells; [] if there is no file."""
    return parse_csv(RESULTS / file)


@cache
def parse_csv(path):
    rows = []
    if not path.exists():
        return rows
    with open(path, newline="") as f:
        for line in csv.DictReader(f):
            row = {}
            for column, text in line.items():
                if text:
                    row[column] = value_of(text)
            rows.append(row)
    return rows


def value_of(text):
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def read_json(file):
    return json.loads((RESULTS / file).read_text())


@cache
def runs_by_name(path):
    """{name: {seed: row}}; a name that does not end in -seedN belongs to seed 0."""
    groups = {}
    for row in parse_csv(path):
        name, _, seed = row["name"].partition("-seed")
        groups.setdefault(name, {})[int(seed or 0)] = row
    return groups


def runs(name, file):
    """{seed: row}"""
    return runs_by_name(RESULTS / file).get(name, {})


def column(name, wanted, file):
    """{seed: value} of one column, for the runs that have it."""
    own = runs(name, file)
    return {seed: own[seed][wanted] for seed in sorted(own) if wanted in own[seed]}


def sweep(name, file):
    """{learning rate: {seed: row}} of a sweep, whose runs are called NAME-lrRATE."""
    found = {}
    for group, runs in runs_by_name(RESULTS / file).items():
        prefix, separator, rate = group.rpartition("-lr")
        if separator and prefix == name:
            found[float(rate)] = runs
    return dict(sorted(found.items()))


def select(rows, **wanted):
    return [row for row in rows if wanted.items() <= row.items()]


def study(file, name, measure, over=None, **wanted):
    """{seed: mean over the matrices} of a measure, or of its ratio to another measure."""
    values = {}
    for row in select(read_csv(file), checkpoint=name, **wanted):
        value = row[measure]
        if over is not None:
            value /= row[over]
        values.setdefault(row["seed"], []).append(value)
    return {seed: mean(values[seed]) for seed in sorted(values)}


def deviation(values):
    """The standard deviation; 0 for a single value."""
    return stdev(values) if len(values) > 1 else 0.0


# Writing -----------------------------------------------------------------------------------------

def write_csv(rows, path):
    """A CSV file with all columns that occur in the rows."""
    columns = {}
    for row in rows:
        columns |= dict.fromkeys(row)
    part = path.with_suffix(".part")        # an interrupted call leaves the old file
    with open(part, "w", newline="") as f:
        out = csv.DictWriter(f, columns, lineterminator="\n")
        out.writeheader()
        for row in rows:
            out.writerow({name: cell(value) for name, value in row.items()})
    part.replace(path)


def update_csv(rows, path, key):
    """Like write_csv, but keep the earlier rows unless a new row has the same `key` columns."""
    new = {tuple(cell(row[name]) for name in key) for row in rows}
    old = []
    if path.exists():
        with open(path, newline="") as f:
            for row in csv.DictReader(f):
                if tuple(row[name] for name in key) not in new:
                    old.append(row)
    write_csv(old + rows, path)


def cell(value):
    """A value as text: lists joined by spaces, floats with six significant digits."""
    if isinstance(value, list):
        return " ".join(map(cell, value))
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else str(value)


def collect(folder, path):
    """Write a row for each finished run in a folder of checkpoints, and for each sum of adapters
    that was measured there."""
    from support import checkpoint
    if any(folder.glob("*-score.json")):
        raise ValueError(f"{folder} has results of an earlier version (*-score.json): move it away")
    rows = []
    for file in sorted(folder.glob("*.pt")):
        saved, settings = checkpoint.open_run(file)
        if saved["after"] is not None:
            rows.append(run_row(file, saved, settings) | measured(file.stem, folder))
    for file in sorted(folder.glob("*-summed-seed*-test.json")):
        name = file.stem.removesuffix("-test")
        rows.append({"name": name} | measured(name, folder))
    update_csv(rows, path, ["name"])
    print(f"{len(rows)} runs written to {path}")


def run_row(file, saved, settings):
    """The settings and the validation losses of one run."""
    from train import METHODS
    row = {"name": file.stem}
    for setting in COMMON + OWN:
        has = setting in COMMON or setting in METHODS[settings.method].flags
        row[setting] = getattr(settings, setting) if has else None
    row["data"] = [Path(task).name for task in settings.data]
    row["parameters"] = saved["parameters"]
    if settings.ranks_from:
        row["rank"] = None
    if "adapter" in saved:
        ranks = [len(own["A"]) for own in saved["adapter"]["tensors"].values()]
        if min(ranks) < max(ranks):
            row["ranks"] = ranks
    for when in ("before", "after"):
        row[f"mean.loss.{when}"] = mean(task["loss"] for task in saved[when].values())
    commit = file.with_suffix(".commit")
    if commit.exists():
        row["commit"] = list(dict.fromkeys(commit.read_text().split()))     # two if resumed later
    return row


def measured(name, folder):
    """{"test.MEASURE": number}, what measure.py and e2e.py have written about a run."""
    row = {}
    for kind in ("test", "untrained"):
        file = folder / f"{name}-{kind}.json"
        if file.exists():
            for measure, value in json.loads(file.read_text()).items():
                if isinstance(value, (int, float)):
                    row[f"{kind}.{measure}"] = value
    return row


def flatten(folder, prefix):
    """Write the numbers of an analysis.json to PREFIX.csv, PREFIX_pairs.csv, ..._intruders.csv and
    ..._blocks.csv."""
    found = json.loads((folder / "analysis.json").read_text())
    run = ["checkpoint", "seed"]            # all rows of such a run, or pair of runs, are replaced
    tables = []
    if "spectrum" in found or "amplification" in found:
        tables.append(("", list(map(flat, found["records"])), run))
    if "subspace" in found:
        tables.append(("_pairs", pair_rows(found["subspace"]), ["checkpoint", "a", "b"]))
    if "intruders" in found:
        tables.append(("_intruders", intruder_rows(found["intruders"]), run))
    if "blocks" in found:
        tables.append(("_blocks", block_rows(found["blocks"]), run))
    for ending, rows, key in tables:
        update_csv(rows, Path(f"{prefix}{ending}.csv"), key)


def flat(record):
    """{"a": {"b": 1}} as {"a.b": 1}. Lists are left out, except the singular values of one ΔW."""
    row = {}
    for key, value in record.items():
        if isinstance(value, dict):
            row |= {f"{key}.{inner}": v for inner, v in flat(value).items()}
        elif not isinstance(value, list) or (key == "S" and len(value) <= 8):
            row[key] = value
    return row


def pair_rows(records):
    """φ of the first direction and of all, for disjoint pairs of seeds: 0 and 1, 2 and 3, ..."""
    rows = []
    for record in records:
        seeds = sorted(map(int, re.findall(r"-seed(\d+)", f"{record['a']} {record['b']}")))
        if len(seeds) < 2 or seeds[0] % 2 == 0 and seeds[1] == seeds[0] + 1:
            row = {"checkpoint": record["pair"], "seed": seeds[0] if seeds else None,
                   "a": record["a"], "b": record["b"], "name": record["name"],
                   "target": record["name"].rpartition(".")[2]}
            for side in ("input", "output", "random"):
                row[f"{side}.first"], row[f"{side}.all"] = record[side]
            rows.append(row)
    return rows


def intruder_rows(records):
    """Mean over the matrices at ε = EPSILON, of the run and of a Gaussian ΔW."""
    by_run = {}
    for record in records:
        by_run.setdefault((record["checkpoint"], record["seed"]), []).append(record)
    rows = []
    for (checkpoint, seed), own in by_run.items():
        row = {"checkpoint": checkpoint, "seed": seed}
        for kind in ("real", "null"):
            row[kind] = mean(r[kind][r["x"].index(EPSILON)] for r in own)
        rows.append(row)
    return rows


def block_rows(records):
    """The largest and smallest share of a block, and φ of all directions of two blocks."""
    rows = []
    for record in records:
        row = {key: record[key] for key in ("checkpoint", "seed", "name", "n")}
        row |= {"largest": record["share"][0], "smallest": record["share"][-1]}
        for side in ("input", "output"):
            row |= {side: record[side][-1], f"null.{side}": record["null"][side][-1]}
        rows.append(row)
    return rows
