"""
What the commands share: the device and the processes, and what a terminal wants.
"""
import argparse
import atexit
import math
import os
import sys
import textwrap
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist


def pick_device(name=None):
    """The torch.device of that name, or cuda, mps, cpu: the first that is there. ValueError."""
    if name is None:
        name = "cpu"
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {name}: {str(e).splitlines()[0]}") from None
    if name.startswith("cuda"):
        torch.set_float32_matmul_precision("high")              # fp32 products as tf32
    return torch.device(name)


def pick_dtype(name, device):
    """bf16 on a GPU that has it, fp32 elsewhere, if `name` does not say."""
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return name or ("bf16" if fast else "fp32")


def autocast(dtype, device):
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16")


def start_processes(device):
    """Join the processes that torchrun started, if it did. Returns this one's device."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    atexit.register(dist.destroy_process_group)
    return device


def process():
    """(this process's index, how many there are)"""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def share(items):
    """This process's share of a list."""
    index, count = process()
    return items[index::count]


def over_processes(tensors):
    """Each tensor summed over the processes, if there are several, in place. Returns them."""
    if dist.is_initialized():
        for t in tensors:
            dist.all_reduce(t)
    return tensors


def say(*lines, **options):
    """Print, once for all processes."""
    if process()[0] == 0:
        print(*lines, **options, flush=True)


def describe(run, flags):
    """What a run is going to do."""
    s = run.settings
    own = [f"{flag} {getattr(s, flag)}" for flag in flags if getattr(s, flag)]
    if s.ranks:
        own = [f"ranks of {s.ranks}, alpha {s.alpha}"]
    say(f"model    {s.model}, {run.size / 1e6:.2f} M parameters, on {run.device} in {s.dtype}")
    method = f"method   {s.method}: {', '.join(own)}"
    say(textwrap.fill(method, 79, subsequent_indent=" " * 9))
    say(f"trains   {run.parameters:,} parameters, {100 * run.parameters / run.size:.2f} %")
    for t in run.tasks:
        say(f"task     {t.name}: {len(t.train):,} rows", t.note and f"({t.note})")
    say(f"run      {s.steps} steps of {s.batch_size} rows, learning rate {s.lr:g}, to {s.out}")
    if run.history["loss"]:
        say(f"resumed  after {run.phase} step {run.step}")
    say()


class Progress:
    """How far a loop is: a line rewritten in place on a terminal, ten lines in all elsewhere."""

    def __init__(self, name, first, steps):
        self.name, self.first, self.steps, self.began = name, first, steps, time.time()

    def show(self, done, loss, tokens):
        """After step `done`; `tokens` have been seen since the first."""
        seconds, ended = time.time() - self.began, done == self.steps
        left = round(seconds / (done - self.first) * (self.steps - done))
        text = (f"{self.name} {done:>{len(str(self.steps))}}/{self.steps}  loss {loss:7.4f}  "
                f"{tokens / seconds:9,.0f} tokens/s  {left // 60:3}:{left % 60:02} left")
        if sys.stdout.isatty():
            say(f"\r{text:<79}", end="\n" if ended else "")
        elif ended or done % max(1, self.steps // 10) == 0:
            say(text)


def parser(description, usage):
    return argparse.ArgumentParser(description=description, usage=usage, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


def number(kind, low, high=math.inf):
    """An argparse type: a number between these two."""
    def check(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return kind(text)
    check.__name__ = kind.__name__
    return check


@contextmanager
def plain_errors(*kinds):
    """What is wrong with a file or a setting is said in one line, with status 2."""
    try:
        yield
    except BrokenPipeError:
        raise
    except kinds or (ValueError, OSError) as e:
        print(f"{Path(sys.argv[0]).name}: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2)


def run(main):
    """Call a command's main: no traceback for Ctrl-C, for `| head`, for a terminal without η."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
