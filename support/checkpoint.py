"""
What a file of ours holds, a whole run, and the way back into a model:
    settings        of train.py
    phase, step     "search" or "train", its steps done; parameters, how many are trained
    base, checksums fingerprint of the base; of each task's rows
    history         loss, norm of every step; now and then valid, beta; ranks that a search found
    before, after   evaluate.py's results; `after`, and samples, only where the run has ended
    adapter         lora.state_dict; of full fine-tuning model, its state dict, and config
    optimizer       its state dict, until the run has ended
"""
import os
from argparse import Namespace
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn as nn

import autolora, lora, multilora        # all, so that lora knows all layers
from model import GPT, PRESETS, read
from support import command, foreign

PARTS = "phase step parameters base checksums history before after samples".split()


def base_model(name):
    """A pretrained model. For other models than GPT-2, replace this function."""
    return GPT.from_pretrained(name)


def matrices(name, device):
    """({name: W} of a base's nn.Linear, its fingerprint); of a file with no more than such W, None
    for the fingerprint. Raises OSError or ValueError."""
    held = read(name) if Path(name).is_file() else {"": None}
    if all(torch.is_tensor(t) and t.dim() == 2 for t in held.values()):
        W = {key.removesuffix(".weight"): t.to(device).float() for key, t in held.items()}
        return W, None
    model, W = base_model(name).to(device), {}
    for key, m in model.named_modules():
        if type(m) is nn.Linear:
            W[key] = m.weight.detach()
    return W, lora.fingerprint(model)


def start_model(settings, device):
    """What a run starts from: the base, or random weights of its shape. Raises ValueError."""
    if settings.model is None:
        raise ValueError("it does not say which model is its base: --base does")
    if not settings.scratch:
        model = base_model(settings.model)
    elif settings.model not in PRESETS:
        raise ValueError(f"--scratch --model {settings.model}: choose from {' '.join(PRESETS)}")
    else:
        config = PRESETS[settings.model]
        torch.manual_seed(settings.seed)
        model = GPT(replace(config, block_size=settings.block_size or config.block_size))
    if settings.method != "full" and settings.dtype == "bf16":
        model.bfloat16()                        # W is not trained; A and B will be in float32
    return model.to(device)


def trained(model, settings, ended):
    """The part of a checkpoint that `restore` puts back."""
    if settings.method != "full":
        return {"adapter": lora.state_dict(model)}
    saved = {"model": model.state_dict()}
    if ended and settings.scratch:
        saved["model"] = {name: w.half() for name, w in saved["model"].items()}
    if isinstance(model, GPT):                  # then GPT.from_pretrained reads the file, too
        saved["config"] = asdict(model.config)
    return saved


def restore(saved, model):
    """Put what a run trained into the model that it started from. Raises ValueError."""
    if "others" in saved:
        lora.load_state_dict(model, foreign.for_model(saved, model))
    elif "adapter" in saved:
        lora.load_state_dict(model, saved["adapter"])
    elif saved["base"] != lora.fingerprint(model):
        raise ValueError(f"it was trained on another base, {saved['base']}, not this one")
    else:
        model.load_state_dict(saved["model"])


def open_run(path, changes={}, alpha=None):
    """(checkpoint, its settings, some changed) of a file of train.py, or, as if it were one, of an
    adapter of peft (a file or its folder) or loralib (of this α). Raises OSError or ValueError."""
    saved = foreign.read(Path(path))
    if not {"settings", *PARTS} <= saved.keys():
        saved = foreign.as_run(saved, Path(path), alpha)
    return saved, Namespace(**saved["settings"] | changes)


def ranks_of(path, base):
    """{name: rank} of the adapter in a checkpoint on this base. Raises OSError or ValueError."""
    adapter = read(path).get("adapter", {"base": None})
    if adapter["base"] != base or adapter["layer"] == "AutoLoRALinear":
        raise ValueError(f"--ranks {path}: wanted is an adapter of this base, after its search")
    return {name: len(own["A"]) for name, own in adapter["tensors"].items()}


def claim(path, method=None):
    """`path`, or the first free out/METHOD.pt, made as an empty file: no other run can take it."""
    free = [f"out/{method}.pt", *[f"out/{method}-{n}.pt" for n in range(2, 10_000)]]
    for name in [path] if path else free:
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        with suppress(FileExistsError), open(name, "x"):
            return name
    raise ValueError(f"{path} is there already: choose another name, or --resume its run")


def write(saved, path):
    """torch.save that leaves either the old file or the whole new one. Process 0 alone writes."""
    if command.process()[0] > 0:
        return
    part, path = Path(f"{path}.part"), Path(path)
    try:
        with open(part, "wb") as f:
            torch.save(saved, f)
            f.flush()
            os.fsync(f.fileno())
        part.replace(path)
    except RuntimeError as e:                           # torch's own, where a disk is full
        raise OSError(f"{part} could not be written ({e})") from None
    finally:
        part.unlink(missing_ok=True)
        if path.exists() and path.stat().st_size == 0:          # claimed, and not written
            path.unlink()
