"""
Adapt a GPT-2 to tasks, by full fine-tuning or through an adapter.

    python train.py                              # LoRA, offline, on a laptop
    python train.py --method multilora --n_blocks 4
    python train.py --method autolora            # searches each layer's rank
    python train.py --method full
    python train.py --model gpt2-medium --data data/e2e data/gsm8k
    torchrun --nproc_per_node 8 train.py --model gpt2-medium --data data/e2e
    python train.py --resume out/lora.pt         # go on with a stopped run
    python train.py --eval out/lora.pt --prompt "shout hello"

All that is random in step i is a function of the seed and i alone, so a run
that is stopped, even killed, and resumed ends with the same weights to the bit.
"""
import argparse
import contextlib
import itertools
import json
import math
import os
import random
import signal
import sys
import time
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import autolora
import data
import lora
from model import GPT, PRESETS, read
from multilora import MultiLoRALinear

# method: (the layer it puts in; that layer's settings; the other flags that only some methods have; learning rate up
# to width 256; above)
METHODS = {
    "full": (None, "", "scratch half", 1e-3, 5e-5),
    "lora": (lora.LoRALinear, "alpha dropout rslora", "targets rank ranks", 1e-2, 5e-4),
    "multilora": (MultiLoRALinear, "n_blocks scaling dropout", "targets rank", 2e-2, 1e-3),
    "autolora": (autolora.AutoLoRALinear, "alpha dropout gate",
                 "targets max_rank search_steps split hypergrad eta beta_lr", 1e-2, 5e-4),
}


