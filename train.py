"""
Adapt a GPT-2 to tasks, by full fine-tuning or through an adapter.

    python train.py                              # LoRA, offline, on a laptop
    python train.py --method multilora --n_blocks 4
    python train.py --method autolora            # searches each layer's rank
    python train.py --method full
    torchrun --nproc_per_node 8 train.py --model gpt2-medium --data data/e2e
    python train.py --resume out/lora.pt         # go on with a stopped run

A run that is killed goes on from its last checkpoint, which it leaves every
--eval_every steps, and ends with the same weights, to the bit.
"""
import math
import os
import random
import sys
from functools import partial

import torch

import autolora
import lora
from evaluate import complete, evaluate, first_prompts, table
from multilora import MultiLoRALinear
from support import checkpoint, command, data
from support.command import number, say

# method: its layer, the layer's settings, its learning rate up to width 256, and above
METHODS = {
    "full": (None, (), 1e-3, 5e-5),
    "lora": (lora.LoRALinear, ("alpha", "dropout"), 1e-2, 5e-4),
    "multilora": (MultiLoRALinear, ("n_blocks", "scaling", "dropout"), 2e-2, 1e-3),
    "autolora": (autolora.AutoLoRALinear, ("alpha", "dropout", "gate"), 1e-2, 5e-4),
}
OWN = {  # the flags that not all methods have
    "full": ["scratch"],
    "lora": "targets rank alpha dropout ranks".split(),
    "multilora": "targets rank dropout n_blocks scaling".split(),
    "autolora": "targets rank alpha dropout gate search_steps split hypergrad eta beta_lr".split(),
}
CLIP = 1.0      # largest norm of the gradient


def train(run):
    """From where the run stands to its end."""
    if run.before is None:
        say("measuring the held-out rows ...")
        run.before = run.measure(generate=True)
    if run.phase == "search":
        loop(run, search_step_gradients, run.settings.search_steps)
        run.start_training(autolora.ranks(run.model))
    loop(run, training_gradients, run.settings.steps)
    run.after = run.measure(generate=True)
    prompts = first_prompts(run.tasks)
    run.samples = complete(run.model, prompts, run.tok, run.settings, run.device)
    run.save()
    if command.process()[0] == 0:
        report(run)


