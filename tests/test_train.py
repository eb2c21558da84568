"""train.py: what a run promises, to the bit where it promises that."""
import json
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import autolora
import data
import lora
import train
from autolora import AutoLoRALinear
from conftest import ROOT, TINY, random_gpt
from model import GPT, read

METHODS = {"lora": ["--rank", "2"], "multilora": ["--rank", "2", "--n_blocks", "2"],
           "autolora": "--max_rank 2 --search_steps 4 --eta 0.1".split(), "full": []}
ROWS = "--data instruct facts --batch_size 8 --eval_rows 4 --device cpu".split()
SMALL = [*ROWS, "--rank", "2"]
HARD = [*SMALL, "--steps", "8", "--dropout", "0.3", "--grad_accum", "2", "--eval_every", "1", "--warmup", "0.5"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def tensors(path):
    held = read(path)
    return held["adapter"]["tensors"] if "adapter" in held else held["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def losses(path):
    return [line["loss"] for line in map(json.loads, open(path)) if "loss" in line]


# one run

@pytest.mark.parametrize("method", METHODS)
def test_a_run(method, capsys):
    flags, searched = ["--method", method, *METHODS[method], *ROWS], 4 if method == "autolora" else 0
    after = train.main([*flags, "--steps", "30", "--eval_every", "10", "--warmup", "0"])
    held, out = read(f"out/{method}.pt"), capsys.readouterr().out
    assert held["step"] == 30 + searched and held["after"] == after and "optimizer" not in held
    for task in ("instruct", "facts"):
        assert after[task]["loss"] < held["before"][task]["loss"] and 0 <= after[task]["exact"] <= 1
        assert f"{after[task]['loss']:9.3f}" in out
    lines = [json.loads(line) for line in open(f"out/{method}.jsonl")]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 31 + searched))
    assert [line["step"] for line in lines if "held_out" in line] == [10, 20, 30][:2 + bool(searched)]
    assert lines[-1]["after"] == after
    assert all(len(line) <= 79 for line in out.splitlines() if not line.startswith(("data ", "  ")))
    base = GPT.from_pretrained("nano")
    assert held["base"] == lora.fingerprint(base)
    if method == "full":  # the checkpoint is a model like any other
        assert all(torch.equal(v, held["model"][k]) for k, v in GPT.from_pretrained("out/full.pt").state_dict().items())
    else:
        own = "ABs" if method == "multilora" else "AB"
        assert set(tensors(f"out/{method}.pt")) == {f"{n}.{m}" for n in lora.adapters(lora.inject(base, rank=1)) for m in own}
        assert os.path.getsize(f"out/{method}.pt") < 0.15 * os.path.getsize(ROOT / "pretrained" / "nano.pt")
    # a second run takes the next name, and never the first one's
    train.main([*flags, "--steps", "1"])
    assert os.path.exists(f"out/{method}-2.pt") and read(f"out/{method}.pt")["step"] == 30 + searched
    assert train.main(["--eval", f"out/{method}.pt"]) == after
    train.main(["--eval", f"out/{method}.pt", "--prompt", "copy abc", "shout a"])
    assert capsys.readouterr().out.count("-> ") >= 2


def test_the_first_loss_is_the_one_of_the_base():
    train.main([*SMALL, "--steps", "1"])
    model, tok = GPT.from_pretrained("nano"), data.tokenizer(257)
    row = data.stream(data.load(["instruct", "facts"], tok, 512, 4), seed=0)
    want = model(*data.collate([row(i) for i in range(8)]))[1].item()
    assert abs(losses("out/lora.jsonl")[0] - want) < 1e-5 * want


def test_pretraining_from_scratch_in_half_precision():
    train.main("--method full --scratch --n_layer 1 --n_embd 16 --n_head 2 --block_size 48 --data add --steps 2 --half "
               "--batch_size 4 --eval_rows 2 --out small.pt --device cpu".split())
    assert {v.dtype for v in read("small.pt")["model"].values()} == {torch.float16}
    model = GPT.from_pretrained("small.pt")
    assert (model.config.n_layer, model.config.n_embd, model.config.block_size) == (1, 16, 48)
    train.main([*SMALL, "--model", "small.pt", "--steps", "1"])


