"""
The files in experiments/results: how runs.py writes them, and how claims.py and pages.py read them.

    nano_runs.csv, ...          a row for each finished run
    STUDY.csv                   a row for each matrix that analyze.py studied
    STUDY_pairs.csv             φ of two runs, for each matrix
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
EPSILON = 0.6           # a vector with no cosine of 0.6 to any of W's is an intruder

# Settings that all runs have, and those of one method
COMMON = "method model data seed lr steps batch_size"
OWN = {
    "full": "",
    "lora": "targets rank",
    "multilora": "targets rank n_blocks scaling",
    "autolora": "targets rank search_steps hypergrad beta_lr",
}
FIRST = f"name {COMMON} {OWN['multilora']} {OWN['autolora']} ranks parameters".split()


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


def phi(file, pair, which, target=""):
    """
    {first seed: mean over the matrices} of φ. `which` is a column such as input.first, and `target`
    selects matrices by the end of their names. `flatten` has kept disjoint pairs of seeds.
    """
    values = {}
    for row in select(read_csv(file), pair=pair):
        if row["name"].endswith(target):
            first = min(seeds_of(row["a"], row["b"]))
            values.setdefault(first, []).append(row[which])
    return {first: mean(values[first]) for first in sorted(values)}


def deviation(values):
    """The standard deviation; 0 of a single value."""
    return stdev(values) if len(values) > 1 else 0.0


def seeds_of(*names):
    return sorted(map(int, re.findall(r"-seed(\d+)", " ".join(names))))


# Writing -----------------------------------------------------------------------------------------

def write_csv(rows, path, columns=()):
    """A CSV file with these columns first, then all others that occur in the rows."""
    columns = dict.fromkeys(columns)
    for row in rows:
        columns |= dict.fromkeys(row)
    part = path.with_suffix(".part")        # an interrupted call leaves the old file
    with open(part, "w", newline="") as f:
        out = csv.DictWriter(f, columns, lineterminator="\n")
        out.writeheader()
        for row in rows:
            out.writerow({name: cell(value) for name, value in row.items()})
    part.replace(path)


def update_csv(rows, path, key, columns=()):
    """The same, but rows of an earlier file remain unless a new row has the same `key` columns."""
    new = {tuple(cell(row[name]) for name in key) for row in rows}
    old = []
    if path.exists():
        with open(path, newline="") as f:
            for row in csv.DictReader(f):
                if tuple(row[name] for name in key) not in new:
                    old.append(row)
    write_csv(old + rows, path, columns)


def cell(value):
    """As text: lists with spaces in between, numbers with six digits."""
    if isinstance(value, list):
        return " ".join(map(cell, value))
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else str(value)


def collect(folder, path):
    """Write a row for each finished run in a folder of checkpoints. Returns the runs' samples."""
    from support import checkpoint
    rows = []
    samples = {}
    for file in sorted(folder.glob("*.pt")):
        saved, settings = checkpoint.open_run(file)
        if saved["after"] is not None:
            rows.append(run_row(file, saved, settings))
            samples[file.stem] = saved["samples"]
    update_csv(rows, path, ["name"], FIRST)
    print(f"{len(rows)} runs written to {path}")
    return samples


def collect_sums(folder, path):
    """Write a row for each sum of adapters that measure.py has measured."""
    rows = []
    for file in sorted(folder.glob("*-summed-seed*.json")):
        row = {"name": file.stem}
        for measure, value in json.loads(file.read_text()).items():
            row[measure if measure == "weight" else f"test.{measure}"] = value
        rows.append(row)
    if rows:
        update_csv(rows, path, ["name"])


def run_row(file, saved, settings):
    """Settings and results of one run, with what measure.py and e2e.py have written beside it."""
    row = {"name": file.stem}
    for setting in f"{COMMON} {OWN[settings.method]}".split():
        row[setting] = getattr(settings, setting)
    row["data"] = [Path(task).name for task in settings.data]
    row["parameters"] = saved["parameters"]
    if "adapter" in saved:
        ranks = [len(own["A"]) for own in saved["adapter"]["tensors"].values()]
        if min(ranks) < max(ranks):
            row["ranks"] = ranks
    if settings.ranks_from:
        del row["rank"]
    row |= result_columns(saved["before"], saved["after"])
    commit = file.with_suffix(".commit")
    if commit.exists():
        row["commit"] = list(dict.fromkeys(commit.read_text().split()))     # two if resumed later
    for kind in ("test", "score", "untrained", "beam"):
        measured = file.with_name(f"{file.stem}-{kind}.json")
        if measured.exists():
            for measure, value in json.loads(measured.read_text()).items():
                if isinstance(value, (int, float)):
                    row[f"{kind}.{measure}"] = value
    return row


def result_columns(before, after):
    """{"TASK.MEASURE.WHEN": value}, and the means over the tasks as task `mean`."""
    row = {}
    for measure in ("loss", "exact"):
        for when, found in (("before", before), ("after", after)):
            values = {task: r[measure] for task, r in found.items() if measure in r}
            if values:
                row[f"mean.{measure}.{when}"] = mean(values.values())
            for task, value in values.items():
                row[f"{task}.{measure}.{when}"] = value
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
        tables.append(("_pairs", pair_rows(found["subspace"]), ["pair", "a", "b"]))
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
        seeds = seeds_of(record["a"], record["b"])
        if len(seeds) < 2 or seeds[0] % 2 == 0 and seeds[1] == seeds[0] + 1:
            row = flat(record)
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
