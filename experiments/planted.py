"""
Does AutoLoRA's search find ranks that are known? Five layers of width 32 learn W x + ΔW x + noise,
where ΔW has rank 0, 1, 2, 4 or 6 and singular values of 1. The search has k = 8 candidates.

    python experiments/planted.py                                        # nine minutes on two cores
    python experiments/planted.py --seeds 1 --steps 10 --out planted.csv    # seconds
"""
from pathlib import Path

import results          # puts the repository's root on sys.path

import torch
import torch.nn as nn

import autolora
import lora
from claims import PLANTED_RANKS
from support import cli

K = 8
WIDTH = 32
NOISE = 0.3
FIRST_SEED = 100        # seeds 0 to 14 were used to decide after how many steps a search is stopped
STEPS = (10, 30, 100, 300, 1000)        # the ranks are read after these
SEARCHES = {
    "default": {},
    "first-order": {"how": "first-order"},
    "beta_lr 0.03": {"beta_lr": 0.03},
    "64 rows": {"rows": 64},
    "sigmoid": {"gate": "sigmoid"},
    "none": {"gate": "none"},
}


def plant(model, rows):
    """x and y (2, layers, rows, WIDTH): a part on which A and B are trained, and one for β."""
    x = torch.randn(2, len(model), rows, WIDTH)
    y = NOISE * torch.randn_like(x)
    for i, (linear, rank) in enumerate(zip(model, PLANTED_RANKS)):
        U = torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0][:, :rank]
        V = torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0][:, :rank]
        y[:, i] += linear(x[:, i]).detach() + x[:, i] @ (U @ V.T).T
    return x, y


def search(seed, steps, how="forward", beta_lr=0.01, rows=512, gate="softmax", eta=0.1, lr=0.01):
    """[a row of the results after each of STEPS], up to `steps`."""
    torch.manual_seed(seed)
    model = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in PLANTED_RANKS])
    x, y = plant(model, rows)
    lora.inject(model, rank=K, layer=autolora.AutoLoRALinear, alpha=float(K), gate=gate)
    omega = []
    beta = []
    for m in model:
        omega += [m.A, m.B]
        beta.append(m.beta)
    optimizer = torch.optim.AdamW([{"params": omega},
                                   {"params": beta, "lr": beta_lr, "weight_decay": 0}], lr=lr)

    def losses(part):
        """The sum of the layers' losses, which are independent of each other."""
        errors = [m(x[part, i]) - y[part, i] for i, m in enumerate(model)]
        yield sum(error.square().sum(1).mean() for error in errors)

    found = []
    for step in range(1, steps + 1):
        autolora.search_gradients(lambda: losses(0), lambda: losses(1), omega, beta, eta, how)
        optimizer.step()
        if step in STEPS:
            row = {"seed": seed, "step": step}
            for planted, rank in zip(PLANTED_RANKS, autolora.ranks(model).values()):
                row[f"rank of {planted}"] = rank
            found.append(row)
    return found


def main(argv=None):
    p = cli.parser(__doc__, "python experiments/planted.py [options]")
    p.add_argument("--seeds", type=int, default=20, help="number of seeds (default %(default)s)")
    p.add_argument("--steps", type=int, default=STEPS[-1], help="per search (default %(default)s)")
    p.add_argument("--out", type=Path, default=results.RESULTS / "planted.csv")
    args = p.parse_args(argv)
    rows = []
    for name, settings in SEARCHES.items():
        for seed in range(FIRST_SEED, FIRST_SEED + args.seeds):
            found = search(seed, args.steps, **settings)
            rows += [{"search": name, **row} for row in found]
        print(f"{name}: {args.seeds} seeds")
    results.write_csv(rows, args.out)


if __name__ == "__main__":
    main()
