"""multilora.py compared with n LoRAs written out as in the paper."""
import math

import pytest
import torch
import torch.nn as nn

import lora
from conftest import IDX, close
from lora import LoRALinear
from multilora import MultiLoRALinear

both_scalings = pytest.mark.parametrize("scaling", ["scalar", "vector"])


def parameters(tensors):
    return nn.ParameterList(t.detach().clone() for t in tensors)


class WrittenOut(nn.Module):
    """The paper's layer: n modules with their own A, B and factor, one after the other."""

    def __init__(self, layer, n):
        super().__init__()
        self.base = layer.base
        self.A = parameters(layer.A.chunk(n))
        self.B = parameters(layer.B.chunk(n, 1))
        self.s = parameters(layer.s.unbind(-1))

    def forward(self, x):
        h = self.base(x)
        for A, B, s in zip(self.A, self.B, self.s):
            h = h + s * (x @ A.T @ B.T)
        return h


def gradients(tensors, dim):
    return torch.cat([t.grad for t in tensors], dim)


@both_scalings
@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_forward_and_gradients_match_n_modules(n, scaling):
    torch.manual_seed(0)
    layer = MultiLoRALinear(nn.Linear(10, 7).double(), 6, n, scaling)
    layer.s.data.normal_()
    assert layer.s.shape == ((n,) if scaling == "scalar" else (7, n))
    written_out = WrittenOut(layer, n)
    x = torch.randn(4, 10, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    h = layer(x)
    want = written_out(y)
    close(h, want)
    loss = h.sin() + want.sin()
    loss.sum().backward()
    close(x.grad, y.grad)
    close(layer.A.grad, gradients(written_out.A, 0))
    close(layer.B.grad, gradients(written_out.B, 1))
    close(layer.s.grad, torch.stack([s.grad for s in written_out.s], -1))
    delta = torch.zeros(7, 10)
    for i in range(n):
        B_A = written_out.B[i] @ written_out.A[i]
        delta = delta + written_out.s[i].view(-1, 1) * B_A
    close(layer.delta_weight(), delta)


@both_scalings
def test_each_block_is_initialised_like_a_lora_of_its_own(scaling):
    layer = MultiLoRALinear(nn.Linear(400, 900).bfloat16(), 40, 4, scaling)
    assert {p.dtype for p in (layer.A, layer.B, layer.s)} == {torch.float32}
    for A, B in zip(layer.A.chunk(4), layer.B.chunk(4, 1)):
        for t, fan_in in ((A, 400), (B, 10)):                   # uniform in ±1/√fan_in
            assert t.abs().max() <= 1 / math.sqrt(fan_in)
            assert abs(t.std() * math.sqrt(3 * fan_in) - 1) < 0.05
    first_values = {B[0, 0].item() for B in layer.B.chunk(4, 1)}
    assert len(first_values) == 4


@both_scalings
def test_the_first_step_changes_only_s_and_the_second_everything(gpt, scaling):
    lora.inject(gpt, "all", 4, MultiLoRALinear, n_blocks=2, scaling=scaling)
    for changed in ([False, False, True], [True, True, True]):
        gpt(IDX, IDX)[1].backward()
        for m in lora.adapters(gpt).values():
            assert [bool(p.grad.any()) for p in (m.A, m.B, m.s)] == changed
            m.s.data -= m.s.grad
        gpt.zero_grad()


def bytes_saved_for_backward(layer, x):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, saved.pop):
        layer(x)
    storages = {}
    for t in saved:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("n", [2, 4, 8])
def test_it_saves_no_more_for_the_backward_pass_than_lora(n):
    linear = nn.Linear(16, 16)
    x = torch.randn(8192, 16)
    multi = MultiLoRALinear(linear, 8, n)
    lora_bytes = bytes_saved_for_backward(LoRALinear(linear, 8), x)
    assert bytes_saved_for_backward(multi, x) <= 1.02 * lora_bytes
    # The sum as the paper writes it saves n activations.
    assert bytes_saved_for_backward(WrittenOut(multi, n), x) > lora_bytes + (n - 1) * x.nbytes


@pytest.mark.parametrize("n, scaling, message", [
    (4, "scalar", "n_blocks 4 does not divide rank 6: choose n_blocks from 1 2 3 6,"),
    (0, "scalar", "n_blocks 0 does not divide rank 6"),
    (7, "scalar", "n_blocks 7 does not divide rank 6"),
    (2, "matrix", 'scaling matrix is unknown: choose "scalar" or "vector"')])
def test_invalid_arguments_are_refused(n, scaling, message):
    with pytest.raises(ValueError, match=message):
        MultiLoRALinear(nn.Linear(10, 7), 6, n, scaling)
