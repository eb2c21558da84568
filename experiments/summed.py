"""
Adapters of single tasks, added up: one adapter Σ w ΔW (adapter_state.combine) in the place of one that was
trained on the mixture.

    python experiments/summed.py out/nano experiments/results/nano_summed.csv

For each seed of LoRA's and MultiLoRA's runs on single tasks the weight w, one for all five, is that
of the lowest loss on held-out rows; the numbers are of measure.py's rows, which chose nothing.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import lora
from collect import write
from evaluate import evaluate
from measure import means, of_test_rows
from support import adapter_state, checkpoint, data, distributed
from support.tasks import MIXTURE

WEIGHTS = (0.2, 0.3, 0.4, 0.6, 0.8, 1.0)


def summed(paths, device):
    """{"weight": w, "test.mean.loss": ...} of the sum of these checkpoints' adapters."""
    runs = [checkpoint.open_run(path) for path in paths]
    adapters, settings = [saved["adapter"] for saved, _ in runs], runs[0][1]
    model = checkpoint.start_model(settings, device)
    tok = data.tokenizer(model.config.vocab_size)
    tasks = data.load(["mixture"], tok, settings.block_size, settings.eval_rows)

    def loss(w):
        adapter_state.load_state_dict(model, adapter_state.combine(adapters, [w] * len(adapters)))
        found = evaluate(model, tasks, tok, settings, device)
        return means(found, ["loss"])["loss"]

    best = min(WEIGHTS, key=loss)
    loss(best)                                                  # its adapter is the model's again
    found = of_test_rows(model, MIXTURE, tok, settings, device)
    return {"weight": best, **{f"test.{name}": value for name, value in found.items()}}


def main(folder, out):
    rows, device = [], distributed.pick_device("cpu")
    for method in ("lora", "multilora"):
        for first in sorted(Path(folder).glob(f"{method}-arith-seed?.pt")):
            paths = [first.with_name(first.name.replace("arith", task)) for task in MIXTURE]
            if not all(path.exists() for path in paths):
                continue
            row = {"name": first.stem.replace("arith", "summed"), **summed(paths, device)}
            print(f"{row['name']}: {row['weight']} of each, loss {row['test.mean.loss']:.3f}")
            rows.append(row)
    write(rows, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
