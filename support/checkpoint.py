"""
Checkpoints of train.py: what a file holds, and the way back from a file to a model.

    settings            the flags of train.py
    phase, step         "search" or "train", and how many of its steps are done
    parameters          how many parameters are trained
    base, checksums     the fingerprint of the base model, and a checksum of each task's rows
    history             loss and gradient norm of every step; at intervals valid and beta
    before, after       the results of evaluate.py; `after` and `samples` only once a run has ended
    adapter             adapter_state.state_dict; full fine-tuning has `model`, its state dict, and
                        `config` instead
    optimizer           its state dict, until the run has ended
"""
import hashlib
import os
import secrets
from argparse import Namespace
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn as nn

from model import GPT, PRESETS, read
from support import adapter_state, distributed, interop

try:
    import fcntl
except ImportError:             # on Windows, where two runs can write the same checkpoint
    fcntl = None

PARTS = "phase step parameters base checksums history before after samples".split()
REQUIRED = "method model data seed dtype block_size batch_size eval_rows scratch".split()
RENAMED = {"ranks": "ranks_from", "split": "search_split"}      # flags of earlier versions


def base_model(name):
    """A pretrained model. To use a model other than GPT-2, replace this function."""
    return GPT.from_pretrained(name)


def base_matrices(name, device):
    """({module name: W} of a base model's nn.Linear layers, its fingerprint). A file that contains
    only some of these W has no fingerprint: None. Raises OSError or ValueError."""
    saved = interop.read(Path(name)) if Path(name).is_file() else {"": None}
    if all(torch.is_tensor(t) and t.dim() == 2 for t in saved.values()):
        W = {key.removesuffix(".weight"): t.to(device).float() for key, t in saved.items()}
        return W, None
    model = base_model(name).to(device)
    W = {}
    for key, m in model.named_modules():
        if type(m) is nn.Linear:
            W[key] = m.weight.detach()
    return W, adapter_state.fingerprint(model)


def start_model(settings, device):
    """The model that a run starts from: the base model, or random weights of its shape with
    --scratch. Raises OSError or ValueError."""
    if settings.model is None:
        raise ValueError("the file does not contain the name of its base model: pass --base")
    if not settings.scratch:
        model = base_model(settings.model)
    elif settings.model not in PRESETS:
        raise ValueError(f"--scratch needs a --model from {' '.join(PRESETS)}, "
                         f"not {settings.model}")
    else:
        config = PRESETS[settings.model]
        torch.manual_seed(settings.seed)
        model = GPT(replace(config, block_size=settings.block_size or config.block_size))
    if settings.method != "full" and settings.dtype == "bf16":
        model.bfloat16()                        # W is not trained; A and B will be float32
    return model.to(device)


def trained_state(model, settings, base, ended):
    """The entries of a checkpoint that `restore` reads."""
    if settings.method != "full":
        return {"adapter": adapter_state.state_dict(model, base)}
    saved = {"model": model.state_dict()}
    if ended and settings.scratch:
        saved["model"] = {name: w.half() for name, w in saved["model"].items()}
    if isinstance(model, GPT):                  # GPT.from_pretrained then reads the file, too
        saved["config"] = asdict(model.config)
    return saved


def restore(saved, model):
    """Load what a run trained into the model that it started from. Raises ValueError."""
    if "ignored" in saved:                      # an adapter of another library
        adapter_state.load_state_dict(model, interop.fit_to_model(saved, model))
    elif "adapter" in saved:
        adapter_state.load_state_dict(model, saved["adapter"])
    elif saved["base"] != adapter_state.fingerprint(model):
        raise ValueError(f"the checkpoint was trained on another base model, with the fingerprint "
                         f"{saved['base']}; this one's is {adapter_state.fingerprint(model)}: pass "
                         "the right one by --base")
    else:
        model.load_state_dict(saved["model"])


def open_run(path, changes={}, alpha=None):
    """
    (checkpoint, its settings with `changes`) from a file of train.py. An adapter of peft (a file
    or its folder) or of loralib (with this alpha) is returned in the same form. Raises OSError or
    ValueError.
    """
    saved = interop.read(Path(path))
    if not {"settings", *PARTS} <= saved.keys():
        saved = interop.to_run(saved, Path(path), alpha)
    check_complete(saved, path)
    settings = {RENAMED.get(name, name): value for name, value in saved["settings"].items()}
    return saved, Namespace(**settings | changes)


