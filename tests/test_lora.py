"""lora.py against closed forms in float64, and its promises one by one."""
import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn as nn

import lora
from autolora import AutoLoRALinear
from conftest import IDX, ROOT, close, logits, random_gpt, randomise, same, snapshot
from lora import LoRALinear
from multilora import MultiLoRALinear

METHODS = [(LoRALinear, {"alpha": 3.0}), (AutoLoRALinear, {"alpha": 3.0}),
           (MultiLoRALinear, {"n_blocks": 2, "scaling": "vector"})]
each_method = pytest.mark.parametrize("layer, settings", METHODS)


# the layer

@pytest.mark.parametrize("d_in, d_out, r", [(6, 10, 3), (10, 6, 3), (8, 8, 8), (7, 5, 1)])
def test_forward_and_gradients_are_the_closed_forms(d_in, d_out, r):
    """Where α/r is forgotten (rasbt/LLMs-from-scratch #821) all of these are wrong."""
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(d_in, d_out).double(), r, alpha=5.0)
    layer.B.data.normal_()
    W, b, A, B, s = layer.base.weight, layer.base.bias, layer.A, layer.B, 5.0 / r
    x = torch.randn(4, d_in, dtype=torch.float64, requires_grad=True)
    g = torch.randn(4, d_out, dtype=torch.float64)                              # ∂L/∂h
    h = layer(x)
    h.backward(g)
    close(h, x @ W.T + b + s * x @ A.T @ B.T)
    close(B.grad, s * g.T @ (x @ A.T))
    close(A.grad, s * B.T @ g.T @ x)
    close(x.grad, g @ W + s * g @ B @ A)
    close(layer.delta_weight(), s * B @ A)


def test_dropout_is_drawn_for_every_element_and_for_the_adapter_alone():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(6, 6).double(), 6, alpha=6.0, dropout=0.5)
    layer.A.data, x = torch.ones(6, 6).triu().double(), torch.ones(64, 8, 6).double()
    layer.B.data = layer.A.data.inverse()                                       # ΔW x = x
    dropped = (layer(x) - layer.base(x)).detach()
    close(dropped, 2.0 * (dropped > 1))                                         # 0 or 2
    for dim in range(3):                        # no mask shared by rows, by tokens or by features
        alike = dropped.round() == dropped.round().roll(1, dim)
        assert 0.45 < alike.double().mean() < 0.55


@each_method
@pytest.mark.parametrize("rank", [0, 7, -1, 2.5])
def test_rank_that_does_not_fit(layer, settings, rank):
    with pytest.raises(ValueError, match=rf"rank {rank} .*\(6, 9\).* 1 to 6"):
        layer(nn.Linear(9, 6), rank, **settings)


# the layers of a model

@each_method
def test_the_start_is_the_base_to_the_bit_and_the_first_step_moves_one_tensor(layer, settings, gpt):
    before = logits(gpt)
    assert torch.equal(logits(lora.inject(gpt, "all", 4, layer, **settings)), before)
    gpt(IDX, IDX)[1].backward()
    for m in lora.adapters(gpt).values():
        moved = [name for name, p in m.named_parameters(recurse=False) if p.grad.any()]
        assert moved == (["s"] if layer is MultiLoRALinear else ["B"])


def test_training_moves_the_adapter_and_nothing_else(gpt):
    names = "attn.q attn.k attn.v attn.o mlp.up mlp.down".split()
    lora.inject(gpt, "all", rank=4)
    assert set(lora.adapters(gpt)) == {f"h.{i}.{name}" for i in range(2) for name in names}
    before = copy.deepcopy(gpt.state_dict())
    optimizer = torch.optim.AdamW(p for p in gpt.parameters() if p.requires_grad)
    for _ in range(2):                                          # A has no gradient in the first
        gpt(IDX, IDX)[1].backward()
        optimizer.step()
    for k, v in gpt.state_dict().items():
        assert torch.equal(v, before[k]) != k.endswith((".A", ".B")), k


def shared():
    """A head that is the embedding: ΔW would be in both (peft #2018). And a layer of two names."""
    embed, head, linear = nn.Embedding(9, 8), nn.Linear(8, 9), nn.Linear(8, 8)
    head.weight = embed.weight
    return nn.ModuleDict(dict(embed=embed, head=head, one=linear, two=linear, base=nn.Linear(8, 8)))


def fused():
    """PyTorch's own layer, which in eval mode reads the weights of its nn.Linear past them."""
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.ModuleDict({"block": nn.TransformerEncoder(block, 2), "base": nn.Linear(8, 8)})


