"""train.py: what a run promises, to the bit where it promises that."""
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from contextlib import suppress
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
from conftest import ROOT, TINY, random_gpt
from model import GPT, read
from multilora import MultiLoRALinear
from support import checkpoint, command, data

SMALL = "--model base.pt --data rows.jsonl --batch_size 8 --device cpu".split()
Killed = type("Killed", (BaseException,), {})
METHODS = {
    "full": "", "lora": "--rank 2",
    "multilora": "--rank 2 --n_blocks 2",
    "autolora": "--rank 4 --search_steps 4 --eta 0.5 --beta_lr 0.5",
}


def flags(method, more=""):
    return [*SMALL, "--method", method, *METHODS[method].split(), *more.split()]


def write_rows(path, completions):
    rows = [json.dumps({"prompt": f"row {i}", "completion": c}) for i, c in enumerate(completions)]
    Path(path).write_text("\n".join(rows))


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Each test is in a folder of its own, with a small base and rows of several lengths."""
    monkeypatch.chdir(tmp_path)
    model = random_gpt(dtype=torch.float32)
    model.wte.weight.data *= 4                  # so that there are gradients to clip
    torch.save({"model": model.state_dict(), "config": asdict(TINY)}, "base.pt")
    write_rows("rows.jsonl", [chr(97 + i % 7) * (1 + i % 5) for i in range(40)])


def tensors(path):
    """{name: tensor} of what a run trained."""
    saved = read(path)
    if "model" in saved:
        return saved["model"]
    layers = saved["adapter"]["tensors"]
    return {f"{name}.{k}": t for name, own in layers.items() for k, t in own.items()}


def identical(a, b):
    """Whether two nests of dicts, lists and tensors are the same to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(identical, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def same_run(a, b):
    """Whether two files hold the same run: weights, results, history. Only their names differ."""
    a, b = read(a), read(b)
    return identical({**a, "settings": {}}, {**b, "settings": {}})


def near(a, b, tolerance):
    return (a - b).norm() <= tolerance * b.norm()


def killed_after(n, argv, monkeypatch):
    """Write n checkpoints, and be killed before there is another. False where there was none."""
    write, written = checkpoint.write, []

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
def test_a_run(method, capsys):
    after = train.main(flags(method, "--steps 40 --eval_every 20 --lr 1e-2"))
    saved, searched = read(f"out/{method}.pt"), 4 if method == "autolora" else 0
    assert (saved["phase"], saved["step"], saved["after"]) == ("train", 40, after)
    assert "optimizer" not in saved and saved["samples"][0] in capsys.readouterr().out
    assert len(saved["history"]["loss"]) == len(saved["history"]["norm"]) == 40 + searched
    assert after["rows.jsonl"].keys() == saved["before"]["rows.jsonl"].keys() == {"loss", "exact"}
    assert after["rows.jsonl"]["loss"] < saved["before"]["rows.jsonl"]["loss"]
    assert saved["base"] == lora.fingerprint(GPT.from_pretrained("base.pt"))
    if method == "full":                            # the checkpoint is a model like any other
        assert identical(dict(GPT.from_pretrained("out/full.pt").state_dict()), saved["model"])


# The loop -----------------------------------------------------------------------------------------
LOOP = dict(steps=6, lr=2e-2, warmup=0.5, weight_decay=2.0, beta2=0.9, label_smoothing=0.2, seed=5)


def loop_by_hand(layer, steps, lr, warmup, weight_decay, beta2, label_smoothing, seed, **adapter):
    """The training in plain PyTorch: tensors before and after; of every step, loss and norm."""
    model, tok = GPT.from_pretrained("base.pt"), data.tokenizer(257)
    row = data.stream(data.load(["rows.jsonl"], tok, 64), seed)
    if layer:
        torch.manual_seed(seed)
        lora.inject(model, "q v", 3, layer, **adapter)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in trained.items()}
    matrices = [name for name, p in trained.items() if p.dim() == 2 and not name.endswith(".s")]
    groups = [{"params": [p], "weight_decay": weight_decay * (name in matrices)}
              for name, p in trained.items()]
    optimizer, history = torch.optim.AdamW(groups, betas=(0.9, beta2)), []
    for step in range(steps):
        idx, targets = data.collate([row(i) for i in range(step * 8, step * 8 + 8)])
        counted = targets != -100
        logp = model(idx)[0].log_softmax(-1)[counted]                                   # (N, V)
        right = logp.gather(1, targets[counted][:, None])
        loss = -((1 - label_smoothing) * right.mean() + label_smoothing * logp.mean())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in trained.values()]).norm().item()
        for p in trained.values():
            p.grad *= min(1, 1 / norm)
        for group in optimizer.param_groups:
            up, down = (step + 1) / (warmup * steps + 1), (steps - step) / (steps - warmup * steps)
            group["lr"] = lr * min(up, down)
        optimizer.step()
        history.append((loss.item(), norm))
    return start, trained, history


