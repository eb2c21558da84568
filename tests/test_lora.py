"""lora.py against closed forms in float64, and its promises one by one."""
import math
import subprocess
import sys

import pytest
import torch
import torch.nn as nn

import lora
from autolora import AutoLoRALinear, prune
from conftest import ROOT, TINY, random_gpt
from lora import LoRALinear
from model import GPT, PRESETS
from multilora import MultiLoRALinear

SHAPES = [(6, 10, 3), (10, 6, 3), (8, 8, 8), (7, 5, 1), (5, 7, 5)]      # d_in, d_out, r: also r = 1, r = min(d)


def random_layer(d_in, d_out, r, alpha=5.0, **settings):
    """A float64 layer whose B is not zero."""
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(d_in, d_out).double(), r, alpha, **settings)
    layer.B.data = torch.randn(d_out, r, dtype=torch.float64)
    return layer


def randomise(model, seed=1):
    """Adapters that have learned something."""
    torch.manual_seed(seed)
    for m in lora.adapters(model).values():
        for p in m.parameters(recurse=False):
            p.data = torch.randn_like(p) * 0.2
    return model


def close(a, b, tol=1e-12):
    assert (a - b).abs().max() <= tol * max(1, b.abs().max()), (a - b).abs().max()


# the layer

@pytest.mark.parametrize("d_in, d_out, r", SHAPES)
@pytest.mark.parametrize("rslora", [False, True])
def test_forward_and_gradients_are_the_closed_forms(d_in, d_out, r, rslora):
    layer = random_layer(d_in, d_out, r, rslora=rslora)
    W, b, A, B = layer.base.weight, layer.base.bias, layer.A, layer.B
    s = 5.0 / math.sqrt(r) if rslora else 5.0 / r
    x = torch.randn(4, d_in, dtype=torch.float64, requires_grad=True)
    g = torch.randn(4, d_out, dtype=torch.float64)                      # ∂L/∂h
    h = layer(x)
    h.backward(g)
    close(h, x @ W.T + b + s * x @ A.T @ B.T)
    close(B.grad, s * g.T @ (x @ A.T))
    close(A.grad, s * B.T @ g.T @ x)
    close(x.grad, g @ W + s * g @ B @ A)
    close(layer.delta_weight(), s * B @ A)
    assert W.grad is None and b.grad is None


def test_dropout_is_drawn_for_every_element_of_the_adapter_path_only():
    layer = random_layer(6, 5, 3, dropout=0.5)
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    torch.manual_seed(3)
    h = layer(x)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.5)
    close(h, layer.base(x) + dropped @ layer.delta_weight().T)
    masks = (dropped != 0).flatten(0, 1)
    assert len({tuple(m.tolist()) for m in masks}) > 6                  # no mask shared by rows or tokens
    layer.eval()
    close(layer(x), x @ (layer.base.weight + layer.delta_weight()).T + layer.base.bias)


def test_a_starts_kaiming_uniform():
    A = LoRALinear(nn.Linear(400, 300), 50).A
    assert A.abs().max() <= 1 / 20 and abs(A.std() * 20 * math.sqrt(3) - 1) < 0.02      # U(±1/√d_in), a = √5


@pytest.mark.parametrize("rank", [0, 7, 2.5, 4.0])
def test_rank_that_does_not_fit(rank):
    with pytest.raises(ValueError, match=rf"rank {rank} for a \(6, 9\) matrix: choose a whole number from 1 to 6"):
        LoRALinear(nn.Linear(9, 6), rank)


@pytest.mark.parametrize("layer", [LoRALinear, MultiLoRALinear, AutoLoRALinear])
def test_every_method_passes_dropout_on(layer):
    m = layer(nn.Linear(20, 20), 4, dropout=0.5)
    for p in m.parameters(recurse=False):
        p.data.normal_()
    x = torch.randn(3, 20)
    assert m.dropout.p == 0.5 and not torch.equal(m(x), m(x)) and torch.equal(m.eval()(x), m(x))


