"""
Other ranks of as many parameters as those that AutoLoRA found, for train.py --ranks_from:

    python experiments/ranks.py FOUND.pt uniform|random|shuffled|chance SEED OUT.pt
    python experiments/ranks.py FOUND.pt null SEED OUT.pt --from NULL.pt

uniform     the same rank everywhere, but for what does not divide
random      any ranks from 1 to k
shuffled    the found ranks, dealt out anew among the matrices of one shape: if these do as well,
            the search has not found where the rank is needed
chance      what a search that has learned nothing would find: with every β a small random number
            about half of the k candidates reach 1/k
null        the ranks that the search of NULL.pt found

All but the shuffled are lowered or raised here and there, at random, until they stay below the
found ranks' number of parameters by less than one more rank costs.
"""
import argparse
import math
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import lora
from support import adapter_state, checkpoint


def spent(ranks, cost):
    """How many parameters these ranks have; `cost` is each matrix's for one more rank."""
    total = 0
    for name, r in ranks.items():
        total += cost[name] * r
    return total


def shuffled(found, cost, dice):
    new = dict(found)
    for shape in set(cost.values()):
        names = [name for name in found if cost[name] == shape]
        ranks = [found[name] for name in names]
        new.update(zip(names, dice.sample(ranks, len(ranks))))
    return new


def random_ranks(found, k, dice):
    new = {}
    for name in found:
        new[name] = dice.randint(1, k)
    return new


def spend(ranks, most, budget, cost, dice):
    """Lower some of these ranks and raise some, up to `most`, until the budget is spent."""
    while spent(ranks, cost) > budget:
        high = [name for name in ranks if ranks[name] > 1]
        ranks[dice.choice(high)] -= 1
    while True:
        left = budget - spent(ranks, cost)
        fit = [name for name in ranks if cost[name] <= left and ranks[name] < most]
        if not fit:
            return ranks
        ranks[dice.choice(fit)] += 1


def chance_ranks(found, k, dice):
    new = {}
    for name in found:
        a = [math.exp(1e-3 * dice.gauss(0, 1)) for _ in range(k)]
        new[name] = max(1, sum(each >= sum(a) / k for each in a))
    return new


def deal(found, kind, cost, k, dice, null=None):
    """{name: rank} of that kind, of as many parameters as those `found`."""
    budget = spent(found, cost)
    if kind == "shuffled":
        return shuffled(found, cost, dice)
    if kind == "uniform":
        low = budget // sum(cost.values())
        return spend(dict.fromkeys(found, low), low + 1, budget, cost, dice)
    if kind == "null":
        new = dict(null)
    else:
        new = {"random": random_ranks, "chance": chance_ranks}[kind](found, k, dice)
    return spend(new, k, budget, cost, dice)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("found", help="a finished run of --method autolora")
    p.add_argument("kind", choices=("uniform", "random", "shuffled", "chance", "null"))
    p.add_argument("seed", type=int)
    p.add_argument("out", type=Path, help="an adapter of the new ranks, untrained")
    p.add_argument("--from", dest="null", metavar="NULL.pt", help="another such run, of null")
    args = p.parse_args(argv)
    if (args.kind == "null") != (args.null is not None):
        p.error("null, and only that, needs --from")
    saved, settings = checkpoint.open_run(args.found)
    found, cost, null = checkpoint.read_ranks(args.found, saved["base"]), {}, None
    if args.kind == "null":
        null = checkpoint.read_ranks(args.null, saved["base"])
    for name, own in saved["adapter"]["tensors"].items():
        cost[name] = own["A"].size(1) + own["B"].size(0)
    new = deal(found, args.kind, cost, settings.rank, random.Random(args.seed), null)
    model = lora.inject(checkpoint.start_model(settings, "cpu"), rank=new)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write({"adapter": adapter_state.state_dict(model)}, args.out)
    print(f"{args.kind} ranks, {spent(new, cost):,} of {spent(found, cost):,} parameters:")
    print(*new.values())


if __name__ == "__main__":
    main()
