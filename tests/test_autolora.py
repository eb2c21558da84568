"""autolora.py: its layer in closed form, the gradients of its search against other means."""
from contextlib import suppress

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import autolora
import lora
from autolora import AutoLoRALinear
from conftest import close, random_gpt

each_gate = pytest.mark.parametrize("gate", autolora.GATES)
each_way = pytest.mark.parametrize("how", autolora.HYPERGRADIENTS)


def random_layer(gate):
    torch.manual_seed(0)
    layer = AutoLoRALinear(nn.Linear(10, 7).double(), 5, 3.0, gate)
    layer.B.data.normal_()
    return layer


@pytest.mark.parametrize("gate, a, slope", [
    ("softmax", lambda b: np.exp(b) / np.exp(b).sum(), lambda a: np.diag(a) - np.outer(a, a)),
    ("sigmoid", lambda b: 1 / (1 + np.exp(-b)), lambda a: np.diag(a * (1 - a))),
    ("none", lambda b: b, lambda a: np.eye(len(a))),
])
def test_forward_and_gradients_are_the_closed_forms(gate, a, slope):
    layer = random_layer(gate)
    layer.beta.data.normal_()
    x, g = torch.randn(4, 10, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)
    h = layer(x)
    h.backward(g)
    A, B, beta, W, b = (p.detach().numpy() for p in layer.parameters())
    a, X, G = a(beta), x.numpy(), g.numpy()
    update = sum(a[j] * np.outer(B[:, j], A[j]) for j in range(5))
    close(h, torch.tensor(X @ W.T + b + 3 * X @ update.T))
    by_a = 3 * ((X @ A.T) * (G @ B)).sum(0)                                     # ∂L/∂aⱼ
    close(layer.beta.grad, torch.tensor(slope(a).T @ by_a))
    close(layer.B.grad, torch.tensor(3 * G.T @ (X @ A.T) * a))
    close(layer.A.grad, torch.tensor(3 * (G @ B * a).T @ X))


@each_gate
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_the_start_it_is_lora_of_rank_k_and_every_candidate_is_kept(gate, dtype):
    linear = nn.Linear(100, 100).to(dtype)
    for k in range(1, 100):
        layer = AutoLoRALinear(linear, k, 3.0, gate)
        layer.B.data.normal_()
        close(layer.delta_weight(), 3 / k * layer.B @ layer.A, tol=10 * torch.finfo(dtype).eps)
        model = nn.ModuleDict({"q": layer})
        assert autolora.ranks(model) == {"q": k}
        layer.beta.data += 3.7                                  # softmax does not see it
        assert autolora.ranks(model) == {"q": k}


@each_gate
def test_the_threshold_is_on_the_selection_of_the_forward_pass(gate):
    """It is a ≥ 1/k; of β itself, or β / Σβ as in one official script, it would be others."""
    layer, one_hot = random_layer(gate), torch.eye(5, 10).double()
    layer.A.data, layer.B.data = one_hot, torch.ones(7, 5).double()
    for _ in range(20):
        layer.beta.data.normal_(-1.0)
        a = (layer(one_hot) - layer.base(one_hot))[:, 0] / 3                    # row j is α aⱼ
        assert autolora.ranks(nn.ModuleDict({"q": layer}))["q"] == max(1, (a >= 1 / 5).sum())


def test_ranks_are_the_numbers_of_kept_candidates_as_inject_takes_them(gpt):
    lora.inject(gpt, "q up", 6, AutoLoRALinear)
    for i, m in enumerate(lora.adapters(gpt).values()):         # aⱼ in proportion to e^(i j / 5)
        m.beta.data = 0.2 * i * torch.arange(6).double()
    found = autolora.ranks(gpt)
    assert found == {"h.0.attn.q": 6, "h.0.mlp.up": 3, "h.1.attn.q": 2, "h.1.mlp.up": 2}
    assert [line.split() for line in autolora.rank_table(found).splitlines()] == [
        ["ranks", "q", "up"], ["h.0", "6", "3"], ["h.1", "2", "2"]]
    fresh = lora.adapters(lora.inject(random_gpt(), rank=found))
    assert {name: len(m.A) for name, m in fresh.items()} == found


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


class Problem:
    """A GPT with k = 2 candidates in two of its layers' matrices, and rows of both halves."""

    def __init__(self, dtype=torch.float64, dropout=0.0):
        self.model = random_gpt(dtype=dtype)
        lora.inject(self.model, "q up", 2, AutoLoRALinear, alpha=4.0, dropout=dropout)
        torch.manual_seed(1)
        layers = lora.adapters(self.model).values()
        for m in layers:
            m.B.data.normal_(0, 0.05)
            m.beta.data.normal_()
        self.omega = [p for m in layers for p in (m.A, m.B)]
        self.beta = [m.beta for m in layers]
        self.train, self.valid = torch.randint(257, (4, 13)), torch.randint(257, (4, 13))
        self.passes, self.limit, self.scale = [], 99, 1.0

    def losses(self, rows, parts=2):
        self.passes.append("train" if rows is self.train else "valid")
        if len(self.passes) > self.limit:
            raise KeyError
        torch.manual_seed(0)
        for x in rows.chunk(parts):
            yield self.scale * self.model(x[:, :-1], x[:, 1:])[1] / parts

    def search(self, eta, how, parts=2, **settings):
        """The loss, and the gradients of omega and of beta, each as one vector."""
        loss = autolora.search_gradients(
            lambda: self.losses(self.train, parts), lambda: self.losses(self.valid, parts),
            self.omega, self.beta, eta, how, **settings)
        return loss, flat(p.grad for p in self.omega), flat(p.grad for p in self.beta)

    def gradient(self, rows, tensors):
        return flat(torch.autograd.grad(sum(self.losses(rows)), tensors))