def loop(run, gradients, steps):
    """
    The steps of a phase that are still to be done. `gradients(run, step)` fills p.grad of all that
    is trained, summed over the processes, and returns the loss.
    """
    settings, history, run.tokens = run.settings, run.history, 0        # tokens seen
    progress = command.Progress(run.phase, run.step, steps)
    run.model.train()
    for step in range(run.step, steps):
        for group in run.optimizer.param_groups:
            if group["scheduled"]:
                group["lr"] = settings.lr * schedule(step, steps, settings.warmup)
        loss = gradients(run, step)
        norm = torch.nn.utils.clip_grad_norm_(run.omega, CLIP)          # β's stays
        beta_norms = [b.grad.norm() for b in run.beta]
        if not torch.stack([loss, norm, *beta_norms]).isfinite().all():
            run.diverged(f"the loss is {loss:g} and the norm of its gradient {norm:g}")
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.step = step + 1
        history["loss"].append(loss.item())
        history["norm"].append(norm.item())
        progress.show(run.step, loss, run.tokens)
        if run.beta and (run.step % max(1, steps // 100) == 0 or run.step == steps):
            history["beta"].append((run.step, torch.stack([b.detach().cpu() for b in run.beta])))
        if run.step % settings.eval_every == 0 and run.step < steps:
            history["valid"].append((len(history["loss"]), run.measure()))
            run.save()


def training_gradients(run, step):
    total = torch.zeros((), device=run.device)
    for loss in losses(run, run.row, step):
        loss.backward()
        total += loss.detach()
    command.over_processes([total, *[p.grad for p in run.omega]])
    return total


def search_step_gradients(run, step):
    """AutoLoRA's: ω, all A and B, learns on one part of the rows, β on the other."""
    both = [partial(losses, run, row, step) for row in run.halves]
    return autolora.search_gradients(*both, run.omega, run.beta, run.settings.eta,
                                     run.settings.hypergrad, command.over_processes)


def losses(run, row, step):
    """
    The loss of a step's rows in parts; their sum, over the processes too, is the mean over the
    step's tokens. The same at every call, dropout too, which each process draws for itself.
    """
    settings = run.settings
    dice = random.Random(f"{settings.seed} {run.phase} {step} {command.process()[0]}")
    torch.manual_seed(dice.getrandbits(60))
    n = settings.batch_size
    batch = [row(i) for i in range(step * n, (step + 1) * n)]
    counted = sum(r.counted for r in batch)
    run.tokens += sum(len(r.ids) - 1 for r in batch)
    mine = sorted(command.share(batch), key=lambda r: len(r.ids))       # less padding in a part
    size = len(mine) // settings.grad_accum
    for i in range(0, len(mine), size):
        rows = mine[i:i + size]
        idx, targets = data.collate(rows, run.device)
        with command.autocast(settings.dtype, run.device):
            loss = run.net(idx, targets, settings.label_smoothing)[1]
        yield loss * sum(r.counted for r in rows) / counted


def schedule(step, steps, warmup):
    """Linear from 0 up to 1 over the warm-up, a share of the steps, then linear down to 0."""
    warm = warmup * steps
    return min((step + 1) / (warm + 1), (steps - step) / max(steps - warm, 1))


class Run:
    """What the loop needs and a checkpoint holds: a new run, or the one of `saved`."""

    def __init__(self, settings, saved=None):
        self.settings = settings
        self.device = command.start_processes(command.pick_device(settings.device))
        settings.dtype = command.pick_dtype(settings.dtype, self.device)
        self.model = checkpoint.start_model(settings, self.device)
        self.size = sum(p.numel() for p in self.model.parameters())
        self.base = lora.fingerprint(self.model)
        settle(settings, self.model.config)
        self.tok = data.tokenizer(self.model.config.vocab_size)
        self.tasks = data.load(settings.data, self.tok, settings.block_size, settings.eval_rows)
        self.checksums = {t.name: t.checksum() for t in self.tasks}
        self.row = data.stream(self.tasks, settings.seed)
        self.phase, self.step, self.before, self.after, self.samples = "train", 0, None, None, []
        self.history = {"loss": [], "norm": [], "valid": [], "beta": [], "ranks": {}}
        if settings.method == "autolora":
            self.phase = "search"
            parts = data.halves(self.tasks, settings.split, settings.seed)
            self.halves = [data.stream(part, settings.seed) for part in parts]
        if saved:
            if saved["checksums"] != self.checksums:
                raise ValueError(f"{settings.out}: the data has changed since. Its checksums were "
                                 f"{saved['checksums']}, and are {self.checksums}")
            checkpoint.restore(saved, self.model)
            for name in ("phase", "step", "before", "history"):
                setattr(self, name, saved[name])
        elif settings.method != "full":
            ranks = settings.rank
            if settings.ranks is not None:
                ranks = checkpoint.ranks_of(settings.ranks, self.base)
            self.adapt(ranks, *METHODS[settings.method][:2])
        self.prepare()
        if saved:
            self.optimizer.load_state_dict(saved["optimizer"])

    def adapt(self, ranks, layer, names):
        """Put new layers in, whose start depends on the seed alone."""
        torch.manual_seed(self.settings.seed)
        own = {name: getattr(self.settings, name) for name in names}
        lora.inject(self.model, self.settings.targets, ranks, layer, **own)

    def start_training(self, ranks):
        """From a search to its training: a fresh LoRA of the ranks found."""
        say(f"\n{autolora.rank_table(ranks)}\n\ntraining a fresh LoRA of these ranks ...")
        lora.remove(self.model)
        self.adapt(ranks, lora.LoRALinear, ("alpha", "dropout"))
        self.phase, self.step, self.history["ranks"] = "train", 0, ranks
        self.prepare()
        self.save()

    def prepare(self):
        """An optimizer for what is trained: ω, and in a search β. Matrices have weight decay."""
        settings, matrices, vectors, self.beta = self.settings, [], [], []
        for name, p in self.model.named_parameters():
            if p.requires_grad and name.endswith(".beta"):
                self.beta.append(p)
            elif p.requires_grad:
                vector = p.ndim < 2 or name.endswith(".s")
                (vectors if vector else matrices).append(p)
        self.omega = matrices + vectors
        self.parameters = sum(p.numel() for p in [*self.omega, *self.beta])
        groups = [{"params": matrices, "weight_decay": settings.weight_decay, "scheduled": True},
                  {"params": vectors, "scheduled": True}, {"params": self.beta, "scheduled": False}]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], settings.beta_lr,
                                           (0.9, settings.beta2), weight_decay=0, fused=True)
        self.net = torch.compile(self.model) if settings.compile else self.model

    def measure(self, generate=False):
        """Results on the held-out rows. Exits where a loss is not finite."""
        results = evaluate(self.model, self.tasks, self.tok, self.settings, self.device, generate)
        if not math.isfinite(sum(r["loss"] for r in results.values())):
            self.diverged(f"the held-out losses are {results}")
        return results

    def diverged(self, what):
        text = (f"\ntrain.py: {self.phase} step {self.step + 1}: {what}: not finite, so the run "
                f"stops.\nTry a lower --lr than {self.settings.lr:g}, in a search a lower --eta, "
                f"or more --warmup. The last good checkpoint is {self.settings.out}")
        sys.exit(text if command.process()[0] == 0 else 1)

    def save(self):
        """Write the checkpoint."""
        saved = {"settings": vars(self.settings)}
        for name in checkpoint.PARTS:
            saved[name] = getattr(self, name)
        saved |= checkpoint.trained(self.model, self.settings, ended=self.after is not None)
        if self.after is None:
            saved["optimizer"] = self.optimizer.state_dict()
        checkpoint.write(saved, self.settings.out)


