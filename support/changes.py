"""
What analyze.py studies: the ΔW of checkpoints and adapters, beside the W that they were added to.
"""
import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import torch

from support import checkpoint


def load(paths, device="cpu", base=None, alpha=None):
    """
    Checkpoints of train.py, or other people's adapters, all of one base. Each has what its file
    has, and path, label, id (how its records begin), W and delta: {name: W}, which may lack some
    for such an adapter, {name: ΔW or its factors (B, A)}; scaled: is the size of ΔW known? chosen:
    did the user say which ΔW? Raises ValueError or OSError for other files.
    """
    found, W, mark = [], {}, None
    for path in map(Path, paths):
        saved, settings = checkpoint.open_run(path, alpha=alpha)
        if settings.scratch:
            raise ValueError(f"{path}: pretrained from scratch, there is no base to compare with")
        if not W and (base or settings.model and saved["base"]):
            W, mark = checkpoint.matrices(base or settings.model, device)
        if saved["base"] not in (mark, None):
            raise ValueError(f"{path}: was trained on another base than {base or settings.model}; "
                             "--base says where its own is")
        c = SimpleNamespace(**saved | {"settings": settings}, path=path, delta={}, svd={})
        c.label, c.scaled, c.chosen = label_of(path), True, False
        name, seed = re.fullmatch(r"(.+?)(?:-seed(\d+))?", c.label).groups()
        c.id = {"checkpoint": name, "seed": seed, "method": settings.method}
        settings.seed = seed if settings.seed is None else settings.seed
        if settings.method == "full":
            for name in W:
                c.delta[name] = c.model[f"{name}.weight"].to(device) - W[name]
        else:
            for name in sorted(c.adapter["tensors"], key=layer_of):
                own, scale = c.adapter["tensors"][name], c.adapter["scale"][name]
                B = own["B"] * (1 if scale is None else scale)
                c.delta[name] = B.to(device), own["A"].to(device)
                c.scaled &= scale is not None
        found.append(c)
    for c in found:
        c.W = W
    check(found)
    return found


def label_of(path):
    path = path.absolute()
    if path.stem == "adapter_model":                    # so peft calls all: the folder says more
        path = path.parent
    return path.name if path.is_dir() else path.stem


def target_of(name):
    return name.split(".")[-1]


def layer_of(name):
    """The first number between the dots of a name."""
    return int(next((part for part in name.split(".") if part.isdecimal()), 0))


def check(checkpoints):
    """ValueError where two of one name are no seeds of one setting, or the shapes do not fit."""
    free = dict.fromkeys(["out", "resume", "ranks", "device", "seed"])
    for a, b in itertools.combinations(checkpoints, 2):
        same = vars(a.settings) | free == vars(b.settings) | free
        same &= a.settings.seed != b.settings.seed
        same &= (a.phase, a.step) == (b.phase, b.step)
        if a.id["checkpoint"] == b.id["checkpoint"] and not same:
            raise ValueError(f"{a.path} and {b.path} have one name, but are not two seeds of one "
                             "setting: rename one")
    shapes = {name: tuple(w.shape) for name, w in checkpoints[0].W.items()}
    for c in checkpoints:
        for name, delta in c.delta.items():
            ends = (delta, delta.T) if torch.is_tensor(delta) else (delta[0], delta[1].T)
            shape = tuple(map(len, ends))
            if shapes.setdefault(name, shape) != shape:
                raise ValueError(f"{c.path}: ΔW of {name} is {shape}, but W, or ΔW of another, "
                                 f"{shapes[name]}: they are not of one base")


def choose(c, flag, wanted, part):
    """Keep the ΔW whose `part` (target_of, layer_of) is wanted. ValueError for one that is none."""
    c.chosen |= bool(wanted)
    there = dict.fromkeys(map(part, c.delta))
    for t in wanted or []:
        if t not in there:
            raise ValueError(f"--{flag} {t}: {c.path} has no such ΔW; choose from "
                             f"{' '.join(map(str, there))}")
    for name in list(c.delta):
        if part(name) not in (wanted or there):
            del c.delta[name]
