"""
The device, the dtype, and the processes that torchrun starts.

Every function also works without torch.distributed, as one process of one.
"""
import atexit
import os

import torch
import torch.distributed as dist


def pick_device(name=None):
    """
    The torch.device called `name`; without a name, the accelerator that torch finds, or the CPU.
    Raises ValueError if a tensor cannot be created on that device.
    """
    if name is None:
        available = torch.accelerator.is_available()
        name = torch.accelerator.current_accelerator().type if available else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {name}: {str(e).splitlines()[0]}") from None
    if name.startswith("cuda"):
        torch.set_float32_matmul_precision("high")      # float32 products in TF32
    return torch.device(name)


def pick_dtype(name, device):
    """`name` if it is given; otherwise bf16 on a GPU that supports it and fp32 elsewhere."""
    if name:
        return name
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return "bf16"
    return "fp32"


def autocast(dtype, device):
    """A context manager in which activations are bfloat16 if `dtype` is "bf16"."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16")


def start_processes(device):
    """Join the process group if torchrun started this process. Returns this process's device."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    atexit.register(dist.destroy_process_group)
    return device


def process_index():
    return dist.get_rank() if dist.is_initialized() else 0


def process_count():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process():
    return process_index() == 0


def share(items):
    """This process's share of a list: every n-th item for n processes."""
    return items[process_index()::process_count()]


def all_reduce_sum(tensors):
    """Replace each tensor of a list, in place, by its sum over the processes."""
    if dist.is_initialized():
        for t in tensors:
            dist.all_reduce(t)


def print0(*lines, **options):
    """print() in the main process only."""
    if is_main_process():
        print(*lines, **options, flush=True)
