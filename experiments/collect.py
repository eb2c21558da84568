"""
What the finished runs of a folder came to, as a CSV with a row for each:

    python experiments/collect.py out/nano experiments/results/nano_runs.csv

Columns such as arith.exact.before say task, measure and when; `mean` is over the run's tasks. What
does not belong to a run's method is empty. With --samples FILE, the runs' answers to their first
held-out prompts go there.
"""
import argparse
import csv
import json
import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support import checkpoint, tasks

COMMON = "method model data seed lr steps batch_size"
OWN = {
    "full": "",
    "lora": "targets rank",
    "multilora": "targets rank n_blocks scaling",
    "autolora": "targets rank search_steps hypergrad beta_lr",
}
FIRST = f"name {COMMON} {OWN['multilora']} {OWN['autolora']} ranks parameters".split()


def row_of(name, saved, settings):
    """The settings and results of one run."""
    row = {"name": name}
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
    return row | results(saved["before"], saved["after"])


def results(before, after):
    """{"TASK.MEASURE.WHEN": value} of what evaluate.py found, and the means over the tasks."""
    means, tasks = {}, {}
    for measure in ("loss", "exact"):
        for when, found in (("before", before), ("after", after)):
            values = {task: r[measure] for task, r in found.items() if measure in r}
            if values:
                means[f"mean.{measure}.{when}"] = mean(values.values())
            for task, value in values.items():
                tasks.setdefault(task, {})[f"{task}.{measure}.{when}"] = value
    row = means
    for columns in tasks.values():
        row |= columns
    return row


def scores(path):
    """The results of measure.py and of `e2e.py score` for a checkpoint and for its base model."""
    row, test = {}, path.with_name(f"{path.stem}-test.json")
    if test.exists():
        row = {f"test.{name}": value for name, value in json.loads(test.read_text()).items()}
    for when in ("score", "untrained", "beam"):
        file = path.with_name(f"{path.stem}-{when}.json")
        if file.exists():
            found = json.loads(file.read_text())
            for measure in ("valid_loss", "bleu", "slots", "text_loss"):
                row[f"{when}.{measure}"] = found.get(measure)
    return row


def cell(value):
    """As text: lists with spaces between, numbers to six digits."""
    if isinstance(value, list):
        return " ".join(map(cell, value))
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else str(value)


def write(rows, path, columns=()):
    """A CSV of these rows: first `columns`, then whatever else is in them."""
    columns = dict.fromkeys(columns)
    for row in rows:
        columns |= dict.fromkeys(row)
    with open(path, "w", newline="") as f:
        out = csv.DictWriter(f, columns, lineterminator="\n")
        out.writeheader()
        for row in rows:
            out.writerow({name: cell(value) for name, value in row.items()})


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path, help="with train.py's checkpoints")
    p.add_argument("csv", type=Path, help="to write")
    p.add_argument("--samples", metavar="FILE", type=Path, help="JSON to write")
    args = p.parse_args(argv)
    rows, samples = [], {}
    for path in sorted(args.folder.glob("*.pt")):
        saved, settings = checkpoint.open_run(path)
        if saved["after"] is not None:
            rows.append(row_of(path.stem, saved, settings) | scores(path))
            samples[path.stem] = saved["samples"]
    write(rows, args.csv, FIRST)
    if args.samples:
        args.samples.write_text(json.dumps(samples, indent=1, ensure_ascii=False) + "\n")
    print(f"{len(rows)} runs in {args.csv}")


if __name__ == "__main__":
    main()
