"""support/adapter_state.py: adapters saved, loaded and combined, and the base's fingerprint."""
import copy
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn as nn

import lora
from autolora import AutoLoRALinear
from conftest import IDX, ROOT, close, logits, random_gpt, randomise, same, snapshot
from lora import LoRALinear
from multilora import MultiLoRALinear
from support.adapter_state import combine, fingerprint, load_state_dict, state_dict
from test_lora import METHODS, each_method


class UserLinear(LoRALinear):
    """A layer that a user has defined."""

    def __init__(self, base, rank, gain=2.0):
        super().__init__(base, rank)
        self.gain = gain

    def scale(self):
        return self.gain


class UserMultiLinear(MultiLoRALinear):
    """A layer that a user has defined, with a buffer and with parameters in a submodule."""

    def __init__(self, base, rank, n_blocks=2, dropout=0.0):
        super().__init__(base, rank, n_blocks, "scalar", dropout)
        self.norm = nn.LayerNorm(base.in_features, dtype=self.A.dtype)
        self.register_buffer("shift", torch.zeros_like(base.bias))

    def forward(self, x):
        return super().forward(self.norm(x)) + self.shift


def trained_gpt(targets="q v", rank=4, layer=LoRALinear, seed=1, **settings):
    """A GPT with adapters that have random values; its base is always the same."""
    return randomise(lora.inject(random_gpt(), targets, rank, layer, **settings), seed)


# Saving

@each_method
def test_a_state_contains_only_the_adapter_and_is_the_same_while_merged(layer, settings):
    model = trained_gpt(layer=layer, **settings)
    state = state_dict(model)
    assert state["tensors"].keys() == {f"h.{i}.attn.{t}" for i in range(2) for t in "qv"}
    for name, m in lora.adapters(model).items():
        tensors = state["tensors"][name]
        assert same(tensors, dict(m.named_parameters(recurse=False)))
        close((state["scale"][name] * tensors["B"]) @ tensors["A"], m.delta_weight())
    lora.merge(model)
    assert same(state_dict(model), state)
    before = copy.deepcopy(state)
    for m in lora.adapters(model).values():
        for p in m.parameters(recurse=False):
            p.data.zero_()                                      # training on changes no saved state
    assert same(state, before)


def test_adapters_that_cannot_be_one_state_are_refused(gpt):
    with pytest.raises(ValueError, match="no adapters to save"):
        state_dict(gpt)
    lora.inject(gpt, "q v", rank=4)
    gpt.h[1].attn.q = LoRALinear(gpt.h[1].attn.q.base, 4, alpha=2.0)
    with pytest.raises(ValueError, match=r"^h\.1\.attn\.q has another class or other settings"):
        state_dict(gpt)


# Loading