def test_bf16_keeps_adapters_in_float32():
    train.main([*SMALL, "--steps", "3", "--dtype", "bf16"])
    assert {v.dtype for v in tensors("out/lora.pt").values()} == {torch.float32}
    assert lora.load(GPT.from_pretrained("nano"), "out/lora.pt")        # the base is known in float32 too


def test_parts_do_not_change_the_step():
    train.main([*SMALL, "--steps", "3", "--out", "one.pt"])
    train.main([*SMALL, "--steps", "3", "--grad_accum", "4", "--out", "four.pt"])
    for a, b in zip(losses("one.jsonl"), losses("four.jsonl")):
        assert abs(a - b) < 1e-5 * a        # float32; the rows' completions differ in length, so a mean of means would not pass


def test_learning_rate():
    args = train.parse("--steps 100 --lr 1 --warmup 0.1".split())[0]
    lr = [train.learning_rate(i, 100, args) for i in range(100)]
    assert lr[0] == pytest.approx(1 / 11) and max(lr) == lr[10] == 1 and lr[55] == pytest.approx(0.5) and lr[99] == pytest.approx(1 / 90)
    assert min(b - a for a, b in zip(lr, lr[1:11])) > 0 > max(b - a for a, b in zip(lr[10:], lr[11:]))


def test_evaluate_counts_tokens_and_exact_matches(monkeypatch):
    model, tok = random_gpt(TINY, dtype=torch.float32), data.tokenizer(257)
    rows = [data.encode(tok, p, c) for p, c in [("ab", "c"), ("abc", "defgh"), ("b", "xy"), ("q" * 40, "r" * 20)]]
    right = model.generate([rows[1].ids[:4]], 3)[0]
    rows.append(data.Row(rows[1].ids[:4] + right + [tok.eot_token], 4))
    with_stop = model.generate  # let it stop after those three
    monkeypatch.setattr(model, "generate", lambda prompts, n, stop: [
        right if p == rows[4].ids[:4] else r for p, r in zip(prompts, with_stop(prompts, n, stop=stop))])
    args = train.parse(["--batch_size", "3", "--dtype", "fp32"])[0]
    got = train.evaluate(model, [data.Task("t", [], rows)], tok, args, torch.device("cpu"), generate=True)["t"]
    each = [model(*data.collate([r]))[1].item() * (len(r.ids) - r.given) for r in rows]
    assert got["loss"] == pytest.approx(sum(each) / sum(len(r.ids) - r.given for r in rows), rel=1e-5)
    assert got["exact"] == 1 / 5