def settle(settings, config):
    settings.block_size = settings.block_size or config.block_size
    if settings.block_size > config.block_size:
        raise ValueError(f"--block_size {settings.block_size}: the model has {config.block_size}")
    if settings.lr is None:
        small, large = METHODS[settings.method][2:]
        settings.lr = small if config.n_embd <= 256 else large
    parts = settings.grad_accum * command.process()[1]
    if settings.batch_size % parts:
        raise ValueError(f"--batch_size {settings.batch_size} is no multiple of the {parts} parts")


def report(run):
    out, size = run.settings.out, os.path.getsize(run.settings.out)
    say("", table(run.tasks, run.before, run.after), "", *run.samples, "", sep="\n")
    say(f"saved    {out}, {size / 1e6:.2f} MB, {run.parameters:,} parameters")
    say(f'next     python evaluate.py {out} --prompt "..."')
    if not run.settings.scratch:
        say(f"         python analyze.py {out}")


def parse(argv=None):
    """(settings, names of those given on the command line)"""
    whole, share, positive = number(int, 1), number(float, 0, 1), number(float, 0)
    p = command.parser(__doc__, "python train.py [options]")
    add = p.add_argument_group("method").add_argument
    add("--method", default="lora", choices=METHODS, help="what is trained (default %(default)s)")
    add("--targets", default=["all"], nargs="+", help="layers: q k v o up down, or all (default)")
    add("--rank", default=16, type=whole, help="r of ΔW; autolora: k candidates (%(default)s)")
    add("--alpha", default=16.0, type=float, help="α: ΔW is scaled by α/r (%(default)s)")
    add("--dropout", default=0.0, type=number(float, 0, 0.999), help="on adapters' input (0)")
    add("--ranks", metavar="CKPT", help="lora: each layer's rank as in this checkpoint")
    add("--n_blocks", default=4, type=whole, help="multilora: LoRAs that share the rank (4)")
    add("--scaling", default="scalar", choices=["scalar", "vector"], help="multilora: s (scalar)")
    add("--gate", default="softmax", choices=autolora.GATES, help="autolora: from β to a (softmax)")
    add("--search_steps", default=200, type=whole, help="autolora: of the search, before --steps")
    add("--split", default=0.7, type=share, help="autolora: share of rows for A and B (0.7)")
    add("--hypergrad", default="forward", choices=autolora.HYPERGRADIENTS, help="for β (forward)")
    add("--eta", default=0.01, type=positive, help="autolora: η, the look-ahead's step (0.01)")
    add("--beta_lr", default=0.01, type=positive, help="autolora: β's learning rate (0.01)")
    add = p.add_argument_group("model and data").add_argument
    add("--model", default="nano", help="nano, gpt2, gpt2-medium, -large, -xl, or a file (nano)")
    add("--scratch", action="store_true", help="full: from random weights of --model's shape")
    add("--block_size", type=whole, help="longest row in tokens (default: the model's)")
    add("--data", default=["mixture"], nargs="+", metavar="TASK",
        help=f"mixture (default), skills, one of either by name, or {data.FORMS}")
    add("--eval_rows", default=200, type=whole, help="held-out rows of each task (200)")
    add = p.add_argument_group("optimisation").add_argument
    add("--steps", default=600, type=whole, help="of training (%(default)s)")
    add("--batch_size", default=64, type=whole, help="rows of a step, over all processes (64)")
    add("--grad_accum", default=1, type=whole, help="take a step's rows in so many parts (1)")
    add("--lr", type=positive, help="peak learning rate (default: by method and width)")
    add("--warmup", default=0.05, type=share, help="share of the steps up to the peak (0.05)")
    add("--weight_decay", default=0.01, type=positive, help="AdamW's, on matrices (0.01)")
    add("--beta2", default=0.999, type=share, help="AdamW's (0.999)")
    add("--label_smoothing", default=0.0, type=share, help="share of a target for all tokens (0)")
    add("--seed", default=0, type=number(int, 0), help="of start, rows' order and dropout (0)")
    add = p.add_argument_group("running").add_argument
    add("--device", help="cuda, mps or cpu (default: the first of them that is there)")
    add("--dtype", choices=["fp32", "bf16"], help="of activations and of a frozen W (by device)")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--out", help="the checkpoint's file (default: out/METHOD.pt, or the next free name)")
    add("--eval_every", default=200, type=whole, help="steps from checkpoint to checkpoint (200)")
    add("--resume", metavar="CKPT", help="go on with a run that was stopped, with its settings")
    settings = p.parse_args(argv)
    settings.targets = " ".join(settings.targets)
    words = sys.argv[1:] if argv is None else argv
    given = {word[2:].split("=")[0] for word in words if word.startswith("--")}
    refuse(p, settings, given)
    return settings, given


