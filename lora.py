"""
LoRA: Low-Rank Adaptation of Large Language Models (Hu et al. 2021, arXiv 2106.09685).

    h = W x + b + ΔW · dropout(x)        ΔW = (B ∘ s) A,   s = α/r              (equation 3)

W stays frozen. A (r, d_in) starts random and B (d_out, r) at zero, so training starts at the base model.
MultiLoRA and AutoLoRA are the same layer with another s: their files override `scale()`, which may also
return a factor per column of B, and the initialisation. Every method thus costs two thin products.

What differs from the paper and from loralib, the official code, and why:
- A starts Kaiming-uniform with a=√5, as in loralib; the paper says Gaussian.
- W is always (d_out, d_in). There is no `fan_in_fan_out`, because `model.py` transposes once, at loading.
- Merging is a call of its own, not a side effect of `eval()`. It happens once however often it is called,
  and `unmerge` puts the kept W back, since subtracting ΔW again would leave rounding behind.
- A and B are float32 even over a bfloat16 W.
- A saved adapter knows its ranks, its α and a fingerprint of its base.
"""
import hashlib
import math
import os
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F


class LoRALinear(nn.Module):
    """
    An nn.Linear `base` (frozen) and a trained update of rank `rank` beside it. With `rslora`, s = α/√r
    (arXiv 2312.03732). Raises ValueError where the rank is no whole number from 1 to min(d_in, d_out).
    """

    def __init__(self, base, rank, alpha=16.0, dropout=0.0, rslora=False):
        super().__init__()
        d_out, d_in = base.weight.shape
        if not 1 <= rank <= min(d_in, d_out) or rank != int(rank):
            raise ValueError(f"rank {rank} for a ({d_out}, {d_in}) matrix: choose a whole number from 1 to {min(d_in, d_out)}")
        self.base = base.requires_grad_(False)
        like = dict(device=base.weight.device, dtype=torch.promote_types(base.weight.dtype, torch.float32))
        self.A = nn.Parameter(torch.empty(rank, d_in, **like))
        self.B = nn.Parameter(torch.empty(d_out, rank, **like))
        self.rank, self.alpha, self.rslora = rank, alpha, rslora
        self.dropout = nn.Dropout(dropout)
        self.disabled = False
        self.kept = None            # the base's own weight, while merged
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.zeros_(self.B)

    def scale(self):
        """s: a number here; in the subclasses a tensor (r,) or (d_out, r), to be multiplied with B."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def factors(self):
        """(B ∘ s, A), of shapes (d_out, r) and (r, d_in), whose product is ΔW."""
        return self.B * self.scale(), self.A

    def delta_weight(self):
        """ΔW (d_out, d_in)."""
        Bs, A = self.factors()
        return Bs @ A

    def forward(self, x):
        h = self.base(x)                                            # (..., d_in) -> (..., d_out)
        if self.disabled or self.kept is not None:
            return h
        Bs, A = self.factors()
        z = F.linear(self.dropout(x), A.to(x.dtype))                # (..., d_in) -> (..., r)
        return h + F.linear(z, Bs.to(x.dtype))                      # (..., r) -> (..., d_out), equation 3

    @torch.no_grad()
    def merge(self):
        """W ← W + ΔW, added in float32: from here on the layer costs what its base costs. Idempotent."""
        if self.kept is None:
            W = self.kept = self.base.weight.data
            self.base.weight.data = (W.to(self.A.dtype) + self.delta_weight()).to(W.dtype)

    def unmerge(self):
        """Put W back to the bit. Idempotent."""
        if self.kept is not None:
            self.base.weight.data, self.kept = self.kept, None


# ---------------------------------------------------------------------------------------------------------------------
# All the layers of a model

def adapters(model):
    """{name: layer} of a model's LoRA layers."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def inject(model, targets="all", rank=8, layer=LoRALinear, **settings):
    """
    Put `layer(linear, rank, **settings)` in the place of nn.Linear layers, and freeze all the rest, biases and
    LayerNorms too. `targets` are last parts of names ("q v"), or "all"; `rank` is one number, or a dict from
    whole names to numbers ({"h.3.attn.q": 5}), which then says the targets as well. Returns the model.
    Raises ValueError for a target that is not there, a rank that does not fit, and a model that has adapters.
    """
    if adapters(model):
        raise ValueError("the model has adapters already: remove(model) takes them out")
    ranks = rank
    if not isinstance(rank, dict):
        linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
        kinds = list(dict.fromkeys(name.split(".")[-1] for name in linears))
        wanted = targets.split() if isinstance(targets, str) else list(targets)
        for t in wanted:
            if t not in [*kinds, "all"]:
                raise ValueError(f"--targets {t}: no such layer; choose from {' '.join(kinds)}, or all")
        ranks = {name: rank for name in linears if "all" in wanted or name.split(".")[-1] in wanted}
    new = build(model, ranks, layer, settings)
    return place(model, new, {"layer": layer.__name__, "settings": settings, "ranks": ranks, "base": fingerprint(model)})


