"""autolora.py: its layer in closed form, its hypergradient against differentiation by other means."""
import copy

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import autolora
import data
import lora
from autolora import AutoLoRALinear
from conftest import random_gpt
from lora import LoRALinear
from test_lora import close


def random_layer(gate="softmax", k=5, d_in=10, d_out=7):
    torch.manual_seed(0)
    layer = AutoLoRALinear(nn.Linear(d_in, d_out).double(), k, 3.0, gate)
    layer.B.data.normal_()
    return layer


# the layer

@pytest.mark.parametrize("gate", autolora.GATES)
@pytest.mark.parametrize("k", [1, 2, 5])
def test_at_the_start_it_is_lora_of_rank_k(gate, k):
    layer, x = random_layer(gate, k), torch.randn(4, 10, dtype=torch.float64)
    other = LoRALinear(layer.base, k, alpha=3.0)
    other.A.data, other.B.data = layer.A.data.clone(), layer.B.data.clone()
    close(layer(x), other(x))
    assert layer.kept_candidates().all()


@pytest.mark.parametrize("gate, a, slope", [
    ("softmax", lambda β: np.exp(β) / np.exp(β).sum(), lambda a: np.diag(a) - np.outer(a, a)),
    ("sigmoid", lambda β: 1 / (1 + np.exp(-β)), lambda a: np.diag(a * (1 - a))),
    ("none", lambda β: β, lambda a: np.eye(len(a))),
])
def test_forward_and_gradients_are_the_closed_forms(gate, a, slope):
    layer, x, g = random_layer(gate), torch.randn(4, 10, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)
    layer.beta.data.normal_()
    layer(x).backward(g)
    W, b, A, B, β = (t.detach().numpy() for t in (layer.base.weight, layer.base.bias, layer.A, layer.B, layer.beta))
    sel, X, G = a(β), x.numpy(), g.numpy()
    close(layer(x), torch.tensor(X @ W.T + b + 3 * sum(s * np.outer(X @ A[j], B[:, j]) for j, s in enumerate(sel))))
    by_s = 3 * ((X @ A.T) * (G @ B)).sum(0)                             # ∂/∂aⱼ
    close(layer.beta.grad, torch.tensor(slope(sel).T @ by_s))
    close(layer.B.grad, torch.tensor(3 * G.T @ (X @ A.T) * sel))
    close(layer.A.grad, torch.tensor(3 * (G @ B * sel).T @ X))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_uniform_selection_every_candidate_is_kept(dtype):
    for k in range(1, 200):
        for shift in (0.0, 3.7):
            layer = AutoLoRALinear(nn.Linear(200, 200).to(dtype), k)
            layer.beta.data += shift
            assert layer.kept_candidates().sum() == k


def test_the_rank_is_read_off_the_selection_of_the_forward_pass():
    layer = random_layer()
    layer.beta.data = torch.tensor([2.0, 1.9, 0.5, 0.4, 0.3]).double()      # each of them is above 1/k = 0.2
    assert layer.kept_candidates().tolist() == [True, True, False, False, False]
    layer.beta.data = torch.tensor([-1.0, -9.0, -1.1, -9.0, -9.0]).double() # and none here
    assert layer.kept_candidates().tolist() == [True, False, True, False, False]
    assert torch.equal(layer.kept_candidates(), layer.scale() / layer.alpha >= 1 / 5)
    for gate in ("sigmoid", "none"):
        layer = random_layer(gate)
        layer.beta.data = torch.tensor([-3.0, -5.0, -9.0, -4.0, -8.0]).double()
        assert layer.kept_candidates().tolist() == [True, False, False, False, False]   # one always


def test_a_gate_that_does_not_exist():
    with pytest.raises(ValueError, match="gate tanh: choose from softmax sigmoid none"):
        random_layer("tanh")


# the hypergradient

