"""multilora.py against n LoRAs written out, and its promises about memory."""
import math
import subprocess
import sys

import pytest
import torch
import torch.nn as nn

import lora
from bench import held
from conftest import ROOT, random_gpt
from lora import LoRALinear
from multilora import MultiLoRALinear
from test_lora import close, randomise


def random_layer(n, scaling="scalar", d_in=10, d_out=7, r=6):
    torch.manual_seed(0)
    layer = MultiLoRALinear(nn.Linear(d_in, d_out).double(), r, n, scaling)
    layer.s.data = torch.randn_like(layer.s)
    return layer


class WrittenOut(nn.Module):
    """The paper's layer: n modules, each with its own A, B and factor, called one after the other."""

    def __init__(self, layer):
        super().__init__()
        n, per = layer.n_blocks, layer.rank // layer.n_blocks
        self.base = layer.base
        cut = lambda t, i, dim: nn.Parameter(t.detach().narrow(dim, i * per, per).clone())
        self.A = nn.ParameterList([cut(layer.A, i, 0) for i in range(n)])
        self.B = nn.ParameterList([cut(layer.B, i, 1) for i in range(n)])
        self.s = nn.ParameterList([nn.Parameter(layer.s[..., i].detach().clone()) for i in range(n)])

    def forward(self, x):
        h = self.base(x)
        for A, B, s in zip(self.A, self.B, self.s):
            h = h + s * (x @ A.T @ B.T)
        return h


@pytest.mark.parametrize("n", [1, 2, 3, 6])
@pytest.mark.parametrize("scaling", ["scalar", "vector"])
def test_forward_and_gradients_are_those_of_n_modules(n, scaling):
    layer = random_layer(n, scaling)
    assert layer.s.shape == ((n,) if scaling == "scalar" else (7, n))
    theirs = WrittenOut(layer)
    g, out = torch.randn(4, 7, dtype=torch.float64), []
    for m in (layer, theirs):
        x = torch.linspace(-1, 2, 40, dtype=torch.float64).view(4, 10).sin().requires_grad_()
        h = m(x)
        h.backward(g)
        out.append((h, x.grad))
    close(out[0][0], out[1][0])
    close(out[0][1], out[1][1])
    close(layer.A.grad, torch.cat([A.grad for A in theirs.A]))
    close(layer.B.grad, torch.cat([B.grad for B in theirs.B], 1))
    close(layer.s.grad, torch.stack([s.grad for s in theirs.s], -1))
    close(layer.delta_weight(), sum(s.view(-1, 1) * (B @ A) for A, B, s in zip(theirs.A, theirs.B, theirs.s)))
    assert layer.base.weight.grad is None


def test_one_block_with_s_at_alpha_over_r_is_lora():
    layer, x = random_layer(1), torch.randn(4, 10, dtype=torch.float64)
    layer.s.data.fill_(5 / 6)
    other = LoRALinear(layer.base, 6, alpha=5.0)
    other.A.data, other.B.data = layer.A.data.clone(), layer.B.data.clone()
    for m in (layer, other):
        m(x).square().sum().backward()
    close(layer(x), other(x))
    close(layer.A.grad, other.A.grad)
    close(layer.B.grad, other.B.grad)


def test_vector_scaling_scales_the_rows_of_the_output():
    layer = random_layer(3, "vector")
    before = layer.delta_weight()
    layer.s.data[2] *= 4
    layer.s.data[5] = 0
    want = before.clone()
    want[2] *= 4
    want[5] = 0
    close(layer.delta_weight(), want)


@pytest.mark.parametrize("scaling", ["scalar", "vector"])
def test_the_start(scaling):
    layer = MultiLoRALinear(nn.Linear(400, 900), 40, 4, scaling)
    assert not layer.s.any() and layer.s.requires_grad and layer.s.dtype == torch.float32
    for A, B in zip(layer.A.split(10), layer.B.split(10, 1)):           # U(±1/√fan_in), of each block by itself
        assert A.abs().max() <= 1 / 20 and abs(A.std() * 20 * math.sqrt(3) - 1) < 0.05
        assert B.abs().max() <= 1 / math.sqrt(10) and abs(B.std() * math.sqrt(10) * math.sqrt(3) - 1) < 0.05
    assert len({B[0, 0].item() for B in layer.B.split(10, 1)}) == 4


