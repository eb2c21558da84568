"""
Reads the adapters of peft and loralib as if they were runs of train.py, and writes peft's.

Both store A (r, d_in) and B (d_out, r) under the layer's name. peft has α in adapter_config.json in
the same folder; loralib does not store it. GPT-2's fused c_attn becomes q, k and v: B is cut into
three. peft's A serves all three; in loralib's MergedLinear each has its own A, and if there are
two, they are q and v, as in the LoRA paper's script for GPT-2.
"""
import json
import math
import re
import shutil

import torch

import model
from support import adapter_state

WRAPPERS = r"(?:(?:base_model\.model|module)\.)*"              # of peft and of DataParallel
KEY = re.compile(WRAPPERS + r"(.+)\.lora_([AB])(?:\.default)?(\.weight)?")
OTHER_METHOD = re.compile(r".+\.lora_(?:magnitude_vector|E)\b.*")      # DoRA, AdaLoRA
IN_GPT2 = re.compile(rf"(?:transformer\.)?(h\.\d+)\.({'|'.join(model.HF_NAMES)})")
UNSUPPORTED = ("use_dora use_qalora use_bdlora kasa_config lora_bias layer_replication "
               "target_parameters alora_invocation_tokens arrow_config").split()
CHANGES_W = ("pissa", "olora", "corda", "loftq", "lora_ga")     # initialisations that change W
METHOD_OF_LAYER = {"MultiLoRALinear": "multilora", "AutoLoRALinear": "autolora"}
SETTINGS = {"model": None, "method": "lora", "scratch": False, "seed": None, "data": None,
            "ranks_from": None, "dtype": "fp32", "eval_rows": 200, "batch_size": 8,
            "block_size": 1024}
RUN = {"history": {"loss": [], "valid": [], "beta": []}, "phase": "train", "step": None,
       "before": None, "after": None}


def read(path):
    """The dict in a torch file, a safetensors file or a peft folder. Raises OSError, ValueError."""
    if path.is_dir():
        files = sorted(path.glob("adapter_model.*"))            # .bin, .safetensors
        if not files:
            raise ValueError(f"{path}: the folder has no adapter_model.safetensors or "
                             "adapter_model.bin")
        path = files[-1]
    with open(path, "rb") as f:
        if f.read(40).startswith(b"version https://git-lfs"):
            raise ValueError(f"{path} is a Git LFS pointer: git lfs pull downloads the real file")
    if path.suffix != ".safetensors":
        return model.read(path)
    data = path.read_bytes()
    try:
        from safetensors.torch import load
        return dict(sorted(load(data).items()))                 # the file's own order varies
    except ImportError:
        raise ValueError(f"{path}: run pip install safetensors to read it") from None
    except Exception as e:                                      # safetensors has its own kind
        raise ValueError(f"{path} is not a complete safetensors file ({e})") from None


def to_run(saved, path, alpha=None):
    """
    The content of such a file in the form of a checkpoint; scales are None if α is unknown. Raises
    OSError or ValueError if the file is not a complete LoRA adapter.
    """
    if {"layer", "settings", "tensors", "scale", "base"} <= saved.keys():
        # a state of adapter_state.state_dict; layers of a user's own class are shown as LoRA
        method = METHOD_OF_LAYER.get(saved["layer"], "lora")
        settings = saved["settings"] | {"model": None, "method": method}
        return run_of(saved, saved["tensors"], settings)
    file = (path if path.is_dir() else path.parent) / "adapter_config.json"
    config = {"lora_alpha": alpha}
    if path.is_dir() or path.stem == "adapter_model":
        config = read_peft_config(file)
    saved = saved.get("model_state_dict", saved)                # the LoRA paper's script saves this
    pairs, ignored, from_peft = find_pairs(saved, path)
    if from_peft and config.get("lora_alpha") is None and file.exists():
        config = read_peft_config(file)
    tensors = {}
    scale = {}
    for layer, pair in pairs.items():
        for name, A, B in split_fused(layer, pair, path):
            tensors[name] = {"A": A.float(), "B": B.float()}
            scale[name] = lora_scale(layer, len(A), config)
    adapter = {"layer": "LoRALinear", "base": None, "tensors": tensors, "scale": scale}
    base = (config.get("base_model_name_or_path") or "").removeprefix("openai-community/")
    settings = {"model": base or None, "scale": scale}
    return run_of(adapter, pairs, settings) | {"ignored": ignored}