class Problem:
    """A GPT with k = 2 candidates in q and up of its layers, one batch to train on and one to validate on."""

    def __init__(self, dtype=torch.float64, dropout=0.0):
        self.model = lora.inject(random_gpt(dtype=dtype), "q up", 2, AutoLoRALinear, alpha=4.0, dropout=dropout)
        torch.manual_seed(1)
        self.layers = lora.adapters(self.model)
        for m in self.layers.values():
            m.B.data.normal_(0, 0.05)
            m.beta.data.normal_()
        self.omega = [p for m in self.layers.values() for p in (m.A, m.B)]
        self.beta = [m.beta for m in self.layers.values()]
        self.rows = [torch.randint(257, (4, 13)) for _ in range(2)]

    def losses(self, rows, seed=0, parts=2):
        torch.manual_seed(seed)
        for x in rows.chunk(parts):
            yield self.model(x[:, :-1], x[:, 1:])[1] / parts

    def hypergradient(self, eta, how, **kw):
        return autolora.hypergradient(lambda: self.losses(self.rows[0]), lambda: self.losses(self.rows[1]),
                                      self.omega, self.beta, eta, how, **kw)

    def outer(self, eta, *beta):
        """L_val(ω − η ∇_ω L_tr(ω, β), β) with nothing changed in place, to be differentiated by β as it is."""
        names = {id(p): n for n, p in self.model.named_parameters()}
        ω, β = ({names[id(p)]: v for p, v in zip(own, values)}
                for own, values in ((self.omega, [p.detach().requires_grad_() for p in self.omega]), (self.beta, beta)))

        def loss(params, rows):
            return functional_call(self.model, params, (rows[:, :-1], rows[:, 1:]))[1]

        with sdpa_kernel(SDPBackend.MATH):
            g = torch.autograd.grad(loss(ω | β, self.rows[0]), ω.values(), create_graph=True)
            ahead = {n: w - eta * d for (n, w), d in zip(ω.items(), g)}
            return loss(ahead | β, self.rows[1])


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def test_exact_is_the_derivative_through_the_step():
    p = Problem()
    β = [b.detach().clone().requires_grad_() for b in p.beta]
    want = torch.autograd.grad(p.outer(0.5, *β), β)
    loss, g, h = p.hypergradient(0.5, "exact")
    close(flat(h), flat(want), tol=1e-10)
    plain = sum(p.losses(p.rows[0]))
    close(loss, plain)
    assert not loss.requires_grad                                       # else each step would keep the graph of all before
    close(flat(g), flat(torch.autograd.grad(plain, p.omega)))


def test_exact_passes_gradcheck():
    p, eta = Problem(), 0.5

    class Outer(torch.autograd.Function):                               # forward: F(β); backward: ours
        @staticmethod
        def forward(ctx, *beta):
            for b, value in zip(p.beta, beta):
                b.data = value.detach().clone()
            with torch.enable_grad():
                return p.outer(eta, *beta).detach()

        @staticmethod
        def backward(ctx, grad):
            with torch.enable_grad():
                return tuple(grad * h for h in p.hypergradient(eta, "exact")[2])

    β = [b.detach().clone().requires_grad_() for b in p.beta]
    assert torch.autograd.gradcheck(Outer.apply, β, eps=1e-6, atol=1e-7, rtol=1e-4)


def test_exact_leaves_a_taylor_remainder_of_order_two():
    p, eta = Problem(), 0.5
    β = [b.detach().clone() for b in p.beta]
    h = p.hypergradient(eta, "exact")[2]
    d = [torch.randn_like(b) for b in β]
    slope, start = sum((x * y).sum() for x, y in zip(h, d)), p.outer(eta, *β)
    rest = [abs(p.outer(eta, *[b + t * x for b, x in zip(β, d)]) - start - t * slope).item() for t in (4e-3, 2e-3, 1e-3)]
    assert 3.8 < rest[0] / rest[1] < 4.2 and 3.8 < rest[1] / rest[2] < 4.2


