"""
The numbers in an analysis.json that is analyze.py's, as tables with a row for each matrix:

    python experiments/flatten.py out/nano/nano_methods experiments/results/nano_methods

writes ..._methods.csv, with the Gaussian's numbers in columns such as null.top1; _pairs.csv with φ
of the first direction of each and of all; _intruders.csv at ε = 0.6, means over matrices. What is
only drawn is left out.
"""
import json
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
        row = flat(record)
        for side in ("input", "output", "random"):
            row[f"{side}.first"], row[f"{side}.all"] = record[side]
        rows.append(row)
    return rows


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
