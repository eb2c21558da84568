"""train.py: the loop and the search written out, interrupted runs, errors."""
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import lora
import train
from autolora import AutoLoRALinear
from conftest import ROOT, TINY, random_gpt, randomise, same
from evaluate import completions
from model import GPT, GPTConfig, read
from multilora import MultiLoRALinear
from support import adapter_state, checkpoint, cli, data, distributed

SMALL = "--model base.pt --data rows.jsonl --batch_size 8 --device cpu".split()
METHODS = {
    "full": "",
    "lora": "--rank 2",
    "multilora": "--rank 2 --n_blocks 2",
    "autolora": "--rank 4 --search_steps 4 --eta 0.5 --beta_lr 0.5",
}


class Killed(BaseException):
    """Ends a run as kill -9 would."""


def flags(method, more=""):
    return [*SMALL, "--method", method, *METHODS[method].split(), *more.split()]


def write_rows(path, completions):
    rows = [json.dumps({"prompt": f"row {i}", "completion": c}) for i, c in enumerate(completions)]
    Path(path).write_text("\n".join(rows))


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Every test runs in its own folder, with a small base model and rows of several lengths."""
    monkeypatch.chdir(tmp_path)
    model = random_gpt(dtype=torch.float32)
    model.wte.weight.data *= 4                  # so large that gradients are clipped
    torch.save({"model": model.state_dict(), "config": asdict(TINY)}, "base.pt")
    write_rows("rows.jsonl", [chr(97 + i % 7) * (1 + i % 5) for i in range(40)])


def tensors(path):
    """{name: tensor} of everything that a run trained."""
    saved = read(path)
    if "model" in saved:
        return saved["model"]
    found = {}
    for name, own in saved["adapter"]["tensors"].items():
        for key, t in own.items():
            found[f"{name}.{key}"] = t
    return found


def same_run(a, b):
    """Whether two checkpoints are exactly equal, apart from the settings (their file names)."""
    return same(read(a) | {"settings": {}}, read(b) | {"settings": {}})


def near(a, b, tolerance):
    return (a - b).norm() <= tolerance * b.norm()


def killed_after(n, argv, monkeypatch):
    """Run train.py and kill it before it writes checkpoint n + 1. False if it ends before that."""
    write = checkpoint.write
    written = []

    def write_or_die(saved, path):
        if len(written) == n:
            raise Killed
        write(saved, path)
        written.append(path)

    with monkeypatch.context() as m, suppress(Killed):
        m.setattr(checkpoint, "write", write_or_die)
        train.main(argv)
        return False
    return True


# One run ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
def test_what_a_run_saves_and_prints(method, capsys):
    after = train.main(flags(method, "--steps 40 --eval_every 20 --lr 1e-2"))
    saved = read(f"out/{method}.pt")
    searched = 4 if method == "autolora" else 0
    assert (saved["phase"], saved["step"], saved["after"]) == ("train", 40, after)
    assert "optimizer" not in saved
    assert saved["samples"][0] in capsys.readouterr().out
    assert len(saved["history"]["loss"]) == len(saved["history"]["norm"]) == 40 + searched
    assert after["rows.jsonl"].keys() == saved["before"]["rows.jsonl"].keys() == {"loss", "exact"}
    assert after["rows.jsonl"]["loss"] < saved["before"]["rows.jsonl"]["loss"]
    assert saved["base"] == adapter_state.fingerprint(GPT.from_pretrained("base.pt"))
    if method == "full":                        # its checkpoint can be the base of another run
        assert same(dict(GPT.from_pretrained("out/full.pt").state_dict()), saved["model"])


@pytest.mark.parametrize("method, narrow, wide", [
    ("full", 1e-3, 2e-4), ("lora", 1e-2, 4e-3), ("multilora", 2e-2, 1.6e-2),
    ("autolora", 1e-2, 4e-3)])
def test_the_default_learning_rate_depends_on_the_method_and_the_width(method, narrow, wide):
    for width, lr in [(128, narrow), (256, narrow), (257, wide), (1600, wide)]:
        settings, _ = train.parse(["--method", method])
        train.resolve_defaults(settings, GPTConfig(n_embd=width))
        assert settings.lr == lr
    settings, _ = train.parse(["--method", method, "--lr", "0.5"])
    train.resolve_defaults(settings, GPTConfig())
    assert settings.lr == 0.5


# The loop -----------------------------------------------------------------------------------------
LOOP = dict(steps=6, lr=2e-2, warmup=0.5, weight_decay=2.0, beta2=0.9, label_smoothing=0.2, seed=5)


def loop_by_hand(layer, steps, lr, warmup, weight_decay, beta2, label_smoothing, seed, **adapter):
    """(parameters before, parameters after, [(loss, gradient norm)]) of training in plain torch."""
    model = GPT.from_pretrained("base.pt")
    row = data.stream(data.load(["rows.jsonl"], data.tokenizer(257), 64), seed)
    if layer:
        torch.manual_seed(seed)
        lora.inject(model, "q v", 3, layer, **adapter)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in trained.items()}
    groups = []
    for name, p in trained.items():
        decays = p.dim() == 2 and not name.endswith(".s")
        groups.append({"params": [p], "weight_decay": weight_decay if decays else 0})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, beta2))
    history = []
    for step in range(steps):
        idx, targets = data.collate([row(i) for i in range(step * 8, step * 8 + 8)])
        counted = targets != -100
        logp = model(idx)[0].log_softmax(-1)[counted]                                   # (N, V)
        of_targets = logp.gather(1, targets[counted][:, None])
        loss = -((1 - label_smoothing) * of_targets.mean() + label_smoothing * logp.mean())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in trained.values()]).norm().item()
        for p in trained.values():
            p.grad *= min(1, 1 / norm)
        up = (step + 1) / (warmup * steps + 1)
        down = (steps - step) / (steps - warmup * steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(up, down)
        optimizer.step()
        history.append((loss.item(), norm))
    return start, trained, history


@pytest.mark.parametrize("method, layer, adapter", [
    ("full", None, {}),
    ("lora", lora.LoRALinear, {"alpha": 70.0}),
    ("multilora", MultiLoRALinear, {"n_blocks": 3, "scaling": "vector"}),
])
def test_training_equals_the_loop_by_hand(method, layer, adapter):
    start, want, history = loop_by_hand(layer, **LOOP, **adapter)
    assert max(norm for _, norm in history) > 1 or method == "multilora"
    own = "" if method == "full" else "--targets q v --rank 3"
    options = [f"--{name}={value}" for name, value in {**LOOP, **adapter}.items()]
    train.main([*SMALL, "--method", method, *own.split(), *options, "--out", "a.pt"])
    got = tensors("a.pt")
    saved = read("a.pt")["history"]
    assert saved["loss"] == pytest.approx([loss for loss, _ in history], rel=1e-4)
    assert saved["norm"] == pytest.approx([norm for _, norm in history], rel=1e-3)
    for name, p in want.items():
        if not name.endswith("k.bias"):     # its gradient is 0 up to rounding
            moved = (p - start[name]).norm()
            assert 0 < moved and (got[name] - p).norm() < 0.01 * moved, name


def new_run(argv):
    """A run before its first step, whose adapter has random values, so that dropout matters."""
    run = train.Run(train.parse([*argv, "--out", "new.pt"])[0])
    randomise(run.model)
    return run


@pytest.mark.parametrize("method, own", [
    ("lora", {"alpha": 5.0, "dropout": 0.3}),
    ("multilora", {"n_blocks": 2, "scaling": "vector", "dropout": 0.3}),
    ("autolora", {"alpha": 5.0, "gate": "sigmoid", "dropout": 0.3})])
def test_a_methods_flags_reach_every_layer(method, own):
    options = [f"--{name}={value}" for name, value in own.items()]
    layers = lora.adapters(new_run(flags(method, " ".join(options))).model).values()
    assert len(layers) == 12
    for m in layers:
        assert adapter_state.settings_of(m) == own


@pytest.mark.parametrize("method", ["lora", "multilora", "autolora"])
def test_dropout_masks_depend_on_the_seed_the_phase_and_the_step(method):
    run = new_run(flags(method, "--dropout 0.5 --device cpu"))
    first = run.row(0)

    def loss(seed, phase, step):
        run.settings.seed = seed
        run.phase = phase
        return sum(part.item() for part in train.loss_parts(run, lambda i: first, step))

    run.model.train()
    losses = [loss(0, "train", 0), loss(1, "train", 0), loss(0, "search", 0), loss(0, "train", 1)]
    assert len(set(losses)) == 4
    assert loss(0, "train", 0) == losses[0]
    run.model.eval()
    assert loss(0, "train", 0) == loss(1, "train", 0)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_activations_are_bf16_with_bf16_in_training_evaluation_and_generation(method):
    seen = set()

    def note(module, args, out):
        seen.add((module.training, out.size(1) == 1, out.dtype))

    for dtype, want in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        seen.clear()
        run = new_run(flags(method, f"--dtype {dtype} --batch_size 2 --eval_rows 2 --steps 1"))
        run.model.h[1].mlp.down.register_forward_hook(note)
        train.train(run)
        completions(run.model, [[97]], run.tok, run.settings, run.device)       # of one token
        assert seen == {(True, False, want), (False, False, want), (False, True, want)}
        assert all(math.isfinite(x) for x in run.history["loss"])


def test_a_model_from_scratch_depends_on_the_seed():
    weights = []
    for seed in (0, 1, 1):
        argv = f"--method full --scratch --model nano --device cpu --dtype fp32 --seed {seed}"
        settings, _ = train.parse(argv.split())
        weights.append(checkpoint.start_model(settings, torch.device("cpu")).h[2].attn.k.weight)
    assert torch.equal(weights[1], weights[2]) and not torch.equal(weights[0], weights[1])


@pytest.mark.parametrize("dropout", [0, 0.5])
def test_dropout_masks_differ_between_steps_and_processes(dropout, monkeypatch):
    """All rows are alike and the learning rate is 0, so that nothing else can differ."""
    rows = ['{"prompt": "%s", "completion": "a"}\n' % prompt for prompt in "pq"]
    Path("alike.jsonl").write_text("".join(12 * rows))
    argv = [*SMALL, *f"--data alike.jsonl --batch_size 2 --steps 2 --dropout {dropout}".split()]
    train.main([*argv, "--lr", "0", "--out", "a.pt"])
    first, second = read("a.pt")["history"]["norm"]
    losses = []
    monkeypatch.setattr(distributed, "process_count", lambda: 2)
    for index in (0, 1):                        # each process of two, without the other
        monkeypatch.setattr(distributed, "process_index", lambda: index)
        losses.append(train.main([*argv, "--out", "two.pt"])["alike.jsonl"]["loss"])
    assert (first == second) == (losses[0] == losses[1]) == (dropout == 0)


# AutoLoRA: the search, then training with the ranks that it found ---------------------------------
def search_by_hand(steps, total, lr, beta_lr, eta, decay, split, gate, seed):
    """(β after each step, ω at the end), without train.py and autolora.search_gradients."""
    model = GPT.from_pretrained("base.pt")
    tasks = data.load(["rows.jsonl"], data.tokenizer(257), 64)
    rows = [data.stream(part, seed) for part in data.split_for_search(tasks, split, seed)]
    torch.manual_seed(seed)
    lora.inject(model, "all", 4, AutoLoRALinear, gate=gate)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ω = {name: p for name, p in trained.items() if not name.endswith(".beta")}
    β = {name: p for name, p in trained.items() if name.endswith(".beta")}
    optimizer = torch.optim.AdamW([{"params": ω.values(), "weight_decay": decay},
                                   {"params": β.values(), "weight_decay": 0, "lr": beta_lr}])
    history = []
    for step in range(steps):
        first, second = ([row(i) for i in range(step * 8, step * 8 + 8)] for row in rows)
        with sdpa_kernel(SDPBackend.MATH):
            loss = functional_call(model, ω | β, data.collate(first))[1]
            g = torch.autograd.grad(loss, ω.values(), create_graph=True)
            ahead = {name: p - eta * d for (name, p), d in zip(ω.items(), g)}
            loss = functional_call(model, ahead | β, data.collate(second))[1]
            h = torch.autograd.grad(loss, β.values())       # through ω', not by a formula
        for p, grad in zip([*ω.values(), *β.values()], [*g, *h]):
            p.grad = grad.detach()
        torch.nn.utils.clip_grad_norm_(ω.values(), 1.0)
        optimizer.param_groups[0]["lr"] = lr * (total - step) / total
        optimizer.step()
        history.append(torch.stack([p.detach().clone() for p in β.values()]))
    return history, ω


@pytest.mark.parametrize("hypergrad, split, gate", [
    ("exact", 0.7, "softmax"), ("central", 0.4, "softmax"), ("exact", 0.7, "sigmoid")])
def test_the_search_equals_the_search_by_hand(hypergrad, split, gate, monkeypatch):
    monkeypatch.setattr(torch.optim, "AdamW", partial(torch.optim.AdamW, eps=1e-2))
    settings = "--search_steps 5 --eval_every 4 --warmup 0 --lr 0.01 --weight_decay 2 --seed 3"
    settings += f" --hypergrad {hypergrad} --search_split {split} --gate {gate}"
    killed_after(2, flags("autolora", settings), monkeypatch)
    want, ω = search_by_hand(4, 5, 0.01, 0.5, 0.5, 2.0, split, gate, seed=3)
    saved = read("out/autolora.pt")
    got = tensors("out/autolora.pt")
    assert (saved["phase"], saved["step"]) == ("search", 4)
    for n, (step, beta) in enumerate(saved["history"]["beta"]):
        assert step == n + 1 and near(beta, want[n], 0.01) and want[n].norm() > 0.1
    assert all(near(got[name], p, 0.01) for name, p in ω.items())


def test_all_passes_of_a_search_step_have_the_same_dropout_masks(monkeypatch):
    """With other masks, a finite difference would be noise instead of the derivative."""
    monkeypatch.setattr(torch.optim, "AdamW", partial(torch.optim.AdamW, eps=1e-2))
    betas = []
    for hypergrad in ("exact", "central"):
        more = f"--dropout 0.3 --hypergrad {hypergrad} --steps 1 --out {hypergrad}.pt"
        train.main(flags("autolora", more))
        betas.append(read(f"{hypergrad}.pt")["history"]["beta"][-1][1])
    assert betas[0].norm() > 0.1 and near(*betas, 0.01)
    train.main(flags("autolora", "--hypergrad exact --steps 1 --out without.pt"))
    without = read("without.pt")["history"]["beta"][-1][1]
    assert not near(betas[0], without, 0.1)                     # there was dropout


@pytest.mark.parametrize("steps, recorded", [(201, [200, 201]), (200, [200]), (99, [98, 99])])
def test_a_hundred_betas_are_recorded_and_always_the_last_one(steps, recorded):
    """The figure of the search draws them. Here only the end of the search is run."""
    run = new_run(flags("autolora", f"--search_steps {steps}"))
    run.step = steps - len(recorded)
    train.loop(run, train.search_gradients, steps)
    assert [step for step, _ in run.history["beta"]] == recorded
    last = torch.stack([m.beta.detach() for m in lora.adapters(run.model).values()])
    assert torch.equal(run.history["beta"][-1][1], last)


def test_the_ranks_come_from_the_last_beta_and_ranks_from_uses_them_again():
    train.main(flags("autolora", "--alpha 5 --steps 3 --dropout 0.2"))
    saved = read("out/autolora.pt")
    step, beta = saved["history"]["beta"][-1]
    ranks = (beta.double().softmax(-1) >= 1 / 4).sum(-1).tolist()
    assert step == 4 and len(set(ranks)) > 1
    assert [len(own["A"]) for own in saved["adapter"]["tensors"].values()] == ranks
    assert saved["adapter"]["settings"] == {"alpha": 5.0, "dropout": 0.2}
    train.main([*SMALL, *"--steps 3 --alpha 5 --dropout 0.2 --ranks_from out/autolora.pt".split()])
    assert same(tensors("out/lora.pt"), tensors("out/autolora.pt"))     # the same training


# Interrupted runs ---------------------------------------------------------------------------------
HARD = "--grad_accum 2 --eval_every 1 --warmup 0.5 --steps 3"
KINDS = {m: flags(m, f"{HARD} --dropout 0.3") for m in ("lora", "multilora", "autolora")}
KINDS["full"] = flags("full", HARD)
KINDS["scratch"] = flags("full", f"{HARD} --scratch --model nano --block_size 32")


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_after_each_of_its_checkpoints_ends_as_if_uninterrupted(kind, monkeypatch):
    train.main([*KINDS[kind], "--out", "whole.pt"])
    argv = [*KINDS[kind], "--out", "a.pt"]
    stages = []
    while len(stages) < 9 and killed_after(1, argv, monkeypatch):
        saved = read("a.pt")
        stages.append((saved["phase"], saved["step"]))
        argv = ["--resume", "a.pt"]
    search = [("search", step) for step in range(4)] if kind == "autolora" else []
    assert stages == [*search, ("train", 0), ("train", 1), ("train", 2)]
    assert same_run("a.pt", "whole.pt")


def test_kill_9_at_any_moment_and_a_second_process_before_it(capsys):
    argv = [*KINDS["autolora"], "--steps", "15", "--search_steps", "15"]
    run = subprocess.Popen([sys.executable, ROOT / "train.py", *argv], stdout=subprocess.DEVNULL)
    file = Path("out/autolora.pt")
    while not file.exists() or not file.stat().st_size:
        assert run.poll() is None
        time.sleep(0.01)
    assert "is in use by another run" in error_of(["--resume", str(file)], capsys)
    time.sleep(0.1)
    run.kill()
    run.wait()
    assert read(file)["after"] is None                          # it was killed before the end
    train.main(["--resume", "out/autolora.pt"])
    train.main([*argv, "--out", "whole.pt"])
    assert same_run("out/autolora.pt", "whole.pt")


@contextmanager
def signal_after(number, owner, name, call, times=1):
    """This process receives a signal at the end of the call-th call of owner.name."""
    real = getattr(owner, name)
    calls = []

    def call_and_send(*args, **options):
        result = real(*args, **options)
        calls.append(name)
        if len(calls) == call:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return result

    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)    # nohup leaves it ignored
    try:
        with pytest.MonkeyPatch.context() as m:
            m.setattr(owner, name, call_and_send)
            yield
    finally:
        for n, handler in handlers.items():
            signal.signal(n, handler)


def exit_status(argv):
    """The exit status of `python train.py ARGV`."""
    with pytest.raises(SystemExit) as e:
        cli.run_main(partial(train.main, argv))
    return e.value.code


@pytest.mark.parametrize("number, kind, owner, name, call, step", [
    (signal.SIGINT, "lora", data, "collate", 1, 0),         # in the first evaluation
    (signal.SIGTERM, "lora", data, "collate", 1, 0),
    (signal.SIGINT, "full", torch.optim.AdamW, "step", 2, 2),       # before run.step is set
    (signal.SIGTERM, "autolora", torch.optim.AdamW, "step", 3, 3),  # the same in a search
    (signal.SIGINT, "autolora", lora, "inject", 2, 0),      # between the search and its training
    (signal.SIGTERM, "multilora", torch, "save", 3, 2),     # while a checkpoint is written
    (signal.SIGINT, "lora", train, "evaluate", 3, 2),       # after the evaluation of step 2
    (signal.SIGTERM, "lora", train, "completions", 1, 3),   # after the last evaluation
])
def test_a_signal_saves_the_run_and_prints_how_to_resume_it(
        number, kind, owner, name, call, step, capsys):
    train.main([*KINDS[kind], "--out", "whole.pt"])
    with signal_after(number, owner, name, call):
        assert exit_status([*KINDS[kind], "--out", "a.pt"]) == 128 + number     # 130 or 143
    out, err = capsys.readouterr()
    hint = out.splitlines()[-1]
    assert hint == "saved; to continue: python train.py --resume a.pt" and not err
    assert read("a.pt")["step"] == step
    train.main(hint.split()[-2:])
    assert same_run("a.pt", "whole.pt")


def test_suggested_commands_are_quoted_for_the_shell(capsys):
    name = "my run's $1.pt"
    with signal_after(signal.SIGINT, torch.optim.AdamW, "step", 1):
        exit_status([*flags("lora", "--steps 2"), "--out", name])
    argv = shlex.split(capsys.readouterr().out.splitlines()[-1].partition(": ")[2])
    assert argv == ["python", "train.py", "--resume", name]
    train.main(argv[2:])
    *_, first, second = capsys.readouterr().out.splitlines()
    assert shlex.split(first) == ["next", "python", "evaluate.py", name, "--prompt", "..."]
    assert shlex.split(second) == ["python", "analyze.py", name]


def test_smollm_suggests_its_own_commands(monkeypatch, capsys):
    """Here with a small GPT in place of SmolLM2."""
    import smollm
    for owner, name in [(train, "COMMANDS"), (checkpoint, "base_model"), (data, "tokenizer")]:
        monkeypatch.setattr(owner, name, getattr(owner, name))      # smollm.main replaces them
    monkeypatch.setattr(smollm, "SmolLM", lambda: GPT.from_pretrained("base.pt"))
    monkeypatch.setattr(smollm, "Tokenizer", partial(data.tokenizer, 257))
    argv = "train --data rows.jsonl --batch_size 8 --device cpu --steps 1 --out a.pt".split()
    monkeypatch.setattr(sys, "argv", ["smollm.py", *argv])
    smollm.main()
    *_, first, second = capsys.readouterr().out.splitlines()
    assert first == 'next     python experiments/smollm.py evaluate a.pt --prompt "..."'
    assert second.strip() == "python experiments/smollm.py analyze a.pt"


def test_a_signal_while_the_last_checkpoint_is_written_changes_nothing(capsys):
    with signal_after(signal.SIGINT, torch, "save", 2):
        cli.run_main(partial(train.main, flags("lora", "--steps 1 --out a.pt")))
    assert read("a.pt")["after"] and "next     python evaluate.py" in capsys.readouterr().out


def test_a_signal_in_a_process_that_writes_no_checkpoint(monkeypatch, capsys):
    """It has no --out and prints nothing."""
    monkeypatch.setattr(distributed, "is_main_process", lambda: False)
    monkeypatch.setenv("RANK", "1")
    with signal_after(signal.SIGINT, torch.optim.AdamW, "step", 1):
        assert exit_status(KINDS["lora"]) == 130
    assert {*os.listdir()} == {"base.pt", "rows.jsonl"} and capsys.readouterr() == ("", "")


@pytest.mark.parametrize("in_step, in_save", [(2, 0), (1, 1)])
def test_a_second_signal_ends_the_program_at_once(in_step, in_save, capsys):
    """Both signals are received in one step, or the second one while the run is saved."""
    with signal_after(signal.SIGTERM, torch.optim.AdamW, "step", 2, times=in_step):
        with signal_after(signal.SIGTERM, torch, "save", 3, times=in_save):
            assert exit_status([*KINDS["lora"], "--out", "a.pt"]) == 143
    assert "to continue" not in capsys.readouterr().out
    assert read("a.pt")["step"] == 1                        # the previous checkpoint
    assert {*os.listdir()} == {"a.pt", "base.pt", "rows.jsonl"}


# Errors -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method, more", [
    ("full", "--steps 1"),                                      # noticed after the last step
    ("autolora", "--search_steps 3 --eval_every 1"),            # noticed in an evaluation
    ("autolora", "--search_steps 1 --eta 1e30 --lr 1e-3"),      # only β's gradient is not finite
])
def test_a_run_that_diverges_stops_and_keeps_the_last_good_checkpoint(method, more, capsys):
    with pytest.raises(SystemExit) as e:
        train.main(flags(method, f"--lr 1e30 --warmup 0 {more} --out a.pt"))
    assert "so the run stops" in e.value.code and "Try a lower --lr" in e.value.code
    assert read("a.pt")["after"] is None
    assert all(t.isfinite().all() for t in tensors("a.pt").values())
    assert "nan" not in capsys.readouterr().out


def error_of(argv, capsys):
    """The message of a command that exits with status 2 and prints nothing else."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="^2$"):
        train.main(argv)
    out, err = capsys.readouterr()
    assert err.count("\n") <= 2 and not out                     # argparse prints its usage, too
    return err.splitlines()[-1]