def test_exact_is_the_derivative_through_the_step_and_first_order_that_at_its_end():
    """Of L_val(ω − η ∇_ω L_tr(ω, β), β), with nothing changed in place."""
    p = Problem()
    names = {id(t): name for name, t in p.model.named_parameters()}
    omega, beta = ({names[id(t)]: t.detach().clone().requires_grad_() for t in tensors}
                   for tensors in (p.omega, p.beta))

    def loss(omega, rows):
        return functional_call(p.model, omega | beta, (rows[:, :-1], rows[:, 1:]))[1]

    with sdpa_kernel(SDPBackend.MATH):
        g = torch.autograd.grad(loss(omega, p.train), omega.values(), create_graph=True)
        ahead = {name: w - 0.5 * d for (name, w), d in zip(omega.items(), g)}
        want = torch.autograd.grad(loss(ahead, p.valid), beta.values())
    for _ in range(2):                                          # gradients are filled, not added
        value, g, h = p.search(0.5, "exact")
        close(h, flat(want), tol=1e-10)
        close(g, p.gradient(p.train, p.omega))
        close(value, sum(p.losses(p.train)).detach())
        assert not value.requires_grad                          # nor does it keep a graph
    h = p.search(0.5, "first-order")[2]
    torch.optim.SGD(p.omega, lr=0.5).step()
    close(h, p.gradient(p.valid, p.beta))


@pytest.mark.parametrize("dtype, scale, eta, central, forward", [
    (torch.float64, 1.0, 0.01, 1e-4, 1e-2), (torch.float64, 1.0, 1.0, 1e-4, 1e-2),
    (torch.float64, 1e3, 1e-3, 1e-4, 1e-2), (torch.float32, 1.0, 0.5, 1e-2, 3e-2)])
def test_finite_differences_are_close_to_exact(dtype, scale, eta, central, forward):
    p = Problem(dtype)
    p.scale = scale                                             # of the loss, and so of v
    h = {how: p.search(eta, how)[2] for how in autolora.HYPERGRADIENTS}
    second = (h["exact"] - h["first-order"]).norm()             # errors are of this term, not of h
    assert second > 1e-4 * eta * h["exact"].norm()
    assert (h["central"] - h["exact"]).norm() <= central * second
    assert (h["forward"] - h["exact"]).norm() <= forward * second


@pytest.mark.parametrize("how, passes", list(zip(autolora.HYPERGRADIENTS, [3, 4, 3, 2])))
def test_the_passes_that_each_takes_and_that_v_may_be_zero(how, passes):
    p, still = Problem(), Problem()
    p.search(0.5, how)
    assert p.passes == ["train", "valid", "train", "train"][:passes]
    h = still.search(0.0, how)[2]
    assert still.passes == ["train", "valid"]                   # two at η = 0
    close(h, still.gradient(still.valid, still.beta))
    for w in p.omega:
        w.data.zero_()
    assert not any(part.any() for part in p.search(0.5, how)[1:])               # not 0 / 0


@each_way
@pytest.mark.parametrize("limit", [1, 2, 99])
def test_the_look_ahead_leaves_no_trace(how, limit):
    """Nor where the second pass fails, at ω', or the third, at ω ± εv."""
    p = Problem()
    p.limit = limit
    before = [(w.data_ptr(), w.detach().clone()) for w in [*p.omega, *p.beta]]
    with suppress(KeyError):
        p.search(0.5, how)
    for w, (address, value) in zip([*p.omega, *p.beta], before):
        assert w.data_ptr() == address and torch.equal(w, value)


@each_way
def test_no_validation_gradient_reaches_a_and_b_and_no_training_gradient_beta(how):
    p, q, r = Problem(), Problem(), Problem()
    q.valid = r.train = torch.randint(257, (4, 13))
    assert torch.equal(q.search(0.5, how)[1], p.search(0.5, how)[1])            # to the bit
    assert not torch.equal(q.search(0.5, how)[2], p.search(0.5, how)[2])
    assert torch.equal(r.search(0.0, how)[2], p.search(0.0, how)[2])            # only through ω'


@each_way
def test_every_sum_is_taken_over_processes(how):
    """Two processes with the same half of a loss each: their sum is its double, exactly."""
    p, half = Problem(), Problem()
    half.scale = 0.5
    both = half.search(0.5, how, over_processes=lambda sums: [2 * t for t in sums])
    assert all(map(torch.equal, both, p.search(0.5, how)))


def test_parts_and_dropout_do_not_change_what_is_computed():
    whole, parts = Problem().search(0.5, "exact", parts=1), Problem().search(0.5, "exact", parts=4)
    for a, b in zip(whole, parts):
        close(a, b, tol=1e-10)
    p = Problem(dropout=0.3)                                    # the masks come back, or else
    exact, central = (p.search(0.5, how)[2] for how in ("exact", "central"))
    assert (exact - central).norm() <= 1e-4 * exact.norm()      # this would be noise
    assert (exact - parts[2]).norm() > 0.01 * exact.norm()


def test_a_hypergradient_that_does_not_exist():
    with pytest.raises(ValueError, match="second: choose from exact central forward first-order"):
        Problem().search(0.5, "second")


def test_the_table_keeps_long_names_apart():
    found = {"model.layers.10.mlp.down_proj": 12, "model.layers.10.mlp.gate_proj": 3}
    head, row = autolora.rank_table(found).splitlines()
    assert head.split() == ["ranks", "down_proj", "gate_proj"]
    assert row.split() == ["model.layers.10", "12", "3"] and len(head) == len(row)
