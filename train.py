"""
Adapt a GPT-2 to tasks, by full fine-tuning or with an adapter.

    python train.py                              # LoRA, offline, on a laptop
    python train.py --method multilora --n_blocks 4
    python train.py --method autolora            # searches the rank of each layer
    python train.py --method full
    torchrun --nproc_per_node 8 train.py --model gpt2-medium --data data/e2e
    python train.py --resume out/lora.pt         # continue an interrupted run

Ctrl-C and SIGTERM save a checkpoint before the run stops. After a kill -9 or a
crash, --resume continues from the last checkpoint, which is written every
--eval_every steps. A resumed run ends with exactly the weights that it would
have had without the interruption.
"""
import math
import os
import random
import shlex
import signal
import sys
import textwrap
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch

import autolora
import lora
from evaluate import completions, evaluate, first_prompts, results_table
from multilora import MultiLoRALinear
from support import adapter_state, checkpoint, cli, data, distributed, report
from support.distributed import print0


@dataclass
class Method:
    layer: type         # the layer that is injected; None for full fine-tuning
    settings: list      # the flags that its constructor takes, besides rank
    other_flags: list   # further flags that not all methods have
    lr: float           # the default peak learning rate up to width 256
    lr_wide: float      # and above

    @property
    def flags(self):
        return [*self.other_flags, *self.settings]


METHODS = {
    "full": Method(None, [], ["scratch"], 1e-3, 2e-4),
    "lora": Method(lora.LoRALinear, ["alpha", "dropout"],
                   ["targets", "rank", "ranks_from"], 1e-2, 4e-3),
    "multilora": Method(MultiLoRALinear, ["n_blocks", "scaling", "dropout"],
                        ["targets", "rank"], 2e-2, 1.6e-2),
    "autolora": Method(autolora.AutoLoRALinear, ["alpha", "dropout", "gate"],
                       ["targets", "rank", "search_steps", "search_split", "hypergrad", "eta",
                        "beta_lr"], 1e-2, 4e-3),
}
MAX_NORM = 1.0      # gradients are clipped to this norm
COMMANDS = {name: f"python {name}.py" for name in ("train", "evaluate", "analyze")}


def train(run):
    """Bring a run from its present state to its end."""
    if run.before is None:
        print0("evaluating the held-out rows ...")
        run.before = run.evaluate_held_out()
    if run.phase == "search":
        loop(run, search_gradients, run.settings.search_steps)
        with cli.deferred_signals() as signals:
            run.start_training(autolora.ranks(run.model))
        run.stop_if_any(signals)
    loop(run, training_gradients, run.settings.steps)
    after = run.evaluate_held_out()
    prompts = first_prompts(run.tasks)
    run.samples = completions(run.model, prompts, run.tok, run.settings, run.device)
    with cli.deferred_signals():                # the run has ended, so a signal changes nothing
        run.after = after
        run.save()


