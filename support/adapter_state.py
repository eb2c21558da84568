"""
An adapter as tensors: saved, loaded, combined, and tied to the base model it was trained on.

A state is a dict that torch.save can write and torch.load(weights_only=True) can read:

    layer, settings     the name of the layers' class, and its constructor's keyword arguments
    base                the fingerprint of the base model
    tensors             {module name: {"A": (r, d_in), "B": (d_out, r), and s or beta}}
    scale               {module name: s of ΔW = B diag(s) A}, so that ΔW can be computed from it
"""
import hashlib
import inspect
from functools import partial

import torch
import torch.nn as nn

import lora
from autolora import AutoLoRALinear
from lora import LoRALinear
from multilora import MultiLoRALinear

LAYERS = {"LoRALinear": LoRALinear, "MultiLoRALinear": MultiLoRALinear,
          "AutoLoRALinear": AutoLoRALinear}
PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def unwrap(model):
    """The model inside the wrappers of torch.compile and data parallelism."""
    while hasattr(model, "_orig_mod") or isinstance(model, PARALLEL):
        model = model.module if isinstance(model, PARALLEL) else model._orig_mod
    return model


def fingerprint(model):
    """16 hex digits that identify the base model, with or without adapters: a hash of the names,
    shapes and values (rounded to bfloat16) of its weights."""
    model = unwrap(model)
    sha = hashlib.sha256()
    with lora.disabled(model):
        for name, p in sorted(model.named_parameters()):
            sha.update(f"{name} {tuple(p.shape)}".encode())
            sha.update(p.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy())
    return sha.hexdigest()[:16]


def settings_of(m):
    """The keyword arguments that construct such a layer again, with their present values. A class
    must keep its constructor's arguments as attributes of the same names."""
    settings = {}
    for name in list(inspect.signature(type(m)).parameters)[2:]:            # after base and rank
        value = getattr(m, name)
        settings[name] = value.p if isinstance(value, nn.Dropout) else value
    return settings


def own_tensors(m):
    """{"A": A, "B": B, ...}: the parameters and buffers of a layer without those of its base."""
    tensors = m.state_dict(keep_vars=True)
    return {key: t for key, t in tensors.items() if not key.startswith("base.")}


def scale_of(m):
    return torch.as_tensor(m.scale(), dtype=m.A.dtype).detach().cpu().clone()


def state_dict(model, base=None):
    """
    The state of a model's adapters, on the CPU; it is the same while they are merged. `base` is
    the base model's fingerprint, if it is known already. Raises ValueError if there are none.
    """
    tensors = {}
    scale = {}
    kinds = []
    for name, m in lora.adapters(unwrap(model)).items():
        tensors[name] = {key: t.detach().cpu().clone() for key, t in own_tensors(m).items()}
        scale[name] = scale_of(m)
        kinds.append((type(m).__name__, settings_of(m)))
        if type(m).factors is not LoRALinear.factors:
            raise ValueError(f"{name}: its class overrides factors(), which a state cannot contain")
        if kinds[-1] != kinds[0]:
            raise ValueError(f"{name} has another class or other settings than the first adapter; "
                             "one state can hold only adapters of the same kind")
    if not kinds:
        raise ValueError("the model has no adapters to save")
    layer, settings = kinds[0]
    return {"layer": layer, "settings": settings, "base": base or fingerprint(model),
            "tensors": tensors, "scale": scale}


def load_state_dict(model, state, layer=None):
    """
    Load a saved adapter into its base model, in place of any adapter that is there. Parameters of
    the same name and shape are overwritten, so that an optimizer keeps working. Returns the model.

    `layer` is the layers' class if it is not one of LAYERS. Raises ValueError, and leaves the model
    as it was, if the state does not belong to this model or is incomplete.
    """
    inner = unwrap(model)
    check_state(state, inner, layer)
    layer = partial(layer or LAYERS[state["layer"]], **state["settings"])
    ranks = {name: len(own.get("A", ())) for name, own in state["tensors"].items()}
    trainable = [p for p in inner.parameters() if p.requires_grad]
    old = lora.adapters(inner)
    with lora.disabled(inner):                  # the old adapters come back if loading fails
        try:
            lora.inject(inner, None, ranks, layer)
            new = lora.adapters(inner)
            for name, m in new.items():
                fill(m, state["tensors"][name], state["scale"].get(name), name)
        except Exception:
            lora.remove(inner)
            for p in trainable:
                p.requires_grad_(True)
            raise
    for name in old.keys() & new.keys():
        keep_parameters(old[name], new[name])
    for p in trainable if old else []:          # what the caller has unfrozen stays trainable
        p.requires_grad_(True)
    return model