def by_hand(full, steps, lr, warmup, decay, beta2, clip, smoothing, batch, seed, mix, tasks, **adapter):
    """The same training in plain PyTorch, without any of train.py: tensors before and after; losses, norms and rates."""
    model, tok = GPT.from_pretrained("nano"), data.tokenizer(257)
    row = data.stream(data.load(tasks, tok, 512), seed, mix)
    if not full:
        torch.manual_seed(seed)
        lora.inject(model, "q v", 3, **adapter)
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
    start = {k: p.detach().clone() for k, p in trained.items()}
    optimizer = torch.optim.AdamW([{"params": [p], "weight_decay": decay if p.dim() == 2 else 0} for p in trained.values()],
                                  lr=lr, betas=(0.9, beta2))
    entries = []
    for step in range(steps):
        now = lr * min((step + 1) / (warmup * steps + 1), (steps - step) / (steps - warmup * steps))
        idx, targets = data.collate([row(i) for i in range(step * batch, (step + 1) * batch)])
        logits = model(idx)[0]
        logp = logits.log_softmax(-1)[targets != -100]
        picked = logp.gather(1, targets[targets != -100][:, None]).squeeze(1)
        loss = -((1 - smoothing) * picked + smoothing * logp.mean(-1)).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in trained.values()]).norm()
        for p in trained.values():
            p.grad *= min(1, clip / (norm + 1e-6))
        for g in optimizer.param_groups:
            g["lr"] = now
        optimizer.step()
        entries.append((loss.item(), norm.item(), now))
    return start, trained, entries


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("smoothing, clip, mix", [(0.0, 1.0, "equal"), (0.2, 1e6, "proportional")])
def test_a_run_is_the_loop_written_out(full, smoothing, clip, mix):
    method = "--method full" if full else "--targets q v --rank 3 --alpha 7 --rslora"
    train.main(f"{method} --data add facts --steps 6 --lr 1e-3 --warmup 0.5 --weight_decay 0.3 --beta2 0.9 --clip {clip} --seed 5 "
               f"--label_smoothing {smoothing} --mix {mix} --batch_size 8 --eval_rows 2 --device cpu --out a.pt --grad_accum 2".split())
    start, want, entries = by_hand(full, 6, 1e-3, 0.5, 0.3, 0.9, clip, smoothing, 8, 5, mix, ["add", "facts"],
                            **{} if full else {"alpha": 7.0, "rslora": True})
    got = [json.loads(line) for line in open("a.jsonl")][:6]
    for line, (loss, norm, lr) in zip(got, entries):
        assert line["loss"] == pytest.approx(loss, rel=1e-4) and line["norm"] == pytest.approx(norm, rel=1e-3)
        assert line["lr"] == pytest.approx(lr, rel=1e-9)
    held = tensors("a.pt")
    for k, p in want.items():
        if not k.endswith("attn.k.bias"):   # softmax does not see it: its gradient is nothing but rounding
            moved = (p - start[k]).norm()   # float32, and Adam makes much of gradients near 0
            assert 0 < moved and (held[k] - p).norm() < 0.01 * moved, k


def test_every_setting_reaches_the_layers():
    train.main([*SMALL, "--steps", "1", "--alpha", "5", "--dropout", "0.25", "--rslora", "--targets", "o up"])
    held = read("out/lora.pt")["adapter"]
    assert held["settings"] == {"alpha": 5.0, "dropout": 0.25, "rslora": True}
    assert set(held["ranks"].values()) == {2} and {k.split(".")[-1] for k in held["ranks"]} == {"o", "up"}
    train.main([*SMALL, "--steps", "1", *"--method multilora --n_blocks 2 --scaling vector --dropout 0.25".split()])
    assert read("out/multilora.pt")["adapter"]["settings"] == {"n_blocks": 2, "scaling": "vector", "dropout": 0.25}
    run = train.Run(train.parse([*AUTO, "--gate", "sigmoid", "--alpha", "5"])[0])
    assert run.model.adapter["settings"] == {"alpha": 5.0, "dropout": 0.0, "gate": "sigmoid"}


def test_dropout_acts_in_training_only():
    run = [*SMALL, "--steps", "3", "--alpha", "200"]
    before = [train.main([*run, *extra, "--out", f"{i}.pt"]) and read(f"{i}.pt")["before"] for i, extra in enumerate(([], ["--dropout", "0.5"]))]
    assert before[0] == before[1] and losses("0.jsonl")[0] == losses("1.jsonl")[0] and losses("0.jsonl")[2] != losses("1.jsonl")[2]


def test_epochs_and_learning_rates_by_default():
    train.main("--data facts --epochs 0.5 --batch_size 8 --eval_rows 2 --device cpu --rank 1".split())
    held = read("out/lora.pt")
    assert held["step"] == 4 and held["args"]["lr"] == train.METHODS["lora"][-2]     # 64 facts, half of them, 8 a step


def test_eval_measures_the_base_too(capsys):
    train.main([*SMALL, "--steps", "20"])
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("instruct", "facts", "mean"))]
    train.main(["--eval", "out/lora.pt"])
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith(("instruct", "facts", "mean"))] == table
    assert len(table) == 3 and "0.000" in table[0]


