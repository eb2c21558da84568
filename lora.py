"""
LoRA: Low-Rank Adaptation of Large Language Models (Hu et al. 2021, arXiv 2106.09685).

    h = W x + b + ΔW · dropout(x)        ΔW = B diag(s) A,   s = α/r              (equation 3)

W is frozen; A and B are trained. A is initialised Kaiming-uniform, as in loralib (the paper says
Gaussian), and B with zeros, so that training starts at the base model.
"""
import math
from collections import Counter
from contextlib import contextmanager

import torch
import torch.nn as nn


class LoRALinear(nn.Module):
    """A frozen nn.Linear, `base`, plus a trained update of rank r: x (..., d_in) -> h (..., d_out).
    Raises ValueError if `rank` is not an integer from 1 to min(d_in, d_out)."""

    def __init__(self, base, rank, alpha=16.0, dropout=0.0):
        super().__init__()
        W = base.weight
        d_out, d_in = W.shape
        if rank not in range(1, min(d_out, d_in) + 1):
            raise ValueError(f"rank {rank} is not an integer from 1 to {min(d_out, d_in)}")
        self.base = base.requires_grad_(False)
        self.rank = int(rank)
        self.alpha = alpha
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("W_frozen", None, persistent=False)    # W, while the layer is merged
        dtype = torch.promote_types(W.dtype, torch.float32)         # float32 over a bfloat16 base
        self.A = nn.Parameter(W.new_empty(self.rank, d_in, dtype=dtype))
        self.B = nn.Parameter(W.new_zeros(d_out, self.rank, dtype=dtype))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def scale(self):
        """s: a number here; in the subclasses a tensor (r,) or (d_out, r) that multiplies B."""
        return self.alpha / self.rank

    def factors(self):
        """(B diag(s), A), of shapes (d_out, r) and (r, d_in). Their product is ΔW."""
        return self.B * self.scale(), self.A

    def delta_weight(self):
        """ΔW (d_out, d_in)."""
        Bs, A = self.factors()
        return Bs @ A

    def forward(self, x):
        if self.merged:                                             # the base has W + ΔW
            return self.base(x)
        Bs, A = self.factors()
        z = nn.functional.linear(self.dropout(x), A.to(x.dtype))    # (..., d_in) -> (..., r)
        return self.base(x) + nn.functional.linear(z, Bs.to(x.dtype))   # equation 3, (..., d_out)

    @property
    def merged(self):
        return self.W_frozen is not None

    @torch.no_grad()
    def merge(self):
        """W ← W + ΔW, added in float32. The layer then costs what its base costs. Idempotent."""
        if not self.merged:
            W = self.W_frozen = self.base.weight.data
            self.base.weight.data = (W.to(self.A.dtype) + self.delta_weight()).to(W.dtype)

    def unmerge(self):
        """Restore the kept W: subtracting ΔW would leave rounding errors. Idempotent."""
        if self.merged:
            self.base.weight.data = self.W_frozen
            self.W_frozen = None


def inject(model, targets=None, rank=8, layer=LoRALinear, **settings):
    """
    Replace nn.Linear layers by `layer(linear, rank, **settings)` and freeze all other parameters.
    `targets` are last parts of module names, "q v" or ["q", "v"], or full names, or "all" (None).
    `rank` is an integer, or {full module name: rank}, which then also chooses the layers. Returns
    the model. Raises ValueError, and leaves the model as it was, if a layer cannot be adapted.
    """
    ranks = choose_layers(model, targets, rank)
    trainable = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    layers = {}
    try:
        for name, r in ranks.items():
            layers[name] = layer(model.get_submodule(name), r, **settings)
    except (TypeError, ValueError) as e:
        for p in trainable:
            p.requires_grad_(True)
        raise ValueError(f"{name}: {e}") from None
    for name, m in layers.items():
        model.set_submodule(name, m.train(model.training))
    return model


def adapters(model):
    """{module name: layer} of a model's LoRA layers."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def merge(model):
    for m in adapters(model).values():
        m.merge()


def unmerge(model):
    for m in adapters(model).values():
        m.unmerge()


def remove(model):
    """Put the base layers back. The weights are then exactly those of the base, still frozen."""
    unmerge(model)
    for name, m in adapters(model).items():
        model.set_submodule(name, m.base)


@contextmanager
def disabled(model):
    """`with disabled(model): ...` runs the base model alone, even if the adapters are merged."""
    layers = adapters(model)
    merged = [m for m in layers.values() if m.merged]
    remove(model)
    try:
        yield model
    finally:
        for name, m in layers.items():
            model.set_submodule(name, m.train(model.training))
        for m in merged:
            m.merge()


def choose_layers(model, targets, rank):
    """{module name: rank} of the layers that `inject` replaces. Raises ValueError."""
    if adapters(model):
        raise ValueError("the model already has adapters: call lora.remove(model) first")
    if isinstance(rank, dict) and targets is not None:
        raise ValueError("a dict of ranks chooses the layers: do not pass targets as well")
    linears = [name for name, m in model.named_modules() if name and type(m) is nn.Linear]
    last_part = {name: name.split(".")[-1] for name in linears}
    wanted = ["all"] if targets is None else targets
    wanted = set(wanted.split() if isinstance(wanted, str) else wanted)
    ranks = {name: rank for name in linears if {name, last_part[name], "all"} & wanted}
    unknown = wanted - {*linears, *last_part.values(), "all"}
    if isinstance(rank, dict):
        ranks = {name: rank[name] for name in linears if name in rank}
        unknown = rank.keys() - ranks.keys()
    for name, m in model.named_modules():
        if type(m).__name__ == "Conv1D" and {name, name.split(".")[-1], "all"} & (unknown or wanted):
            raise ValueError(f"{name} is a transformers Conv1D, not an nn.Linear: the README shows "
                             "how to replace it")
    if unknown or not ranks:
        choices = f"{' '.join(dict.fromkeys(last_part.values()))}, \"all\" and full names"
        if isinstance(rank, dict):
            choices = f"full names such as {', '.join(linears[:2])}"
        raise ValueError(f"{' '.join(sorted(unknown)) or 'an empty selection'} is not an nn.Linear "
                         f"of the model: choose from {choices}")
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name in ranks:
        parent = model.get_submodule(name.rpartition(".")[0])
        tied = uses[id(model.get_submodule(name).weight)] > 1
        if tied or isinstance(parent, nn.TransformerEncoderLayer):
            raise ValueError(f"{name}: its weight is also used outside this layer (it is tied, or "
                             "nn.TransformerEncoderLayer reads it), where ΔW would be missing")
    return ranks
