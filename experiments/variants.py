"""
train.py with one thing changed, for controls that no flag makes:

    python experiments/variants.py learned-s --rank 8 --steps 300 --out out/a.pt

learned-s       LoRA whose α/r is learned: one of MultiLoRA's three changes alone
random-b        LoRA whose B starts at random too, which is then off the base at the start: another
fixed-scale     LoRA of any ranks whose scale is α/k, k = 8, not α/r: in AutoLoRA a layer's rank
                changes its scale as well
shuffled-rows   --method autolora, whose β learns from rows with the answers of other rows: the null
                of the whole search
"""
import math
import random
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn as nn

import lora
import train
from support import cli, data

K = 8
OWN = ("alpha", "dropout")


class LearnedScale(lora.LoRALinear):
    """s = α/r at the start, and learned."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.s = nn.Parameter(torch.full_like(self.B[0, :1], self.alpha / self.rank))

    def scale(self):
        return self.s


class RandomB(lora.LoRALinear):
    """B starts as MultiLoRA's do."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        nn.init.kaiming_uniform_(self.B, a=math.sqrt(5))


class FixedScale(lora.LoRALinear):
    """s = α/k, whatever r is."""

    def scale(self):
        return self.alpha / K


def shuffled_halves(tasks, share, seed):
    """As data.split_for_search, but in the second part the answers are those of other rows of the task."""
    first, second = data_halves(tasks, share, seed)
    shuffled = []
    for task in second:
        answers = [row.ids[row.prompt_len:] for row in task.train]
        random.Random(seed).shuffle(answers)
        rows = []
        for row, answer in zip(task.train, answers):
            rows.append(data.Row(row.ids[:row.prompt_len] + answer, row.prompt_len))
        shuffled.append(replace(task, train=rows))
    return first, shuffled


LAYERS = {"learned-s": LearnedScale, "random-b": RandomB, "fixed-scale": FixedScale}
data_halves = data.split_for_search


def main(argv):
    kind, *flags = argv or [""]
    if kind in LAYERS:
        _, own, *rates = train.METHODS["lora"]
        train.METHODS["lora"] = (LAYERS[kind], own, *rates)
    elif kind == "shuffled-rows":
        data.split_for_search = shuffled_halves
    else:
        sys.exit(__doc__)
    try:
        return train.main(flags)
    finally:
        train.METHODS["lora"] = (lora.LoRALinear, *train.METHODS["lora"][1:])
        data.split_for_search = data_halves


if __name__ == "__main__":
    cli.run_main(lambda: main(sys.argv[1:]))