@pytest.mark.parametrize("method, layer, adapter", [
    ("full", None, {}),
    ("lora", lora.LoRALinear, {"alpha": 70.0}),
    ("multilora", MultiLoRALinear, {"n_blocks": 3, "scaling": "vector"}),
])
def test_a_run_is_the_loop_written_out(method, layer, adapter):
    start, want, history = loop_by_hand(layer, **LOOP, **adapter)
    assert max(norm for _, norm in history) > 1 or method == "multilora"
    own = "" if method == "full" else "--targets q v --rank 3"
    options = [f"--{name}={value}" for name, value in {**LOOP, **adapter}.items()]
    train.main([*SMALL, "--method", method, *own.split(), *options, "--out", "a.pt"])
    got, saved = tensors("a.pt"), read("a.pt")["history"]
    assert saved["loss"] == pytest.approx([loss for loss, _ in history], rel=1e-4)
    assert saved["norm"] == pytest.approx([norm for _, norm in history], rel=1e-3)
    for name, p in want.items():
        if not name.endswith("k.bias"):     # softmax does not see it: its gradient is rounding
            moved = (p - start[name]).norm()
            assert 0 < moved and (got[name] - p).norm() < 0.01 * moved, name


@pytest.mark.parametrize("dropout", [0, 0.5])
def test_dropout_masks_differ_between_steps_and_processes(dropout, monkeypatch):
    """Of rows that are all alike: nothing else differs, where the learning rate is 0."""
    rows = ['{"prompt": "%s", "completion": "a"}\n' % prompt for prompt in "pq"]
    Path("alike.jsonl").write_text("".join(12 * rows))
    argv = [*SMALL, *f"--data alike.jsonl --batch_size 2 --steps 2 --dropout {dropout}".split()]
    train.main([*argv, "--lr", "0", "--out", "a.pt"])
    a, b = read("a.pt")["history"]["norm"]
    losses = []
    for i in (0, 1):                                    # as if there were two
        monkeypatch.setattr(command, "process", lambda: (i, 2))
        losses.append(train.main([*argv, "--out", "two.pt"])["alike.jsonl"]["loss"])
    assert (a == b) == (losses[0] == losses[1]) == (dropout == 0)


# AutoLoRA: a search, then a training at the ranks found -------------------------------------------
def search_by_hand(steps, total, lr, beta_lr, eta, decay, split, gate, seed):
    """The search without train.py and without autolora.search_gradients: β of all steps, ω."""
    model, tok = GPT.from_pretrained("base.pt"), data.tokenizer(257)
    parts = data.halves(data.load(["rows.jsonl"], tok, 64), split, seed)
    rows = [data.stream(part, seed) for part in parts]
    torch.manual_seed(seed)
    lora.inject(model, "all", 4, AutoLoRALinear, gate=gate)
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ω = {name: p for name, p in own.items() if not name.endswith(".beta")}
    β = {name: p for name, p in own.items() if name.endswith(".beta")}
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


@pytest.mark.parametrize("how, split, gate", [
    ("exact", 0.7, "softmax"), ("central", 0.4, "softmax"), ("exact", 0.7, "sigmoid")])