def loop(run, gradients, steps):
    """
    The remaining steps of a phase. `gradients(run, step)` fills p.grad of every trained parameter,
    summed over the processes, and returns the loss.
    """
    settings = run.settings
    history = run.history
    progress = cli.Progress(run.phase, run.step, steps)
    run.model.train()
    for step in range(run.step, steps):
        if step > 0 and step % settings.eval_every == 0:
            run.evaluate_and_save()
        with cli.deferred_signals() as signals:
            for group in run.optimizer.param_groups:
                if group["scheduled"]:
                    group["lr"] = settings.lr * schedule(step, steps, settings.warmup)
            loss = gradients(run, step)
            norm = torch.nn.utils.clip_grad_norm_(run.omega, MAX_NORM)      # β is not clipped
            run.check_finite(loss, norm)
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)
            run.step = step + 1
            history["loss"].append(loss.item())
            history["norm"].append(norm.item())
            if run.beta and (run.step % max(1, steps // 100) == 0 or run.step == steps):
                beta = torch.stack([b.detach().cpu() for b in run.beta])    # (matrices, k)
                history["beta"].append((run.step, beta))
        run.stop_if_any(signals)
        progress.show(run.step, loss)


def training_gradients(run, step):
    """The gradients of the training loss."""
    total = torch.zeros((), device=run.device)
    for loss in loss_parts(run, run.row, step):
        loss.backward()
        total += loss.detach()
    distributed.all_reduce_sum([total, *[p.grad for p in run.omega]])
    return total


def search_gradients(run, step):
    """AutoLoRA's gradients: ω, all A and B, learns from one part of the rows, β from the other."""
    train_part, valid_part = [partial(loss_parts, run, row, step) for row in run.search_rows]
    return autolora.search_gradients(train_part, valid_part, run.omega, run.beta, run.settings.eta,
                                     run.settings.hypergrad, distributed.all_reduce_sum)


def loss_parts(run, row, step):
    """
    Yield the loss of a batch in --grad_accum parts. Their sum over the parts and the processes is
    the mean over the batch's target tokens. Every call for one step yields the same values, since
    the dropout masks depend on the seed, the phase, the step and the process only.
    """
    settings = run.settings
    rng = random.Random(f"{settings.seed} {run.phase} {step} {distributed.process_index()}")
    torch.manual_seed(rng.getrandbits(60))
    batch = [row(i) for i in range(step * settings.batch_size, (step + 1) * settings.batch_size)]
    batch_tokens = sum(r.n_target_tokens for r in batch)
    own = distributed.share(batch)
    for rows in data.batches(own, len(own) // settings.grad_accum):
        idx, targets = data.collate(rows, run.device)
        with distributed.autocast(settings.dtype, run.device):
            loss = run.net(idx, targets, settings.label_smoothing)[1]
        yield loss * sum(r.n_target_tokens for r in rows) / batch_tokens


def schedule(step, steps, warmup):
    """The share of the peak learning rate: it rises linearly over the first `warmup` of the steps,
    then falls linearly to 0."""
    warm = warmup * steps
    return min((step + 1) / (warm + 1), (steps - step) / max(steps - warm, 1))


class Run:
    """A training run: what the loop needs and what a checkpoint contains."""

    def __init__(self, settings, saved=None):
        """A new run, or the one of the checkpoint `saved`."""
        self.settings = settings
        self.device = distributed.start_processes(distributed.pick_device(settings.device))
        settings.dtype = distributed.pick_dtype(settings.dtype, self.device)
        self.model = checkpoint.start_model(settings, self.device)
        self.size = sum(p.numel() for p in self.model.parameters())
        self.base = adapter_state.fingerprint(self.model)
        resolve_defaults(settings, self.model.config)
        self.tok = data.tokenizer(self.model.config.vocab_size)
        self.tasks = data.load(settings.data, self.tok, settings.block_size, settings.eval_rows)
        self.checksums = {t.name: t.checksum() for t in self.tasks}
        self.row = data.stream(self.tasks, settings.seed)
        self.phase = "train"
        self.step = 0
        self.before = None
        self.after = None
        self.samples = []
        self.history = {"loss": [], "norm": [], "valid": [], "beta": []}
        if settings.method == "autolora":
            self.phase = "search"
            parts = data.split_for_search(self.tasks, settings.search_split, settings.seed)
            self.search_rows = [data.stream(part, settings.seed) for part in parts]
        if saved:
            self.restore(saved)
        elif settings.method != "full":
            ranks = settings.rank
            if settings.ranks_from is not None:
                ranks = checkpoint.read_ranks(settings.ranks_from, self.base)
            self.inject_adapter(ranks, METHODS[settings.method])
        self.make_optimizer()
        if saved:
            self.optimizer.load_state_dict(saved["optimizer"])

    def restore(self, saved):
        if list(saved["checksums"].values()) != list(self.checksums.values()):
            raise ValueError(f"{self.settings.out}: the data differs from that of the run: its "
                             f"checksums were {saved['checksums']}, and are {self.checksums}. Pass "
                             "the run's data by --data")
        for task, name in zip(self.tasks, saved["checksums"]):
            task.name = name                    # the data may have moved, see --data
        self.checksums = saved["checksums"]
        checkpoint.restore(saved, self.model)
        for name in ("phase", "step", "before", "history"):
            setattr(self, name, saved[name])

    def inject_adapter(self, ranks, method):
        """Inject new layers, whose initial values depend on the seed only."""
        torch.manual_seed(self.settings.seed)
        targets = None if isinstance(ranks, dict) else self.settings.targets
        settings = {name: getattr(self.settings, name) for name in method.settings}
        lora.inject(self.model, targets, ranks, method.layer, **settings)

    def start_training(self, ranks):
        """Go from a search to training: a fresh LoRA with the ranks that were found."""
        print0(f"\n{report.rank_table(ranks)}\n\ntraining a fresh LoRA with these ranks ...")
        lora.remove(self.model)
        self.inject_adapter(ranks, METHODS["lora"])
        self.phase = "train"
        self.step = 0
        self.make_optimizer()
        self.save()

    def make_optimizer(self):
        """AdamW for ω, and in a search for β with its own constant learning rate. Weight decay
        applies to the matrices of ω except MultiLoRA's s."""
        settings = self.settings
        decayed = []
        other = []
        self.beta = []
        for name, p in self.model.named_parameters():
            if not p.requires_grad:
                continue
            if name.endswith(".beta"):
                self.beta.append(p)
            elif p.ndim < 2 or name.endswith(".s"):
                other.append(p)
            else:
                decayed.append(p)
        self.omega = decayed + other
        self.parameters = sum(p.numel() for p in [*self.omega, *self.beta])
        groups = [
            {"params": decayed, "scheduled": True, "weight_decay": settings.weight_decay},
            {"params": other, "scheduled": True, "weight_decay": 0},
            {"params": self.beta, "scheduled": False, "weight_decay": 0, "lr": settings.beta_lr},
        ]
        groups = [group for group in groups if group["params"]]
        self.optimizer = torch.optim.AdamW(groups, settings.lr, (0.9, settings.beta2), fused=True)
        self.net = torch.compile(self.model) if settings.compile else self.model

    def evaluate_held_out(self):
        results = evaluate(self.model, self.tasks, self.settings, self.device)
        if not math.isfinite(sum(r["loss"] for r in results.values())):
            self.stop_diverged(f"the held-out losses are {results}")
        return results

    def evaluate_and_save(self):
        """Record the held-out losses and save, unless an interrupted run has done so."""
        done = len(self.history["loss"])
        if done not in dict(self.history["valid"]):
            self.history["valid"].append((done, self.evaluate_held_out()))
            self.save()

    def check_finite(self, loss, norm):
        beta_norms = [b.grad.norm() for b in self.beta]
        if not torch.stack([loss, norm, *beta_norms]).isfinite().all():
            self.stop_diverged(f"the loss is {loss:g} and the norm of its gradient {norm:g}")

    def stop_diverged(self, problem):
        text = (f"\ntrain.py: {self.phase} step {self.step + 1}: {problem}, so the run stops.\n"
                f"Try a lower --lr than {self.settings.lr:g}, in a search a lower --eta, or more "
                f"--warmup. The last checkpoint is {self.settings.out}")
        sys.exit(text if distributed.is_main_process() else 1)

    def stop_if_any(self, signals):
        """Raise KeyboardInterrupt in all processes if one of them received a signal."""
        received = torch.tensor(float(max(signals, default=0)), device=self.device)
        distributed.all_reduce_sum([received])
        if received > 0:
            raise KeyboardInterrupt(max(signals, default=signal.SIGTERM))

    def save(self):
        """Write the checkpoint."""
        saved = {"settings": vars(self.settings)}
        for name in checkpoint.PARTS:
            saved[name] = getattr(self, name)
        ended = self.after is not None
        saved |= checkpoint.trained_state(self.model, self.settings, self.base, ended)
        if not ended:
            saved["optimizer"] = self.optimizer.state_dict()
        checkpoint.write(saved, self.settings.out)


def resolve_defaults(settings, config):
    """Fill in the settings whose defaults depend on the model. Raises ValueError."""
    settings.block_size = settings.block_size or config.block_size
    if settings.block_size > config.block_size:
        raise ValueError(f"--block_size {settings.block_size} exceeds the model's block of "
                         f"{config.block_size} tokens")
    if settings.lr is None:
        method = METHODS[settings.method]
        settings.lr = method.lr if config.n_embd <= 256 else method.lr_wide
    if settings.compile and settings.hypergrad == "exact":
        raise ValueError("--hypergrad exact cannot be compiled: omit --compile")
    parts = settings.grad_accum * distributed.process_count()
    if settings.batch_size % parts:
        raise ValueError(f"--batch_size {settings.batch_size} is not divisible by {parts}, the "
                         "number of processes times --grad_accum")


def print_plan(run):
    """Say what the run is going to do."""
    s = run.settings
    flags = [f"{flag} {getattr(s, flag)}" for flag in METHODS[s.method].flags if getattr(s, flag)]
    if s.ranks_from:
        flags = [f"ranks from {s.ranks_from}, alpha {s.alpha}"]
    print0(f"model    {s.model}, {run.size / 1e6:.2f} M parameters, on {run.device} in {s.dtype}")
    method = f"method   {', '.join([s.method, *flags])}"
    print0(textwrap.fill(method, 79, subsequent_indent=" " * 9))
    print0(f"trains   {run.parameters:,} parameters, {100 * run.parameters / run.size:.2f} %")
    for t in run.tasks:
        print0(f"task     {t.name}: {len(t.train):,} rows", f"({t.note})" if t.note else "")
    print0(f"run      {s.steps} steps, batch size {s.batch_size}, learning rate {s.lr:g}")
    print0(f"writes   {s.out}")
    if run.history["loss"]:
        print0(f"resumed  after {run.phase} step {run.step}")
    print0()


def print_results(run):
    out = shlex.quote(run.settings.out)
    print0("", results_table(run.tasks, run.before, run.after), "", *run.samples, "", sep="\n")
    size = os.path.getsize(run.settings.out) / 1e6
    print0(f"saved    {out}, {size:.2f} MB, {run.parameters:,} parameters")
    print0(f'next     {COMMANDS["evaluate"]} {out} --prompt "..."')
    if not run.settings.scratch:
        print0(f"         {COMMANDS['analyze']} {out}")


def parse(argv=None):
    """(settings, names of the flags that were given explicitly)"""
    count = cli.bounded(int, 1)
    share = cli.bounded(float, 0, 1)
    positive = cli.bounded(float, 0)
    finite = cli.bounded(float, -math.inf)
    p = cli.parser(__doc__, "python train.py [options]")
    add = p.add_argument_group("method").add_argument
    add("--method", default="lora", choices=METHODS, help="what is trained (default: lora)")
    add("--targets", default=["all"], nargs="+", help="layers: q k v o up down, or all (default)")
    add("--rank", default=16, type=count, help="r of ΔW; autolora: k candidates (default: 16)")
    add("--alpha", default=16.0, type=finite, help="α: ΔW is scaled by α/r (default: 16)")
    add("--dropout", default=0.0, type=cli.bounded(float, 0, 0.999), help="before A (default: 0)")
    add("--ranks_from", metavar="CKPT", help="lora: give each layer its rank in this checkpoint")
    add("--n_blocks", default=4, type=count, help="multilora: n, which divides r (default: 4)")
    add("--scaling", default="scalar", choices=["scalar", "vector"],
        help="multilora: whether each sᵢ is a number or a vector of d_out (default: scalar)")
    add("--gate", default="softmax", choices=autolora.GATES, help="autolora: the function "
        "that maps β to a (default: softmax)")
    add("--search_steps", default=200, type=count, help="autolora: steps of the search, before the "
        "--steps of training (default: 200)")
    add("--search_split", default=0.7, type=share, help="autolora: share of the training rows for "
        "A and B in the search; the rest is for β (default: 0.7)")
    add("--hypergrad", default="forward", choices=autolora.HYPERGRADIENTS, help="autolora: how β's "
        "gradient is computed (default: forward)")
    add("--eta", default=0.01, type=positive, help="autolora: η, the look-ahead's step (default: "
        "0.01)")
    add("--beta_lr", default=0.01, type=positive, help="autolora: β's learning rate (0.01)")
    add = p.add_argument_group("model and data").add_argument
    add("--model", default="nano", help="nano (default), gpt2, gpt2-medium, -large, -xl, or a file")
    add("--scratch", action="store_true", help="full: start with random weights of --model's shape")
    add("--block_size", type=count, help="longest row in tokens (default: the model's)")
    add("--data", default=["mixture"], nargs="+", metavar="TASK",
        help=f"mixture (default), skills, the name of one of their tasks, or {data.FORMS}")
    add("--eval_rows", default=200, type=count, help="held-out rows of each task (default: 200)")
    add = p.add_argument_group("optimisation").add_argument
    add("--steps", default=600, type=count, help="training steps (default: 600)")
    add("--batch_size", default=64, type=count, help="rows per step of all processes (default: 64)")
    add("--grad_accum", default=1, type=count, help="parts of a batch, to save memory (default: 1)")
    add("--lr", type=positive, help="peak learning rate (default: depends on method and width)")
    add("--warmup", default=0.05, type=share, help="share of the steps before the peak (0.05)")
    add("--weight_decay", default=0.01, type=positive, help="of matrices (default: 0.01)")
    add("--beta2", default=0.999, type=share, help="AdamW's second beta (default: 0.999)")
    add("--label_smoothing", default=0.0, type=share, help="of the training loss (default: 0)")
    add("--seed", default=0, type=cli.bounded(int, 0), help="of initialisation, order of the rows "
        "and dropout (default: 0)")
    add = p.add_argument_group("running").add_argument
    add("--device", help="cuda, mps or cpu (default: the first available one)")
    add("--dtype", choices=["fp32", "bf16"], help="of activations and of a frozen W (default: bf16 "
        "on a GPU that supports it)")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--out", help="the checkpoint's file (default: out/METHOD.pt, or the next free name)")
    add("--eval_every", default=200, type=count, help="steps between checkpoints (default: 200)")
    add("--resume", metavar="CKPT", help="continue an interrupted run with its settings")
    settings = p.parse_args(argv)
    settings.targets = " ".join(settings.targets)
    words = sys.argv[1:] if argv is None else argv
    explicit_flags = {word[2:].split("=")[0] for word in words if word.startswith("--")}
    validate_args(p, settings, explicit_flags)
    return settings, explicit_flags


def validate_args(p, settings, explicit_flags):
    """Exit with argparse's error message if flags contradict each other."""
    if settings.alpha == 0:
        p.error("--alpha 0 would keep ΔW at zero: nothing would be learned")
    extra = explicit_flags - {"resume", "device", "compile", "model", "data"}
    if "resume" in explicit_flags and extra:
        p.error(f"--resume takes the settings from the run: omit --{' --'.join(sorted(extra))}")
    if "ranks_from" in explicit_flags and explicit_flags & {"rank", "targets"}:
        p.error("--ranks_from determines the layers and their ranks: omit --rank and --targets")
    for flag in sorted(explicit_flags):
        methods = [name for name, method in METHODS.items() if flag in method.flags]
        if methods and settings.method not in methods:
            p.error(f"--{flag} belongs to --method {' or '.join(methods)}, not {settings.method}")


def open_interrupted_run(flags, explicit_flags):
    """(checkpoint, its settings) for --resume. Raises OSError or ValueError."""
    changes = {name: getattr(flags, name) for name in explicit_flags}
    saved, settings = checkpoint.open_run(flags.resume, changes)
    settings.out = flags.resume
    if saved["step"] is None:
        raise ValueError(f"{settings.out} contains an adapter but no run of train.py, so it cannot "
                         "be resumed")
    if saved["after"]:
        raise ValueError(f"{settings.out}: the run has ended; start a new one with more --steps")
    missing = {*vars(flags), "optimizer"} - {*vars(settings), *saved}
    if missing:
        raise ValueError(f"{settings.out} is damaged or of another version: it has no "
                         f"{', '.join(sorted(missing))}")
    return saved, settings


@contextmanager
def opened(settings, explicit_flags):
    """The run that the flags describe. In the block, no other process can write its checkpoint."""
    if settings.resume:
        with checkpoint.locked(settings.resume):
            saved, settings = open_interrupted_run(settings, explicit_flags)
            yield Run(settings, saved)
        return
    run = Run(settings)
    with checkpoint.reserved(settings.out, settings.method) as path:
        settings.out = path
        run.save()                              # so that a run killed early can be resumed
        yield run


def main(argv=None):
    settings, explicit_flags = parse(argv)
    with ExitStack() as stack:
        with cli.one_line_errors():
            run = stack.enter_context(opened(settings, explicit_flags))
        with cli.one_line_errors(OSError):
            try:
                print_plan(run)
                train(run)
            except KeyboardInterrupt:
                run.save()
                out = shlex.quote(str(run.settings.out))
                print0(f"\nsaved; to continue: {COMMANDS['train']} --resume {out}")
                raise
    if distributed.is_main_process():
        print_results(run)
    return run.after


if __name__ == "__main__":
    cli.run_main(main)
