"""lora.py compared with closed forms in float64, and each property that it promises."""
import copy

import pytest
import torch
import torch.nn as nn
from torch.nn.utils import prune

import lora
from autolora import AutoLoRALinear
from conftest import IDX, close, logits, random_gpt, randomise, same, snapshot
from lora import LoRALinear
from multilora import MultiLoRALinear

METHODS = [
    (LoRALinear, {"alpha": 3.0}),
    (AutoLoRALinear, {"alpha": 3.0}),
    (MultiLoRALinear, {"n_blocks": 2, "scaling": "vector"}),
]
each_method = pytest.mark.parametrize("layer, settings", METHODS)


# One layer

@pytest.mark.parametrize("d_in, d_out, r", [(6, 10, 3), (10, 6, 3), (8, 8, 8), (7, 5, 1)])
def test_forward_and_gradients_match_the_closed_forms(d_in, d_out, r):
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(d_in, d_out).double(), r, alpha=5.0)
    layer.B.data.normal_()
    W = layer.base.weight
    b = layer.base.bias
    A = layer.A
    B = layer.B
    s = 5.0 / r
    x = torch.randn(4, d_in, dtype=torch.float64, requires_grad=True)
    g = torch.randn(4, d_out, dtype=torch.float64)              # ∂L/∂h
    h = layer(x)
    h.backward(g)
    close(h, x @ W.T + b + s * x @ A.T @ B.T)
    close(B.grad, s * g.T @ (x @ A.T))
    close(A.grad, s * B.T @ g.T @ x)
    close(x.grad, g @ W + s * g @ B @ A)
    close(layer.delta_weight(), s * B @ A)


def test_dropout_acts_on_each_element_and_only_on_the_adapter():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(6, 6).double(), 6, alpha=6.0, dropout=0.5)
    layer.A.data = torch.ones(6, 6).triu().double()
    layer.B.data = layer.A.data.inverse()                       # ΔW x = x
    x = torch.ones(64, 8, 6).double()
    dropped = (layer(x) - layer.base(x)).detach()
    close(dropped, 2.0 * (dropped > 1))                         # each element is 0 or 2
    for dim in range(3):                # rows, tokens and features do not share a mask
        equal = dropped.round() == dropped.round().roll(1, dim)
        assert 0.45 < equal.double().mean() < 0.55


@each_method
@pytest.mark.parametrize("p", [0.0, 0.25, 0.75])
def test_every_method_has_dropout(layer, settings, p):
    """ΔW x is 1 for each feature of x that is kept, times 1 / (1 - p)."""
    torch.manual_seed(0)
    m = layer(nn.Linear(8, 8).double(), 8, dropout=p, **settings)
    for q in m.parameters(recurse=False):
        q.data.normal_()
    m.A.data = torch.eye(8).double()
    m.B.data = (torch.eye(8).double() / m.scale()).detach()     # ΔW = 1
    x = torch.ones(500, 8).double()
    update = (m(x) - m.base(x)).detach()
    close(update, (update > 0.5).double() / (1 - p), tol=1e-9)
    assert abs((update < 0.5).double().mean() - p) < 0.03
    m.eval()
    close(m(x) - m.base(x), x, tol=1e-9)


@each_method
@pytest.mark.parametrize("rank", [0, 7, -1, 2.5])
def test_an_invalid_rank_is_refused(layer, settings, rank):
    with pytest.raises(ValueError, match=f"rank {rank} is not an integer from 1 to 6"):
        layer(nn.Linear(9, 6), rank, **settings)


@each_method
def test_a_layer_without_inject_trains_only_its_own_tensors(layer, settings):
    linear = nn.Linear(9, 6)
    model = layer(linear, 4, **settings)
    assert not linear.weight.requires_grad
    assert not linear.bias.requires_grad
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters(recurse=False)}
    assert {"A", "B"} <= trained


# The layers of a model

@each_method
def test_training_starts_at_the_base_model_and_first_changes_one_tensor(layer, settings, gpt):
    before = logits(gpt)
    lora.inject(gpt, "all", 4, layer, **settings)
    assert torch.equal(logits(gpt), before)
    gpt(IDX, IDX)[1].backward()
    for m in lora.adapters(gpt).values():
        changed = [name for name, p in m.named_parameters(recurse=False) if p.grad.any()]
        assert changed == (["s"] if layer is MultiLoRALinear else ["B"])