def test_plain_text(tmp_path, capsys):
    (tmp_path / "t.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    after = train.main("--data t.txt --block_size 30 --steps 2 --batch_size 4 --device cpu".split())
    assert set(after) == {"t.txt"} and set(after["t.txt"]) == {"loss"}
    assert train.main(["--eval", "out/lora.pt"]) == after


def test_a_run_on_my_jsonl_called_my_pt_does_not_write_its_log_over_the_data(tmp_path):
    (tmp_path / "my.jsonl").write_text('{"prompt": "p", "completion": "c"}\n' * 20)
    with pytest.raises(SystemExit, match="my.jsonl is there already"):
        train.main("--data my.jsonl --out my.pt --steps 1".split())
    assert len((tmp_path / "my.jsonl").read_text()) == 20 * 35


# stopping and going on

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "a.pt"
    train.main([*HARD, "--out", str(out)])
    return out


def test_stop_and_resume_is_the_same_run_to_the_bit(whole, monkeypatch, capsys):
    step, calls = torch.optim.AdamW.step, []

    def interrupt(self, *a):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)                         # Ctrl-C in the middle of step 3
        return step(self, *a)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupt)
    with pytest.raises(SystemExit, match="130"):                        # so that a script around it stops too
        train.main([*HARD, "--eval_every", "100", "--out", "a.pt"])
    assert "to go on: python train.py --resume a.pt" in capsys.readouterr().out
    assert read("a.pt")["step"] in (3, 4)
    train.main(["--resume", "a.pt"])
    assert same(tensors("a.pt"), tensors(whole))
    assert losses("a.jsonl") == losses(whole.with_suffix(".jsonl"))


def test_a_log_line_cut_in_half_is_done_again(whole):
    held = read(whole)
    step, write = {}, lora.write
    with pytest.MonkeyPatch.context() as m:
        m.setattr(lora, "write", lambda obj, path: write(obj, path) if obj["step"] < 6 else step.update(obj) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.main([*HARD, "--out", "a.pt"])
    with open("a.jsonl", "a") as f:
        f.write('{"step": 6, "lo')
    train.main(["--resume", "a.pt"])
    assert same(tensors("a.pt"), held["adapter"]["tensors"]) and losses("a.jsonl") == losses(whole.with_suffix(".jsonl"))


@pytest.mark.parametrize("after", [0.0, 0.15])
def test_kill_and_resume_is_the_same_run_to_the_bit(whole, after):
    run = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *HARD, "--out", "a.pt"], stdout=subprocess.DEVNULL)
    while not os.path.exists("a.jsonl") or len(losses("a.jsonl")) < 2:
        assert run.poll() is None
        time.sleep(0.002)
    time.sleep(after)
    run.kill()
    run.wait()
    assert read("a.pt")["step"] > 0
    if "after" not in read("a.pt"):
        train.main(["--resume", "a.pt"])
    assert same(tensors("a.pt"), tensors(whole))
    assert losses("a.jsonl") == losses(whole.with_suffix(".jsonl"))


def test_full_fine_tuning_resumes_too(monkeypatch):
    flags = "--method full --data facts --batch_size 4 --eval_rows 2 --steps 4 --eval_every 2 --device cpu".split()
    train.main([*flags, "--out", "whole.pt"])
    write = lora.write
    with monkeypatch.context() as m, pytest.raises(ZeroDivisionError):
        m.setattr(lora, "write", lambda obj, path: write(obj, path) if obj["step"] < 4 else 1 / 0)
        train.main([*flags, "--out", "a.pt"])
    train.main(["--resume", "a.pt"])
    assert same(tensors("a.pt"), tensors("whole.pt"))