def test_the_search_is_the_one_by_hand(how, split, gate, monkeypatch):
    monkeypatch.setattr(torch.optim, "AdamW", partial(torch.optim.AdamW, eps=1e-2))
    settings = "--search_steps 5 --eval_every 4 --warmup 0 --lr 0.01 --weight_decay 2 --seed 3"
    settings += f" --hypergrad {how} --split {split} --gate {gate}"
    killed_after(2, flags("autolora", settings), monkeypatch)
    want, ω = search_by_hand(4, 5, 0.01, 0.5, 0.5, 2.0, split, gate, seed=3)
    saved, got = read("out/autolora.pt"), tensors("out/autolora.pt")
    assert (saved["phase"], saved["step"]) == ("search", 4)
    for n, (step, beta) in enumerate(saved["history"]["beta"]):
        assert step == n + 1 and near(beta, want[n], 0.01) and want[n].norm() > 0.1
    assert all(near(got[name], p, 0.01) for name, p in ω.items())


def test_the_passes_of_a_search_step_have_the_same_dropout_masks(monkeypatch):
    """Else a finite difference is noise, and not the exact derivative."""
    monkeypatch.setattr(torch.optim, "AdamW", partial(torch.optim.AdamW, eps=1e-2))
    found = []
    for how in ("exact", "central"):
        train.main(flags("autolora", f"--dropout 0.3 --hypergrad {how} --steps 1 --out {how}.pt"))
        found.append(read(f"{how}.pt")["history"]["beta"][-1][1])
    assert found[0].norm() > 0.1 and near(*found, 0.01)


def test_the_ranks_found_are_those_of_the_last_beta_and_can_be_used_again():
    train.main(flags("autolora", "--alpha 5 --steps 3 --dropout 0.2"))
    saved = read("out/autolora.pt")
    step, beta = saved["history"]["beta"][-1]
    ranks = (beta.double().softmax(-1) >= 1 / 4).sum(-1).tolist()
    assert step == 4 and list(saved["history"]["ranks"].values()) == ranks and len(set(ranks)) > 1
    assert [len(own["A"]) for own in saved["adapter"]["tensors"].values()] == ranks
    assert saved["adapter"]["settings"] == {"alpha": 5.0, "dropout": 0.2}
    train.main([*SMALL, *"--steps 3 --alpha 5 --dropout 0.2 --ranks out/autolora.pt".split()])
    assert identical(tensors("out/lora.pt"), tensors("out/autolora.pt"))    # the same training


def test_two_processes_with_two_parts_of_a_step_are_one():
    argv = flags("autolora", "--grad_accum 2 --steps 4 --hypergrad exact --beta_lr 0.1")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run([*torchrun, ROOT / "train.py", *argv], check=True, timeout=100,
                   stdout=subprocess.DEVNULL)
    train.main([*argv, "--grad_accum", "1", "--out", "one.pt"])
    one, two = read("one.pt"), read("out/autolora.pt")
    for key in ("loss", "norm"):
        assert two["history"][key] == pytest.approx(one["history"][key], rel=1e-3)
    assert near(two["history"]["beta"][-1][1], one["history"]["beta"][-1][1], 0.01)
    for key in ("before", "after"):
        assert two[key]["rows.jsonl"] == pytest.approx(one[key]["rows.jsonl"], rel=1e-4)
    one, two = tensors("one.pt"), tensors("out/autolora.pt")
    assert all(near(two[name], one[name], 0.01) for name in one)