def test_training_changes_only_the_adapter(gpt):
    lora.inject(gpt, rank=4)
    before = copy.deepcopy(gpt.state_dict())
    optimizer = torch.optim.AdamW(p for p in gpt.parameters() if p.requires_grad)
    for _ in range(2):                                          # A has no gradient in the first
        gpt(IDX, IDX)[1].backward()
        optimizer.step()
    for name, tensor in gpt.state_dict().items():
        assert torch.equal(tensor, before[name]) != name.endswith((".A", ".B")), name


ALL = "attn.q attn.k attn.v attn.o mlp.up mlp.down".split()


@pytest.mark.parametrize("targets, names", [
    (None, ALL),
    ("all", ALL),
    (["all"], ALL),
    ("q down", ["attn.q", "mlp.down"]),
    (["q", "down"], ["attn.q", "mlp.down"]),
    (("v", "v"), ["attn.v"])])
def test_targets_may_be_a_string_or_a_list(gpt, targets, names):
    lora.inject(gpt, targets, rank=4)
    assert set(lora.adapters(gpt)) == {f"h.{i}.{name}" for i in range(2) for name in names}


@pytest.mark.parametrize("targets", ["h.0.attn.q up", ["h.0.attn.q", "up"]])
def test_targets_may_be_full_names(gpt, targets):
    lora.inject(gpt, targets, rank=4)
    assert set(lora.adapters(gpt)) == {"h.0.attn.q", "h.0.mlp.up", "h.1.mlp.up"}


def test_a_dict_of_ranks_chooses_the_layers(gpt):
    ranks = {"h.0.attn.q": 4, "h.1.mlp.up": 16}
    lora.inject(gpt, rank=ranks)
    assert {name: m.rank for name, m in lora.adapters(gpt).items()} == ranks


class Conv1D(nn.Module):
    """It has the name of transformers' class."""


def test_a_dict_of_ranks_may_leave_out_a_conv1d():
    model = nn.ModuleDict({"q": nn.Linear(4, 4), "c_attn": Conv1D()})
    for arguments in ({"targets": "all"}, {"rank": {"q": 2, "c_attn": 2}}):
        with pytest.raises(ValueError, match="^c_attn is a transformers Conv1D"):
            lora.inject(model, **{"rank": 2, **arguments})
    lora.inject(model, rank={"q": 2})
    assert set(lora.adapters(model)) == {"q"}


def tied():
    """A head tied to the embedding (as in peft #2018), and a layer with two names."""
    embed = nn.Embedding(9, 8)
    head = nn.Linear(8, 9)
    head.weight = embed.weight
    linear = nn.Linear(8, 8)
    return nn.ModuleDict({"embed": embed, "head": head, "one": linear, "two": linear,
                          "base": nn.Linear(8, 8)})


def fused():
    """In eval mode nn.TransformerEncoderLayer does not call its nn.Linear layers."""
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.ModuleDict({"block": nn.TransformerEncoder(block, 2)})


def merged():
    model = randomise(lora.inject(random_gpt(), rank=3))
    lora.merge(model)
    return model


@pytest.mark.parametrize("make, arguments, message", [
    (random_gpt, {"targets": "q qkv"}, "qkv.* choose from q k v o up down"),
    (random_gpt, {"targets": ["wte", "q"]}, "wte.* choose from"),
    (random_gpt, {"targets": ""}, "choose from q k v o up down"),
    (random_gpt, {"targets": []}, "choose from q k v o up down"),
    (random_gpt, {"rank": {}}, "choose"),
    (random_gpt, {"rank": {"h.0.attn.q": 2, "h.9.attn.q": 2}}, r"h\.9\.attn\.q"),
    (random_gpt, {"rank": {"q": 2}}, "q.* full"),               # a dict needs full names
    (random_gpt, {"rank": {"h.0.attn.q": 2}, "targets": "q"}, "do not pass targets"),
    (random_gpt, {"rank": {"h.0.attn.q": 2}, "targets": "all"}, "do not pass targets"),
    (random_gpt, {"rank": 17}, r"^h\.0\.attn\.q: rank 17 is not an integer from 1 to 16"),
    (random_gpt, {"rank": {"h.0.attn.q": 4, "h.1.mlp.up": 17}}, r"^h\.1\.mlp\.up: rank 17"),
    (random_gpt, {"rank": {"h.0.attn.q": 4, "h.1.mlp.up": 5}, "layer": MultiLoRALinear},
     r"^h\.1\.mlp\.up: n_blocks 4 does not divide rank 5: choose n_blocks from 1 5,"),
    (random_gpt, {"layer": AutoLoRALinear, "gate": "tanh"}, "tanh.*from softmax sigmoid none"),
    (random_gpt, {"n_blocks": 2}, r"^h\.0\.attn\.q: .*n_blocks"),       # LoRALinear has no blocks
    (merged, {"rank": 2}, r"already has adapters: call lora\.remove"),
    (tied, {"targets": "all"}, "head: .* tied"),
    (tied, {"targets": "base head"}, "head: .* tied"),
    (tied, {"targets": "one"}, "one: .* tied"),
    (tied, {"targets": "two"}, "two"),
    (fused, {"targets": "all"}, "linear1: .* nn.TransformerEncoderLayer"),
    (fused, {"targets": "linear2"}, "linear2: .* nn.TransformerEncoderLayer"),
    (lambda: nn.Linear(4, 4), {}, "nn.Linear"),                 # it cannot be replaced
    (lambda: nn.Sequential(nn.Embedding(4, 4)), {}, "nn.Linear")])
