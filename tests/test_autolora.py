"""autolora.py: the layer's closed form, and the search's gradients computed in other ways."""
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
each_hypergradient = pytest.mark.parametrize("how", autolora.HYPERGRADIENTS)


# The layer and its ranks

def random_layer(gate):
    torch.manual_seed(0)
    layer = AutoLoRALinear(nn.Linear(10, 7).double(), 5, 3.0, gate)
    layer.B.data.normal_()
    return layer


@pytest.mark.parametrize("gate, a, jacobian", [
    ("softmax",
     lambda beta: np.exp(beta) / np.exp(beta).sum(),
     lambda a: np.diag(a) - np.outer(a, a)),
    ("sigmoid",
     lambda beta: 1 / (1 + np.exp(-beta)),
     lambda a: np.diag(a * (1 - a))),
    ("none",
     lambda beta: beta,
     lambda a: np.eye(len(a))),
])
def test_forward_and_gradients_match_the_closed_forms(gate, a, jacobian):
    layer = random_layer(gate)
    layer.beta.data.normal_()
    x = torch.randn(4, 10, dtype=torch.float64)
    g = torch.randn(4, 7, dtype=torch.float64)                  # ∂L/∂h
    h = layer(x)
    h.backward(g)
    A = layer.A.detach().numpy()
    B = layer.B.detach().numpy()
    W = layer.base.weight.detach().numpy()
    b = layer.base.bias.detach().numpy()
    a = a(layer.beta.detach().numpy())
    X = x.numpy()
    G = g.numpy()
    update = sum(a[j] * np.outer(B[:, j], A[j]) for j in range(5))
    close(h, torch.tensor(X @ W.T + b + 3 * X @ update.T))
    a_grad = 3 * ((X @ A.T) * (G @ B)).sum(0)                   # ∂L/∂aⱼ
    close(layer.beta.grad, torch.tensor(jacobian(a).T @ a_grad))
    close(layer.B.grad, torch.tensor(3 * G.T @ (X @ A.T) * a))
    close(layer.A.grad, torch.tensor(3 * (G @ B * a).T @ X))


@each_gate
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_starts_as_lora_of_rank_k_and_keeps_every_candidate(gate, dtype):
    linear = nn.Linear(100, 100).to(dtype)
    for k in range(1, 100):
        layer = AutoLoRALinear(linear, k, 3.0, gate)
        layer.B.data.normal_()
        close(layer.delta_weight(), 3 / k * layer.B @ layer.A, tol=10 * torch.finfo(dtype).eps)
        model = nn.ModuleDict({"q": layer})
        assert autolora.ranks(model) == {"q": k}
        layer.beta.data += 3.7                                  # softmax does not change
        assert autolora.ranks(model) == {"q": k}


@each_gate
def test_the_threshold_applies_to_the_selection_of_the_forward_pass(gate):
    """One official script applies it to β / Σβ instead, which gives other ranks."""
    layer = random_layer(gate)
    one_hot = torch.eye(5, 10).double()
    layer.A.data = one_hot
    layer.B.data = torch.ones(7, 5).double()
    for _ in range(20):
        layer.beta.data.normal_(-1.0)
        a = (layer(one_hot) - layer.base(one_hot))[:, 0] / 3    # row j of the update is α aⱼ
        assert autolora.ranks(nn.ModuleDict({"q": layer}))["q"] == max(1, (a >= 1 / 5).sum())


@each_gate
def test_stacked_selections_are_those_of_each_matrix(gate):
    """analyze.py passes the β of all steps and matrices at once, of shape (steps, matrices, k)."""
    torch.manual_seed(0)
    beta = torch.randn(3, 4, 5).double() - 2                    # often, no a is above 1/k
    a = autolora.selection(beta, gate)
    kept = autolora.above_threshold(a)
    assert a.shape == kept.shape == (3, 4, 5)
    for i in np.ndindex(3, 4):
        one = autolora.selection(beta[i], gate)
        close(a[i], one)
        want = one >= 1 / 5
        want[one.argmax()] = True
        assert torch.equal(kept[i], want)


@pytest.mark.parametrize("k", [2, 8, 64])
def test_the_threshold_tolerates_only_rounding(k):
    for below in (1e-5, 1e-3, 0.1):
        a = torch.full((k,), (1 + below) / k).double()
        a[0] = (1 - below) / k
        kept = autolora.above_threshold(a)
        assert not kept[0]
        assert kept[1:].all()
    rounded = torch.full((k,), 1 / k).double()
    rounded[0] *= 1 - 1e-8
    assert autolora.above_threshold(rounded).all()


