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
from torch.nn.utils.parametrize import type_before_parametrizations


class LoRALinear(nn.Module):
    """A frozen nn.Linear, `base`, plus a trained update of rank r: x (..., d_in) -> h (..., d_out).
    Raises ValueError if `rank` is not an integer from 1 to min(d_in, d_out)."""

    def __init__(self, base, rank, alpha=16.0, dropout=0.0):
        super().__init__()
        if not {"weight", "bias"} <= base._parameters.keys():
            raise ValueError("its weight or bias is recomputed in every forward pass, as by "
                             "weight_norm or prune: remove that first")
        W = base.weight
        d_out, d_in = W.shape
        if rank not in range(1, min(d_out, d_in) + 1):
            raise ValueError(f"rank {rank} is not an integer from 1 to {min(d_out, d_in)}")
        self.base = base.requires_grad_(False)
        self.rank = int(rank)
        self.alpha = alpha
        self.dropout = nn.Dropout(dropout)
        dtype = torch.promote_types(W.dtype, torch.float32)         # float32 over a bfloat16 base
        self.A = nn.Parameter(W.new_empty(self.rank, d_in, dtype=dtype))
        self.B = nn.Parameter(W.new_zeros(d_out, self.rank, dtype=dtype))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.register_buffer("W_merged", None, persistent=False)    # W + ΔW, while merged
        self.register_load_state_dict_post_hook(LoRALinear.unmerge)

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
        if self.merged:
            return nn.functional.linear(x, self.weight, self.base.bias)
        Bs, A = self.factors()
        z = nn.functional.linear(self.dropout(x), A.to(x.dtype))    # (..., d_in) -> (..., r)
        return self.base(x) + nn.functional.linear(z, Bs.to(x.dtype))   # equation 3, (..., d_out)

    @property
    def weight(self):
        """W + ΔW (d_out, d_in), added in float32. Some models, such as T5, read it directly."""
        if self.merged:
            if self.training and torch.is_grad_enabled():
                raise RuntimeError("a merged layer cannot be trained: call unmerge() to train it, "
                                   "or eval() to use it")
            return self.W_merged
        W = self.base.weight
        return (W.to(self.A.dtype) + self.delta_weight()).to(W.dtype)

    @property
    def merged(self):
        return self.W_merged is not None

    @torch.no_grad()
    def merge(self):
        """Compute W + ΔW once, so that the layer costs what its base costs. The base keeps W."""
        self.unmerge()
        self.W_merged = self.weight

    def unmerge(self, *_):      # also called by load_state_dict, with arguments
        self.W_merged = None


def inject(model, targets=None, rank=8, layer=LoRALinear, **settings):
    """
    Replace nn.Linear layers by `layer(linear, rank, **settings)` and freeze all other parameters.
    `targets` lists full module names or their last parts, "q v" or ["q", "v"]; None means all.
    `rank` may also be a dict {full module name: rank}, which then selects the layers. Returns the
    model. Raises ValueError, and leaves the model as it was, if a layer cannot be adapted.
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
    if isinstance(model, LoRALinear):
        raise ValueError("the model is itself a LoRA layer, which cannot be replaced by its base: "
                         "put it into another module, such as nn.Sequential(layer)")
    for name, m in adapters(model).items():
        model.set_submodule(name, m.base)


@contextmanager
def disabled(model):
    """`with disabled(model): ...` runs the base model alone, even if the adapters are merged. They
    are restored afterwards, unless others were loaded in the block."""
    layers = adapters(model)
    training = model.training
    remove(model)
    try:
        yield model
    finally:
        if not adapters(model):
            for name, m in layers.items():
                model.set_submodule(name, m)
                if model.training != training:
                    m.train(model.training)


def choose_layers(model, targets, rank):
    """{module name: rank} of the layers that `inject` replaces. Raises ValueError."""
    if adapters(model):
        raise ValueError("the model already has adapters: call lora.remove(model) first")
    if isinstance(rank, dict) and targets is not None:
        raise ValueError("a dict of ranks chooses the layers: do not pass targets as well")
    linears = {}                                        # {module name: its last part}
    for name, m in model.named_modules():
        if name and type_before_parametrizations(m) is nn.Linear:
            linears[name] = name.split(".")[-1]
    if isinstance(rank, dict):
        wanted = set(rank)
        ranks = {name: rank[name] for name in linears if name in rank}
        unknown = wanted - linears.keys()
        choices = f"full names such as {', '.join(list(linears)[:2])}"
    else:
        wanted = "all" if targets is None else targets
        wanted = set(wanted.split() if isinstance(wanted, str) else wanted)
        ranks = {name: rank for name, last in linears.items() if {name, last, "all"} & wanted}
        unknown = wanted - {*linears, *linears.values(), "all"}
        choices = f"{' '.join(dict.fromkeys(linears.values()))}, \"all\" and full names"
    for name, m in model.named_modules():
        if type(m).__name__ == "Conv1D" and {name, name.split(".")[-1], "all"} & wanted:
            raise ValueError(f"{name} is a transformers Conv1D, not an nn.Linear: the README shows "
                             "how to replace it")
    if unknown or not ranks:
        raise ValueError("the model has no nn.Linear "
                         f"{' '.join(sorted(unknown)) or 'to adapt'}: choose from {choices}")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    uses = Counter(map(id, parameters.values()))
    for name in ranks:
        parent = model.get_submodule(name.rpartition(".")[0])
        tied = uses[id(parameters.get(f"{name}.weight"))] > 1
        if tied or isinstance(parent, nn.TransformerEncoderLayer):
            raise ValueError(f"{name}: its weight is also used elsewhere (it is tied, or read by "
                             "nn.TransformerEncoderLayer), without ΔW: leave this layer out")
    return ranks
