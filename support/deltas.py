"""
What analyze.py studies: the ΔW of checkpoints and adapters, with the W that they were added to.
"""
import itertools
import os
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
    label: str                  # a unique name, if possible the file's: lora-seed0
    identity: dict              # checkpoint (lora), seed ("0" or None) and method, in every record
    settings: Namespace         # of train.py
    saved: dict                 # what the checkpoint's file contains
    delta: dict = field(default_factory=dict)   # {module name: ΔW, or its factors (B diag(s), A)}
    W: dict = field(default_factory=dict)       # {module name: W}; some may be missing
    scale_known: bool = True    # whether α, and so the size of ΔW, is known
    selected: bool = False      # whether the user selected matrices by --targets or --layers
    zero: list = field(default_factory=list)    # names of matrices whose ΔW is zero, left out
    svd: dict = field(default_factory=dict)     # {module name: (U, S, V)}, filled by analyze.py


def load(paths, device="cpu", base=None, alpha=None):
    """
    A Deltas for each checkpoint or adapter. Those of train.py must belong to one base model, and if
    adapters of peft name different base models, no W is returned. Raises OSError or ValueError.
    """
    loaded = []
    W = {}
    owners = {}                                 # {fingerprint: the file or model that has it}
    paths = list(map(Path, paths))
    for path, label in zip(paths, unique_labels(paths)):
        saved, settings = checkpoint.open_run(path, alpha=alpha)
        if settings.scratch:
            raise ValueError(f"{path} was trained from random weights, so it has no ΔW to analyse: "
                             "leave it out")
        base_name = base or (settings.model if saved["base"] else None)
        if base_name and not W:
            W, fingerprint = read_base(path, base_name, device)
            if fingerprint:
                owners[fingerprint] = f"the base model {base_name}"
        if saved["base"]:
            owners.setdefault(saved["base"], path)
        if len(owners) > 1:
            raise ValueError(f"{' and '.join(map(str, owners.values()))} do not belong to the same "
                             "base model: pass the right one by --base, or analyse them separately")
        name, seed = re.fullmatch(r"(.+?)(?:-seed(\d+))?", label).groups()
        settings.seed = seed if settings.seed is None else settings.seed
        identity = {"checkpoint": name, "seed": seed, "method": settings.method}
        c = Deltas(path, label, identity, settings, saved)
        if settings.method == "full":
            add_differences(c, W, device)
        else:
            add_factors(c, saved["adapter"], device)
        leave_out_zeros(c)
        loaded.append(c)
    if base or len(base_names(loaded)) < 2:
        for c in loaded:
            c.W = W
    check_compatible(loaded)
    return loaded


def read_base(path, name, device):
    """As checkpoint.base_matrices, for the checkpoint `path`. Raises ValueError."""
    try:
        return checkpoint.base_matrices(name, device)
    except (OSError, ValueError) as e:
        raise ValueError(f"{path}: its base model cannot be read ({e}): pass the right one by "
                         "--base") from None


def add_differences(c, W, device):
    """Fill c.delta for full fine-tuning. Raises ValueError if it has other matrices than W."""
    for name, w in W.items():
        trained = c.saved["model"].get(f"{name}.weight")
        if trained is None or trained.shape != w.shape:
            raise ValueError(f"{c.path} has no {name} of shape {tuple(w.shape)}")
        c.delta[name] = trained.to(device) - w


def add_factors(c, adapter, device):
    """Fill c.delta with the factors of an adapter's ΔW, sorted by layer."""
    for name in sorted(adapter["tensors"], key=layer_of):
        own = adapter["tensors"][name]
        scale = adapter["scale"][name]
        if scale is None:
            c.scale_known = False
            scale = 1
        c.delta[name] = (own["B"] * scale).to(device), own["A"].to(device)


def leave_out_zeros(c):
    """Move the names of the ΔW that are zero to c.zero. Raises ValueError if all of them are."""
    for name, delta in list(c.delta.items()):
        factors = [delta] if torch.is_tensor(delta) else delta
        if not all(t.any() for t in factors):
            c.zero.append(name)
            del c.delta[name]
    if not c.delta:
        raise ValueError(f"{c.path}: all {len(c.zero)} ΔW are zero, so it was never trained")


def label_of(path, depth=0):
    """The names of the last `depth` parent folders and of the file, without its suffix, joined by
    "-". For peft, whose files always have the same name, it is the folder."""
    place = Path(os.path.abspath(path))
    if place.stem == "adapter_model" and not place.is_dir():
        place = place.parent
    own = place.name if place.is_dir() else place.stem
    parents = [folder.name for folder in place.parents][:depth]
    label = "-".join([*reversed(parents), own])
    return "".join(c if c.isprintable() else "_" for c in label)


def unique_labels(paths):
    """A label for each file; if two are equal, they begin with just enough parent folders to be
    unique. Raises ValueError if that is not possible."""
    for depth in range(20):
        labels = [label_of(path, depth) for path in paths]
        if len(set(labels)) == len(labels):
            return labels
    raise ValueError(f"two of {', '.join(map(str, paths))} have the same name: rename one of them")


def base_names(checkpoints):
    """The different names of base models that the files contain. Files with a fingerprint have
    the same base, whatever its name is."""
    names = {}
    for c in checkpoints:
        if c.settings.model:
            names.setdefault(c.saved["base"] or c.settings.model, c.settings.model)
    return list(dict.fromkeys(names.values()))


def target_of(name):
    return name.split(".")[-1]


def layer_of(name):
    """The first number between the dots of a module's name."""
    return int(next((part for part in name.split(".") if part.isdecimal()), 0))


def check_compatible(checkpoints):
    """Raise ValueError for one name with different settings, and for different shapes, unless the
    files name different base models."""
    free = dict.fromkeys(["out", "resume", "ranks_from", "device", "seed"])
    for a, b in itertools.combinations(checkpoints, 2):
        same = vars(a.settings) | free == vars(b.settings) | free
        same &= a.saved.get("checksums") == b.saved.get("checksums")
        same &= (a.settings.ranks_from is None) == (b.settings.ranks_from is None)
        same &= a.settings.seed != b.settings.seed
        same &= (a.saved["phase"], a.saved["step"]) == (b.saved["phase"], b.saved["step"])
        if a.identity["checkpoint"] == b.identity["checkpoint"] and not same:
            raise ValueError(f"{a.path} and {b.path} have the same name, but are not two seeds of "
                             "the same settings: rename one of them")
    shapes = {name: tuple(w.shape) for name, w in checkpoints[0].W.items()}
    if not shapes and len(base_names(checkpoints)) > 1:
        return
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