@pytest.mark.parametrize("module, wrong, message", [
    (random_gpt, dict(targets="qkv"), "--targets qkv: .*choose from q k v o up down, or all"),
    (random_gpt, dict(targets="q wte"), "wte: "),
    (random_gpt, dict(targets=""), "choose from q k v o up down"),
    (random_gpt, dict(rank={"h.9.attn.q": 2}), "h.9.attn.q"),
    (random_gpt, dict(rank={"q": 2}), "q: "),                   # here whole names are wanted
    (random_gpt, dict(rank={"h.0.attn.q": 4, "h.1.mlp.up": 17}), r"rank 17 .*\(64, 16\)"),
    (random_gpt, dict(rank={"h.0.attn.q": 4, "h.1.mlp.up": 5}, layer=MultiLoRALinear), "1 5"),
    (random_gpt, dict(layer=AutoLoRALinear, gate="tanh"), "tanh: choose from softmax sigmoid none"),
    (lambda: lora.inject(random_gpt(), rank=3), dict(rank=2), "adapters already"),
    (shared, dict(targets="all"), "head: "), (shared, dict(targets="base head"), "head: "),
    (shared, dict(targets="one"), "one: "), (shared, dict(targets="two"), "two: "),
    (fused, dict(targets="all"), "linear1: "), (fused, dict(targets="linear2"), "linear2: "),
    (lambda: nn.Linear(4, 4), {}, None),                        # a layer needs a name
    (lambda: nn.Sequential(nn.Embedding(4, 4)), {}, None),
])
def test_what_cannot_work_is_refused_and_left_as_it_was(module, wrong, message):
    model = module()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        lora.inject(model, **{"rank": 4, **wrong})
    assert same(snapshot(model), before)
    if "base" in dict(model.named_children()):                  # a name that we use too is no trap
        assert set(lora.adapters(lora.inject(model, "base"))) == {"base"}
        lora.remove(randomise(model))
        assert same(snapshot(model.requires_grad_(True)), before)


# merging

@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merge_and_unmerge(dtype):
    """Over a bfloat16 base the sum is taken in float32; in bfloat16 ΔW is lost (peft #2502)."""
    model = randomise(lora.inject(random_gpt(dtype=dtype), rank=4))
    m = model.h[0].attn.q
    assert m.A.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    apart, before = logits(model), copy.deepcopy(model.state_dict())
    want = (m.base.weight.to(m.A.dtype) + m.delta_weight()).to(dtype)
    lora.merge(model)
    lora.merge(model)                                           # once is enough, twice no harm
    assert torch.equal(m.base.weight, want)
    close(logits(model).double(), apart.double(), tol=100 * torch.finfo(dtype).eps)
    lora.unmerge(model)
    lora.unmerge(model)
    assert same(model.state_dict(), before) and torch.equal(logits(model), apart)


def test_a_merged_layer_is_its_base_alone_whatever_the_mode_and_can_be_moved(gpt):
    """In loralib eval() was to merge, and never did (microsoft/LoRA #34)."""
    W = gpt.float().h[0].attn.q.weight.clone()
    randomise(lora.inject(gpt, rank=4, dropout=0.5))
    lora.merge(gpt)
    merged = logits(gpt)
    for m in lora.adapters(gpt).values():
        m.A.data.zero_()                                        # nobody looks at it now
    assert torch.equal(logits(gpt.eval()), merged) and torch.equal(logits(gpt.train()), merged)
    lora.unmerge(gpt.double())
    assert same(gpt.h[0].attn.q.base.weight.data, W.double())


def test_disabled_is_the_base(gpt):
    base = logits(gpt)
    randomise(lora.inject(gpt, rank=4))
    for prepare in (lora.unmerge, lora.merge):
        prepare(gpt)
        before = snapshot(gpt)
        with pytest.raises(KeyError), lora.disabled(gpt):
            assert torch.equal(logits(gpt), base)
            raise KeyError                                      # back after an exception, too
        assert same(snapshot(gpt), before) and not torch.equal(logits(gpt), base)


def test_adapters_are_in_the_mode_that_the_model_is_in(gpt):
    lora.inject(gpt.eval(), rank=4)
    assert not any(m.training for m in gpt.modules())
    with lora.disabled(gpt):
        gpt.train()
    assert all(m.training for m in gpt.modules())


# adapters as tensors

