"""
Does AutoLoRA's search find ranks that are known? Five layers, each asked for W x + ΔW x + noise, where ΔW has rank
0, 1, 2, 4 or 6 and singular values of 1. Prints and writes what the search of k = 8 candidates finds on the way, and as
a control what it would find if every β were a small random number.

    python experiments/planted.py            # seven minutes; results in experiments/results/planted.json
"""
import argparse
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.nn as nn

import autolora
import lora

PLANTED, K, D = (0, 1, 2, 4, 6), 8, 32
STEPS = (10, 30, 100, 300, 1000)


def search(seed, gate="softmax", hypergrad="forward", beta_lr=0.01, eta=0.1, rows=512, noise=0.3, lr=1e-2):
    """[{step, and a list over the layers of: rank, top (the largest a / Σa)}]."""
    torch.manual_seed(seed)
    model = nn.ModuleList([nn.Linear(D, D) for _ in PLANTED])
    x = torch.randn(2, len(PLANTED), rows, D)                           # training and validation rows of each layer
    y = noise * torch.randn(2, len(PLANTED), rows, D)
    for i, (linear, rank) in enumerate(zip(model, PLANTED)):
        U, V = (torch.linalg.qr(torch.randn(D, D))[0][:, :rank] for _ in range(2))
        y[:, i] += linear(x[:, i]).detach() + x[:, i] @ (U @ V.T).T
    lora.inject(model, rank=K, layer=autolora.AutoLoRALinear, alpha=float(K), gate=gate)
    layers = list(lora.adapters(model).values())
    omega, beta = [p for m in layers for p in (m.A, m.B)], [m.beta for m in layers]
    optimizer = torch.optim.AdamW([{"params": omega}, {"params": beta, "lr": beta_lr, "weight_decay": 0}], lr=lr)

    def losses(part):                                                   # layers have nothing to do with each other
        yield sum((m(x[part, i]) - y[part, i]).square().sum(1).mean() for i, m in enumerate(model))

    history = []
    for step in range(1, STEPS[-1] + 1):
        _, g, h = autolora.hypergradient(lambda: losses(0), lambda: losses(1), omega, beta, eta, hypergrad)
        for p, grad in zip([*omega, *beta], [*g, *h]):
            p.grad = grad
        optimizer.step()
        if step in STEPS:
            a = torch.stack([m.selection().detach() for m in layers])
            p = a.abs() / a.abs().sum(1, keepdim=True)
            history.append({"step": step, "rank": list(autolora.ranks(model).values()), "top": p.amax(1).tolist()})
    return history


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, default=5, help="how many (default %(default)s)")
    p.add_argument("--out", default=ROOT / "experiments/results/planted.json", help="file of the results")
    args = p.parse_args()
    runs = {"default": {}, "first-order": {"hypergrad": "first-order"}, "beta_lr 0.03": {"beta_lr": 0.03},
            "64 rows": {"rows": 64}, "sigmoid": {"gate": "sigmoid"}, "none": {"gate": "none"}}
    results = {}
    for name, settings in runs.items():
        seeds = [search(s, **settings) for s in range(args.seeds)]
        results[name] = {"settings": settings, "seeds": seeds}
        print(f"\n{name:13}  rank found (largest a), mean of {args.seeds} seeds, for a planted rank of")
        print(f"{'after steps':13}" + "".join(f"{r:>13}" for r in PLANTED))
        for i, step in enumerate(STEPS):
            cells = [(statistics.mean(s[i]["rank"][l] for s in seeds), statistics.mean(s[i]["top"][l] for s in seeds))
                     for l in range(len(PLANTED))]
            print(f"{step:13}" + "".join(f"{r:7.1f} ({top:.2f})" for r, top in cells))
    a = torch.softmax(1e-3 * torch.randn(100_000, K, dtype=torch.float64), 1)
    noise = (a >= 1 / K).sum(1).double()
    print(f"\ncontrol: with β at random the rank found is {noise.mean():.2f} ± {noise.std():.2f}")
    about = {"planted": PLANTED, "candidates": K, "width": D, "steps": STEPS, "torch": torch.__version__,
             "random_beta": {"mean": noise.mean().item(), "std": noise.std().item()}}
    Path(args.out).write_text(json.dumps(about | {"runs": results}) + "\n")


if __name__ == "__main__":
    main()