def test_ranks_count_the_kept_candidates_and_inject_accepts_them(gpt):
    lora.inject(gpt, "q up", 6, AutoLoRALinear)
    for i, m in enumerate(lora.adapters(gpt).values()):         # aⱼ is proportional to e^(i j / 5)
        m.beta.data = 0.2 * i * torch.arange(6).double()
    ranks = autolora.ranks(gpt)
    assert ranks == {"h.0.attn.q": 6, "h.0.mlp.up": 3, "h.1.attn.q": 2, "h.1.mlp.up": 2}
    fresh = lora.adapters(lora.inject(random_gpt(), rank=ranks))
    assert {name: len(m.A) for name, m in fresh.items()} == ranks


# The search

def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


class Problem:
    """A GPT with k = 2 candidates in each q and up, and rows of the two parts of the data."""

    def __init__(self, dtype=torch.float64, dropout=0.0):
        self.model = random_gpt(dtype=dtype)
        lora.inject(self.model, "q up", 2, AutoLoRALinear, alpha=4.0, dropout=dropout)
        torch.manual_seed(1)
        self.omega = []
        self.beta = []
        for m in lora.adapters(self.model).values():
            m.B.data.normal_(0, 0.05)
            m.beta.data.normal_()
            self.omega += [m.A, m.B]
            self.beta += [m.beta]
        self.train = torch.randint(257, (4, 13))
        self.valid = torch.randint(257, (4, 13))
        self.passes = []
        self.positions = []         # ω in each pass
        self.limit = 99             # the pass after so many fails
        self.scale = 1.0            # of the loss

    def losses(self, rows, parts=2):
        self.passes.append("train" if rows is self.train else "valid")
        self.positions.append(flat(self.omega).detach())
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

    def hypergradient(self, eta, how, parts=2):
        return self.search(eta, how, parts)[2]

    def gradient(self, rows, tensors):
        return flat(torch.autograd.grad(sum(self.losses(rows)), tensors))


def test_exact_is_the_derivative_through_the_step():
    """Of L_val(ω − η ∇_ω L_tr(ω, β), β) as the paper writes it, with no tensor changed in place."""
    p = Problem()
    names = {id(t): name for name, t in p.model.named_parameters()}
    omega = {names[id(t)]: t.detach().clone().requires_grad_() for t in p.omega}
    beta = {names[id(t)]: t.detach().clone().requires_grad_() for t in p.beta}

    def loss(omega, rows):
        return functional_call(p.model, omega | beta, (rows[:, :-1], rows[:, 1:]))[1]

    with sdpa_kernel(SDPBackend.MATH):
        g = torch.autograd.grad(loss(omega, p.train), omega.values(), create_graph=True)
        ahead = {name: w - 0.5 * d for (name, w), d in zip(omega.items(), g)}
        want = flat(torch.autograd.grad(loss(ahead, p.valid), beta.values()))
    for _ in range(2):                                          # gradients are not accumulated
        value, g, h = p.search(0.5, "exact")
        close(h, want, tol=1e-10)
        close(g, p.gradient(p.train, p.omega))
        close(value, sum(p.losses(p.train)).detach())
        assert not value.requires_grad


def test_first_order_is_the_derivative_after_the_step():
    p = Problem()
    h = p.hypergradient(0.5, "first-order")
    torch.optim.SGD(p.omega, lr=0.5).step()
    close(h, p.gradient(p.valid, p.beta))


@pytest.mark.parametrize("dtype, scale, eta, central, forward", [
    (torch.float64, 1.0, 0.01, 1e-4, 1e-2),
    (torch.float64, 1.0, 1.0, 1e-4, 1e-2),
    (torch.float64, 1e3, 1e-3, 1e-4, 1e-2),
    (torch.float32, 1.0, 0.5, 1e-2, 3e-2)])
def test_the_finite_differences_approximate_the_exact_second_term(dtype, scale, eta, central,
                                                                 forward):
    p = Problem(dtype)
    p.scale = scale                                             # v is proportional to it
    h = {how: p.hypergradient(eta, how) for how in autolora.HYPERGRADIENTS}
    second = (h["exact"] - h["first-order"]).norm()             # errors are relative to this term
    assert second > 1e-4 * eta * h["exact"].norm()
    assert (h["central"] - h["exact"]).norm() <= central * second
    assert (h["forward"] - h["exact"]).norm() <= forward * second