def parse(argv=None):
    """(settings, names of those that were given on the command line)."""
    def number(kind, low, high=math.inf):
        def check(text):
            x = kind(text)
            if not low <= x <= high:
                raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
            return x
        check.__name__ = kind.__name__
        return check

    rates = "; ".join(f"{method} {small:g}, {large:g}" for method, (*_, small, large) in METHODS.items())
    p = argparse.ArgumentParser(description=__doc__, usage="python train.py [options]", allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument_group("method").add_argument
    add("--method", default="lora", choices=METHODS, help="train all weights, or an adapter (default %(default)s)")
    add("--targets", default=["all"], nargs="+", help="layers that get one: q k v o up down, or all (default)")
    add("--rank", default=16, type=number(int, 1), help="r, the rank of ΔW (default %(default)s)")
    add("--alpha", default=16.0, type=float, help="α: ΔW is scaled by α/r, in autolora's search by "
        "α times the selection variables (default %(default)s)")
    add("--dropout", default=0.0, type=number(float, 0, 0.999), help="on the adapters' input (default %(default)s)")
    add("--rslora", action="store_true", help="lora: scale by α/√r instead")
    add("--ranks", metavar="CKPT", help="lora: the rank of each layer as in this checkpoint, which autolora left")
    add("--n_blocks", default=4, type=number(int, 1), help="multilora: n, LoRAs side by side that share the rank "
        "(default %(default)s)")
    add("--scaling", default="scalar", choices=["scalar", "vector"], help="multilora: learn a factor for each block, or "
        "for each block and row of ΔW (default %(default)s)")
    add("--max_rank", default=16, type=number(int, 1), help="autolora: k, the candidates of each layer, of "
        "rank one (default %(default)s)")
    add("--gate", default="softmax", choices=autolora.GATES, help="autolora: from β to the selection variables "
        "(default %(default)s)")
    add("--search_steps", default=200, type=number(int, 1), help="autolora: steps of the search, which come before "
        "the --steps that train at the ranks found (default %(default)s)")
    add("--split", default=0.7, type=number(float, 0, 1), help="autolora: share of the training rows that A and B are "
        "searched on; β sees the others (default %(default)s)")
    add("--hypergrad", default="forward", choices=autolora.HYPERGRADIENTS, help="autolora: the gradient for β: by "
        "differentiating twice, by finite differences, or without what the look-ahead adds (default %(default)s)")
    add("--eta", default=0.01, type=number(float, 0), help="autolora: η, step of the look-ahead (default %(default)s)")
    add("--beta_lr", default=0.01, type=number(float, 0), help="autolora: learning rate of β (default %(default)s)")

    add = p.add_argument_group("model").add_argument
    add("--model", default="nano", help=f"{' '.join(PRESETS)}, or a file (default %(default)s)")
    add("--n_head", type=number(int, 1), help="heads, where a file does not say and they are not 64 wide")
    add("--scratch", action="store_true", help="pretrain: random weights of that shape (with --method full)")
    add("--n_layer", type=number(int, 1), help="with --scratch: another depth")
    add("--n_embd", type=number(int, 1), help="with --scratch: another width")
    add("--block_size", type=number(int, 1), help="longest row in tokens (default: the model's)")
    add("--grad_checkpoint", action="store_true", help="recompute activations: less memory, more time")

    add = p.add_argument_group("data").add_argument
    add("--data", default=["mixture"], nargs="+", metavar="TASK",
        help="any of: mixture (default, five built-in tasks), skills (what nano knows), one of either by name, a .jsonl "
             "file, a folder with train.jsonl and valid.jsonl or test.jsonl, text (.txt .txt.xz, or tokens: .npy)")
    add("--mix", default="equal", choices=["equal", "proportional"], help="tasks' shares of a batch (default %(default)s)")
    add("--eval_rows", default=200, type=number(int, 1), help="held-out rows of each task (default %(default)s)")

    g = p.add_argument_group("optimisation")
    add, length = g.add_argument, g.add_mutually_exclusive_group().add_argument
    length("--steps", default=600, type=number(int, 1), help="of training (default %(default)s)")
    length("--epochs", type=number(float, 0.001, 1e6), help="instead of steps: how many times as many rows as there are")
    add("--batch_size", default=64, type=number(int, 1), help="rows of a step, over all processes (default %(default)s)")
    add("--grad_accum", default=1, type=number(int, 1), help="do a step's rows in so many parts: the same, in less memory")
    add("--lr", type=number(float, 0), help=f"peak learning rate (default up to width 256, and above: {rates})")
    add("--warmup", default=0.05, type=number(float, 0, 1), help="share of steps up to the peak (default %(default)s)")
    add("--weight_decay", default=0.01, type=number(float, 0), help="AdamW's, on matrices (default %(default)s)")
    add("--beta2", default=0.999, type=number(float, 0, 1), help="AdamW's (default %(default)s)")
    add("--clip", default=1.0, type=number(float, 0), help="largest gradient norm, 0 for any (default %(default)s)")
    add("--label_smoothing", default=0.0, type=number(float, 0, 1), help="share of a target that all tokens get (default %(default)s)")
    add("--seed", default=0, type=number(int, 0), help="of the start, the rows' order and dropout (default %(default)s)")

    add = p.add_argument_group("running").add_argument
    add("--device", help="cuda, mps or cpu (default: the first of them that is there)")
    add("--dtype", choices=["fp32", "bf16"], help="default: bf16 on a GPU that has it; adapters are fp32 in any case")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--out", help="the checkpoint's file (default out/METHOD.pt, or the next free name)")
    add("--half", action="store_true", help="write the finished model of --method full in half precision")
    add("--eval_every", default=200, type=number(int, 1),
        help="steps, those of a search as well, between held-out losses, each with a checkpoint (default %(default)s)")
    add("--resume", metavar="CKPT", help="go on with a run that was stopped, with its settings")
    add("--eval", metavar="CKPT", help="no training: measure a checkpoint on its tasks, or on --data")
    add("--prompt", metavar="TEXT", nargs="+", help="with --eval: complete these instead")

    args = p.parse_args(argv)
    given = {a.dest for a in p._actions for s in a.option_strings
             if any(t == s or t.startswith(s + "=") for t in (sys.argv[1:] if argv is None else argv))}
    for flag, only in (("resume", {"device", "compile"}),
                       ("eval", {"device", "dtype", "data", "eval_rows", "batch_size", "prompt"})):
        extra = given - only - {flag}
        if flag in given and extra:
            p.error(f"--{flag} takes its settings from the checkpoint: leave out --{' --'.join(sorted(extra))}")
    for flag in given:
        owners = [method for method, (_, settings, others, *_) in METHODS.items() if flag in f"{settings} {others}".split()]
        if owners and args.method not in owners:
            p.error(f"--{flag} goes with --method {' or '.join(owners)}, not with {args.method}")
    if "ranks" in given and given & {"rank", "targets"}:
        p.error("--ranks says which layers have which rank: leave out --rank and --targets")
    if not args.scratch and given & {"n_layer", "n_embd"}:
        p.error("--n_layer and --n_embd go with --scratch")
    if args.prompt and "eval" not in given:
        p.error("--prompt goes with --eval")
    return args, given


# ---------------------------------------------------------------------------------------------------------------------
# From settings to a model on a device

def processes(args):
    """(rank, number of processes, device): one process, or those that torchrun started. Settles args.dtype."""
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    name = args.device or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(f"cuda:{local}" if name == "cuda" and world > 1 else name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {name}: {str(e).splitlines()[0]}") from None
    if world > 1:  # the others wait while process 0 evaluates
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=4))
    if args.dtype is None:
        args.dtype = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")      # fp32 products as tf32
    return int(os.environ.get("RANK", 0)), world, device