def build(model, ranks, layer, settings):
    """{name: new layer} for {name: rank}, over the model's linears or the bases of the adapters it has."""
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    linears |= {name: m.base for name, m in adapters(model).items()}
    new = {}
    for name, r in ranks.items():
        if name not in linears:
            raise ValueError(f"rank for {name}: no such layer; there are {' '.join(linears)}")
        try:
            new[name] = layer(linears[name], r, **settings)
        except ValueError as e:
            raise ValueError(f"{name}: {e}") from None
    if not new:
        raise ValueError("no layer to adapt: name at least one target")
    return new


def place(model, new, about):
    """Swap the new layers in, take older ones out, let nothing but the new ones' own parameters be trained."""
    remove(model)
    model.requires_grad_(False)
    for name, m in new.items():
        model.set_submodule(name, m)
        for p in m.parameters(recurse=False):
            p.requires_grad_(True)
    model.adapter = about
    return model


def remove(model):
    """Take the adapters out again: what is left is the base to the bit (still frozen)."""
    for name, m in adapters(model).items():
        m.unmerge()
        model.set_submodule(name, m.base)


def merge(model):
    for m in adapters(model).values():
        m.merge()


def unmerge(model):
    for m in adapters(model).values():
        m.unmerge()


@contextmanager
def disabled(model):
    """`with disabled(model): ...` runs the base alone, merged or not."""
    layers = adapters(model).values()
    merged = [m for m in layers if m.kept is not None]
    before = [(m, m.disabled) for m in layers]
    for m in layers:
        m.unmerge()
        m.disabled = True
    try:
        yield model
    finally:
        for m, was in before:
            m.disabled = was
        for m in merged:
            m.merge()


# ---------------------------------------------------------------------------------------------------------------------
# Files

def fingerprint(model):
    """
    Names, shapes and values of a model's own weights in 16 hex digits, the same with and without adapters,
    merged or not, in float32 and in bfloat16 (to which values are rounded first).
    """
    layers = adapters(model)
    sha = hashlib.sha256()
    for name, p in sorted(model.named_parameters(), key=lambda pair: pair[0].replace(".base.", ".")):
        owner = layers.get(name.rpartition(".base.")[0] or name.rpartition(".")[0])
        if owner is not None and ".base." not in name:
            continue                                                        # A, B, s: the adapter's own
        if owner is not None and name.endswith("weight") and owner.kept is not None:
            p = owner.kept
        bits = p.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy()
        sha.update(f"{name.replace('.base.', '.')} {tuple(p.shape)}".encode())
        sha.update(bits)
    return sha.hexdigest()[:16]


def state(model):
    """Everything `load` needs, as a dict: the layer's class and settings, ranks, the base's fingerprint, tensors."""
    tensors = {f"{name}.{k}": p.detach().cpu().clone() for name, m in adapters(model).items()
               for k, p in m.named_parameters(recurse=False)}
    return {**model.adapter, "tensors": tensors}


def write(obj, path):
    """torch.save that leaves either the old file or the whole new one, whenever the machine stops."""
    torch.save(obj, f"{path}.part")
    with open(f"{path}.part", "rb+") as f:
        os.fsync(f.fileno())
    os.replace(f"{path}.part", path)


def save(model, path):
    """Write the adapter alone: some thousandths of the model, merged or not."""
    write({"adapter": state(model)}, path)


def load(model, saved):
    """
    Put a saved adapter on a base model, in the place of the one it has: this is how tasks are switched.
    `saved` is a path or what `state` returned. Raises ValueError, and leaves the model as it was, for a file
    that holds no adapter, an adapter of another base, and tensors that are not exactly those it should have.
    """
    if not isinstance(saved, dict):
        try:
            held = torch.load(saved, map_location="cpu", weights_only=True)
            saved = held["adapter"]
        except FileNotFoundError:
            raise
        except Exception:  # torch raises many kinds here
            raise ValueError(f"{saved}: not a complete file, or one without an adapter") from None
    base = fingerprint(model)
    if saved["base"] != base:
        raise ValueError(f"the adapter was trained on another base: one with fingerprint {saved['base']}, "
                         f"while this model's is {base}")
    classes = {c.__name__: c for c in (LoRALinear, *LoRALinear.__subclasses__())}
    if saved["layer"] not in classes:
        raise ValueError(f"the adapter is made of {saved['layer']}: import the file that defines it first")
    new = build(model, saved["ranks"], classes[saved["layer"]], saved["settings"])
    own = {f"{name}.{k}": p for name, m in new.items() for k, p in m.named_parameters(recurse=False)}
    wrong = [f"missing {k}" for k in own.keys() - saved["tensors"].keys()]
    wrong += [f"unexpected {k}" for k in saved["tensors"].keys() - own.keys()]
    wrong += [f"{k} is {tuple(t.shape)}, not {tuple(own[k].shape)}" for k, t in saved["tensors"].items()
              if k in own and t.shape != own[k].shape]
    if wrong:
        raise ValueError(f"the adapter is not whole: {'; '.join(sorted(wrong))}")
    for k, p in own.items():
        p.data.copy_(saved["tensors"][k])
    return place(model, new, {k: v for k, v in saved.items() if k != "tensors"})