@pytest.mark.parametrize("eta", [0.01, 1.0])
def test_finite_differences_are_close_to_exact_and_first_order_is_not(eta):
    p = Problem()
    h = {how: flat(p.hypergradient(eta, how)[2]) for how in autolora.HYPERGRADIENTS}
    error = {how: ((x - h["exact"]).norm() / (h["exact"] - h["first-order"]).norm()).item() for how, x in h.items()}
    assert error["central"] <= 1e-4 and error["forward"] <= 1e-2        # of the second term, which is more to ask than of h
    assert error["first-order"] == 1 and (h["exact"] - h["first-order"]).norm() > 1e-4 * eta * h["exact"].norm()


def test_first_order_looks_ahead_too():
    p, eta = Problem(), 0.5
    loss, g, h = p.hypergradient(eta, "first-order")
    for w, d in zip(p.omega, g):
        w.data -= eta * d
    close(flat(h), flat(torch.autograd.grad(sum(p.losses(p.rows[1])), p.beta)))


@pytest.mark.parametrize("how", autolora.HYPERGRADIENTS)
def test_at_eta_zero_all_are_the_gradient_of_the_validation_loss(how):
    p = Problem()
    h = p.hypergradient(0.0, how)[2]
    close(flat(h), flat(torch.autograd.grad(sum(p.losses(p.rows[1])), p.beta)))


@pytest.mark.parametrize("how", autolora.HYPERGRADIENTS)
@pytest.mark.parametrize("fails", [None, "valid", "train"])
def test_the_look_ahead_leaves_no_trace(how, fails):
    p = Problem()
    optimizer = torch.optim.AdamW(p.omega, lr=1e-2)
    sum(p.losses(p.rows[0])).backward()
    optimizer.step()
    p.model.zero_grad()
    state = copy.deepcopy(optimizer.state_dict()["state"])
    before = [(w.data_ptr(), w.detach().clone()) for w in [*p.omega, *p.beta]]
    calls = {"train": 0, "valid": 0}

    def losses(name, rows):
        calls[name] += 1
        if name == fails and (name == "valid" or calls[name] == 2):     # the second training pass is done at ω ± εv
            raise KeyError
        return p.losses(rows)

    def run():
        return autolora.hypergradient(lambda: losses("train", p.rows[0]), lambda: losses("valid", p.rows[1]),
                                      p.omega, p.beta, 0.5, how)

    if fails and not (fails == "train" and how == "first-order"):
        with pytest.raises(KeyError):
            run()
    else:
        run()
        assert calls == {"train": {"first-order": 1, "central": 3}.get(how, 2), "valid": 1}
    for w, (address, value) in zip([*p.omega, *p.beta], before):
        assert w.data_ptr() == address and torch.equal(w, value) and w.grad is None
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(state[i][k], after[i][k]) for i in state for k in state[i])


@pytest.mark.parametrize("how", autolora.HYPERGRADIENTS)
def test_no_validation_gradient_reaches_a_and_b_and_no_training_gradient_beta(how):
    p, other = Problem(), torch.randint(257, (4, 13))
    _, g, h = p.hypergradient(0.5, how)
    p.rows[1], kept = other, p.rows[1]
    assert torch.equal(flat(p.hypergradient(0.5, how)[1]), flat(g))     # to the bit
    p.rows = [other, kept]
    h0 = flat(p.hypergradient(0.0, how)[2])
    p.rows = [kept, kept]
    assert torch.equal(flat(p.hypergradient(0.0, how)[2]), h0)          # training rows come in through ω' alone


def test_parts_and_dropout_do_not_change_what_is_computed():
    p = Problem()
    whole = autolora.hypergradient(lambda: p.losses(p.rows[0], parts=1), lambda: p.losses(p.rows[1], parts=1),
                                   p.omega, p.beta, 0.5, "exact")
    parts = p.hypergradient(0.5, "exact")
    for a, b in zip(whole[1:], parts[1:]):
        close(flat(a), flat(b), tol=1e-10)
    p = Problem(dropout=0.3)                                            # the masks come back, or this would be noise
    exact, central = (flat(p.hypergradient(0.5, how)[2]) for how in ("exact", "central"))
    assert (exact - central).norm() <= 1e-4 * exact.norm()
    assert (exact - flat(parts[2])).norm() > 0.01 * exact.norm()