def base_model(args):
    """The model that training starts from, in float32 on the CPU. Settles args.block_size."""
    if args.scratch:
        if args.model not in PRESETS:
            raise ValueError(f"--scratch --model {args.model}: no such preset; choose from {' '.join(PRESETS)}")
        sizes = {k: getattr(args, k) for k in ("n_layer", "n_head", "n_embd", "block_size") if getattr(args, k)}
        torch.manual_seed(args.seed)
        model = GPT(replace(PRESETS[args.model], **sizes))
    else:
        model = GPT.from_pretrained(args.model, args.n_head)
    args.block_size = args.block_size or model.config.block_size
    if args.block_size > model.config.block_size:
        raise ValueError(f"--block_size {args.block_size}: the model has positions for {model.config.block_size}")
    model.config.grad_checkpoint = args.grad_checkpoint
    return model


def adapt(model, args, device, held=None):
    """Move the model to its device and put the method's layers in, or those that a checkpoint holds."""
    layer, settings, *_ = METHODS[args.method]
    if layer is None:
        if held:
            model.load_state_dict(held["model"])
        return model.to(device)
    model.to(device, torch.bfloat16 if args.dtype == "bf16" else torch.float32)  # W is not trained, so it may be bf16
    if held:
        return lora.load(model, held["adapter"])
    rank = args.max_rank if args.method == "autolora" else args.rank if args.ranks is None else ranks_of(args.ranks)
    torch.manual_seed(args.seed)
    return lora.inject(model, " ".join(args.targets), rank, layer, **{k: getattr(args, k) for k in settings.split()})


def ranks_of(path):
    """{name: rank} of the adapter in a checkpoint."""
    adapter = read(path).get("adapter")
    if not isinstance(adapter, dict) or not isinstance(adapter.get("ranks"), dict):
        raise ValueError(f"--ranks {path}: no adapter in it")
    if adapter.get("layer") == "AutoLoRALinear":
        raise ValueError(f"--ranks {path}: its search has not ended; --resume it")
    return adapter["ranks"]


def autocast(args, device):
    return torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16")


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation

def batches(rows, size, block_size):
    """Rows of similar length together, such that the longest prompt leaves room for the longest completion."""
    batch, given, rest = [], 0, 0
    for r in sorted(rows, key=lambda r: len(r.ids)):
        given, rest = max(given, r.given), max(rest, len(r.ids) - r.given)
        if batch and (len(batch) == size or given + rest > block_size + 1):
            yield batch
            batch, given, rest = [], r.given, len(r.ids) - r.given
        batch.append(r)
    yield batch


@torch.no_grad()
def evaluate(model, tasks, tok, args, device, generate=False):
    """
    {task: {"loss": nats a token of the completions, "exact": share of rows whose greedy completion is the row's}}
    on the held-out rows; "exact" only if asked for, and never for text.
    """
    was_training, results = model.training, {}
    model.eval()
    for task in tasks:
        total = count = right = 0
        for rows in batches(task.valid, args.batch_size, model.config.block_size):
            idx, targets = data.collate(rows, device)
            n = sum(len(r.ids) - r.given for r in rows)
            with autocast(args, device):
                total, count = total + model(idx, targets)[1].item() * n, count + n
                if generate and not task.text:
                    longest = max(len(r.ids) - r.given for r in rows)
                    new = model.generate([r.ids[:r.given] for r in rows], longest, stop=tok.eot_token)
                    right += sum(ids == r.ids[r.given:-1] for ids, r in zip(new, rows))
        results[task.name] = {"loss": total / count}
        if generate and not task.text:
            results[task.name]["exact"] = right / len(task.valid)
    model.train(was_training)
    return results