@pytest.mark.parametrize("how, n_passes", list(zip(autolora.HYPERGRADIENTS, [3, 4, 3, 2])))
def test_each_hypergradient_takes_so_many_passes(how, n_passes):
    p = Problem()
    p.search(0.5, how)
    assert p.passes == ["train", "valid", "train", "train"][:n_passes]


@pytest.mark.parametrize("how, signs", [("central", [-1, 1]), ("forward", [1])])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_each_pass_is_at_its_own_point(how, signs, scale):
    """At ω, at ω' = ω − η ∇_ω L_tr, and at ω ± ε v, where ε = 0.01 / ‖v‖."""
    p = Problem()
    p.scale = scale
    start = flat(p.omega).detach()
    _, g, _ = p.search(0.5, how)
    positions = list(p.positions)
    torch.optim.SGD(p.omega, lr=0.5).step()
    v = p.gradient(p.valid, p.omega)                            # at ω'
    ahead = flat(p.omega).detach()
    step = 0.01 * v / v.norm()
    want = [start, ahead]
    for sign in signs:
        want.append(start + sign * step)
    assert len(positions) == len(want)
    for position, point in zip(positions, want):
        close(position - start, point - start, tol=1e-10)
    assert (ahead - start).norm() > 0.01
    close((start - ahead) / 0.5, g, tol=1e-10)


@each_hypergradient
def test_without_a_step_the_hypergradient_is_the_plain_gradient(how):
    p = Problem()
    h = p.hypergradient(0.0, how)
    assert p.passes == ["train", "valid"]
    close(h, p.gradient(p.valid, p.beta))


@each_hypergradient
def test_v_may_be_zero(how):
    p = Problem()
    for w in p.omega:
        w.data.zero_()
    _, g, h = p.search(0.5, how)
    assert not g.any()
    assert not h.any()                                          # in particular not 0 / 0


@each_hypergradient
@pytest.mark.parametrize("limit", [1, 2, 99])
def test_the_look_ahead_leaves_the_tensors_unchanged(how, limit):
    """Even if the second pass fails, at ω', or the third, at ω ± εv."""
    p = Problem()
    p.limit = limit
    before = [(w.data_ptr(), w.detach().clone()) for w in [*p.omega, *p.beta]]
    with suppress(KeyError):
        p.search(0.5, how)
    for w, (address, value) in zip([*p.omega, *p.beta], before):
        assert w.data_ptr() == address
        assert torch.equal(w, value)


@each_hypergradient
def test_omega_learns_only_from_training_rows_and_beta_from_validation_rows(how):
    p = Problem()
    other_valid = Problem()
    other_train = Problem()
    other_valid.valid = other_train.train = torch.randint(257, (4, 13))
    _, g, h = p.search(0.5, how)
    _, other_g, other_h = other_valid.search(0.5, how)
    assert torch.equal(other_g, g)
    assert not torch.equal(other_h, h)
    # The training rows reach β only through ω'.
    assert torch.equal(other_train.hypergradient(0.0, how), p.hypergradient(0.0, how))


def double(tensors):
    for t in tensors:
        t *= 2


@each_hypergradient
def test_all_sums_are_taken_over_processes(how):
    """Two processes that each have the same half of the loss give exactly the whole loss's."""
    p = Problem()
    half = Problem()
    half.scale = 0.5
    summed = half.search(0.5, how, sum_over_processes=double)
    assert all(map(torch.equal, summed, p.search(0.5, how)))


def test_the_number_of_parts_does_not_matter():
    loss, g, h = Problem().search(0.5, "exact", parts=1)
    parts = Problem().search(0.5, "exact", parts=4)
    close(parts[0], loss)
    close(parts[1], g, tol=1e-10)
    close(parts[2], h, tol=1e-10)


def test_every_pass_has_the_same_dropout_masks():
    p = Problem(dropout=0.3)
    exact = p.hypergradient(0.5, "exact")
    central = p.hypergradient(0.5, "central")
    assert (exact - central).norm() <= 1e-4 * exact.norm()      # other masks would be noise
    without = Problem().hypergradient(0.5, "exact")
    assert (exact - without).norm() > 0.01 * exact.norm()


def test_invalid_arguments_are_refused():
    with pytest.raises(ValueError, match="second.*: choose from exact central forward first-order"):
        Problem().search(0.5, "second")
    with pytest.raises(ValueError, match="gate tanh is unknown: choose from softmax sigmoid none"):
        random_layer("tanh")
