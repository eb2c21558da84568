"""
The numbers that are reported: runs of nano on rows that chose no setting.

    python experiments/measure.py out/nano/lora-seed?.pt [--skills] [--share 0/2]

Training holds out `valid` rows, by which learning rates and the like were chosen. These are 200
others of each task (of `facts`, which asks for what it has taught, the same). Into NAME-test.json
beside each checkpoint, which collect.py puts into its row; --skills adds the loss on the base's own
skills: what was forgotten. --share i/n takes every n-th checkpoint, for n processes.
"""
import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import variants         # so that their layers can be loaded
from evaluate import evaluate
from support import checkpoint, data, distributed
from support.tasks import MIXTURE, SKILLS, builtin

ROWS = 200
WINDOW = 512        # tokens of a window of plain text
MEASURES = "loss", "exact"


def test_rows(name):
    """Rows of a task of the mixture that are in neither part of it."""
    train, valid = builtin(name)
    if name == "facts":
        return valid
    known, rows, dice = {prompt for prompt, _ in train + valid}, {}, random.Random(f"test {name}")
    while len(rows) < ROWS:
        prompt, answer = MIXTURE[name](dice)
        if prompt not in known:
            rows[prompt] = answer
    return list(rows.items())


def test_task(name, tok):
    return data.Task(name, [], [data.encode(tok, *row) for row in test_rows(name)])


def means(found, measures=MEASURES):
    """Over the tasks."""
    return {key: sum(r[key] for r in found.values()) / len(found) for key in measures}


def of_test_rows(model, names, tok, settings, device):
    """{"mean.loss": ..., "arith.exact": ...} of these tasks."""
    tasks = [test_task(name, tok) for name in names]
    found, row = evaluate(model, tasks, tok, settings, device, generate=True), {}
    for name, result in [("mean", means(found)), *found.items()]:
        for key in MEASURES:
            row[f"{name}.{key}"] = result[key]
    return row


def measure(path, skills, text, device):
    """{"mean.loss": ..., "arith.exact": ..., "skills.loss": ...} of a checkpoint."""
    saved, settings = checkpoint.open_run(path)
    model = checkpoint.start_model(settings, device)
    checkpoint.restore(saved, model)
    tok = data.tokenizer(model.config.vocab_size)
    names = MIXTURE if settings.data == ["mixture"] else settings.data
    row = of_test_rows(model, names, tok, settings, device)
    if text:
        tasks = data.load([text], tok, WINDOW)
        row["text.loss"] = means(evaluate(model, tasks, tok, settings, device), ["loss"])["loss"]
    if skills:
        tasks = data.load(["skills"], tok, settings.block_size, 100)
        row["skills.loss"] = means(evaluate(model, tasks, tok, settings, device), ["loss"])["loss"]
    return row


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoints", nargs="+", type=Path)
    p.add_argument("--skills", action="store_true")
    p.add_argument("--text", metavar="FILE", help="add the loss on a .txt's held-out windows")
    p.add_argument("--share", default="0/1", metavar="I/N")
    args = p.parse_args(argv)
    i, n = map(int, args.share.split("/"))
    device = distributed.pick_device("cpu")
    for path in args.checkpoints[i::n]:
        out = path.with_name(f"{path.stem}-test.json")
        known = {}
        if out.exists() and out.stat().st_mtime > path.stat().st_mtime:
            known = json.loads(out.read_text())
        if not known or args.skills and "skills.loss" not in known:
            row = measure(path, args.skills, args.text, device)
            out.write_text(json.dumps(row, indent=1) + "\n")
            print(f"{path.stem}: exact match {row['mean.exact']:.3f}", flush=True)


if __name__ == "__main__":
    main()