@each_method
def test_a_state_is_the_adapter_alone_and_the_same_while_merged(gpt, layer, settings):
    randomise(lora.inject(gpt, "q v", 4, layer, **settings))
    state = lora.state_dict(gpt)
    assert state["tensors"].keys() == {f"h.{i}.attn.{t}" for i in range(2) for t in "qv"}
    for name, m in lora.adapters(gpt).items():
        tensors = state["tensors"][name]
        assert same(tensors, dict(m.named_parameters(recurse=False)))
        close((state["scale"][name] * tensors["B"]) @ tensors["A"], m.delta_weight())
    lora.merge(gpt)
    assert same(lora.state_dict(gpt), state)
    m.A.data.zero_()
    assert state["tensors"][name]["A"].any()                    # what is saved does not train on
    lora.remove(gpt)
    with pytest.raises(ValueError, match="no adapters"):
        lora.state_dict(gpt)


def test_save_in_one_process_load_in_another(tmp_path):
    for i, (layer, settings) in enumerate(METHODS):
        ranks = {"h.0.attn.q": np.int64(4), "h.1.mlp.down": 16}
        model = randomise(lora.inject(random_gpt(), "", ranks, layer, **settings))
        torch.save((lora.state_dict(model), logits(model)), tmp_path / f"{i}.pt")
    subprocess.run([sys.executable, "-c", f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]
import torch, lora, multilora, autolora
from conftest import logits, random_gpt
for i in range({len(METHODS)}):
    state, want = torch.load({str(tmp_path)!r} + f"/{{i}}.pt", weights_only=True)
    assert torch.equal(logits(lora.load_state_dict(random_gpt(), state)), want)
"""], check=True)


def test_switching_tasks_in_place(gpt):
    base, states, want = logits(gpt), [], []
    for layer, settings in METHODS:
        randomise(lora.inject(gpt, "q v", 4, layer, **settings), seed=len(want))
        states.append(lora.state_dict(gpt))
        want.append(logits(gpt))
        lora.remove(gpt)
    for i in (0, 1, 2, 0):
        assert torch.equal(logits(lora.load_state_dict(gpt, states[i])), want[i])
        assert same(lora.state_dict(gpt), states[i])
        lora.merge(gpt)                                         # switching while merged is no trap
        close(logits(gpt), want[i])
    lora.remove(gpt)
    assert torch.equal(logits(gpt), base)


@pytest.mark.parametrize("there", ["base", "adapter", "merged"])
@pytest.mark.parametrize("spoil, message", [
    (lambda s: s["tensors"]["h.1.attn.v"].pop("A"), None),
    (lambda s: s["tensors"]["h.1.attn.v"].pop("B"), "h.1.attn.v"),
    (lambda s: s["tensors"]["h.1.attn.v"].update(s=torch.zeros(4)), "h.1.attn.v"),
    (lambda s: s["tensors"]["h.1.attn.v"].update(A=torch.zeros(3, 16)), "h.1.attn.v"),
    (lambda s: s["tensors"].update({"h.9.attn.q": s["tensors"]["h.1.attn.v"]}), "h.9.attn.q"),
    (lambda s: s.update(base="0" * 16), "another base, .*0000000000000000"),
    (lambda s: s.update(layer="DoRALinear"), "DoRALinear"),
])
def test_load_is_all_or_nothing(gpt, there, spoil, message):
    """In peft #2699 tensors that do not fit are left out with a warning, and training is lost."""
    state = lora.state_dict(randomise(lora.inject(random_gpt(), "q v", rank=4)))
    spoil(state)
    if there != "base":
        randomise(lora.inject(gpt, "all", rank=2), seed=5)
    if there == "merged":
        lora.merge(gpt)
    before = snapshot(gpt)
    with pytest.raises(ValueError, match=message):
        lora.load_state_dict(gpt, state)
    assert same(snapshot(gpt), before)


def test_fingerprint():
    model = random_gpt(dtype=torch.float32)
    mark = lora.fingerprint(model)
    assert lora.fingerprint(random_gpt(dtype=torch.bfloat16)) == mark
    for change in (lora.inject, randomise, lora.merge, lora.remove):
        change(model)
        assert lora.fingerprint(model) == mark
    for change in (lambda m: m.h[1].ln_2.bias.data[3].add_(1),
                   lambda m: m.wte.weight.data[5].neg_(),
                   lambda m: m.h[0].add_module("extra", nn.Linear(1, 1))):
        other = random_gpt(dtype=torch.float32)
        change(other)
        assert lora.fingerprint(other) != mark