def check_complete(saved, path):
    """Raise ValueError if a checkpoint lacks something that every command needs."""
    dicts = {name for name, part in saved.items() if isinstance(part, dict)}
    missing = sorted({"settings", "history"} - dicts)
    if not {"adapter", "model"} & dicts:
        missing.append("adapter")
    missing = missing or [name for name in REQUIRED if name not in saved["settings"]]
    if missing:
        raise ValueError(f"{path} is damaged: it has no {', '.join(missing)}")


def read_ranks(path, base):
    """{module name: rank} of the adapter in a checkpoint. Raises OSError, or ValueError unless the
    adapter was trained on the base model with this fingerprint and its search has ended."""
    saved = read(path)
    adapter = saved.get("adapter") or saved
    if not {"layer", "base", "tensors"} <= adapter.keys():
        raise ValueError(f"--ranks_from {path}: the file contains no adapter, or one of an early "
                         "version of train.py")
    if adapter["base"] != base:
        raise ValueError(f"--ranks_from {path}: its adapter was trained on another base model: "
                         "pass that one by --model")
    if adapter["layer"] == "AutoLoRALinear":
        raise ValueError(f"--ranks_from {path}: the search for ranks has not ended")
    return {name: len(own["A"]) for name, own in adapter["tensors"].items()}


@contextmanager
def reserved(path, method):
    """
    Create `path`, or the first free out/METHOD.pt, as an empty file, so that no other run uses it,
    and lock it. If nothing has been written into it by the end of the block, it is removed. Raises
    ValueError if the file exists and is not empty.
    """
    if not distributed.is_main_process():
        yield path
        return
    path = create_empty(path, method)
    with locked(path):
        try:
            yield path
        finally:
            with suppress(FileNotFoundError):
                if os.path.getsize(path) == 0:
                    os.unlink(path)


def create_empty(path, method):
    if path and os.path.isfile(path) and os.path.getsize(path) == 0:
        return path             # left by a run that was killed before it saved
    free = [f"out/{method}.pt", *[f"out/{method}-{n}.pt" for n in range(2, 10_000)]]
    for name in [path] if path else free:
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        with suppress(FileExistsError), open(name, "x"):
            return name
    raise ValueError(f"{path} exists already: choose another name, or continue its run by --resume")


@contextmanager
def locked(path):
    """In the block, no other run can write this checkpoint. Raises OSError if another run does, or
    if there is no such file."""
    os.stat(path)
    if fcntl is None or os.environ.get("RANK", "0") != "0":     # torchrun's others do not write
        yield
        return
    lock = beside(path, "lock")
    with open(lock, "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(f.fileno()).st_nlink == 0:              # another run has just removed it
                raise BlockingIOError
        except BlockingIOError:
            raise OSError(f"{path} is in use by another run, which has to end first") from None
        except OSError:
            pass                                                # a file system without locks
        for part in lock.parent.glob(beside(path, "*.part").name):
            part.unlink()                       # left by a process that was killed while writing
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def beside(path, suffix):
    """A hidden file next to `path`, with a short name even if the name of `path` is a long one."""
    path = Path(path).resolve()
    digits = hashlib.sha1(os.fsencode(path.name)).hexdigest()[:12]
    return path.with_name(f".{digits}.{suffix}")


def write(saved, path):
    """torch.save in the main process that leaves either the old file or the complete new one."""
    if not distributed.is_main_process():
        return
    part = beside(path, f"{secrets.token_hex(6)}.part")
    part.parent.mkdir(parents=True, exist_ok=True)      # it may have been moved during the run
    try:
        with open(part, "xb") as f:
            torch.save(saved, f)
            f.flush()
            os.fsync(f.fileno())
        part.replace(Path(path).resolve())              # a symbolic link remains one
    except RuntimeError as e:                           # torch raises it if the disk is full
        raise OSError(f"{path} could not be written ({e})") from None
    finally:
        part.unlink(missing_ok=True)