# Stopping and going on ----------------------------------------------------------------------------
HARD = "--grad_accum 2 --eval_every 1 --warmup 0.5 --steps 3"
KINDS = {m: flags(m, f"{HARD} --dropout 0.3") for m in ("lora", "multilora", "autolora")}
KINDS["full"] = flags("full", HARD)
KINDS["scratch"] = flags("full", f"{HARD} --scratch --model nano --block_size 32")


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_after_each_of_its_checkpoints_ends_as_if_nothing_was(kind, monkeypatch):
    train.main([*KINDS[kind], "--out", "whole.pt"])
    argv, stages = [*KINDS[kind], "--out", "a.pt"], []
    while len(stages) < 9 and killed_after(1, argv, monkeypatch):
        saved = read("a.pt")
        stages.append((saved["phase"], saved["step"]))
        argv = ["--resume", "a.pt"]
    search = [("search", step) for step in range(4)] if kind == "autolora" else []
    assert stages == [*search, ("train", 0), ("train", 1), ("train", 2)]
    assert same_run("a.pt", "whole.pt")


@pytest.mark.parametrize("owner, name", [
    (GPT, "generate"), (torch.optim.AdamW, "step")])        # in a measurement, in a step
def test_ctrl_c_says_in_a_line_how_to_go_on(owner, name, monkeypatch, capsys):
    def press_ctrl_c(*args, **options):
        os.kill(os.getpid(), signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)    # which nohup and & have off
    with monkeypatch.context() as m, pytest.raises(SystemExit, match="130"):
        m.setattr(owner, name, press_ctrl_c)
        m.setattr(sys, "argv", ["train.py", *KINDS["autolora"]])
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")     # python train.py
    out, err = capsys.readouterr()
    said = out.splitlines()[-1]
    assert said == "stopped; to go on: python train.py --resume out/autolora.pt" and not err
    assert train.main(said.split()[-2:])


def test_kill_9_at_any_moment():
    argv = [*KINDS["autolora"], "--steps", "15", "--search_steps", "15"]
    run = subprocess.Popen([sys.executable, ROOT / "train.py", *argv], stdout=subprocess.DEVNULL)
    killed = Path("out/autolora.pt")
    while not killed.exists() or not killed.stat().st_size:
        assert run.poll() is None
        time.sleep(0.01)
    time.sleep(0.1)
    run.kill()
    run.wait()
    assert read(killed)["after"] is None                        # it was in the midst of it
    train.main(["--resume", "out/autolora.pt"])
    train.main([*argv, "--out", "whole.pt"])
    assert same_run("out/autolora.pt", "whole.pt")


# What goes wrong ----------------------------------------------------------------------------------
@pytest.mark.parametrize("method, more", [
    ("full", "--steps 1"),                                              # in the last step
    ("autolora", "--search_steps 3 --eval_every 1"),                    # seen in an evaluation
    ("autolora", "--search_steps 1 --eta 1e30 --lr 1e-3"),              # only in β's gradient
])
def test_a_run_that_diverges_stops_and_leaves_the_last_good_checkpoint(method, more, capsys):
    with pytest.raises(SystemExit) as e:
        train.main(flags(method, f"--lr 1e30 --warmup 0 {more} --out a.pt"))
    assert "not finite" in e.value.code and "Try a lower --lr" in e.value.code
    assert read("a.pt")["after"] is None
    assert all(t.isfinite().all() for t in tensors("a.pt").values())
    assert "nan" not in capsys.readouterr().out


@pytest.mark.parametrize("argv, message", [
    ("--batch_size 10 --grad_accum 3", "--batch_size 10"),
    ("--block_size 65", "--block_size 65"),
    ("--device meta", "--device meta:"),
    ("--out /proc/a.pt", "/proc/a.pt"),
    ("--method full --scratch --model gpt5", "--scratch --model gpt5"),
    ("--method multilora --alpha=4", "--alpha goes with --method lora"),
    ("--resume a.pt --lr 1", "leave out --batch_size --data --lr"),
    ("--rank 0", "argument --rank: 0 is not between 1 and inf"),
    ("--method autolora --hypergrad exact --compile", "leave out --compile"),
])
def test_errors_say_in_a_line_what_would_be_right(argv, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        train.main([*SMALL, "--steps", "1", *argv.split()])
    out, err = capsys.readouterr()
    assert message in err.splitlines()[-1] and err.count("\n") <= 2 and not out
    assert not os.path.exists("out")
