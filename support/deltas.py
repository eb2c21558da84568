"""
What analyze.py studies: the ΔW of checkpoints and adapters, with the W that they were added to.
"""
import itertools
import re
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path

import torch

from support import checkpoint


@dataclass
class Deltas:
    """The updates of one checkpoint. Other fields of its file are in `saved`."""
    path: Path
    label: str                  # the file's name without its suffix: lora-seed0
    identity: dict              # checkpoint (lora), seed ("0" or None) and method, in every record
    settings: Namespace         # of train.py
    saved: dict                 # what the checkpoint's file contains
    delta: dict = field(default_factory=dict)   # {module name: ΔW, or its factors (B diag(s), A)}
    W: dict = field(default_factory=dict)       # {module name: W}; some may be missing
    scale_known: bool = True    # whether α, and so the size of ΔW, is known
    selected: bool = False      # whether the user selected matrices by --targets or --layers
    svd: dict = field(default_factory=dict)     # {module name: (U, S, V)}, filled by analyze.py


def load(paths, device="cpu", base=None, alpha=None):
    """A Deltas for each checkpoint or adapter of one base model. Raises OSError or ValueError."""
    loaded = []
    W = {}
    bases = {}                                  # {fingerprint: the file that has it}
    for path in map(Path, paths):
        saved, settings = checkpoint.open_run(path, alpha=alpha)
        if settings.scratch:
            raise ValueError(f"{path} was trained from random weights: it has no base model")
        if not W and (base or settings.model and saved["base"]):
            W, fingerprint = checkpoint.base_matrices(base or settings.model, device)
            if fingerprint:
                bases[fingerprint] = f"the base model {base or settings.model}"
        if saved["base"]:
            bases[saved["base"]] = bases.get(saved["base"], path)
        if len(bases) > 1:
            raise ValueError(f"{' and '.join(map(str, bases.values()))} do not belong to the same "
                             "base model: pass the right one by --base, or analyse them separately")
        label = label_of(path)
        name, seed = re.fullmatch(r"(.+?)(?:-seed(\d+))?", label).groups()
        settings.seed = seed if settings.seed is None else settings.seed
        identity = {"checkpoint": name, "seed": seed, "method": settings.method}
        c = Deltas(path, label, identity, settings, saved)
        if settings.method == "full":
            for name in W:
                c.delta[name] = saved["model"][f"{name}.weight"].to(device) - W[name]
        else:
            add_factors(c, saved["adapter"], device)
        loaded.append(c)
    for c in loaded:
        c.W = W
    check_compatible(loaded)
    return loaded


def add_factors(c, adapter, device):
    """Fill c.delta with the factors of an adapter's ΔW, sorted by layer."""
    for name in sorted(adapter["tensors"], key=layer_of):
        own = adapter["tensors"][name]
        scale = adapter["scale"][name]
        if scale is None:
            c.scale_known = False
            scale = 1
        c.delta[name] = (own["B"] * scale).to(device), own["A"].to(device)


def label_of(path):
    path = path.absolute()
    if path.stem == "adapter_model":            # all files of peft have this name: use the folder's
        path = path.parent
    return path.name if path.is_dir() else path.stem


def target_of(name):
    return name.split(".")[-1]


def layer_of(name):
    """The first number between the dots of a module's name."""
    return int(next((part for part in name.split(".") if part.isdecimal()), 0))


def check_compatible(checkpoints):
    """Raise ValueError for one name with different settings, and for different shapes."""
    free = dict.fromkeys(["out", "resume", "ranks_from", "device", "seed"])
    for a, b in itertools.combinations(checkpoints, 2):
        same = vars(a.settings) | free == vars(b.settings) | free
        same &= a.settings.seed != b.settings.seed
        same &= (a.saved["phase"], a.saved["step"]) == (b.saved["phase"], b.saved["step"])
        if a.identity["checkpoint"] == b.identity["checkpoint"] and not same:
            raise ValueError(f"{a.path} and {b.path} have the same name, but are not two seeds of "
                             "the same settings: rename one of them")
    shapes = {name: tuple(w.shape) for name, w in checkpoints[0].W.items()}
    for c in checkpoints:
        for name, delta in c.delta.items():
            shape = delta.shape if torch.is_tensor(delta) else (len(delta[0]), delta[1].size(1))
            if shapes.setdefault(name, tuple(shape)) != tuple(shape):
                raise ValueError(f"{c.path}: ΔW of {name} has shape {tuple(shape)}, but the base "
                                 f"model or another checkpoint has {shapes[name]}")


def keep_only(c, flag, wanted, part):
    """Keep the ΔW whose `part` (target_of or layer_of) is wanted. Raises ValueError."""
    if not wanted:
        return
    c.selected = True
    known = dict.fromkeys(map(part, c.delta))
    for value in wanted:
        if value not in known:
            raise ValueError(f"--{flag} {value}: {c.path} has no such ΔW; choose from "
                             f"{' '.join(map(str, known))}")
    c.delta = {name: delta for name, delta in c.delta.items() if part(name) in wanted}
