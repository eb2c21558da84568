"""
Does AutoLoRA's search find ranks that are known? Five layers, each asked for W x + ΔW x + noise,
where ΔW has rank 0, 1, 2, 4 or 6 and singular values of 1. Prints, and writes, what the search of
k = 8 candidates finds on the way; as a control, what random selection variables would.

    python experiments/planted.py                           # three minutes on an idle core
    python experiments/planted.py --seeds 1 --steps 10 --out planted.csv        # seconds
"""
import argparse
import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn as nn

import autolora
import lora
from collect import write
from results import PLANTED_RANKS, RESULTS, where

K, WIDTH, NOISE = 8, 32, 0.3
FIRST = 100             # seed: by those from 0 to 14 it was decided after how many steps to look
STEPS = (10, 30, 100, 300, 1000)                        # after which the ranks are read
SEARCHES = {
    "default": {},
    "first-order": {"how": "first-order"},
    "beta_lr 0.03": {"beta_lr": 0.03},
    "64 rows": {"rows": 64},
    "sigmoid": {"gate": "sigmoid"},
    "none": {"gate": "none"},
}


def plant(model, rows):
    """x and y of the layers (2, layers, rows, WIDTH): a part to train A and B on, and one for β."""
    x = torch.randn(2, len(model), rows, WIDTH)
    y = NOISE * torch.randn_like(x)
    for i, (linear, rank) in enumerate(zip(model, PLANTED_RANKS)):
        U = torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0][:, :rank]
        V = torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0][:, :rank]
        y[:, i] += linear(x[:, i]).detach() + x[:, i] @ (U @ V.T).T
    return x, y


def search(seed, steps, how="forward", beta_lr=0.01, rows=512, gate="softmax", eta=0.1, lr=0.01):
    """[a row of the results] after each of STEPS, up to `steps`."""
    torch.manual_seed(seed)
    model = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in PLANTED_RANKS])
    x, y = plant(model, rows)
    lora.inject(model, rank=K, layer=autolora.AutoLoRALinear, alpha=float(K), gate=gate)
    omega, beta, found = [], [], []
    for m in model:
        omega += [m.A, m.B]
        beta.append(m.beta)
    optimizer = torch.optim.AdamW([{"params": omega},
                                   {"params": beta, "lr": beta_lr, "weight_decay": 0}], lr=lr)

    def losses(part):
        """The layers' losses, which have nothing to do with each other, in one sum."""
        errors = [m(x[part, i]) - y[part, i] for i, m in enumerate(model)]
        yield sum(error.square().sum(1).mean() for error in errors)

    for step in range(1, steps + 1):
        autolora.search_gradients(lambda: losses(0), lambda: losses(1), omega, beta, eta, how)
        optimizer.step()
        if step in STEPS:
            found.append({"seed": seed, "step": step, **read(model)})
    return found


def read(model):
    """Each layer's rank, and the share of its largest selection variable."""
    row = {}
    for planted, rank in zip(PLANTED_RANKS, autolora.ranks(model).values()):
        row[f"rank of {planted}"] = rank
    for planted, m in zip(PLANTED_RANKS, model):
        a = autolora.selection(m.beta.detach(), m.gate).abs()
        row[f"top of {planted}"] = (a.max() / a.sum()).item()
    return row


def show(name, rows, seeds):
    print(f"\n{name:13}  rank found (largest a / Σa), mean of {seeds} seeds, for a planted rank of")
    print(f"{'after steps':13}", *(f"{planted:12}" for planted in PLANTED_RANKS))
    for step in STEPS:
        at, line = where(rows, step=step), f"{step:13}"
        for planted in PLANTED_RANKS:
            if at:
                rank = mean(row[f"rank of {planted}"] for row in at)
                top = mean(row[f"top of {planted}"] for row in at)
                line += f"{rank:7.1f} ({top:.2f})"
        print(line)


def control():
    """(100,000,): the ranks found where every β is a small random number."""
    torch.manual_seed(0)
    a = torch.softmax(1e-3 * torch.randn(100_000, K, dtype=torch.float64), 1)
    return (a >= 1 / K).sum(1).double()


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, default=20, help="how many (default %(default)s)")
    p.add_argument("--steps", type=int, default=STEPS[-1], help="of each (default %(default)s)")
    p.add_argument("--out", default=RESULTS / "planted.csv", help="file of the results")
    args = p.parse_args(argv)
    results = []
    for name, settings in SEARCHES.items():
        rows = []
        for seed in range(FIRST, FIRST + args.seeds):
            rows += search(seed, args.steps, **settings)
        show(name, rows, args.seeds)
        for row in rows:
            results.append({"search": name, **row})
    write(results, args.out)
    found = control()
    print(f"\ncontrol: with β at random the rank found is {found.mean():.2f} ± {found.std():.2f}")


if __name__ == "__main__":
    main()
