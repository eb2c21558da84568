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

import torch

import lora
from autolora import AutoLoRALinear
from lora import LoRALinear
from multilora import MultiLoRALinear

LAYERS = {c.__name__: c for c in (LoRALinear, MultiLoRALinear, AutoLoRALinear)}


def fingerprint(model):
    """16 hex digits that identify the base model, with or without adapters: a hash of the names,
    shapes and values (rounded to bfloat16) of its weights."""
    sha = hashlib.sha256()
    with lora.disabled(model):
        for name, p in sorted(model.named_parameters()):
            sha.update(f"{name} {tuple(p.shape)}".encode())
            sha.update(p.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy())
    return sha.hexdigest()[:16]


def settings_of(layer):
    """The keyword arguments that construct such a layer again, with their present values. A class
    must keep its constructor's arguments as attributes of the same names."""
    settings = {}
    for name in list(inspect.signature(type(layer)).parameters)[2:]:        # after base and rank
        value = getattr(layer, name)
        settings[name] = value.p if name == "dropout" else value
    return settings


def own_tensors(layer):
    """{"A": A, "B": B, ...}: the parameters of a layer without those of its base."""
    return dict(layer.named_parameters(recurse=False))


def state_dict(model, base=None):
    """
    The state of a model's adapters, on the CPU; it is the same while they are merged. `base` is
    the base model's fingerprint, if it is known already. Raises ValueError if there are none.
    """
    tensors = {}
    scale = {}
    kinds = []
    for name, m in lora.adapters(model).items():
        tensors[name] = {key: p.detach().cpu().clone() for key, p in own_tensors(m).items()}
        scale[name] = torch.as_tensor(m.scale(), dtype=m.A.dtype).detach().cpu().clone()
        kinds.append((type(m).__name__, settings_of(m)))
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
    Load a saved adapter into its base model, in place of any adapter that is there. Tensors of
    layers that fit are overwritten in place, so that an optimizer keeps working. Returns the model.

    `layer` is the layers' class if it is not one of LAYERS. Raises ValueError, and leaves the model
    as it was, if the state does not belong to this model or is incomplete.
    """
    check_state(state, model, layer)
    layer = layer or LAYERS[state["layer"]]
    ranks = {name: len(own.get("A", ())) for name, own in state["tensors"].items()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    old = lora.adapters(model)
    merged = [m for m in old.values() if m.merged]
    lora.remove(model)
    try:
        lora.inject(model, None, ranks, layer, **state["settings"])
        new = lora.adapters(model)
        check_shapes(state, new)
    except Exception:
        lora.remove(model)
        for name, m in old.items():
            model.set_submodule(name, m)
        for m in merged:
            m.merge()
        for p in trainable:
            p.requires_grad_(True)
        raise
    for name, m in new.items():
        if name in old and same_kind(m, old[name]):
            m = old[name]
            model.set_submodule(name, m)
        for key, p in own_tensors(m).items():
            p.data.copy_(state["tensors"][name][key])
    for p in trainable if old else []:          # what the caller has unfrozen stays trainable
        p.requires_grad_(True)
    return model


def same_kind(a, b):
    return type(a) is type(b) and a.rank == b.rank and settings_of(a) == settings_of(b)


def check_state(state, model, layer):
    """Raise ValueError, with the reason, if a state cannot belong to this model."""
    if "adapter" in state:
        raise ValueError('this is a checkpoint of train.py: its adapter is under ["adapter"]')
    missing = {"layer", "settings", "base", "tensors", "scale"} - state.keys()
    if missing:
        raise ValueError(f"this is not an adapter's state: it has no {' '.join(sorted(missing))}")
    if layer is None and state["layer"] not in LAYERS:
        raise ValueError(f"the adapter's layers are of class {state['layer']}, which is unknown "
                         "here: pass the class as the argument `layer`")
    here = fingerprint(model)
    if state["base"] != here:
        raise ValueError(f"the adapter was trained on another base model, with the fingerprint "
                         f"{state['base']}; this model's is {here}: load it into its own base")


def check_shapes(state, layers):
    """Raise ValueError unless a state has exactly the tensors of these layers."""
    for name, m in layers.items():
        shapes = {key: tuple(p.shape) for key, p in own_tensors(m).items()}
        saved = {key: tuple(t.shape) for key, t in state["tensors"][name].items()}
        if shapes != saved:
            raise ValueError(f"{name}: the adapter's tensors are {saved}, but should be {shapes}")


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