def refuse(p, settings, given):
    extra = given - {"resume", "device", "compile", "model"}
    if "resume" in given and extra:
        p.error(f"--resume has its settings from the run: leave out --{' --'.join(sorted(extra))}")
    if settings.compile and settings.hypergrad == "exact":
        p.error("--hypergrad exact cannot be compiled: leave out --compile")
    if "ranks" in given and given & {"rank", "targets"}:
        p.error("--ranks says which layers have which rank: leave out --rank and --targets")
    for flag in sorted(given):
        owners = [method for method, flags in OWN.items() if flag in flags]
        if owners and settings.method not in owners:
            p.error(f"--{flag} goes with --method {' or '.join(owners)}, not {settings.method}")


def main(argv=None):
    settings, given = parse(argv)
    saved = None
    with command.plain_errors():
        if "resume" in given:
            changes = {name: getattr(settings, name) for name in given}
            saved, settings = checkpoint.open_run(settings.resume, changes)
            settings.out = settings.resume
            if saved["after"] or saved["step"] is None:
                raise ValueError(f"{settings.out}: this run has ended; start one with more --steps")
        run = Run(settings, saved)
        if saved is None and command.process()[0] == 0:
            settings.out = checkpoint.claim(settings.out, settings.method)
            run.save()                      # so that a kill before --eval_every can be resumed
        command.describe(run, OWN[settings.method])
    try:
        with command.plain_errors(OSError):
            train(run)
    except KeyboardInterrupt:
        say(f"\nstopped; to go on: python train.py --resume {settings.out}")
        sys.exit(130)
    return run.after


if __name__ == "__main__":
    command.run(main)
