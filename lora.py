"""
LoRA: Low-Rank Adaptation of Large Language Models (Hu et al. 2021, arXiv 2106.09685).

    h = W x + b + ΔW · dropout(x)        ΔW = (B ∘ s) A,   s = α/r              (equation 3)

W stays frozen. A (r, d_in) starts random and B (d_out, r) at zero, so training starts at the base model.
MultiLoRA and AutoLoRA are the same layer with a learned s: their files override `scale()`, which may also
return a factor per column of B, and how B starts. Every method thus costs two thin products.

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
        if not isinstance(rank, int) or not 1 <= rank <= min(d_in, d_out):
            raise ValueError(f"rank {rank} for a ({d_out}, {d_in}) matrix: "
                             f"choose a whole number from 1 to {min(d_in, d_out)}")
        self.base = base.requires_grad_(False)
        like = dict(device=base.weight.device, dtype=torch.promote_types(base.weight.dtype, torch.float32))
        self.A = nn.Parameter(torch.empty(rank, d_in, **like))
        self.B = nn.Parameter(torch.empty(d_out, rank, **like))
        self.rank, self.alpha, self.rslora = rank, alpha, rslora
        self.dropout = nn.Dropout(dropout)
        self.disabled = False
        self.register_buffer("kept", None, persistent=False)        # W, while the base holds W + ΔW
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
        if self.disabled or self.kept is not None:
            return self.base(x)
        Bs, A = self.factors()
        flat = x.reshape(-1, x.size(-1))                            # (..., d_in) -> (N, d_in)
        h = self.base(flat)                                         # (N, d_out)
        z = F.linear(self.dropout(flat), A.to(x.dtype))             # (N, r)
        # equation 3 in one call. Bᵀ is made contiguous because its gradient is then zᵀ g, which CPUs do four
        # times faster than gᵀ z
        h = torch.addmm(h, z, Bs.T.contiguous().to(x.dtype))        # h + z Bᵀ
        return h.view(*x.shape[:-1], -1)                            # (..., d_out)

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
    Raises ValueError, and leaves the model as it was, for a target that is not there, a rank that does not fit,
    and a model that has adapters.
    """
    if adapters(model):
        raise ValueError("the model has adapters already: remove(model) takes them out")
    ranks = rank
    if not isinstance(rank, dict):
        linears = linear_layers(model)
        kinds = list(dict.fromkeys(name.split(".")[-1] for name in linears))
        wanted = targets.split() if isinstance(targets, str) else list(targets)
        for t in wanted:
            if t not in [*kinds, "all"]:
                raise ValueError(f"--targets {t}: no such layer; choose from {' '.join(kinds)}, or all")
        ranks = {name: rank for name in linears if "all" in wanted or name.split(".")[-1] in wanted}
    with as_it_was(model):
        new = build(model, ranks, layer, settings)
    return place(model, new, {"layer": layer.__name__, "settings": settings, "ranks": ranks, "base": fingerprint(model)})


def linear_layers(model):
    """{name: nn.Linear}, an adapter's base under the adapter's name. Subclasses are left out: not all are called."""
    bases = {f"{name}.base": name for name in adapters(model)}
    return {bases.get(name, name): m for name, m in model.named_modules() if type(m) is nn.Linear}


@contextmanager
def as_it_was(model):
    """Take freezing back where what follows fails."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    except BaseException:   # Ctrl-C too
        for p, was in before:
            p.requires_grad_(was)
        raise


def build(model, ranks, layer, settings):
    """{name: new layer} for {name: rank}, not yet in the model."""
    linears, new = linear_layers(model), {}
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
        model.set_submodule(name, m.train(model.training))
        for p in m.parameters(recurse=False):
            p.requires_grad_(True)
    model.adapter = about
    return model


def remove(model):
    """Take the adapters out again: what is left is the base to the bit (still frozen)."""
    for name, m in adapters(model).items():
        m.unmerge()
        model.set_submodule(name, m.base)
    model.adapter = None


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

def base_weights(model):
    """{name: tensor} of the model as it is without adapters, merged or not."""
    weights = dict(model.named_parameters())
    for name, m in adapters(model).items():
        for k, _ in m.named_parameters(recurse=False):                      # A, B, s
            del weights[f"{name}.{k}"]
        for k, _ in m.base.named_parameters():
            weights[f"{name}.{k}"] = weights.pop(f"{name}.base.{k}")
        if m.kept is not None:
            weights[f"{name}.weight"] = m.kept
    return weights


def fingerprint(model):
    """Names, shapes and values (rounded to bfloat16) of the base's weights, in 16 hex digits."""
    sha = hashlib.sha256()
    for name, p in sorted(base_weights(model).items()):
        sha.update(f"{name} {tuple(p.shape)}".encode())
        sha.update(p.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy())
    return sha.hexdigest()[:16]


def state(model):
    """Everything `load` needs, as a dict: the layer's class and settings, ranks, the base's fingerprint, tensors."""
    if not adapters(model):
        raise ValueError("the model has no adapters to save")
    tensors = {f"{name}.{k}": p.detach().cpu().clone() for name, m in adapters(model).items()
               for k, p in m.named_parameters(recurse=False)}
    return {**model.adapter, "tensors": tensors}


def write(obj, path):
    """torch.save that leaves either the old file or the whole new one, whenever the machine stops."""
    with open(f"{path}.part", "wb") as f:
        torch.save(obj, f)
        f.flush()
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
    with as_it_was(model):
        new = build(model, saved["ranks"], classes[saved["layer"]], saved["settings"])
        own = {f"{name}.{k}": p for name, m in new.items() for k, p in m.named_parameters(recurse=False)}
        want, have = ({k: tuple(t.shape) for k, t in d.items()} for d in (own, saved["tensors"]))
        wrong = [f"missing {k}" for k in want.keys() - have.keys()]
        wrong += [f"unexpected {k}" for k in have.keys() - want.keys()]
        wrong += [f"{k} is {have[k]}, not {want[k]}" for k in want.keys() & have.keys() if have[k] != want[k]]
        if wrong:
            raise ValueError(f"the adapter is not whole: {'; '.join(sorted(wrong))}")
    for k, p in own.items():
        p.data.copy_(saved["tensors"][k])
    return place(model, new, {k: v for k, v in saved.items() if k != "tensors"})