@pytest.mark.parametrize("how", autolora.HYPERGRADIENTS)
def test_where_nothing_depends_on_omega_the_hypergradient_is_zero(how):
    p = Problem()
    for m in p.layers.values():
        m.A.data.zero_()
        m.B.data.zero_()
    assert all((x == 0).all() for part in p.hypergradient(0.5, how)[1:] for x in part)     # not 0 / 0


def test_at_eta_zero_there_are_two_passes():
    p, calls = Problem(), []
    count = lambda i: lambda: calls.append(i) or p.losses(p.rows[i])
    autolora.hypergradient(count(0), count(1), p.omega, p.beta, 0.0, "central")
    assert calls == [0, 1]


def test_in_float32_the_finite_differences_still_hold():
    p = Problem(torch.float32)
    h = {how: flat(p.hypergradient(0.5, how)[2]) for how in autolora.HYPERGRADIENTS}
    second = (h["exact"] - h["first-order"]).norm()
    assert (h["central"] - h["exact"]).norm() <= 1e-2 * second and (h["forward"] - h["exact"]).norm() <= 3e-2 * second


def test_a_hypergradient_that_does_not_exist():
    with pytest.raises(ValueError, match="hypergradient second: choose from exact central forward first-order"):
        Problem().hypergradient(0.5, "second")


# from the search to the ranks

@pytest.mark.parametrize("gate", autolora.GATES)
def test_the_pruned_model_is_the_masked_one(gate):
    model = lora.inject(random_gpt(), "all", 6, AutoLoRALinear, alpha=5.0, gate=gate)
    torch.manual_seed(1)
    for m in lora.adapters(model).values():
        m.B.data.normal_()
        m.beta.data += torch.randn(6)
    idx, found = torch.randint(257, (2, 9)), autolora.ranks(model)
    assert 1 <= min(found.values()) < max(found.values()) < 6
    masked = copy.deepcopy(model)
    for m in lora.adapters(masked).values():
        a = m.scale() / m.alpha
        m.B.data *= (a >= 1 / 6) | (a == a.max())
    want, whole = masked(idx)[0], model(idx)[0]
    pruned = autolora.prune(model)
    assert {n: m.rank for n, m in lora.adapters(pruned).items()} == found
    assert {type(m) for m in lora.adapters(pruned).values()} == {LoRALinear}
    close(pruned(idx)[0], want)
    assert (whole - want).abs().max() > 1e-3
    assert [p.requires_grad for n, p in pruned.named_parameters()] == [n.endswith((".A", ".B")) for n, _ in pruned.named_parameters()]


@pytest.mark.parametrize("share", [0.7, 0.25])
def test_halves_are_disjoint_and_all_there_is(share):
    tok = data.tokenizer(257)
    tasks = data.load(["instruct", "facts"], tok, 512)
    for task, a, b in zip(tasks, *data.halves(tasks, share, 0)):
        key = lambda rows: [tuple(r.ids) for r in rows]
        assert len(a.train) == round(share * len(task.train)) and len(a.train) + len(b.train) == len(task.train)
        assert not set(key(a.train)) & set(key(b.train))
        assert sorted(key(a.train) + key(b.train)) == sorted(key(task.train))
        assert a.valid is task.valid and key(a.train) != key(task.train)[:len(a.train)]
    again, other = data.halves(tasks, share, 0), data.halves(tasks, share, 1)
    assert [r.ids for r in again[0][0].train] == [r.ids for r in data.halves(tasks, share, 0)[0][0].train]
    assert [r.ids for r in again[0][0].train] != [r.ids for r in other[0][0].train]
    with pytest.raises(ValueError, match="--split 0.001: of the 64 rows of facts, both parts need one at least"):
        data.halves(tasks, 0.001, 0)
