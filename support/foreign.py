"""
Adapters that train.py did not save, in the files of peft and loralib, read as a run of train.py.

Both keep A (r, d_in) and B (d_out, r) by the layer's name; peft has α in an adapter_config.json
beside them, loralib nowhere. GPT-2's fused c_attn is q, k and v here, and B is cut in three. peft's
A serves all; in loralib's MergedLinear each has its own, and two of them are q and v, as in LoRA's
script for GPT-2.
"""
import json
import math
import re

import torch

import lora
import model

KEY = re.compile(r"(?:base_model\.model\.|module\.)?(.+)\.lora_([AB])(\.weight)?")
IN_GPT2 = re.compile(rf"(?:transformer\.)?(h\.\d+)\.({'|'.join(model.HF_NAMES)})")
OTHERS = ("use_dora use_qalora use_bdlora kasa_config lora_bias layer_replication "
          "target_parameters alora_invocation_tokens arrow_config").split()
MOVES_W = "pissa", "olora", "corda", "loftq", "lora_ga"     # starts that change the base as well
SETTINGS = {"method": "lora", "scratch": False, "seed": None, "data": ["(not given)"],
            "dtype": "fp32", "eval_rows": 200, "batch_size": 8, "block_size": 1024}
RUN = {"history": {"loss": [], "valid": [], "beta": []}, "phase": "train", "step": None,
       "before": None, "after": None}


def read(path):
    """The dict in a torch or safetensors file, or a peft folder. Raises OSError or ValueError."""
    if path.is_dir():
        files = sorted(path.glob("adapter_model.*"))            # .bin, .safetensors
        if not files:
            raise ValueError(f"{path}: a folder without peft's adapter_model.safetensors or .bin")
        path = files[-1]
    if path.suffix != ".safetensors":
        return model.read(path)
    data = path.read_bytes()
    try:
        from safetensors.torch import load
        return dict(sorted(load(data).items()))                 # else in any order
    except ImportError:
        raise ValueError(f"{path}: to read it, pip install safetensors") from None
    except Exception as e:                                      # of a kind of safetensors' own
        raise ValueError(f"{path}: not a whole safetensors file ({e})") from None


def as_run(saved, path, alpha=None):
    """What a checkpoint holds, of such tensors; the scale is None where nothing says α.
    Raises OSError or ValueError where they are not a whole LoRA."""
    if {"layer", "tensors", "scale", "base"} <= saved.keys():
        return of_state_dict(saved)
    saved = saved.get("model_state_dict", saved)                # as LoRA's own script saves it
    config, layers, others = {"lora_alpha": alpha}, {}, []
    for key, t in saved.items():
        found = KEY.fullmatch(str(key))
        if found and torch.is_tensor(t):
            layer, side, of_peft = found.groups()
            layers.setdefault(layer, {})[side] = t
        else:
            others.append(str(key))
    if not layers:
        raise ValueError(f"{path}: not a checkpoint of train.py, nor an adapter of peft or loralib")
    if of_peft:
        config = peft_config((path if path.is_dir() else path.parent) / "adapter_config.json")
    own, scale, size = {}, {}, 0
    for layer, pair in layers.items():
        size += sum(t.numel() for t in pair.values())
        for name, A, B in split(layer, pair, path):
            own[name] = {"A": A.float(), "B": B.float()}
            scale[name] = scale_of(layer, len(A), config)
    adapter = {"layer": "LoRALinear", "base": None, "tensors": own, "scale": scale}
    ranks = {name: len(pair["A"]) for name, pair in own.items()}
    settings = {"model": config.get("base_model_name_or_path"), "rank": ranks, "scale": scale}
    return RUN | {"settings": SETTINGS | settings, "adapter": adapter, "base": None,
                  "others": others, "parameters": size}


def of_state_dict(adapter):
    """The same of a lora.state_dict(model) that was saved by hand."""
    size = 0
    for own in adapter["tensors"].values():
        size += sum(t.numel() for t in own.values())
    settings = {"model": None, "method": adapter["layer"].removesuffix("Linear").lower()}
    return RUN | {"settings": SETTINGS | settings, "adapter": adapter, "base": adapter["base"],
                  "parameters": size}


def peft_config(path):
    """What peft says of an adapter. Raises OSError, or ValueError where that is not LoRA alone."""
    try:
        config = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as e:
        raise ValueError(f"{path}: not a config of peft ({e})") from None
    kinds = [str(config.get("peft_type")), *[flag for flag in OTHERS if config.get(flag)]]
    start = str(config.get("init_lora_weights")).lower()
    if kinds != ["LORA"] or start.startswith(MOVES_W):
        raise ValueError(f"{path}: not LoRA alone, but {' '.join(kinds)}, start {start}")
    return config


def split(layer, pair, path):
    """(name, A, B) of each matrix that a layer's A and B are about: three in GPT-2's c_attn."""
    found, names = IN_GPT2.fullmatch(layer), [layer]
    if found:
        names = [f"{found[1]}.{name}" for name in model.HF_NAMES[found[2]]]
    shapes = {side: tuple(t.shape) for side, t in pair.items()}
    if len(pair) < 2 or any(len(shape) != 2 for shape in shapes.values()):
        raise ValueError(f"{path}: {layer} should have two matrices A and B, not {shapes}")
    A, B = pair["A"], pair["B"]
    groups = len(A) / B.size(1)                         # 2 or 3 in a MergedLinear
    if groups == 2:
        names = names[::2]                              # q and v
    n = len(names)
    if groups not in (1, n) or n > 1 and len(B) != n * A.size(1):
        raise ValueError(f"{path}: A and B of {layer} do not fit each other, {shapes}")
    if groups == 1:
        return zip(names, [A] * n, B.chunk(n))
    return zip(names, A.chunk(n), B.chunk(n))


def scale_of(layer, r, config):
    """α/r, or α/√r; None where α is not known."""
    alpha = config.get("lora_alpha")
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            alpha = value
            break
    if config.get("use_rslora"):
        r = math.sqrt(r)
    return None if alpha is None else alpha / r


def for_model(saved, base):
    """The adapter as `lora.load_state_dict` takes it for this base. Raises ValueError."""
    if None in saved["adapter"]["scale"].values():
        raise ValueError("its file does not say α: --alpha does")
    if saved["others"]:
        raise ValueError(f"it is more than A and B, it has {saved['others'][0]}")
    for name in saved["adapter"]["tensors"]:
        if f"{name}.weight" not in base.state_dict():
            raise ValueError(f"it is of another base: this one has no {name}")
    return lora.combine([saved["adapter"]]) | {"base": lora.fingerprint(base)}