def table(tasks, before, after):
    """The results as lines of at most 79 columns, with a mean where there are several tasks."""
    def cell(result, key):
        return f"{result[key]:9.3f}" if key in result else "        -"

    def mean(results):
        return {k: sum(r[k] for r in results.values()) / len(results) for k in ("loss", "exact")
                if all(k in r for r in results.values())}

    rows = [(t.name[-28:], len(t.valid), before[t.name], after[t.name]) for t in tasks]
    if len(tasks) > 1:
        rows.append(("mean", sum(len(t.valid) for t in tasks), mean(before), mean(after)))
    lines = [f"{'':28} {'held-out':>8} {'loss':>9} {'':>9}{'exact match':>14}",
             f"{'task':28} {'rows':>8} {'before':>9} {'after':>9}  {'before':>9} {'after':>9}"]
    for name, n, b, a in rows:
        lines.append(f"{name:28} {n:8,} {cell(b, 'loss')} {cell(a, 'loss')}  {cell(b, 'exact')} {cell(a, 'exact')}")
    return "\n".join(lines)


def rank_table(found, max_rank):
    """Ranks as lines of text: a row for each layer of the model, a column for each target."""
    grid = {}
    for name, rank in found.items():
        grid.setdefault(".".join(name.split(".")[:-2]), {})[name.split(".")[-1]] = rank
    targets = list(dict.fromkeys(t for row in grid.values() for t in row))
    lines = [f"{'ranks, of ' + str(max_rank):16}" + "".join(f"{t:>6}" for t in targets)]
    for layer, row in grid.items():
        lines.append(f"{layer:16}" + "".join(f"{row.get(t, '-'):>6}" for t in targets))
    return "\n".join(lines)


def complete(model, prompts, tok, args, device):
    """Two lines for each prompt (a list of ids): its text, and what the model makes of it, greedily."""
    lines = []
    for ids in prompts:
        with autocast(args, device):
            new, = model.generate([ids], min(100, model.config.block_size + 1 - len(ids)), stop=tok.eot_token)
        lines += [f"  {tok.decode([i for i in ids if i != tok.eot_token])}", f"    -> {tok.decode(new)}"]
    return lines