def test_inject_refuses_what_cannot_work_and_leaves_the_model_unchanged(make, arguments, message):
    model = make()
    next(model.parameters()).requires_grad_(False)      # the others stay trainable
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        lora.inject(model, **{"rank": 4, **arguments})
    assert same(snapshot(model), before)


def test_a_layer_of_the_model_may_be_called_base():
    model = tied()
    before = snapshot(model)
    randomise(lora.inject(model, "base"))
    assert set(lora.adapters(model)) == {"base"}
    lora.remove(model)
    assert same(snapshot(model.requires_grad_(True)), before)


# Merging

@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merge_and_unmerge(dtype):
    """Over a bfloat16 base ΔW is added in float32: in bfloat16 it would be lost (peft #2502)."""
    model = randomise(lora.inject(random_gpt(dtype=dtype), rank=4)).eval()
    m = model.h[0].attn.q
    assert m.A.dtype == torch.promote_types(dtype, torch.float32)
    unmerged = logits(model)
    before = copy.deepcopy(model.state_dict())
    want = (m.base.weight.to(m.A.dtype) + m.delta_weight()).to(dtype)
    assert torch.equal(m.weight, want)
    lora.merge(model)
    lora.merge(model)                                           # the second call changes nothing
    assert m.merged
    x = torch.randn(3, 16, dtype=dtype)
    assert torch.equal(m(x), nn.functional.linear(x, want, m.base.bias))
    assert torch.equal(m.weight, want)
    close(logits(model).double(), unmerged.double(), tol=100 * torch.finfo(dtype).eps)
    lora.unmerge(model)
    lora.unmerge(model)
    assert not m.merged
    assert same(model.state_dict(), before)
    assert torch.equal(logits(model), unmerged)


def test_merging_again_uses_the_present_tensors(gpt):
    randomise(lora.inject(gpt.eval(), rank=4))
    lora.merge(gpt)
    randomise(gpt, seed=2)
    lora.merge(gpt)
    merged = logits(gpt)
    lora.unmerge(gpt)
    close(merged, logits(gpt))


def test_a_merged_layer_runs_only_its_base_in_both_modes_and_can_be_converted(gpt):
    """In loralib eval() is meant to merge, but did not (microsoft/LoRA #34)."""
    W = gpt.float().h[0].attn.q.weight.clone()
    randomise(lora.inject(gpt, rank=4, dropout=0.5))
    lora.merge(gpt)
    for m in lora.adapters(gpt).values():
        m.A.data.zero_()                                        # must not matter while merged
    want = logits(gpt.eval())
    with torch.no_grad():
        assert torch.equal(logits(gpt.train()), want)
    close(logits(gpt.double().eval()).float(), want, tol=1e-3)
    lora.unmerge(gpt)
    assert not torch.allclose(logits(gpt).float(), want, atol=1e-2)
    assert same(gpt.h[0].attn.q.base.weight.data, W.double())


@each_method
def test_the_state_dict_of_a_merged_model_contains_the_base_weights(layer, settings):
    """Otherwise a model that loads it would have W + 2 ΔW."""
    model = randomise(lora.inject(random_gpt(), "q up", 4, layer, **settings)).eval()
    want = logits(model)
    before = copy.deepcopy(model.state_dict())
    lora.merge(model)
    saved = copy.deepcopy(model.state_dict())
    assert same(saved, before)
    for prepare in (lora.unmerge, lora.merge):
        other = lora.inject(random_gpt(seed=3), "q up", 4, layer, **settings).eval()
        prepare(other)
        other.load_state_dict(saved, strict=True)
        assert torch.equal(logits(other), want)
        lora.merge(other)
        close(logits(other), want)