def run_of(adapter, stored, settings):
    """A checkpoint with this adapter. `stored` are its tensors as they are in the file."""
    size = 0
    for own in stored.values():
        size += sum(map(torch.numel, own.values()))
    ranks = {name: len(own["A"]) for name, own in adapter["tensors"].items()}
    return RUN | {"settings": SETTINGS | settings | {"rank": ranks}, "adapter": adapter,
                  "base": adapter["base"], "parameters": size}


def find_pairs(saved, path):
    """({layer: {"A": A, "B": B}}, the keys of other tensors, whether peft wrote them). Raises
    ValueError if there is no pair, or another method's."""
    pairs = {}
    ignored = []
    from_peft = None
    for key, t in saved.items():
        key = str(key).replace("_orig_mod.", "")                # of a compiled model
        match = KEY.fullmatch(key)
        if OTHER_METHOD.fullmatch(key):
            raise ValueError(f"{path}: {key} belongs to DoRA or AdaLoRA, whose ΔW is not B A alone")
        if match and torch.is_tensor(t):
            layer, side, from_peft = match.groups()
            if side in pairs.setdefault(layer, {}):
                raise ValueError(f"{path} has two matrices {side} for {layer}")
            pairs[layer][side] = t
        else:
            ignored.append(key)
    if not pairs:
        raise ValueError(f"{path} is neither a checkpoint of train.py nor an adapter of peft or "
                         "loralib")
    return pairs, ignored, from_peft


def read_peft_config(path):
    """A dict from adapter_config.json. Raises OSError, or ValueError if it is not plain LoRA."""
    try:
        config = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as e:
        raise ValueError(f"{path} is not a configuration of peft ({e})") from None
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: the adapter is peft's {config.get('peft_type')}, not LORA: it "
                         "has no ΔW = B A")
    used = [flag for flag in UNSUPPORTED if config.get(flag)]
    if used:
        raise ValueError(f"{path}: the adapter is not plain LoRA, it uses {' '.join(used)}")
    initialisation = str(config.get("init_lora_weights")).lower()
    if initialisation.startswith(CHANGES_W):
        raise ValueError(f"{path}: the initialisation {initialisation} changed the base model's "
                         "weights, so ΔW is not B A alone")
    return config


def split_fused(layer, pair, path):
    """(name, A, B) of each matrix that a layer's A and B update: three for GPT-2's c_attn."""
    shapes = {side: tuple(t.shape) for side, t in pair.items()}
    if len(pair) < 2 or any(len(shape) != 2 for shape in shapes.values()):
        raise ValueError(f"{path}: {layer} should have two matrices A and B, but has {shapes}")
    names = [layer]
    match = IN_GPT2.fullmatch(layer)
    if match:
        names = [f"{match[1]}.{name}" for name in model.HF_NAMES[match[2]]]
    A = pair["A"]
    B = pair["B"]
    if len(A) > A.size(1) == len(B):
        raise ValueError(f"{path}: {layer} has {shapes}, but A should be (r, d_in) and B "
                         "(d_out, r) with r ≤ min(d_in, d_out): are they transposed?")
    groups = len(A) / B.size(1)                         # 2 or 3 in loralib's MergedLinear
    if groups == 2:
        names = names[::2]                              # q and v
    n = len(names)
    if groups not in (1, n) or n > 1 and len(B) != n * A.size(1):
        raise ValueError(f"{path}: the shapes of A and B of {layer} do not fit together: {shapes}")
    if groups == 1:
        return zip(names, [A] * n, B.chunk(n))
    return zip(names, A.chunk(n), B.chunk(n))