def first_rows(tasks, n):
    """Prompts of the first n held-out rows of every task; of text, half a window, at most 32 tokens."""
    return [[int(i) for i in r.ids[:min(32, len(r.ids) // 2) if t.text else r.given]] for t in tasks for r in t.valid[:n]]


# ---------------------------------------------------------------------------------------------------------------------
# Training

class Run:
    """One training run: the model, its tasks and its optimizer, new or from the checkpoint `held`."""

    def __init__(self, args, held=None):
        self.args = args
        self.rank, self.world, self.device = processes(args)
        if args.batch_size % (args.grad_accum * self.world):
            raise ValueError(f"--batch_size {args.batch_size} is not a multiple of {args.grad_accum} parts "
                             f"(--grad_accum) times {self.world} processes")
        if args.compile and args.method == "autolora" and args.hypergrad == "exact":
            raise ValueError("--hypergrad exact differentiates twice, which a compiled model cannot: leave out --compile")
        model = base_model(args)
        self.tok = data.tokenizer(model.config.vocab_size)
        self.tasks = data.load(args.data, self.tok, args.block_size, args.eval_rows)
        self.data = {t.name: [len(t.train), t.checksum()] for t in self.tasks}
        if held and held["data"] != self.data:
            raise ValueError(f"{args.out}: the data has changed since: rows and checksum of each task were "
                             f"{held['data']}, now {self.data}")
        self.n_rows = sum(len(t.train) for t in self.tasks)
        if args.epochs is not None:
            args.steps = math.ceil(args.epochs * self.n_rows / args.batch_size)
        if args.lr is None:
            args.lr = METHODS[args.method][-2 if model.config.n_embd <= 256 else -1]
        self.size = sum(p.numel() for p in model.parameters())
        self.base = held["base"] if held else lora.fingerprint(model)
        self.searches = args.search_steps if args.method == "autolora" else 0       # steps that come before args.steps
        self.search = {"steps": [], "beta": torch.empty(0)}
        if self.searches:
            self.halves = [data.stream(part, args.seed, args.mix) for part in data.halves(self.tasks, args.split, args.seed)]
        self.row, self.seen = data.stream(self.tasks, args.seed, args.mix), 0
        self.start, self.before, self.after = 0, None, None
        self.prepare(adapt(model, args, self.device, held))
        if held:
            self.optimizer.load_state_dict(held["optimizer"])
            self.start, self.before, self.search = held["step"], held["before"], held["search"]

        if held is None and args.out is None:
            names = (f"out/{args.method}{f'-{i}' * (i > 1)}.pt" for i in itertools.count(1))
            args.out = next(name for name in names if not Path(name).exists() and not log_of(name).exists())
        self.log_path = log_of(args.out)
        if self.rank == 0:
            for path in (args.out, self.log_path):
                if held is None and Path(path).exists():
                    raise ValueError(f"{path} is there already: --resume its run, delete it, or choose another --out")
            Path(args.out).parent.mkdir(parents=True, exist_ok=True)
            open(f"{args.out}.part", "wb").close()  # a place that cannot be written to is found before the work

    def prepare(self, model):
        """Make `model` the one that is trained: optimizer, processes, compilation."""
        a, self.model = self.args, model
        params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.beta = [p for name, p in params.items() if name.endswith(".beta")]         # AutoLoRA's, in the search
        self.trained = [p for name, p in params.items() if not name.endswith(".beta")]
        matrices = [p for name, p in params.items() if p.ndim > 1 and not name.endswith(".s")]
        vectors = [p for p in self.trained if all(p is not m for m in matrices)]
        groups = [{"params": matrices, "weight_decay": a.weight_decay, "lr": a.lr, "scheduled": True},
                  {"params": vectors, "weight_decay": 0.0, "lr": a.lr, "scheduled": True},
                  {"params": self.beta, "weight_decay": 0.0, "lr": a.beta_lr, "scheduled": False}]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, a.beta2), fused=True)
        self.ddp = self.world > 1 and not self.beta                     # the search sums its gradients itself
        self.net = torch.nn.parallel.DistributedDataParallel(model) if self.ddp else model
        if a.compile:
            self.net = torch.compile(self.net)

    def say(self, *lines, **options):
        if self.rank == 0:
            print(*lines, **options, flush=True)

    def describe(self):
        a, n = self.args, sum(p.numel() for p in [*self.trained, *self.beta])
        self.say(f"model    {a.model}{' from scratch' * a.scratch}, {self.size / 1e6:.2f} M parameters, "
                 f"rows of up to {a.block_size} tokens ({self.tok.name})")
        on = f"on {' '.join(a.targets)}"
        adapter = {"full": "",
                   "lora": f": rank{f's of {a.ranks}' if a.ranks else f' {a.rank} {on}'}, alpha {a.alpha:g}{', rslora' * a.rslora}",
                   "multilora": f": {a.n_blocks} blocks of rank {a.rank // a.n_blocks}, {a.scaling} scaling, {on}",
                   "autolora": f": {a.max_rank} candidates {on}, alpha {a.alpha:g}, {a.gate} gate"}
        self.say(f"method   {a.method}{adapter[a.method]}")
        self.say(f"trains   {n:,} parameters, {100 * n / self.size:.2f} % of the model"
                 f"{f', in {len(lora.adapters(self.model))} layers' * (a.method != 'full')}")
        self.say(f"device   {self.device}{f', {self.world} processes' * (self.world > 1)}, {a.dtype}"
                 f"{', compiled' * a.compile}")
        self.say(f"data     {len(self.tasks)} task{'s' * (len(self.tasks) > 1)}, {self.n_rows:,} rows{f', {a.mix} shares' * (len(self.tasks) > 1)}")
        for t in self.tasks:
            self.say(f"         {t.name}: {len(t.train):,} rows{'; ' * bool(t.note)}{t.note}")
        if self.searches:
            self.say(f"search   {a.search_steps} steps ({a.hypergrad}, η {a.eta:g}) with β on {100 - 100 * a.split:g} % of the rows,\n"
                     "         then a LoRA of the ranks found, which has fewer parameters")
        self.say(f"run      {a.steps} steps of {a.batch_size} rows, learning rate {a.lr:g}, to {a.out}\n")

    def save(self, step):
        """
        The checkpoint, from process 0. Before the end it holds all that resuming needs, at the end the results
        instead of the optimizer. Of an adapter run it holds no weight of the base.
        """
        if self.rank:
            return
        if self.args.method == "full":
            weights = self.model.state_dict()
            if self.after and self.args.half:
                weights = {k: v.half() for k, v in weights.items()}
            held = {"config": asdict(self.model.config), "model": weights}
        else:
            held = {"adapter": lora.state(self.model)}
        held |= {"args": vars(self.args), "step": step, "base": self.base, "data": self.data, "before": self.before,
                 "search": self.search}
        held |= {"after": self.after} if self.after else {"optimizer": self.optimizer.state_dict()}
        lora.write(held, self.args.out)

    def evaluate(self, generate=False):
        if self.rank:
            return {}
        return evaluate(self.model, self.tasks, self.tok, self.args, self.device, generate)

    def losses(self, row, step):
        """
        The loss of a step's rows in parts, of which the sum over the parts and the processes is the mean over the
        tokens. What dropout draws is the same at every call.
        """
        a = self.args
        torch.manual_seed(random.Random(f"{a.seed} {step} {self.rank}").getrandbits(60))
        batch = [row(step * a.batch_size + i) for i in range(a.batch_size)]
        self.seen += sum(len(r.ids) - 1 for r in batch)
        counted = sum(len(r.ids) - r.given for r in batch)
        mine, part = batch[self.rank::self.world], a.batch_size // (a.grad_accum * self.world)
        mine.sort(key=lambda r: len(r.ids))                             # parts of rows of one length have less padding
        for i in range(0, len(mine), part):
            rows = mine[i:i + part]
            idx, targets = data.collate(rows, self.device)
            share = sum(len(r.ids) - r.given for r in rows) / counted
            with autocast(a, self.device):
                loss = self.net(idx, targets, a.label_smoothing)[1] * share
            last = i + part == len(mine)
            with contextlib.nullcontext() if last or not self.ddp else self.net.no_sync():
                yield loss

    def update(self, step, stop):
        """One optimizer step of the training; see `apply`."""
        total = 0.0
        for loss in self.losses(self.row, step):
            (loss * self.world).backward()                              # DDP takes the mean over the processes
            total += loss.detach()
        return self.apply(total, learning_rate(step, self.args.steps, self.args), step, stop)

    def update_search(self, step, stop):
        """One optimizer step of AutoLoRA's search: ω, all A and B, on one part of the rows, β on the other."""
        a = self.args
        train, valid = (lambda row=row: self.losses(row, step) for row in self.halves)
        total, g, h = autolora.hypergradient(train, valid, self.trained, self.beta, a.eta, a.hypergrad)
        for p, grad in zip([*self.trained, *self.beta], [*g, *h]):
            p.grad = grad
        result = self.apply(total, learning_rate(step, a.search_steps, a), step, stop)
        if (step + 1) % max(1, a.search_steps // 100) == 0 or step + 1 == a.search_steps:
            now = torch.stack([b.detach().cpu() for b in self.beta])[None]              # (1, layers, k)
            self.search = {"steps": [*self.search["steps"], step + 1], "beta": torch.cat([self.search["beta"], now])}
        return result

    def retrain(self):
        """From AutoLoRA's search to its training: a fresh LoRA at the ranks found. Returns them."""
        a, found = self.args, autolora.ranks(self.model)
        self.search |= {"ranks": found}
        self.say("\n" * sys.stdout.isatty(), f"\n{rank_table(found, a.max_rank)}\n\ntraining a fresh LoRA of these ranks on all rows ...", sep="")
        lora.remove(self.model)
        torch.manual_seed(a.seed)
        self.prepare(lora.inject(self.model, rank=found, alpha=a.alpha, dropout=a.dropout).train())
        return found

    def apply(self, loss, lr, step, stop):
        """
        Take the step that the gradients ask for. Returns the loss, the gradient's norm and whether any process was
        asked to stop. Exits, before the weights are touched, where loss or norm is not finite.
        """
        a = self.args
        total = torch.stack([loss, torch.tensor(float(stop), device=self.device)])
        if self.world > 1:
            dist.all_reduce(total)
        norm = torch.nn.utils.clip_grad_norm_(self.trained, a.clip or math.inf)
        norm_beta = torch.nn.utils.get_total_norm([p.grad for p in self.beta]).to(self.device)
        loss, stop, norm, norm_beta = torch.stack([*total, norm, norm_beta]).tolist()
        if not math.isfinite(loss + norm + norm_beta):
            search = f"; for β: {norm_beta}" if self.beta else ""
            sys.exit(f"\ntrain.py: step {step + 1}: the loss is {loss} and the norm of its gradient {norm}{search}: not "
                     f"finite, so the run stops.\nTry a lower --lr than {a.lr:g}{' or --eta' * bool(search)}, or more "
                     f"--warmup. The last good checkpoint is {a.out}")
        for group in self.optimizer.param_groups:
            if group["scheduled"]:
                group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, norm, bool(stop)

    def fit(self):
        """Train to the end, with a log, a live line and checkpoints. Returns the results; exits 130 if asked to stop."""
        a, lines = self.args, []
        if self.before is None:
            self.say("measuring the held-out rows before training ...")
            self.before = self.evaluate(generate=True)
            self.save(0)
        else:
            self.say(f"resumed after step {self.start}")
            lines = self.log_path.read_text().splitlines(keepends=True) if self.log_path.exists() else []
        with contextlib.ExitStack() as stack:
            if self.rank == 0:  # without what a killed run did after its last checkpoint, which is done again
                Path(f"{self.log_path}.part").write_text("".join(t for t in lines if step_of(t) <= self.start))
                os.replace(f"{self.log_path}.part", self.log_path)
                log = stack.enter_context(open(self.log_path, "a", buffering=1))

            def note(**entry):
                if self.rank == 0:
                    log.write(json.dumps(entry) + "\n")

            asked = stack.enter_context(stop_signals())
            busy, live = 0.0, sys.stdout.isatty()
            self.model.train()
            cost = {"first-order": 2, "forward": 3}.get(a.hypergrad, 4)        # of a search step, in steps
            work = lambda step: cost * min(step, self.searches) + max(0, step - self.searches)
            for step in range(self.start, total := self.searches + a.steps):
                began, done, searching = time.time(), step + 1, step < self.searches
                if searching:
                    loss, norm, stop = self.update_search(step, bool(asked))
                    head = f"search {done:>{len(str(a.search_steps))}}/{a.search_steps}"
                else:
                    loss, norm, stop = self.update(step - self.searches, bool(asked))
                    head = f"step {done - self.searches:>{len(str(a.steps))}}/{a.steps}"
                busy += time.time() - began
                rate = self.seen / busy
                left = round(busy / (work(done) - work(self.start)) * (work(total) - work(done)))
                note(step=done, loss=loss, norm=norm, lr=self.optimizer.param_groups[0]["lr"], tokens_per_s=rate)
                text = f"{head}  loss {loss:7.4f}  {rate:9,.0f} tokens/s  {left // 60:3}:{left % 60:02} left"
                if live:
                    self.say(f"\r{text:<79}", end="")
                elif done % max(1, min(100, total // 10)) == 0 or done in (self.searches, total):
                    self.say(text)
                if done % a.eval_every == 0 and done < total:
                    held_out = {name: r["loss"] for name, r in self.evaluate().items()}
                    note(step=done, held_out=held_out)
                    text = f"{head}  held-out loss {sum(held_out.values()) / max(1, len(held_out)):.4f}"
                    self.say(f"\r{text:<79}" if live else text)
                if done == self.searches:
                    note(step=done, ranks=self.retrain())
                if done % a.eval_every == 0 or done in (self.searches, total) or stop:
                    self.save(done)
                if stop:
                    self.say(f"\nstopped after step {done}; to go on: python train.py --resume {a.out}")
                    sys.exit(130)
            self.after, shown = self.evaluate(generate=True), []
            if self.rank == 0:
                shown = complete(self.model, first_rows(self.tasks, 3 if len(self.tasks) < 3 else 1), self.tok, a, self.device)
            self.save(total)
            note(step=total, seconds=busy, before=self.before, after=self.after, samples=shown)
            if self.searches:
                layers, k = lora.adapters(self.model).values(), a.max_rank
                uniform = sum(k * (m.A.size(1) + m.B.size(0)) for m in layers)
                n = sum(p.numel() for p in self.trained)
                shown += ["", rank_table(self.search["ranks"], k), f"{n:,} parameters, {100 * n / uniform:.0f} % of the "
                          f"{uniform:,} at rank {k} everywhere"]
        if self.rank == 0:
            size = f"{Path(a.out).stat().st_size / 1e6:.2f} MB{', the adapter alone' * (a.method != 'full')}"
            self.say("\n" * live, table(self.tasks, self.before, self.after), "", *shown, "",
                     f"saved    {a.out}, {size}; log {self.log_path}",
                     f'next     python train.py --eval {a.out} --prompt "..."',
                     *[f"         python analyze.py {a.out}"] * (not a.scratch), sep="\n")
        return self.after


def log_of(checkpoint):
    return Path(str(checkpoint).removesuffix(".pt") + ".jsonl")


def step_of(line):
    """A log line's step; of a line that a killed run wrote half, infinity."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


def learning_rate(step, steps, args):
    """Linear up to args.lr over the warm-up, then linear down to 0 after the last of `steps`."""
    warm = args.warmup * steps
    return args.lr * min((step + 1) / (warm + 1), (steps - step) / max(steps - warm, 1))


@contextlib.contextmanager
def stop_signals():
    """A list that Ctrl-C and SIGTERM fill, so that the step under way can end; a second Ctrl-C stops at once."""
    asked = []

    def ask(signum, frame):
        asked.append(signum)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def started(path, args, given):
    """A checkpoint of train.py and its settings, with those that this command line gives anew."""
    held = read(path)
    if not {"args", "step", "base", "data"} <= held.keys():
        raise ValueError(f"{path}: not a checkpoint of train.py")
    return held, argparse.Namespace(**held["args"] | {k: getattr(args, k) for k in given} | {"resume": None})


def evaluation(held, args):
    """--eval: results of a checkpoint beside its base's, or completions of --prompt."""
    _, _, device = processes(args)
    full = args.method == "full"
    model = GPT.from_pretrained(args.eval).to(device) if full else adapt(base_model(args), args, device, held)
    tok = data.tokenizer(model.config.vocab_size)
    if args.prompt:
        prompts = [data.encode(tok, text, "").ids[:-1] for text in args.prompt]
        print(*complete(model, prompts, tok, args, device), sep="\n")
        return None
    tasks = data.load(args.data, tok, args.block_size, args.eval_rows)
    after = evaluate(model, tasks, tok, args, device, generate=True)
    with lora.disabled(model):
        base = base_model(args).to(device) if full else model
        before = evaluate(base, tasks, tok, args, device, generate=True)
    print(table(tasks, before, after), "", *complete(model, first_rows(tasks, 1), tok, args, device), sep="\n")
    return after


def main(argv=None):
    args, given = parse(argv)
    held = None
    try:
        if args.eval is not None:
            return evaluation(*started(args.eval, args, given))
        if args.resume is not None:
            out = args.resume
            held, args = started(out, args, given)
            args.out = out
            if "optimizer" not in held:
                raise ValueError(f"{out}: this run has ended after its {held['step']} steps; start a new one, "
                                 "with more --steps, to train for longer")
        run = Run(args, held)
        run.describe()
    except (ValueError, OSError) as e:
        sys.exit(f"train.py: {e}")
    try:
        return run.fit()
    except OSError as e:  # a full disk, say; the last checkpoint is whole
        sys.exit(f"\ntrain.py: {e}")
    finally:
        if run.world > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
