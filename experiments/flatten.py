"""
The numbers in an analysis.json that is analyze.py's, as tables with a row for each matrix:

    python experiments/flatten.py out/nano/nano_methods experiments/results/nano_methods

writes ..._methods.csv, with the Gaussian's numbers in columns such as null.top1; _pairs.csv with φ
of the first direction of each and of all, of seeds 0 and 1, of 2 and 3 ..., so that no seed counts
twice; _intruders.csv at ε = 0.6, means over matrices. What is only drawn is left out.
"""
import json
import re
import sys
from pathlib import Path
from statistics import mean

from collect import write

EPSILON = 0.6


def flat(record):
    """Without its lists, and with {"a": {"b": 1}} as {"a.b": 1}."""
    row = {}
    for key, value in record.items():
        if isinstance(value, dict):
            row |= {f"{key}.{inner}": v for inner, v in flat(value).items()}
        elif not isinstance(value, list):
            row[key] = value
    return row


def pairs(found):
    rows = []
    for record in found:
        if couple(record["a"], record["b"]):
            row = flat(record)
            for side in ("input", "output", "random"):
                row[f"{side}.first"], row[f"{side}.all"] = record[side]
            rows.append(row)
    return rows


def couple(a, b):
    """Whether these runs are of seeds 0 and 1, or 2 and 3, ...; or no runs of seeds at all."""
    seeds = sorted(int(seed) for seed in re.findall(r"-seed(\d+)", f"{a} {b}"))
    return len(seeds) < 2 or seeds[0] % 2 == 0 and seeds[1] == seeds[0] + 1


def intruders(found):
    by_checkpoint = {}
    for record in found:
        key = record["checkpoint"], record["seed"]
        by_checkpoint.setdefault(key, []).append(record)
    rows = []
    for (checkpoint, seed), records in by_checkpoint.items():
        row = {"checkpoint": checkpoint, "seed": seed}
        for kind in ("real", "null"):
            row[kind] = mean(r[kind][r["x"].index(EPSILON)] for r in records)
        rows.append(row)
    return rows


def main(folder, out):
    found = json.loads((Path(folder) / "analysis.json").read_text())
    write([flat(record) for record in found["records"]], f"{out}.csv")
    if "subspace" in found:
        write(pairs(found["subspace"]), f"{out}_pairs.csv")
    if "intruders" in found:
        write(intruders(found["intruders"]), f"{out}_intruders.csv")


if __name__ == "__main__":
    main(*sys.argv[1:])