def test_another_process_loads_what_was_saved(tmp_path):
    """It imports only adapter_state, which has to know the classes of all three methods."""
    for i, (layer, settings) in enumerate(METHODS):
        ranks = {"h.0.attn.q": np.int64(4), "h.1.mlp.down": 16}
        model = trained_gpt(None, ranks, layer, **settings)
        torch.save((state_dict(model), logits(model)), tmp_path / f"{i}.pt")
    subprocess.run([sys.executable, "-c", f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]
import torch
from conftest import logits, random_gpt
from support import adapter_state
for i in range({len(METHODS)}):
    state, want = torch.load({str(tmp_path)!r} + f"/{{i}}.pt", weights_only=True)
    assert torch.equal(logits(adapter_state.load_state_dict(random_gpt(), state)), want)
"""], check=True)


def test_a_user_defined_class_is_named_in_the_error_and_can_be_passed(gpt):
    model = trained_gpt(layer=UserLinear, gain=3.0)
    state = state_dict(model)
    with pytest.raises(ValueError, match="class UserLinear.* pass the class as .*`layer`"):
        load_state_dict(gpt, state)
    load_state_dict(gpt, state, layer=UserLinear)
    assert torch.equal(logits(gpt), logits(model))


def test_a_subclass_keeps_its_other_parameters_and_buffers(gpt):
    model = trained_gpt(layer=UserMultiLinear)
    for m in lora.adapters(model).values():
        m.norm.weight.data.normal_()
        m.shift.normal_()
    state = state_dict(model)
    with pytest.raises(ValueError, match="class UserMultiLinear.* pass the class as .*`layer`"):
        load_state_dict(gpt, state)
    load_state_dict(gpt, state, layer=UserMultiLinear)
    assert torch.equal(logits(gpt), logits(model))
    before = trainable(gpt)
    load_state_dict(gpt, state_dict(trained_gpt(layer=UserMultiLinear)), layer=UserMultiLinear)
    assert all(p is before[name] for name, p in trainable(gpt).items())
    assert not torch.equal(logits(gpt), logits(model))


def test_a_layer_without_inject_can_be_saved_as_a_part_of_a_model():
    layer = LoRALinear(nn.Linear(6, 5), 2)
    layer.B.data.normal_()
    with pytest.raises(ValueError, match="itself a LoRA layer.*nn.Sequential"):
        state_dict(layer)
    state = state_dict(nn.Sequential(layer))
    base = copy.deepcopy(nn.Sequential(layer.base))
    assert torch.equal(load_state_dict(base, state)(torch.ones(6)), layer(torch.ones(6)))


@pytest.mark.parametrize("wrap", [
    lambda model: torch.compile(model, backend="eager"),
    nn.DataParallel,
    lambda model: torch.compile(nn.DataParallel(model), backend="eager")])
def test_a_wrapped_model_has_the_same_state(gpt, wrap):
    """torch.compile and nn.DataParallel put `_orig_mod.` and `module.` before each name."""
    model = trained_gpt()
    state = state_dict(model)
    wrapped = wrap(model)
    assert fingerprint(wrapped) == state["base"]
    assert same(state_dict(wrapped), state)
    fresh = wrap(gpt)
    assert load_state_dict(fresh, state) is fresh
    assert torch.equal(logits(fresh), logits(model))
    other = state_dict(trained_gpt("up", rank=3, seed=5))
    load_state_dict(fresh, other)
    assert same(state_dict(gpt), other)
    assert torch.equal(logits(fresh), logits(gpt))


def test_adapters_can_be_switched(gpt):
    base = logits(gpt.eval())
    models = [trained_gpt(layer=layer, seed=i, **settings)
              for i, (layer, settings) in enumerate(METHODS)]
    for i in (0, 1, 2, 0):
        state = state_dict(models[i])
        load_state_dict(gpt, state)
        assert torch.equal(logits(gpt), logits(models[i]))
        assert same(state_dict(gpt), state)
        lora.merge(gpt)                                 # the next one is loaded while it is merged
        close(logits(gpt), logits(models[i]))
    lora.remove(gpt)
    assert torch.equal(logits(gpt), base)


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@each_method
@pytest.mark.parametrize("prepare", [lora.unmerge, lora.merge])
def test_loading_in_place_keeps_the_parameters_of_an_optimizer(gpt, layer, settings, prepare):
    lora.inject(gpt, "q v", 4, layer, **settings)
    gpt.ln_f.weight.requires_grad_(True)                        # the caller trains this as well
    before = trainable(gpt)
    optimizer = torch.optim.SGD(before.values(), lr=0.1)
    prepare(gpt)
    state = state_dict(trained_gpt(layer=layer, **settings))
    load_state_dict(gpt, state)
    after = trainable(gpt)
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert same(state_dict(gpt), state)
    gpt(IDX, IDX)[1].backward()
    optimizer.step()
    for name, own in state_dict(gpt)["tensors"].items():
        assert not any(torch.equal(own[key], state["tensors"][name][key]) for key in own)


@pytest.mark.parametrize("layer, settings", [
    (LoRALinear, {"alpha": 5.0}), (LoRALinear, {"dropout": 0.5}), (AutoLoRALinear, {"alpha": 3.0})])
def test_loading_other_settings_keeps_the_parameters_that_fit(gpt, layer, settings):
    lora.inject(gpt, "q v", rank=4)
    for m in lora.adapters(gpt).values():
        m.A.requires_grad_(False)                               # the caller trains only B
    before = dict(gpt.named_parameters())
    frozen = {name for name, p in before.items() if not p.requires_grad}
    model = trained_gpt(layer=layer, **settings)
    load_state_dict(gpt, state_dict(model))
    after = dict(gpt.named_parameters())
    assert all(after[name] is p for name, p in before.items())
    assert {name for name, p in after.items() if not p.requires_grad} == frozen
    assert same(state_dict(gpt), state_dict(model))
    assert torch.equal(logits(gpt.eval()), logits(model.eval()))


@pytest.mark.parametrize("there", ["q v", "q up"])
def test_an_adapter_that_is_loaded_while_disabled_stays(gpt, there):
    lora.inject(gpt, there, rank=4)
    model = trained_gpt()
    with lora.disabled(gpt):
        load_state_dict(gpt, state_dict(model))
    assert same(state_dict(gpt), state_dict(model))
    assert torch.equal(logits(gpt), logits(model))


# The scale

def change_in_place(m):
    if isinstance(m, MultiLoRALinear):
        m.s.data += 1
    else:
        m.alpha = 7.0
    m.dropout.p = 0.125


@each_method
def test_settings_that_were_changed_in_place_are_saved(gpt, layer, settings):
    model = trained_gpt(layer=layer, **settings).eval()
    before = logits(model)
    for m in lora.adapters(model).values():
        change_in_place(m)
    assert not torch.equal(logits(model), before)
    load_state_dict(gpt.eval(), state_dict(model))
    assert torch.equal(logits(gpt), logits(model))
    for m in lora.adapters(gpt).values():
        assert m.dropout.p == 0.125


@pytest.mark.parametrize("layer", [LoRALinear, AutoLoRALinear])
def test_a_loaded_layer_has_the_saved_scale(gpt, layer):
    """A file without α may come from a version with another default."""
    before = snapshot(gpt)
    for alpha in (5.0, 16.1):
        state = state_dict(trained_gpt(layer=layer, alpha=alpha))
        del state["settings"]["alpha"]
        with pytest.raises(ValueError, match=r"^h\.0\.attn\.q: the adapter's scale is"):
            load_state_dict(gpt, state)
        assert same(snapshot(gpt), before)
    model = trained_gpt(layer=layer)                            # α is the default
    state = state_dict(model)
    del state["settings"]["alpha"]
    load_state_dict(gpt, state)
    assert torch.equal(logits(gpt), logits(model))


@each_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_of_lower_precision_can_be_loaded(layer, settings, dtype):
    model = trained_gpt(layer=layer, **settings)
    base = fingerprint(model)
    state = state_dict(model.to(dtype), base)                   # A, B and the scale are rounded
    loaded = load_state_dict(random_gpt(), state)
    for name, m in lora.adapters(loaded).items():
        want = model.get_submodule(name).double().delta_weight()
        close(m.delta_weight(), want, tol=0.05)


def test_loading_other_layers_keeps_what_the_caller_has_unfrozen(gpt):
    lora.inject(gpt, "q v", rank=2)
    gpt.ln_f.weight.requires_grad_(True)
    load_state_dict(gpt, state_dict(trained_gpt("q up")))
    names = {f"h.{i}.{name}.{key}" for i in range(2) for name in ("attn.q", "mlp.up")
             for key in "AB"}
    assert trainable(gpt).keys() == names | {"ln_f.weight"}


def change(key, name, value):
    """A function that changes one value of a state, or deletes it if `value` is None."""
    def apply(state):
        part = state["tensors"]["h.1.attn.v"] if key == "h.1.attn.v" else state[key]
        if value is None:
            del part[name]
        else:
            part[name] = value
    return apply


V = "h.1.attn.v"
FAULTS = [
    (change(V, "A", None), r"^h\.1\.attn\.v: "),
    (change(V, "B", None), r"^h\.1\.attn\.v: .*\{'A': \(4, 16\)\}.* should be .*'B': \(16, 4\)"),
    (change(V, "s", torch.zeros(4)), r"^h\.1\.attn\.v: "),
    (change(V, "A", torch.zeros(3, 16)), r"^h\.1\.attn\.v: "),
    (change(V, "A", torch.zeros(17, 16)), r"^h\.1\.attn\.v: rank 17"),
    (change("tensors", "h.9.attn.q", {"A": torch.zeros(4, 16)}), r"h\.9\.attn\.q"),
    (change("settings", "gain", 2.0), "gain"),
    (lambda state: state.update(base="0" * 16), "another base model.* 0{16}"),
    (lambda state: state.update(layer="DoRALinear"), "class DoRALinear"),
    (lambda state: state.pop("layer"), "no layer"),
    (lambda state: state.pop("scale"), "no scale"),
    (change("scale", V, torch.tensor(4.1)), r"^h\.1\.attn\.v: .* is 4\.0999.* settings give 4\.0"),
    (change("scale", V, torch.full((4,), 4.0)), r"^h\.1\.attn\.v: .*scale is"),
    (change("scale", V, None), r"^h\.1\.attn\.v: .*scale is unknown"),
    (change("settings", "alpha", 8.0), r"^h\.0\.attn\.q: .*scale is .*settings give"),
    (change("settings", "rank", 4), "rank"),
    (change("settings", "layer", 4), "layer"),
    (change("settings", "targets", "q"), "targets"),
    (lambda state: state.update(settings=None), "no settings"),
    (lambda state: state.update(tensors=None), "no tensors"),
    (dict.clear, "no base layer scale settings tensors")]


@pytest.mark.parametrize("there", ["base", "adapter", "merged", "disabled"])
@pytest.mark.parametrize("fault, message", FAULTS)
def test_a_failed_load_changes_nothing(gpt, there, fault, message):
    """peft #2699: tensors that do not fit are left out with a warning, and training is lost."""
    state = state_dict(trained_gpt())
    fault(state)
    if there != "base":
        randomise(lora.inject(gpt, "all", rank=2), seed=5)
        gpt.ln_f.weight.requires_grad_(True)
    if there == "merged":
        lora.merge(gpt)
    before = snapshot(gpt)
    parameters = dict(gpt.named_parameters())
    with lora.disabled(gpt) if there == "disabled" else nullcontext():
        with pytest.raises(ValueError, match=message):
            load_state_dict(gpt, state)
    assert same(snapshot(gpt), before)
    assert all(p is parameters[name] for name, p in gpt.named_parameters())
    assert there != "merged" or all(m.merged for m in lora.adapters(gpt).values())


def test_an_unexpected_error_changes_nothing_either():
    model = trained_gpt("all", rank=2)
    before = snapshot(model)
    state = state_dict(trained_gpt())
    state["tensors"][V]["B"] = "not a tensor"
    with pytest.raises(Exception, match="shape"):
        load_state_dict(model, state)
    assert same(snapshot(model), before)


def test_a_whole_checkpoint_says_where_its_adapter_is(gpt):
    model = trained_gpt()
    saved = {"settings": {}, "phase": "train", "adapter": state_dict(model), "optimizer": {}}
    with pytest.raises(ValueError, match=r'its adapter is under \["adapter"\]'):
        load_state_dict(gpt, saved)
    load_state_dict(gpt, saved["adapter"])
    assert torch.equal(logits(gpt), logits(model))


# Fingerprints

def test_a_fingerprint_identifies_the_base_model():
    model = random_gpt(dtype=torch.float32)
    base = fingerprint(model)
    assert fingerprint(random_gpt(dtype=torch.bfloat16)) == base
    for step in (lora.inject, randomise, lora.merge):
        step(model)
        assert fingerprint(model) == base
        assert step is lora.inject or state_dict(model)["base"] == base
    lora.remove(model)
    assert fingerprint(model) == base


def test_a_base_model_in_half_precision_is_named_in_the_error():
    """bfloat16 does not change the fingerprint, but float16 rounds differently."""
    model = random_gpt(dtype=torch.float32)
    model.wte.weight.data *= 1 + 2 ** -8 - 2 ** -13     # between two bfloat16 values
    state = state_dict(lora.inject(copy.deepcopy(model), "q", rank=2))
    load_state_dict(copy.deepcopy(model).bfloat16(), state)
    with pytest.raises(ValueError, match=r"another base model.* float16.* load first"):
        load_state_dict(model.half(), state)
    with pytest.raises(ValueError, match="^(?!.*float16)"):
        load_state_dict(random_gpt(seed=1), state)


@pytest.mark.parametrize("edit", [
    lambda model: model.h[1].ln_2.bias.data[3].add_(1),
    lambda model: model.wte.weight.data[5].neg_(),
    lambda model: setattr(model.wpe.weight, "data", model.wpe.weight.data.view(32, 32)),
    lambda model: model.h[0].add_module("extra", nn.Linear(1, 1))])
def test_every_value_shape_and_name_changes_the_fingerprint(edit):
    model = random_gpt(dtype=torch.float32)
    base = fingerprint(model)
    edit(model)
    assert fingerprint(model) != base


# Combining

TASKS = [("q v", 3, LoRALinear, {"alpha": 5.0}), ("all", 2, LoRALinear, {}),
         ("q down", 4, MultiLoRALinear, {"n_blocks": 2}), ("q up", 3, AutoLoRALinear, {}),
         ("q k", 4, MultiLoRALinear, {"n_blocks": 2, "scaling": "vector"})]


@pytest.mark.parametrize("tasks, weights", [
    (TASKS, [0.5, -1.0, 2.0, 1.5, 0.25]), (TASKS, None), (2 * TASKS, None),     # rank > 16 in q
    *[([task], [-1.0]) for task in TASKS]])
def test_the_combination_is_the_weighted_sum_of_the_updates(tasks, weights):
    """In peft it was not for one adapter of some kinds (#3761), nor for a negative w (#3004)."""
    states = []
    sums = {}
    base = random_gpt()
    for i, (targets, rank, layer, settings) in enumerate(tasks):
        model = trained_gpt(targets, rank, layer, seed=i, **settings)
        states.append(state_dict(model))
        for name, m in lora.adapters(model).items():
            update = (weights[i] if weights else 1.0) * m.delta_weight().detach()
            sums[name] = sums.get(name, 0.0) + update
            base.get_submodule(name).weight.data += update
    before = copy.deepcopy(states)
    state = combine(states, weights)
    assert all(map(same, states, before))                       # the arguments are unchanged
    for name, want in sums.items():                             # what analyze.py reads
        own = state["tensors"][name]
        close((state["scale"][name] * own["B"]) @ own["A"], want)
    model = load_state_dict(random_gpt(), state)
    assert lora.adapters(model).keys() == sums.keys()
    for name, m in lora.adapters(model).items():
        close(m.delta_weight(), sums[name])
    close(logits(model), logits(base), tol=1e-10)


@pytest.mark.parametrize("shape", [(128, 128), (128, 512), (512, 128)])
def test_a_combination_of_a_larger_rank_than_the_matrix_is_compressed_exactly(shape):
    base = nn.ModuleDict({"q": nn.Linear(*shape)})              # float32
    states = []
    want = 0
    for seed in range(9):                                       # nine times r = 16 is 144
        model = randomise(lora.inject(copy.deepcopy(base), rank=16), seed)
        states.append(state_dict(model))
        want = want + model["q"].delta_weight().detach().double()
    model = load_state_dict(base, combine(states))
    assert model["q"].rank == 128
    close(model["q"].delta_weight().double(), want, tol=10 * torch.finfo(torch.float32).eps)


def test_invalid_combinations_are_refused():
    state = state_dict(trained_gpt())
    other = state_dict(lora.inject(random_gpt(seed=1)))
    with pytest.raises(ValueError, match="different base models"):
        combine([state, other])
    with pytest.raises(ValueError, match="2 adapters"):
        combine([state, state], [1.0])
    with pytest.raises(ValueError, match="no adapters"):
        combine([])


def test_a_class_with_other_factors_cannot_be_saved():
    class Gated(lora.LoRALinear):
        def factors(self):
            return self.B * self.scale(), 2 * self.A

    model = lora.inject(nn.Sequential(nn.Linear(4, 4)), rank=2, layer=Gated)
    with pytest.raises(ValueError, match=r"0: its class overrides factors\(\)"):
        state_dict(model)


def test_a_checkpoint_cannot_be_combined():
    with pytest.raises(ValueError, match=r'that of a checkpoint is its \["adapter"\]'):
        combine([{"adapter": {}, "base": "0"}])