# the layers of a model

def test_at_the_start_the_model_is_the_base_to_the_bit(gpt):
    idx = torch.randint(257, (2, 9))
    before = gpt(idx)[0]
    assert torch.equal(lora.inject(gpt, rank=4)(idx)[0], before)


def test_at_the_first_step_only_b_has_a_gradient(gpt):
    lora.inject(gpt, rank=4)
    idx = torch.randint(257, (2, 9))
    gpt(idx, idx)[1].backward()
    for m in lora.adapters(gpt).values():
        assert not m.A.grad.any() and m.B.grad.abs().min() > 0


@pytest.mark.parametrize("targets, names", [("q v", ["attn.q", "attn.v"]), (["down"], ["mlp.down"]),
                                            ("all", ["attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down"])])
def test_training_moves_the_adapter_and_nothing_else(gpt, targets, names):
    lora.inject(gpt, targets, rank=4)
    assert set(lora.adapters(gpt)) == {f"h.{i}.{n}" for i in range(2) for n in names}
    before = {k: v.clone() for k, v in gpt.state_dict().items()}
    trained = [p for p in gpt.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.1)
    idx = torch.randint(257, (2, 9))
    for _ in range(2):
        gpt(idx, idx)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    for k, v in gpt.state_dict().items():
        assert torch.equal(v, before[k]) != k.endswith((".A", ".B")), k


def test_a_rank_for_each_layer(gpt):
    lora.inject(gpt, rank={"h.1.attn.q": 5, "h.0.mlp.up": 2})
    assert {k: tuple(m.A.shape) for k, m in lora.adapters(gpt).items()} == {"h.1.attn.q": (5, 16), "h.0.mlp.up": (2, 16)}


def test_gpt2_medium_with_rank_4_on_q_and_v_trains_393216_parameters():
    with torch.device("meta"):
        model = GPT(PRESETS["gpt2-medium"])
    new = lora.build(model, {f"h.{i}.attn.{t}": 4 for i in range(24) for t in "qv"}, LoRALinear, {})
    assert sum(p.numel() for m in new.values() for p in m.parameters(recurse=False)) == 393_216


@pytest.mark.parametrize("change, message", [
    (dict(targets="qkv"), "--targets qkv: no such layer; choose from q k v o up down, or all"),
    (dict(targets=""), "no layer to adapt"),
    (dict(rank=17), r"h.0.attn.q: rank 17 for a \(16, 16\) matrix"),
    (dict(rank={"h.9.attn.q": 2}), "rank for h.9.attn.q: no such layer; there are h.0.attn.q"),
])
def test_inject_errors_leave_the_model_alone(gpt, change, message):
    with pytest.raises(ValueError, match=message):
        lora.inject(gpt, **change)
    assert not lora.adapters(gpt) and all(p.requires_grad for p in gpt.parameters())
    with pytest.raises(ValueError, match="adapters already"):
        lora.inject(lora.inject(gpt), rank=2)


# merging

