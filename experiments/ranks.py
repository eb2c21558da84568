"""
Other ranks of as many parameters as those AutoLoRA found, for `train.py --ranks`:

    python experiments/ranks.py FOUND.pt uniform|random|shuffled SEED OUT

uniform: the same rank everywhere, but for what does not divide; random: any ranks. Both stay below the found ranks'
number of parameters by less than what one more rank costs. shuffled: the found ranks, dealt out anew among the matrices
of one shape: if these do as well, the search has not found where the rank is needed.
"""
import random
import sys

import torch

if len(sys.argv) != 5:
    sys.exit(__doc__)
found, kind, seed, out = sys.argv[1:]
held = torch.load(found, weights_only=True)
ranks, tensors = held["adapter"]["ranks"], held["adapter"]["tensors"]
cost = {n: (tensors[f"{n}.A"].numel() + tensors[f"{n}.B"].numel()) // r for n, r in ranks.items()}     # of one more
budget, k = sum(cost[n] * r for n, r in ranks.items()), held["args"]["max_rank"]
rng, low = random.Random(int(seed)), budget // sum(cost.values())
if kind == "shuffled":
    new = {}
    for one in set(cost.values()):
        names = [n for n in ranks if cost[n] == one]
        new |= zip(names, rng.sample([ranks[n] for n in names], len(names)))
    new = {n: new[n] for n in ranks}
else:
    new = {n: low if kind == "uniform" else rng.randint(1, k) for n in ranks}
spent = lambda: sum(cost[n] * r for n, r in new.items())
while spent() > budget:
    new[rng.choice([n for n in new if new[n] > 1])] -= 1
while fit := [n for n in new if cost[n] <= budget - spent() and new[n] < (low + 1 if kind == "uniform" else k)]:
    new[rng.choice(fit)] += 1
print(f"{kind} ranks, {spent():,} of {budget:,} parameters: {' '.join(map(str, new.values()))}")
torch.save({"adapter": {"ranks": new, "layer": "LoRALinear"}}, out)
