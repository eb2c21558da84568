"""
LoRA: Low-Rank Adaptation of Large Language Models (Hu et al. 2021, arXiv 2106.09685).

    h = W x + b + ΔW · dropout(x)        ΔW = (B ∘ s) A,   s = α/r              (equation 3)

W stays frozen. A starts Kaiming-uniform, as in loralib (the paper: Gaussian), and B at zero.
"""
import hashlib
import math
from collections import Counter
from contextlib import contextmanager

import torch
import torch.nn as nn


class LoRALinear(nn.Module):
    """An nn.Linear `base`, frozen by `inject`, and a trained update of rank r beside it."""
    def __init__(self, base, rank, alpha=16.0, dropout=0.0):
        super().__init__()
        W, (d_out, d_in) = base.weight, base.weight.shape
        if rank not in range(1, min(W.shape) + 1):
            raise ValueError(f"rank {rank} for {tuple(W.shape)}: choose 1 to {min(W.shape)}")
        self.base, self.rank, self.alpha = base, int(rank), alpha
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("kept", None, persistent=False)        # W, while the base is W + ΔW
        dtype = torch.promote_types(W.dtype, torch.float32)         # float32 over bfloat16
        self.A = nn.Parameter(W.new_empty(self.rank, d_in, dtype=dtype))
        self.B = nn.Parameter(W.new_zeros(d_out, self.rank, dtype=dtype))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def scale(self):
        """s: a number here; in the subclasses a tensor (r,) or (d_out, r), multiplied with B."""
        return self.alpha / self.rank

    def factors(self):
        """(B ∘ s, A), of shapes (d_out, r) and (r, d_in), whose product is ΔW."""
        return self.B * self.scale(), self.A

    def delta_weight(self):
        """ΔW (d_out, d_in)."""
        Bs, A = self.factors()
        return Bs @ A

    def forward(self, x):
        if self.kept is not None:                                   # merged: the base is W + ΔW
            return self.base(x)
        Bs, A = self.factors()
        z = nn.functional.linear(self.dropout(x), A.to(x.dtype))    # x Aᵀ: (..., d_in) -> (..., r)
        return self.base(x) + nn.functional.linear(z, Bs.to(x.dtype))   # equation 3, (..., d_out)

    @torch.no_grad()
    def merge(self):
        """W ← W + ΔW, added in float32: the layer then costs what its base costs. Idempotent."""
        if self.kept is None:
            W = self.kept = self.base.weight.data
            merged = W.to(self.A.dtype) + self.delta_weight()
            self.base.weight.data = merged.to(W.dtype)

    def unmerge(self):
        """Put the kept W back: subtracting ΔW again would leave rounding. Idempotent."""
        if self.kept is not None:
            self.base.weight.data, self.kept = self.kept, None