@pytest.mark.parametrize("argv, message", [
    ("--batch_size 10 --grad_accum 3", "--batch_size 10 is not divisible by 3, the number of"),
    ("--block_size 65", "--block_size 65 exceeds the model's block of 64 tokens"),
    ("--device meta", "--device meta:"),
    ("--out /proc/a.pt", "/proc/a.pt"),
    ("--method full --scratch --model gpt5", "--scratch needs a --model from nano tiny gpt2 "),
    ("--method multilora --alpha=4", "--alpha belongs to --method lora or autolora, not multilora"),
    ("--resume a.pt --lr 1", "--resume takes the settings from the run: omit --batch_size --lr"),
    ("--rank 0", "argument --rank: 0 is not a finite number, at least 1"),
    ("--method autolora --eta inf", "argument --eta: inf is not a finite number, at least 0"),
    ("--lr nan", "argument --lr: nan is not a finite number"),
    ("--alpha=-inf", "argument --alpha: -inf is not a finite number"),
    ("--alpha 0", "--alpha 0 would keep ΔW at zero: nothing would be learned"),
    ("--method autolora --alpha 0", "--alpha 0 would keep ΔW at zero: nothing would be learned"),
    ("--data d", "d has neither valid.jsonl nor test.jsonl"),
    ("--data rows.csv", "rows.csv is none of these: a .jsonl file"),
    ("--method autolora --hypergrad exact --compile", "omit --compile"),
    ("--ranks_from a.pt --rank 3", "omit --rank and --targets"),
    ("--ranks_from a.pt --targets q", "omit --rank and --targets"),
])
def test_errors_are_one_line_that_says_what_to_do(argv, message, capsys):
    os.mkdir("d")
    Path("rows.csv").write_text("prompt,completion")
    assert message in error_of([*SMALL, "--steps", "1", *argv.split()], capsys)
    assert not os.path.exists("out")


def test_each_reason_why_a_run_cannot_be_resumed_has_its_own_message(capsys):
    train.main(flags("lora", "--steps 1 --out ended.pt"))
    torch.save(read("ended.pt")["adapter"], "by_hand.pt")
    os.mkdir("peft")
    keys = [f"base_model.model.transformer.h.0.mlp.c_fc.lora_{side}.weight" for side in "AB"]
    torch.save(dict(zip(keys, (torch.ones(2, 16), torch.ones(64, 2)))), "peft/adapter_model.bin")
    Path("peft/adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 4}')
    for name, message in {
        "ended.pt": "ended.pt: the run has ended; start a new one with more --steps",
        "peft": "peft contains an adapter but no run of train.py",
        "by_hand.pt": "by_hand.pt contains an adapter but no run of train.py",
        "missing.pt": "No such file or directory: 'missing.pt'",
        "no/folder/a.pt": "No such file or directory: 'no/folder/a.pt'",
        "base.pt": "base.pt is neither a checkpoint of train.py nor an adapter",
    }.items():
        assert message in error_of(["--resume", name], capsys)