@pytest.mark.parametrize("merged", [["h.0.attn.q"], ["h.1.mlp.up"], ["h.0.attn.q", "h.1.mlp.up"]])
def test_a_merged_layer_does_not_train(gpt, merged):
    """A model of which a part is merged would otherwise train the rest without a warning."""
    lora.inject(gpt, "q up", rank=4)
    for name in merged:
        gpt.get_submodule(name).merge()
    with pytest.raises(RuntimeError, match=r"call unmerge\(\) to train it"):
        gpt(IDX, IDX)
    with torch.no_grad():
        gpt(IDX, IDX)                                           # measures the loss only
    gpt.eval()(IDX, IDX)
    lora.unmerge(gpt.train())
    gpt(IDX, IDX)[1].backward()
    assert all(m.B.grad.any() for m in lora.adapters(gpt).values())


def pruned(linear):
    prune.l1_unstructured(linear, "weight", 3)


def bias_pruned(linear):
    prune.l1_unstructured(linear, "bias", 3)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("reparametrise", [
    nn.utils.weight_norm, nn.utils.spectral_norm, pruned, bias_pruned,
    nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm,
    nn.utils.parametrizations.orthogonal])
@pytest.mark.parametrize("targets", ["all", "q", "h.1.attn.q"])
def test_a_linear_whose_weight_is_computed_is_refused(gpt, reparametrise, targets):
    """A hook computes W again in each forward pass, so that merging would have no effect."""
    reparametrise(gpt.h[1].attn.q)
    before = snapshot(gpt)
    with pytest.raises(ValueError, match=r"^h\.1\.attn\.q: its weight or bias is recomputed"):
        lora.inject(gpt, targets, rank=4)
    assert same(snapshot(gpt), before)
    with pytest.raises(ValueError, match="^its weight or bias is recomputed"):
        LoRALinear(gpt.h[1].attn.q, 4)
    lora.inject(gpt, "h.0.attn.q up", rank=4)                   # the others can be adapted


class ReadsWeight(nn.Module):
    """Mamba's and other models read the weight of a layer in place of calling it."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(6, 5).double()

    def forward(self, x):
        return x @ self.q.weight.T + self.q.base.bias


def test_a_model_that_reads_the_weight_of_a_layer_gets_the_adapted_one():
    model = ReadsWeight()
    randomise(lora.inject(model, "q", rank=2))
    x = torch.randn(4, 6).double()
    want = model.q(x)
    close(model(x), want)
    model(x).sum().backward()
    assert model.q.A.grad.any()
    lora.merge(model.eval())
    close(model(x), want)


def test_disabled_keeps_the_mode_of_every_layer_unless_the_model_changes_its_own():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    lora.inject(model, rank=2, dropout=0.5)
    model.eval()
    model[0].dropout.train()                                    # Monte Carlo dropout
    model[1].train()
    with lora.disabled(model):
        pass
    assert [model[0].training, model[0].dropout.training, model[1].training] == [False, True, True]
    with lora.disabled(model):
        model.train()
    assert model[0].training and model[0].dropout.training


@pytest.mark.parametrize("prepare", [lora.unmerge, lora.merge])
def test_disabled_runs_the_base_model(gpt, prepare):
    base = logits(gpt)
    randomise(lora.inject(gpt.eval(), rank=4))
    prepare(gpt)
    before = snapshot(gpt)
    adapted = logits(gpt)
    with pytest.raises(KeyError), lora.disabled(gpt):
        assert torch.equal(logits(gpt), base)
        with lora.disabled(gpt):
            assert torch.equal(logits(gpt), base)
        assert torch.equal(logits(gpt), base)
        raise KeyError                                          # the adapters must come back
    assert same(snapshot(gpt), before)
    assert torch.equal(logits(gpt), adapted)
    assert not torch.equal(adapted, base)


@pytest.mark.parametrize("remove", [lora.remove, lambda layer: lora.disabled(layer).__enter__()])
def test_a_layer_that_is_the_whole_model_cannot_be_replaced(remove):
    layer = LoRALinear(nn.Linear(6, 5), 2)
    with pytest.raises(ValueError, match="itself a LoRA layer"):
        remove(layer)


def test_adapters_have_the_mode_of_the_model(gpt):
    lora.inject(gpt.eval(), rank=4)
    assert not any(m.training for m in gpt.modules())
    with lora.disabled(gpt):
        gpt.train()
    assert all(m.training for m in gpt.modules())