@pytest.mark.parametrize("scaling", ["scalar", "vector"])
def test_at_the_first_step_only_s_moves(gpt, scaling):
    idx = torch.randint(257, (2, 9))
    before = gpt(idx)[0]
    lora.inject(gpt, "all", 4, MultiLoRALinear, n_blocks=2, scaling=scaling)
    assert torch.equal(gpt(idx)[0], before)
    gpt(idx, idx)[1].backward()
    for m in lora.adapters(gpt).values():
        assert not m.A.grad.any() and not m.B.grad.any() and m.s.grad.abs().min() > 0
        m.s.data -= m.s.grad
    gpt.zero_grad()
    gpt(idx, idx)[1].backward()
    assert all(m.A.grad.any() and m.B.grad.any() for m in lora.adapters(gpt).values())


@pytest.mark.parametrize("n", [2, 4, 8])
def test_bytes_saved_for_the_backward_pass(n):
    idx, size = torch.randint(257, (8, 64)), {}
    saved_bytes = lambda model: held(model, lambda: model(idx, idx)[1])[1]
    for name, layer, settings in (("lora", LoRALinear, {}), ("multilora", MultiLoRALinear, {"n_blocks": n})):
        size[name] = saved_bytes(lora.inject(random_gpt(dtype=torch.float32), "all", 8, layer, **settings))
    model = lora.inject(random_gpt(dtype=torch.float32), "all", 8, MultiLoRALinear, n_blocks=n)
    for name, m in lora.adapters(model).items():
        model.set_submodule(name, WrittenOut(m))
    assert size["multilora"] <= 1.02 * size["lora"] and size["multilora"] < saved_bytes(model)


@pytest.mark.parametrize("scaling", ["scalar", "vector"])
def test_merge_save_load_and_switch(gpt, tmp_path, scaling):
    idx = torch.randint(257, (2, 9))
    base = gpt(idx)[0]
    randomise(lora.inject(gpt, "q v down", 4, MultiLoRALinear, n_blocks=2, scaling=scaling))
    apart = gpt(idx)[0]
    lora.save(gpt, tmp_path / "multi.pt")
    lora.merge(gpt)
    close(gpt(idx)[0], apart)
    assert all(m.kept is not None for m in lora.adapters(gpt).values())
    lora.unmerge(gpt)
    assert torch.equal(gpt(idx)[0], apart) and not torch.equal(apart, base)
    lora.remove(gpt)
    randomise(lora.inject(gpt, "all", 3))
    lora.save(gpt, tmp_path / "plain.pt")
    for _ in range(2):
        lora.load(gpt, tmp_path / "plain.pt")
        assert not torch.equal(gpt(idx)[0], apart)
        lora.load(gpt, tmp_path / "multi.pt")                           # from one method's layers to the other's
        assert torch.equal(gpt(idx)[0], apart)
    held = torch.load(tmp_path / "multi.pt", weights_only=True)["adapter"]
    assert held["settings"] == {"n_blocks": 2, "scaling": scaling} and len(held["tensors"]) == 2 * 3 * 3
    torch.save((idx, apart), tmp_path / "want.pt")
    code = f"""
import sys, torch; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]
import lora, multilora; from conftest import random_gpt
idx, want = torch.load({str(tmp_path / 'want.pt')!r})
assert torch.equal(lora.load(random_gpt(), {str(tmp_path / 'multi.pt')!r})(idx)[0], want)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    alone = subprocess.run([sys.executable, "-c", code.replace(", multilora", "")], capture_output=True, text=True)
    assert "made of MultiLoRALinear: import the file that defines it first" in alone.stderr


def test_over_a_bfloat16_base_it_stays_in_float32():
    layer = MultiLoRALinear(nn.Linear(6, 6).bfloat16(), 4, 2)
    assert {layer.A.dtype, layer.B.dtype, layer.s.dtype} == {torch.float32}
    assert layer(torch.randn(3, 6).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("settings, message", [
    (dict(n_blocks=4), "rank 6 in 4 blocks of equal rank: choose --n_blocks from 1 2 3 6, or another rank"),
    (dict(n_blocks=0), "rank 6 in 0 blocks"),
    (dict(n_blocks=12), "rank 6 in 12 blocks"),
    (dict(n_blocks=2, scaling="matrix"), "scaling matrix: choose scalar or vector"),
])
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        MultiLoRALinear(nn.Linear(10, 7), 6, **settings)
