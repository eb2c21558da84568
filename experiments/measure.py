"""
Measure runs on the built-in tasks, on a test set of rows that were never used for tuning.

    python experiments/measure.py out/nano/lora-seed0.pt            # writes lora-seed0-test.json
    python experiments/measure.py out/nano/lora-instruct-seed0.pt --skills
    python experiments/measure.py --sum out/sum.json out/nano/lora-{arith,infer}-seed0.pt

The test set has 200 rows of each task that are neither training nor validation rows; for `facts`,
it has the training rows, because this task asks for what was taught. --skills adds the loss on the
base model's skills, --text the loss on held-out windows of a plain text: both measure forgetting.
--sum measures the sum of several adapters, Σ w ΔW, with the weight w of lowest validation loss.
"""
import json
import random
from pathlib import Path
from statistics import mean

import controls         # so that its layers can be loaded
from evaluate import evaluate
from support import adapter_state, checkpoint, cli, data, distributed
from support.tasks import MIXTURE, builtin

ROWS = 200
WINDOW = 512            # tokens of a window of plain text
WEIGHTS = (0.2, 0.3, 0.4, 0.6, 0.8, 1.0)


def test_rows(name):
    """Rows of a task of the mixture that occur in neither of its two parts."""
    if name not in MIXTURE:
        raise ValueError(f"{name} has no test rows: choose a run on {' '.join(MIXTURE)}")
    train, valid = builtin(name)
    if name == "facts":
        return valid
    known = {prompt for prompt, _ in train + valid}
    rng = random.Random(f"test {name}")
    rows = {}
    while len(rows) < ROWS:
        prompt, answer = MIXTURE[name](rng)
        if prompt not in known:
            rows[prompt] = answer
    return list(rows.items())


def every_nth(items, count):
    """`count` items at equal distances. Results files contain losses on these rows, so they stay
    the same whatever data.load selects."""
    return items[::max(1, len(items) // max(1, count))][:count]


class Measured:
    """A run whose model can be measured on several kinds of rows; it begins as the base model."""

    def __init__(self, path, base=None, alpha=None, device="cpu"):
        changes = {"model": base} if base else {}
        self.saved, self.settings = checkpoint.open_run(path, changes, alpha)
        self.device = distributed.pick_device(device)
        self.model = checkpoint.start_model(self.settings, self.device)
        self.tok = data.tokenizer(self.model.config.vocab_size)

    def evaluate(self, tasks):
        return evaluate(self.model, tasks, self.settings, self.device)

    def load(self, names, rows, block_size=None):
        """The tasks, with `rows` validation rows each."""
        block_size = block_size or self.settings.block_size
        tasks = data.load(names, self.tok, block_size, eval_rows=1_000_000)
        for task in tasks:
            task.valid = every_nth(task.valid, rows)
        return tasks

    def loss(self, tasks):
        """The mean loss over tasks, on their validation rows."""
        return mean(r["loss"] for r in self.evaluate(tasks).values())

    def test(self, names):
        """{"mean.loss": ..., "arith.exact": ...} on the test rows of these tasks."""
        tasks = []
        for name in names:
            rows = [data.encode(self.tok, *row) for row in test_rows(name)]
            tasks.append(data.Task(name, [], rows))
        found = self.evaluate(tasks)
        row = {}
        for measure in ("loss", "exact"):
            row[f"mean.{measure}"] = mean(r[measure] for r in found.values())
            for name, result in found.items():
                row[f"{name}.{measure}"] = result[measure]
        return row


def measure(path, skills=False, text=None):
    run = Measured(path)
    checkpoint.restore(run.saved, run.model)
    row = run.test(MIXTURE if run.settings.data == ["mixture"] else run.settings.data)
    if text:
        row["text.loss"] = run.loss(run.load([text], 50, WINDOW))
    if skills:
        row["skills.loss"] = run.loss(run.load(["skills"], 100))
    return row


def measure_sum(paths):
    """The sum of these runs' adapters, on the mixture."""
    run = Measured(paths[0])
    tasks = data.load(["mixture"], run.tok, run.settings.block_size, run.settings.eval_rows)
    adapters = [checkpoint.open_run(path)[0]["adapter"] for path in paths]

    def loss_with(weight):
        state = adapter_state.combine(adapters, [weight] * len(adapters))
        adapter_state.load_state_dict(run.model, state)
        return run.loss(tasks)

    best = min(WEIGHTS, key=loss_with)
    loss_with(best)                             # the model has this weight again
    return {"weight": best, **run.test(MIXTURE)}


def main(argv=None):
    p = cli.parser(__doc__, "python experiments/measure.py CKPT ... [options]")
    p.add_argument("checkpoints", nargs="+", type=Path, metavar="CKPT", help="runs of train.py")
    p.add_argument("--skills", action="store_true", help="add the loss on the base model's skills")
    p.add_argument("--text", metavar="FILE", help="add the loss on held-out windows of a .txt file")
    p.add_argument("--sum", type=Path, metavar="JSON", help="write the measures of their sum here")
    args = p.parse_args(argv)
    with cli.one_line_errors():
        if args.sum:
            return write(args.sum, measure_sum(args.checkpoints))
        for path in args.checkpoints:
            row = measure(path, args.skills, args.text)
            write(path.with_name(f"{path.stem}-test.json"), row)


def write(path, row):
    if path.exists() and "mean.exact" not in json.loads(path.read_text()):
        raise ValueError(f"{path} contains results of e2e.py: move it away")
    path.write_text(json.dumps(row, indent=1) + "\n")
    print(f"{path}: loss {row['mean.loss']:.3f}, exact match {row['mean.exact']:.3f}")


if __name__ == "__main__":
    cli.run_main(main)