def test_two_processes_are_one(tmp_path):
    flags = [*SMALL, "--steps", "4", "--grad_accum", "2"]
    train.main([*flags, "--out", "one.pt"])
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--standalone",
                    str(ROOT / "train.py"), *flags, "--out", "two.pt"], check=True)
    for a, b in zip(map(json.loads, open("one.jsonl")), map(json.loads, open("two.jsonl")), strict=True):
        for key in {"loss", "norm"} & a.keys():
            assert abs(a[key] - b[key]) < 1e-4 * a[key]
    one, two = tensors("one.pt"), tensors("two.pt")
    assert max((one[k] - two[k]).abs().max() for k in one) < 1e-4


# AutoLoRA: a search, then a training at the ranks found

AUTO = "--method autolora --max_rank 4 --search_steps 4 --eta 0.5 --beta_lr 0.5 --steps 3 --warmup 0".split() + ROWS


def search_by_hand(steps, lr, beta_lr, eta, seed, clip, split, mix):
    """The search without train.py and without autolora.hypergradient: β after every step."""
    model, tok = GPT.from_pretrained("nano"), data.tokenizer(257)
    rows = [data.stream(part, seed, mix) for part in data.halves(data.load(["instruct", "facts"], tok, 512), split, seed)]
    torch.manual_seed(seed)
    lora.inject(model, "all", 4, AutoLoRALinear)
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    ω, β = ({n: p for n, p in own.items() if n.endswith(".beta") == isβ} for isβ in (False, True))
    optimizer = torch.optim.AdamW([{"params": ω.values(), "lr": lr}, {"params": β.values(), "lr": beta_lr, "weight_decay": 0}],
                                  weight_decay=0.01)
    history = []
    for step in range(steps):
        batch = [data.collate([row(step * 8 + i) for i in range(8)]) for row in rows]
        loss = lambda params, part: functional_call(model, params, batch[part])[1]
        with sdpa_kernel(SDPBackend.MATH):
            g = torch.autograd.grad(loss(ω | β, 0), ω.values(), create_graph=True)
            ahead = {n: p - eta * d for (n, p), d in zip(ω.items(), g)}
            h = torch.autograd.grad(loss(ahead | β, 1), β.values())         # through ω', not by a formula
        for p, d in zip([*ω.values(), *β.values()], [*g, *h]):
            p.grad = d.detach()
        torch.nn.utils.clip_grad_norm_(ω.values(), clip)
        optimizer.param_groups[0]["lr"] = lr * (steps - step) / steps
        optimizer.step()
        history.append(torch.stack([p.detach().clone() for p in β.values()]))
    return torch.stack(history), {n: p.detach() for n, p in ω.items()}


@pytest.mark.parametrize("hypergrad, split, mix", [("exact", 0.7, "equal"), ("central", 0.4, "proportional")])
def test_the_search_is_the_one_by_hand(hypergrad, split, mix, monkeypatch):
    monkeypatch.setattr(torch.optim, "AdamW", partial(torch.optim.AdamW, eps=1e-2))     # else it makes steps of rounding
    found = {}
    monkeypatch.setattr(autolora, "ranks", lambda model: found.update(
        {n: p.detach().clone() for n, p in model.named_parameters()}) or {n: 1 for n in lora.adapters(model)})
    train.main([*AUTO, "--lr", "1e-2", "--hypergrad", hypergrad, "--clip", "0.5", "--split", str(split), "--mix", mix])
    want, ω = search_by_hand(4, 1e-2, 0.5, 0.5, 0, 0.5, split, mix)
    got = read("out/autolora.pt")["search"]
    assert got["steps"] == [1, 2, 3, 4] and got["beta"].shape == want.shape == (4, 24, 4)
    assert want[-1].norm() > 1 and (got["beta"] - want).norm() < 0.01 * want.norm()
    assert all((found[n] - p).norm() < 0.01 * p.norm() for n, p in ω.items())