def check_state(state, model, layer):
    """Raise ValueError, with the reason, if a state cannot belong to this model."""
    if "adapter" in state:
        raise ValueError('this is a checkpoint of train.py: its adapter is under ["adapter"]')
    present = {key for key, value in state.items() if value is not None}
    missing = {"layer", "settings", "base", "tensors", "scale"} - present
    if missing:
        raise ValueError(f"this is not an adapter's state: it has no {' '.join(sorted(missing))}")
    if layer is None and state["layer"] not in LAYERS:
        raise ValueError(f"the adapter's layers are of class {state['layer']}, which is unknown "
                         "here: pass the class as the argument `layer`")
    here = fingerprint(model)
    if state["base"] == here:
        return
    message = (f"the adapter was trained on another base model, with the fingerprint "
               f"{state['base']}; this model's is {here}: load it into its own base")
    if any(p.dtype == torch.float16 for p in model.parameters()):
        message += ". This model is in float16, which changes W: load first, then call half()"
    raise ValueError(message)


def fill(m, tensors, scale, name):
    """Copy saved tensors into a new layer. Raises ValueError if they, or its scale, do not fit."""
    own = own_tensors(m)
    shapes = {key: tuple(t.shape) for key, t in own.items()}
    saved = {key: tuple(t.shape) for key, t in tensors.items()}
    if shapes != saved:
        raise ValueError(f"{name}: the adapter's tensors are {saved}, but should be {shapes}")
    for key, t in own.items():
        t.data.copy_(tensors[key])
    if scale is None:
        raise ValueError(f"{name}: the adapter's scale is unknown")
    here = scale_of(m)
    rtol = 1e-4 if scale.dtype.itemsize > 2 else 0.02           # it may have been in bfloat16
    if scale.shape != here.shape or not torch.allclose(here, scale.to(here), rtol):
        raise ValueError(f"{name}: the adapter's scale is {scale}, but its settings give {here}")


def keep_parameters(old, new):
    """Give a layer the Parameters of the one that it replaces, with its own values."""
    before = own_tensors(old)
    for key, t in own_tensors(new).items():
        if key in before and before[key].shape == t.shape:
            before[key].data.copy_(t.data)
            parent, _, attribute = key.rpartition(".")
            setattr(new.get_submodule(parent), attribute, before[key])


def combine(states, weights=None):
    """
    Σᵢ wᵢ ΔWᵢ of adapters of one base model as the state of one LoRA: wᵢ Bᵢ diag(sᵢ) side by side,
    Aᵢ on top of each other. It is exact; its rank is Σᵢ rᵢ, but at most min(d_in, d_out). Task
    arithmetic (arXiv 2212.04089). Raises ValueError for different base models.
    """
    weights = [1.0] * len(states) if weights is None else weights
    if not states:
        raise ValueError("there are no adapters to combine")
    if len(weights) != len(states):
        raise ValueError(f"{len(states)} adapters need {len(states)} weights, not {len(weights)}")
    for state in states:
        if "tensors" not in state:
            raise ValueError('this is not an adapter: that of a checkpoint is its ["adapter"]')
    bases = {state["base"] for state in states}
    if len(bases) != 1:
        raise ValueError("the adapters were trained on different base models")
    factors = {}
    for state, w in zip(states, weights):
        for name, own in state["tensors"].items():
            Bs = w * state["scale"][name] * own["B"]
            factors.setdefault(name, []).append((Bs, own["A"]))
    tensors = {}
    scale = {}
    for name, pairs in factors.items():
        B = torch.cat([B for B, _ in pairs], 1)                         # (d_out, Σ rᵢ)
        A = torch.cat([A for _, A in pairs])                            # (Σ rᵢ, d_in)
        if len(A) > min(len(B), A.size(1)):                             # more than full rank
            U, S, Vh = torch.linalg.svd(B.double() @ A.double(), full_matrices=False)
            B, A = (U * S).to(B.dtype), Vh.to(A.dtype)
        tensors[name] = {"A": A, "B": B * len(A)}                       # s = α/r with α = 1
        scale[name] = torch.tensor(1 / len(A), dtype=A.dtype)
    return {"layer": "LoRALinear", "settings": {"alpha": 1.0}, "base": bases.pop(),
            "tensors": tensors, "scale": scale}