def lora_scale(layer, r, config):
    """α/r, or α/√r with peft's use_rslora; None if α is unknown."""
    alpha = config.get("lora_alpha")
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            alpha = value
            break
    if config.get("use_rslora"):
        r = math.sqrt(r)
    return None if alpha is None else alpha / r


def fit_to_model(saved, base):
    """The adapter as a state that load_state_dict accepts for this base model. Raises
    ValueError."""
    if None in saved["adapter"]["scale"].values():
        raise ValueError("the file does not contain α: pass --alpha")
    if saved["ignored"]:
        raise ValueError(f"the file also contains {saved['ignored'][0]}, which is neither A nor B, "
                         "so it can only be analysed")
    for name in saved["adapter"]["tensors"]:
        if f"{name}.weight" not in base.state_dict():
            raise ValueError(f"the adapter belongs to another base model: this one has no {name}")
    state = adapter_state.combine([saved["adapter"]])
    return state | {"base": adapter_state.fingerprint(base)}


def to_peft(state, base):
    """
    (adapter_config.json as a dict, tensors) in peft's format for a state of adapter_state and the
    name of its base model. s is folded into B, so that peft's own scale is 1. GPT-2's q, k and v
    become one pair for c_attn; the names of other models' layers do not change.
    """
    layers = {name: [name] for name in state["tensors"]}        # {peft's layer: our layers in it}
    for name in state["tensors"]:
        for theirs, ours in model.HF_NAMES.items():
            match = re.fullmatch(rf"(h\.\d+)\.({'|'.join(ours)})", name)
            if match:
                del layers[name]
                layers[f"transformer.{match[1]}.{theirs}"] = [f"{match[1]}.{n}" for n in ours]
    tensors = {}
    ranks = {}
    for name, parts in layers.items():
        A, B = stack([scaled_factors(state, part) for part in parts])
        tensors[f"base_model.model.{name}.lora_A.weight"] = A
        tensors[f"base_model.model.{name}.lora_B.weight"] = B
        ranks[name] = len(A)
    r = max(ranks.values())
    other = {name: rank for name, rank in ranks.items() if rank != r}
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
              "r": r, "lora_alpha": r, "rank_pattern": other, "alpha_pattern": other,
              "target_modules": list(ranks), "lora_dropout": 0.0, "bias": "none",
              "fan_in_fan_out": any(name.startswith("transformer.h.") for name in ranks)}
    return config, tensors


def scaled_factors(state, name):
    """(B diag(s), A) of a layer, or None."""
    own = state["tensors"].get(name)
    return own and (own["B"] * state["scale"][name], own["A"])


def stack(factors):
    """One pair A (Σ r, d_in) and B (Σ d_out, Σ r) for layers with the same input and d_out, whose
    outputs are concatenated: A is stacked, and B has a block for each layer (empty for None)."""
    d_out, d_in = next((len(f[0]), f[1].size(1)) for f in factors if f)
    empty = torch.zeros(d_out, 0), torch.zeros(0, d_in)
    factors = [f or empty for f in factors]
    return torch.cat([A for _, A in factors]), torch.block_diag(*[B for B, _ in factors])


def write_peft(state, base, folder):
    """Write an adapter into a new folder in peft's format. Raises OSError or ValueError."""
    try:
        from safetensors.torch import save
    except ImportError:
        raise ValueError("run pip install safetensors to write peft's format") from None
    config, tensors = to_peft(state, base)
    folder.mkdir(parents=True)
    try:
        (folder / "adapter_model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))
    except BaseException:
        shutil.rmtree(folder)                   # so that the command can be repeated
        raise
