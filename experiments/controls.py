"""
train.py with one change, for controls that have no flag in train.py.

    python experiments/controls.py --layer learned-s --rank 8 --out out/a.pt
    python experiments/controls.py --ranks uniform --found out/autolora.pt --seed 0 --out out/b.pt

--layer learned-s       LoRA whose α/r is learned: the first of MultiLoRA's changes alone
--layer random-b        LoRA whose B is initialised like A: the second of them alone
--layer fixed-scale     LoRA with the scale α/8 at every rank, so that the rank does not change it
--permute_labels        AutoLoRA with permuted labels in the rows for β: a search without a signal
--ranks KIND            LoRA with the same number of parameters as the run FOUND, and these ranks:
    uniform             the same rank everywhere, or one more where parameters are left
    random              random ranks from 1 to k
    shuffled            the ranks found, shuffled among the matrices of one shape
    chance              the ranks that an untrained β would give, about k/2
    null                the ranks of NULL, a search with --permute_labels

Ranks other than the shuffled ones are raised or lowered at random until the number of parameters
fits. Every other flag goes to train.py.
"""
import math
import random
from dataclasses import replace

import results          # puts the repository's root on sys.path

import torch
import torch.nn as nn

import lora
import train
from support import adapter_state, checkpoint, cli, data

K = 8
KINDS = ("uniform", "random", "shuffled", "chance", "null")


class LearnedScale(lora.LoRALinear):
    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.s = nn.Parameter(torch.full_like(self.B[0, :1], self.alpha / self.rank))

    def scale(self):
        return self.s


class RandomB(lora.LoRALinear):
    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        nn.init.kaiming_uniform_(self.B, a=math.sqrt(5))


class FixedScale(lora.LoRALinear):
    def scale(self):
        return self.alpha / K


LAYERS = {"learned-s": LearnedScale, "random-b": RandomB, "fixed-scale": FixedScale}
adapter_state.LAYERS.update({layer.__name__: layer for layer in LAYERS.values()})
split_for_search = data.split_for_search        # the originals of what main replaces
read_ranks = checkpoint.read_ranks


def permuted_split(tasks, share, seed):
    """data.split_for_search, with the labels permuted within each task of the second part."""
    first, second = split_for_search(tasks, share, seed)
    permuted = []
    for task in second:
        labels = [row.ids[row.prompt_len:] for row in task.train]
        random.Random(seed).shuffle(labels)
        rows = []
        for row, label in zip(task.train, labels):
            rows.append(data.Row(row.ids[:row.prompt_len] + label, row.prompt_len))
        permuted.append(replace(task, train=rows))
    return first, permuted


def other_ranks(found, kind, cost, k, rng, null=None):
    """{name: rank} of that kind; `cost`: the parameters that one more rank adds to a matrix."""
    budget = total(found, cost)
    if kind == "shuffled":
        return shuffled(found, cost, rng)
    if kind == "uniform":
        low = budget // sum(cost.values())
        return fit(dict.fromkeys(found, low), low + 1, budget, cost, rng)
    if kind == "null":
        ranks = dict(null)
    else:
        ranks = {}
        for name in found:
            ranks[name] = rng.randint(1, k) if kind == "random" else chance_rank(k, rng)
    return fit(ranks, k, budget, cost, rng)


def total(ranks, cost):
    return sum(rank * cost[name] for name, rank in ranks.items())


def shuffled(found, cost, rng):
    new = dict(found)
    for shape in set(cost.values()):
        names = [name for name in found if cost[name] == shape]
        ranks = list(map(found.get, names))
        new.update(zip(names, rng.sample(ranks, len(ranks))))
    return new


def chance_rank(k, rng):
    """How many of k selection variables reach 1/k if β is small and random."""
    a = [math.exp(1e-3 * rng.gauss(0, 1)) for _ in range(k)]
    return max(1, sum(each >= sum(a) / k for each in a))


def fit(ranks, largest, budget, cost, rng):
    """Lower ranks at random until they cost at most the budget, then raise them while it lasts."""
    while total(ranks, cost) > budget:
        above_one = [name for name in ranks if ranks[name] > 1]
        ranks[rng.choice(above_one)] -= 1
    while True:
        left = budget - total(ranks, cost)
        candidates = [name for name in ranks if cost[name] <= left and ranks[name] < largest]
        if not candidates:
            return ranks
        ranks[rng.choice(candidates)] += 1


def ranks_of_kind(args, seed):
    """The ranks of args.ranks, in place of those that train.py reads from the run FOUND."""
    saved, settings = checkpoint.open_run(args.found)
    found = read_ranks(args.found, saved["base"])
    null = args.null and read_ranks(args.null, saved["base"])
    cost = {}
    for name, own in saved["adapter"]["tensors"].items():
        cost[name] = own["A"].size(1) + own["B"].size(0)
    ranks = other_ranks(found, args.ranks, cost, settings.rank, random.Random(seed), null)
    print(f"{args.ranks} ranks, {total(ranks, cost):,} of {total(found, cost):,} parameters")
    return ranks


def main(argv=None):
    p = cli.parser(__doc__, "python experiments/controls.py [options]")
    p.add_argument("--layer", choices=LAYERS)
    p.add_argument("--permute_labels", action="store_true")
    p.add_argument("--ranks", choices=KINDS)
    p.add_argument("--found", help="a finished run of --method autolora")
    p.add_argument("--null", help="another one, for --ranks null")
    args, flags = p.parse_known_args(argv)
    if args.ranks and not args.found or args.ranks == "null" and not args.null:
        p.error("--ranks needs --found, and --ranks null also needs --null")
    if args.ranks and "--resume" not in flags:
        flags += ["--ranks_from", f"{args.found} ({args.ranks})"]
        settings, _ = train.parse(flags)
        with cli.one_line_errors():
            ranks = ranks_of_kind(args, settings.seed)
        checkpoint.read_ranks = lambda path, base: ranks
    if args.layer:
        train.METHODS["lora"] = replace(train.METHODS["lora"], layer=LAYERS[args.layer])
    if args.permute_labels:
        data.split_for_search = permuted_split
    return train.main(flags)


if __name__ == "__main__":
    cli.run_main(main)