def adapters(model):
    """{name: layer} of a model's LoRA layers."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def inject(model, targets="all", rank=8, layer=LoRALinear, **settings):
    """Put `layer(linear, rank, **settings)` in the place of nn.Linear layers, freeze all the rest.
    `targets` are last parts of names ("q v") or "all"; a `rank` {whole name: r} says them, too.
    Returns the model. ValueError, with the model as it was, where that cannot work."""
    if adapters(model):
        raise ValueError("the model has adapters already: remove(model) takes them out")
    return place(model, build(model, targets, rank, layer, settings))


def build(model, targets, rank, layer, settings):
    """{name: new layer}, checked and not yet in the model."""
    linears = {name: m for name, m in model.named_modules() if name and type(m) is nn.Linear}
    kinds = dict.fromkeys(name.split(".")[-1] for name in linears)
    known, wanted = [*linears, *kinds, "all"], targets.split()
    if isinstance(rank, dict):
        known, wanted = linears, list(rank)
    unknown = [t for t in wanted if t not in known]
    if unknown or not wanted or not linears:
        raise ValueError(f"--targets {' '.join(unknown)}: choose from {' '.join(kinds)}, or all")
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    new, about = {}, {"layer": layer.__name__, "settings": settings, "base": fingerprint(model)}
    for name, linear in linears.items():
        parent, _, kind = name.rpartition(".")
        if {name, kind, "all"}.isdisjoint(wanted):
            continue
        fused = isinstance(model.get_submodule(parent), nn.TransformerEncoderLayer)
        if fused or uses[id(linear.weight)] > 1:
            raise ValueError(f"{name}: leave it out, its weight is used past an adapter as well")
        r = rank[name] if isinstance(rank, dict) else rank
        new[name] = layer(linear, r, **settings)
        new[name].about = about                             # what its state says besides tensors
    return new


def place(model, new):
    remove(model)
    model.requires_grad_(False)
    for name, m in new.items():
        model.set_submodule(name, m.train(model.training))
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
    """`with disabled(model): ...` has the base alone, merged or not."""
    layers = [(name, m, m.kept) for name, m in adapters(model).items()]
    remove(model)
    try:
        yield model
    finally:
        for name, m, was_merged in layers:
            model.set_submodule(name, m.train(model.training))
            if was_merged is not None:
                m.merge()


def fingerprint(model):
    """Names, shapes and values (rounded to bfloat16) of the base's weights, in 16 hex digits."""
    for m in adapters(model).values():
        return m.about["base"]                  # taken before the adapters came
    sha = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        sha.update(f"{name} {tuple(p.shape)}".encode())
        sha.update(p.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy())
    return sha.hexdigest()[:16]


def state_dict(model):
    """The adapter alone: its class, settings, base (a fingerprint), {name: its tensors}, scale."""
    if not adapters(model):
        raise ValueError("the model has no adapters to save")
    tensors, scale = {}, {}
    for name, m in adapters(model).items():
        tensors[name] = {k: p.detach().cpu().clone() for k, p in m.named_parameters(recurse=False)}
        scale[name] = torch.as_tensor(m.scale(), dtype=m.A.dtype).detach().cpu()
    return {**m.about, "tensors": tensors, "scale": scale}


def load_state_dict(model, state):
    """Put a saved adapter in the place of the one there is. ValueError, with all as it was."""
    layers = {c.__name__: c for c in (LoRALinear, *LoRALinear.__subclasses__())}
    if state["base"] != fingerprint(model) or state["layer"] not in layers:
        raise ValueError(f"it is of another base, {state['base']}, or unknown {state['layer']}")
    ranks = {name: len(own.get("A", [])) for name, own in state["tensors"].items()}
    with disabled(model):                                   # `build` looks for plain nn.Linear
        new = build(model, "", ranks, layers[state["layer"]], state["settings"])
    for name, m in new.items():
        own, saved = dict(m.named_parameters(recurse=False)), state["tensors"][name]
        if own.keys() != saved.keys() or any(own[k].shape != saved[k].shape for k in own):
            raise ValueError(f"the adapter is not whole: {name} should have other tensors")
        for k, p in own.items():
            p.data.copy_(saved[k])
    return place(model, new)


def combine(states, weights=None):
    """Σᵢ wᵢ ΔWᵢ of saved adapters of one base, exactly, as one of rank Σᵢ rᵢ: wᵢ Bᵢ side by side,
    Aᵢ on top of each other, as MultiLoRA's n LoRAs are. Task arithmetic (arXiv 2212.04089)."""
    weights = [1.0] * len(states) if weights is None else weights
    tensors, scale = {}, {}
    bases = {state["base"] for state in states}
    if len(bases) != 1:
        raise ValueError("the adapters to combine should be of one base")
    for state, w in zip(states, weights, strict=True):
        for name, own in state["tensors"].items():
            both = tensors.setdefault(name, {"A": own["A"][:0], "B": own["B"][:, :0]})
            both["A"] = torch.cat([both["A"], own["A"]])
            both["B"] = torch.cat([both["B"], w * state["scale"][name] * own["B"]], 1)
    for name, both in tensors.items():
        scale[name] = 1 / len(both["A"])                                # α/r with α = 1
        both["B"] *= len(both["A"])
    about = {"layer": "LoRALinear", "settings": {"alpha": 1.0}, "base": bases.pop()}
    return {**about, "tensors": tensors, "scale": scale}