@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merge_and_unmerge(dtype):
    model = randomise(lora.inject(random_gpt(dtype=dtype), rank=4))
    first = model.h[0].attn.q
    assert first.A.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    idx = torch.randint(257, (2, 9))
    apart, W = model(idx)[0], {k: v.clone() for k, v in model.state_dict().items()}
    want = (first.base.weight.to(first.A.dtype) + first.delta_weight()).to(dtype)
    lora.merge(model)
    lora.merge(model)                                                   # once is enough, twice does no harm
    assert torch.equal(first.base.weight, want)
    eps = torch.finfo(dtype).eps
    close(model(idx)[0].double(), apart.double(), tol=100 * eps)        # some 10 roundings a layer
    assert not torch.equal(model(idx)[0], lora_off(model, idx))
    lora.unmerge(model)
    lora.unmerge(model)
    assert all(torch.equal(v, W[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(idx)[0], apart)


def test_a_merged_model_can_be_moved(gpt):
    randomise(lora.inject(gpt.float(), rank=4))
    W = gpt.h[0].attn.q.base.weight.clone()
    lora.merge(gpt)
    assert not any("kept" in k for k in gpt.state_dict())
    gpt.double()
    lora.unmerge(gpt)
    assert torch.equal(gpt.h[0].attn.q.base.weight, W.double())
    lora.remove(gpt)
    with pytest.raises(ValueError, match="no adapters to save"):
        lora.save(gpt, "nowhere.pt")


def test_generation_is_without_dropout(gpt):
    randomise(lora.inject(gpt, rank=4, dropout=0.5))
    gpt.train()
    with_dropout = gpt.generate([[1, 2, 3]] * 4, 8)
    assert with_dropout == gpt.eval().generate([[1, 2, 3]] * 4, 8)


def test_new_layers_are_in_the_mode_of_their_model(gpt):
    gpt.eval()
    idx = torch.randint(257, (2, 9))
    randomise(lora.inject(gpt, "all", 4, AutoLoRALinear, dropout=0.5))
    saved = lora.state(gpt)
    for change in (lambda: None, lambda: lora.load(gpt, saved), lambda: prune(gpt)):
        change()
        assert torch.equal(gpt(idx)[0], gpt(idx)[0])
    assert not torch.equal(gpt.train()(idx)[0], gpt(idx)[0])
    assert {(m.dropout.p, m.alpha) for m in lora.adapters(gpt).values()} == {(0.5, 16.0)}


def lora_off(model, idx):
    with lora.disabled(model):
        return model(idx)[0]


@pytest.mark.parametrize("merged", [False, True])
def test_disabled_is_the_base(gpt, merged):
    idx = torch.randint(257, (2, 9))
    base = gpt(idx)[0]
    randomise(lora.inject(gpt, rank=4))
    if merged:
        lora.merge(gpt)
    on = gpt(idx)[0]
    with pytest.raises(KeyError), lora.disabled(gpt):
        assert torch.equal(gpt(idx)[0], base)
        raise KeyError                                                  # comes back on after an exception too
    assert torch.equal(gpt(idx)[0], on) and not torch.equal(on, base)


# files

def test_a_checkpoint_is_the_adapter_alone_and_the_same_while_merged(gpt, tmp_path):
    randomise(lora.inject(gpt, "q v", rank=4))
    lora.save(gpt, tmp_path / "a.pt")
    lora.merge(gpt)
    lora.save(gpt, tmp_path / "b.pt")
    a, b = (torch.load(tmp_path / f, weights_only=True)["adapter"] for f in ("a.pt", "b.pt"))
    assert a["tensors"].keys() == {f"h.{i}.attn.{t}.{m}" for i in range(2) for t in "qv" for m in "AB"}
    assert all(torch.equal(a["tensors"][k], b["tensors"][k]) for k in a["tensors"])
    assert {k: v for k, v in a.items() if k != "tensors"} == {k: v for k, v in b.items() if k != "tensors"}


def test_save_in_one_process_load_in_another(gpt, tmp_path):
    randomise(lora.inject(gpt, rank={"h.0.attn.q": 3, "h.1.mlp.down": 16}, alpha=3.0, rslora=True))
    lora.save(gpt, tmp_path / "a.pt")
    idx = torch.randint(257, (2, 9))
    torch.save((idx, gpt(idx)[0]), tmp_path / "want.pt")
    subprocess.run([sys.executable, "-c", f"""
import sys, torch; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]
import lora; from conftest import random_gpt
idx, want = torch.load({str(tmp_path / 'want.pt')!r})
assert torch.equal(lora.load(random_gpt(), {str(tmp_path / 'a.pt')!r})(idx)[0], want)
"""], check=True)


def test_switching_tasks_in_place(gpt, tmp_path):
    idx, want = torch.randint(257, (2, 9)), {}
    base = gpt(idx)[0]
    for name, targets, rank in (("a", "q v", 4), ("b", "all", 2)):
        randomise(lora.inject(gpt, targets, rank), seed=rank)
        want[name] = gpt(idx)[0]
        lora.save(gpt, tmp_path / name)
        lora.remove(gpt)
    assert torch.equal(gpt(idx)[0], base)
    for name in "abab":
        assert torch.equal(lora.load(gpt, tmp_path / name)(idx)[0], want[name])
        lora.merge(gpt)                                                 # switching while merged is no trap
    lora.remove(gpt)
    assert torch.equal(gpt(idx)[0], base)


@pytest.mark.parametrize("spoil, message", [
    (lambda s: s["tensors"].pop("h.0.attn.q.A"), "not whole: missing h.0.attn.q.A"),
    (lambda s: s["tensors"].update({"h.0.attn.z.A": torch.zeros(1)}), "unexpected h.0.attn.z.A"),
    (lambda s: s["ranks"].update({"h.0.attn.q": 2}), r"h.0.attn.q.A is \(4, 16\), not \(2, 16\)"),
    (lambda s: s.update(base="0" * 16), "trained on another base: one with fingerprint 0000000000000000"),
    (lambda s: s.update(layer="DoRALinear"), "made of DoRALinear: import the file that defines it"),
])
def test_load_is_all_or_nothing(gpt, spoil, message):
    saved = lora.state(randomise(lora.inject(gpt, "q v", rank=4)))
    lora.remove(gpt)
    gpt.requires_grad_(True)
    saved["ranks"] = dict(saved["ranks"])
    spoil(saved)
    before = {k: v.clone() for k, v in gpt.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        lora.load(gpt, saved)
    assert all(torch.equal(v, before[k]) for k, v in gpt.state_dict().items())
    assert all(p.requires_grad for p in gpt.parameters()) and not lora.adapters(gpt)


def test_load_of_other_files(gpt, tmp_path):
    torch.save({"model": {}}, tmp_path / "model.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "model.pt").read_bytes()[:300])
    for name in ("model.pt", "cut.pt"):
        with pytest.raises(ValueError, match=f"{name}: not a complete file, or one without an adapter"):
            lora.load(gpt, tmp_path / name)


def test_fingerprint():
    model = random_gpt(dtype=torch.float32)
    mark = lora.fingerprint(model)
    assert lora.fingerprint(random_gpt(dtype=torch.bfloat16)) == mark
    randomise(lora.inject(model, rank=4))
    assert lora.fingerprint(model) == mark
    lora.merge(model)
    assert lora.fingerprint(model) == mark
    lora.remove(model)
    for change in (lambda m: m.h[1].ln_2.bias.data[3].add_(1), lambda m: m.wte.weight.data[5].neg_(),
                   lambda m: m.set_submodule("h.0.attn.q2", m.h[0].attn.q) or delattr(m.h[0].attn, "q")):
        other = random_gpt(dtype=torch.float32)
        change(other)
        assert lora.fingerprint(other) != mark


def test_a_model_with_layers_called_base(tmp_path):
    model = nn.ModuleDict({"base": nn.ModuleDict({"fc": nn.Linear(4, 4), "base": nn.Linear(4, 4)})})
    mark = lora.fingerprint(model)
    randomise(lora.inject(model, rank=2))
    assert set(lora.adapters(model)) == {"base.fc", "base.base"} and lora.fingerprint(model) == mark
    lora.save(model, tmp_path / "a.pt")
    lora.load(model, tmp_path / "a.pt")


def test_layers_whose_forward_nobody_calls_are_left_alone():
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x = torch.randn(2, 3, 8)
    before = model(x)
    lora.inject(model, rank=2)
    assert set(lora.adapters(model)) == {"linear1", "linear2"}
    close(model(x), before, tol=1e-6)       # torch has a fused path for the layer without adapters


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    lora.write({"a": 1}, tmp_path / "f")
    real = torch.save

    def full_disk(obj, path):
        real(obj, path)
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError):
        lora.write({"a": 2}, tmp_path / "f")
    assert torch.load(tmp_path / "f", weights_only=True) == {"a": 1}