def test_the_ranks_found_are_those_of_the_last_beta_and_can_be_used_again(capsys):
    train.main([*AUTO, "--alpha", "5", "--dropout", "0.2"])
    held, out = read("out/autolora.pt"), capsys.readouterr().out
    a = torch.softmax(held["search"]["beta"][-1].double(), -1)
    assert list(held["search"]["ranks"].values()) == (a >= 1 / 4).sum(-1).tolist()
    assert held["adapter"]["ranks"] == held["search"]["ranks"] and held["adapter"]["layer"] == "LoRALinear"
    assert held["adapter"]["settings"] == {"alpha": 5.0, "dropout": 0.2}
    lines = [json.loads(line) for line in open("out/autolora.jsonl")]
    assert [line for line in lines if "ranks" in line] == [{"step": 4, "ranks": held["search"]["ranks"]}]
    n = sum(t.numel() for t in held["adapter"]["tensors"].values())
    assert out.count("ranks, of 4 ") == 2 and f"{n:,} parameters, {100 * n / 36864:.0f} % of the 36,864 at rank 4 everywhere" in out
    train.main([*ROWS, "--ranks", "out/autolora.pt", "--alpha", "5", "--dropout", "0.2", "--steps", "3", "--warmup", "0"])
    assert same(tensors("out/lora.pt"), tensors("out/autolora.pt"))                 # the same training, to the bit
    train.main([*ROWS, "--ranks", "out/lora.pt", "--steps", "1"])                   # of any adapter


def test_the_table_of_ranks():
    found = {"h.0.attn.q": 3, "h.0.mlp.up": 12, "h.1.mlp.up": 7}
    assert train.rank_table(found, 16).splitlines() == [
        "ranks, of 16         q    up", "h.0                  3    12", "h.1                  -     7"]


def test_without_eta_every_hypergradient_is_first_order():
    for how in ("forward", "first-order", "exact"):
        train.main([*AUTO, "--eta", "0", "--hypergrad", how, "--out", f"{how}.pt"])
        assert torch.equal(read(f"{how}.pt")["search"]["beta"], read("forward.pt")["search"]["beta"])
        assert same(tensors(f"{how}.pt"), tensors("forward.pt"))
    train.main([*AUTO, "--hypergrad", "first-order", "--out", "ahead.pt"])
    assert not torch.equal(read("ahead.pt")["search"]["beta"], read("forward.pt")["search"]["beta"])


def test_the_passes_of_a_step_have_one_dropout_mask_and_steps_have_their_own():
    run = train.Run(train.parse([*AUTO, "--dropout", "0.3", "--grad_accum", "2"])[0])
    for m in lora.adapters(run.model.train()).values():
        m.B.data.normal_()
    same_rows = lambda i: run.tasks[0].train[i % 8]
    first, again, later = ([loss.item() for loss in run.losses(same_rows, step)] for step in (0, 0, 1))
    assert first == again and first != later


def test_the_end_of_the_search_is_saved_with_its_last_beta(monkeypatch):
    write = lora.write
    with monkeypatch.context() as m, pytest.raises(ZeroDivisionError):
        m.setattr(lora, "write", lambda obj, path: write(obj, path) if obj["step"] <= 205 else 1 / 0)
        train.main([*AUTO, "--search_steps", "205", "--batch_size", "2", "--targets", "q", "--beta_lr", "0", "--out", "a.pt"])
    held = read("a.pt")
    assert held["step"] == 205 and held["search"]["steps"][-2:] == [204, 205] and held["adapter"]["layer"] == "LoRALinear"
    train.main(["--resume", "a.pt"])


def test_neither_s_nor_beta_has_weight_decay():
    for flags in (["--method", "multilora", "--scaling", "vector"], AUTO):
        run = train.Run(train.parse([*ROWS, *flags])[0])
        decayed = {id(p) for g in run.optimizer.param_groups if g["weight_decay"] for p in g["params"]}
        for name, p in run.model.named_parameters():
            assert (id(p) in decayed) == name.endswith((".A", ".B"))


def test_a_model_with_fewer_layers_than_ranks_or_more(capsys):
    torch.save({"adapter": {"ranks": {"h.0.attn.q": 2, "h.1.mlp.up": 3}}}, "some.pt")
    train.main([*ROWS, "--ranks", "some.pt", "--steps", "1"])
    assert "in 2 layers" in capsys.readouterr().out


