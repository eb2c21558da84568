"""multilora.py against n LoRAs written out; lora.combine: n LoRAs of several tasks as one."""
import copy
import math

import pytest
import torch
import torch.nn as nn

import lora
from autolora import AutoLoRALinear
from conftest import IDX, close, logits, random_gpt, randomise, same
from lora import LoRALinear
from multilora import MultiLoRALinear

both_scalings = pytest.mark.parametrize("scaling", ["scalar", "vector"])


class WrittenOut(nn.Module):
    """The paper's layer: n modules, each with an A, a B and a factor, one after the other."""

    def __init__(self, layer, n):
        super().__init__()
        self.base = layer.base
        parts = layer.A.chunk(n), layer.B.chunk(n, 1), layer.s.unbind(-1)
        self.A, self.B, self.s = (nn.ParameterList(t.detach().clone() for t in ts) for ts in parts)

    def forward(self, x):
        h = self.base(x)
        for A, B, s in zip(self.A, self.B, self.s):
            h = h + s * (x @ A.T @ B.T)
        return h


@both_scalings
@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_forward_and_gradients_are_those_of_n_modules(n, scaling):
    torch.manual_seed(0)
    layer = MultiLoRALinear(nn.Linear(10, 7).double(), 6, n, scaling)
    layer.s.data.normal_()
    assert layer.s.shape == ((n,) if scaling == "scalar" else (7, n))
    theirs = WrittenOut(layer, n)
    x = torch.randn(4, 10, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    h, want = layer(x), theirs(y)
    close(h, want)
    (h.sin() + want.sin()).sum().backward()
    close(x.grad, y.grad)
    close(layer.A.grad, torch.cat([A.grad for A in theirs.A]))
    close(layer.B.grad, torch.cat([B.grad for B in theirs.B], 1))
    close(layer.s.grad, torch.stack([s.grad for s in theirs.s], -1))
    parts = [s.view(-1, 1) * (B @ A) for A, B, s in zip(theirs.A, theirs.B, theirs.s)]
    close(layer.delta_weight(), sum(parts))


@both_scalings
def test_every_block_starts_like_a_lora_of_its_own(scaling):
    layer = MultiLoRALinear(nn.Linear(400, 900).bfloat16(), 40, 4, scaling)
    assert {p.dtype for p in (layer.A, layer.B, layer.s)} == {torch.float32}
    for A, B in zip(layer.A.chunk(4), layer.B.chunk(4, 1)):
        for t, fan_in in ((A, 400), (B, 10)):                                   # U(±1/√fan_in)
            assert t.abs().max() <= 1 / math.sqrt(fan_in)
            assert abs(t.std() * math.sqrt(3 * fan_in) - 1) < 0.05
    assert len({B[0, 0].item() for B in layer.B.chunk(4, 1)}) == 4


@both_scalings
def test_at_the_first_step_only_s_moves_and_then_everything(gpt, scaling):
    lora.inject(gpt, "all", 4, MultiLoRALinear, n_blocks=2, scaling=scaling)
    for moves in ([False, False, True], [True, True, True]):
        gpt(IDX, IDX)[1].backward()
        for m in lora.adapters(gpt).values():
            assert [bool(p.grad.any()) for p in (m.A, m.B, m.s)] == moves
            m.s.data -= m.s.grad
        gpt.zero_grad()


@pytest.mark.parametrize("n", [2, 4, 8])
def test_it_keeps_no_more_for_the_backward_pass_than_lora(n):
    linear, x, kept_bytes = nn.Linear(16, 16), torch.randn(8192, 16), []
    multi = MultiLoRALinear(linear, 8, n)
    for layer in (LoRALinear(linear, 8), multi, WrittenOut(multi, n)):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(kept.append, kept.pop):
            layer(x)
        storages = [tensor.untyped_storage() for tensor in kept]
        kept_bytes.append(sum({s.data_ptr(): s.nbytes() for s in storages}.values()))
    plain, ours, written_out = kept_bytes
    assert ours <= 1.02 * plain and plain + (n - 1) * x.nbytes < written_out


@pytest.mark.parametrize("n, scaling, message", [
    (4, "scalar", "rank 6 in 4 .* from 1 2 3 6"), (0, "scalar", "in 0"), (2, "matrix", "vector")])
def test_errors(n, scaling, message):
    with pytest.raises(ValueError, match=message):
        MultiLoRALinear(nn.Linear(10, 7), 6, n, scaling)


TASKS = [("q v", 3, LoRALinear, {"alpha": 5.0}), ("all", 2, LoRALinear, {}),
         ("q down", 4, MultiLoRALinear, {"n_blocks": 2}), ("q up", 3, AutoLoRALinear, {}),
         ("q k", 4, MultiLoRALinear, {"n_blocks": 2, "scaling": "vector"})]


@pytest.mark.parametrize("tasks, weights", [
    (TASKS, [0.5, -1.0, 2.0, 1.5, 0.25]), (TASKS, None), *[([task], [-1.0]) for task in TASKS]])
def test_the_combination_is_the_weighted_sum_of_the_updates(tasks, weights):
    """In peft it was not for one adapter of some kinds (#3761), nor for a negative w (#3004)."""
    states, base, sums = [], random_gpt(), {}
    for i, (*task, settings) in enumerate(tasks):
        model = randomise(lora.inject(random_gpt(), *task, **settings), seed=i)
        states.append(lora.state_dict(model))
        for name, m in lora.adapters(model).items():
            update = (weights[i] if weights else 1.0) * m.delta_weight().detach()
            sums[name] = sums.get(name, 0.0) + update
            base.get_submodule(name).weight.data += update
    before = copy.deepcopy(states)
    model = lora.load_state_dict(random_gpt(), lora.combine(states, weights))
    assert all(map(same, states, before)) and lora.adapters(model).keys() == sums.keys()
    for name, m in lora.adapters(model).items():
        close(m.delta_weight(), sums[name])
    close(logits(model), logits(base), tol=1e-10)
    with pytest.raises(ValueError, match="one base"):
        lora.combine([*states, lora.state_dict(lora.inject(random_gpt(seed=1)))])