def test_parts_do_not_change_the_search():
    for n in "14":
        train.main([*AUTO, "--grad_accum", n, "--out", f"{n}.pt"])
    a, b = (read(f"{n}.pt")["search"]["beta"] for n in "14")
    assert (a - b).norm() < 0.02 * a.norm()     # float32: the finite difference makes more of its rounding


@pytest.mark.parametrize("stop", [0, 2, 3, 4, 5])
@pytest.mark.parametrize("method", ["multilora", "autolora"])
def test_every_phase_resumes_to_the_bit(method, stop, monkeypatch):
    flags = [*AUTO, "--split", "0.5"] if method == "autolora" else ["--method", method, *METHODS[method], *ROWS, "--steps", "7"]
    flags += "--dropout 0.3 --grad_accum 2 --eval_every 1 --targets q v --warmup 0.3".split()
    train.main([*flags, "--out", "whole.pt"])
    write = lora.write
    with monkeypatch.context() as m, pytest.raises(ZeroDivisionError):
        m.setattr(lora, "write", lambda obj, path: write(obj, path) if obj["step"] <= stop else 1 / 0)
        train.main([*flags, "--out", "a.pt"])
    assert read("a.pt")["step"] == stop
    if method == "autolora" and stop < 4:
        with pytest.raises(SystemExit, match="--ranks a.pt: its search has not ended; --resume it"):
            train.main([*ROWS, "--ranks", "a.pt"])
        train.main(["--eval", "a.pt"])
    train.main(["--resume", "a.pt"])
    assert same(tensors("a.pt"), tensors("whole.pt")) and losses("a.jsonl") == losses("whole.jsonl")
    if method == "autolora":
        a, b = (read(path)["search"] for path in ("a.pt", "whole.pt"))
        assert torch.equal(a["beta"], b["beta"]) and a["steps"] == b["steps"] and a["ranks"] == b["ranks"]


def test_a_search_in_two_processes_is_the_one_in_one():
    flags = [*AUTO, "--grad_accum", "2", "--hypergrad", "exact"]
    train.main([*flags, "--out", "one.pt"])
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--standalone",
                    str(ROOT / "train.py"), *flags, "--out", "two.pt"], check=True)
    one, two = (read(path)["search"]["beta"] for path in ("one.pt", "two.pt"))
    assert (one[0] - two[0]).norm() < 0.1 * one[0].norm()       # Adam makes steps of rounding, but of few elements
    for a, b in zip(map(json.loads, open("one.jsonl")), map(json.loads, open("two.jsonl")), strict=True):
        for key in {"loss", "norm"} & a.keys():
            assert abs(a[key] - b[key]) < 0.01 * a[key]


# errors

def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint():
    with pytest.raises(SystemExit, match=r"step \d+: the loss is .* not finite, so the run stops.\nTry a lower --lr than 1e\+30"):
        train.main([*SMALL, "--lr", "1e30", "--steps", "5", "--eval_every", "1", "--warmup", "0"])
    assert all(t.isfinite().all() for t in tensors("out/lora.pt").values())
    with pytest.raises(SystemExit, match="step 1: .*; for β: .*: not finite, so the run stops.\nTry a lower --lr than 0.01 or --eta"):
        train.main([*AUTO, "--eta", "1e30"])


@pytest.mark.parametrize("flags, message", [
    ("--targets qkv", "--targets qkv: no such layer; choose from q k v o up down, or all"),
    ("--rank 200", "h.0.attn.q: rank 200 for a (128, 128) matrix: choose a whole number from 1 to 128"),
    ("--data nothing", "--data nothing: no such .jsonl or .txt file, folder or built-in task"),
    ("--model gpt5", "gpt5: no such file, and no preset either"),
    ("--batch_size 10 --grad_accum 3", "--batch_size 10 is not a multiple of 3 parts"),
    ("--block_size 1000", "--block_size 1000: the model has positions for 512"),
    ("--resume none.pt", "none.pt: no such file"),
    ("--device tpu7", "--device tpu7:"),
    ("--n_head 8", "nano has 4 heads, not 8"),
    ("--out /proc/a.pt", "No such file or directory: '/proc/a.pt.part'"),
    (f"--model {ROOT / 'requirements.txt'}", "requirements.txt: not a complete file of tensors"),
    ("--method multilora --n_blocks 3", "rank 16 in 3 blocks of equal rank: choose --n_blocks from 1 2 4 8 16, or another rank"),
    ("--method autolora --max_rank 200", "h.0.attn.q: rank 200 for a (128, 128) matrix"),
    ("--method autolora --hypergrad exact --compile", "differentiates twice, which a compiled model cannot"),
    ("--resume=", ": no such file"),
    ("--ranks=", ": no such file"),
    ("--method autolora --split 0.001", "--split 0.001: of the 64 rows of facts, both parts need one at least"),
    ("--ranks none.pt", "none.pt: no such file"),
    (f"--ranks {ROOT / 'pretrained/nano.pt'}", "nano.pt: no adapter in it"),
    ("--method full --scratch --model gpt5", "--scratch --model gpt5: no such preset; choose from nano"),
    # these come from argparse
    ("--method full --rank 3", "--rank goes with --method lora or multilora, not with full"),
    ("--n_blocks 4", "--n_blocks goes with --method multilora, not with lora"),
    ("--method multilora --alpha 4", "--alpha goes with --method lora or autolora, not with multilora"),
    ("--method autolora --rank=4", "--rank goes with --method lora or multilora, not with autolora"),
    ("--method lora --search_steps 4", "--search_steps goes with --method autolora, not with lora"),
    ("--ranks a.pt --rank 4", "--ranks says which layers have which rank: leave out --rank and --targets"),
    ("--resume a.pt --lr 1", "--resume takes its settings from the checkpoint: leave out --lr"),
    ("--eval a.pt --rank 1", "--eval takes its settings from the checkpoint: leave out --rank"),
    ("--prompt hello", "--prompt goes with --eval"),
    ("--scratch", "--scratch goes with --method full, not with lora"),
    ("--half --method autolora", "--half goes with --method full, not with autolora"),
    ("--n_layer 2", "--n_layer and --n_embd go with --scratch"),
    ("--rank 0", "--rank: 0 is not between 1 and inf"),
    ("--steps 5 --epochs 1", "not allowed with argument"),
    ("--ran 5", "unrecognized arguments: --ran"),
])
def test_errors_say_what_would_be_right(flags, message, capsys):
    with pytest.raises(SystemExit) as e:
        train.main(flags.split())
    assert message in f"{e.value} {capsys.readouterr().err}" and e.value.code != 0
    assert not os.path.exists("out")


def test_no_run_is_overwritten_or_resumed_by_mistake():
    train.main([*SMALL, "--steps", "1", "--out", "a.pt"])
    with pytest.raises(SystemExit, match="a.pt is there already"):
        train.main([*SMALL, "--steps", "1", "--out", "a.pt"])
    with pytest.raises(SystemExit, match="this run has ended after its 1 steps"):
        train.main(["--resume", "a.pt"])
    with pytest.raises(SystemExit, match="nano.pt: not a checkpoint of train.py|this run has ended"):
        train.main(["--resume", str(ROOT / "pretrained" / "nano.pt")])


def test_data_that_changed_since(tmp_path):
    rows = [json.dumps({"prompt": str(i), "completion": "c"}) + "\n" for i in range(20)]
    (tmp_path / "d.jsonl").write_text("".join(rows))
    flags = "--data d.jsonl --steps 2 --batch_size 2 --device cpu --out a.pt".split()
    train.main(flags)
    held = read("a.pt")
    held["optimizer"] = held.pop("after")
    torch.save(held, "a.pt")
    (tmp_path / "d.jsonl").write_text("".join(rows[:15]))
    with pytest.raises(SystemExit, match="a.pt: the data has changed since"):
        train.main(["--resume", "a.pt"])
