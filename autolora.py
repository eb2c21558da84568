"""
AutoLoRA: Automatically Tuning Matrix Ranks in Low-Rank Adaptation (2024, arXiv 2403.09113).

    h = W x + b + α Σⱼ aⱼ Bⱼ Aⱼᵀ dropout(x),    a = softmax(β),    j = 1 … k

Bⱼ is a column of B (d_out, k) and Aⱼᵀ a row of A (k, d_in): k candidates of rank one, each with a
selection variable aⱼ. ω, which is all A and B, learns from one part of the training rows, and β
from the other, so that β measures which candidates help on rows they were not fitted to:

    min_β L_val(ω'(β), β),    ω' = ω − η ∇_ω L_tr(ω, β)
    dL_val/dβ = ∇_β L_val(ω', β) − η ∇²_{βω} L_tr(ω, β) v,    v = ∇_ω L_val(ω', β)

A layer's rank is then the number of j with aⱼ ≥ 1/k. Finally a fresh LoRA with these ranks is
trained on all training rows.

What differs from the official code: s = α a, so that the layer starts as LoRA of rank k (there the
update is α/k · a). The threshold is applied to the a of the forward pass (there to β / Σβ). One
pass over the training rows serves ω', the real step and, with the `forward` hypergradient, one end
of the finite difference, so a step takes three passes instead of five.
"""
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn as nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import lora

GATES = ("softmax", "sigmoid", "none")              # the paper's, and its two ablations
HYPERGRADIENTS = ("exact", "central", "forward", "first-order")


def selection(beta, gate):
    """a (..., k), the selection variables of β (..., k)."""
    if gate == "softmax":
        return beta.softmax(-1)
    if gate == "sigmoid":
        return beta.sigmoid()
    return beta


def above_threshold(a):
    """(..., k) booleans: aⱼ ≥ 1/k up to rounding. The largest a is always kept."""
    return (a >= (1 - 1e-6) / a.size(-1)) | (a == a.amax(-1, keepdim=True))


class AutoLoRALinear(lora.LoRALinear):
    """An nn.Linear plus k = `rank` candidates of rank one; at first every aⱼ is 1/k.
    Raises ValueError for an unknown gate."""

    def __init__(self, base, rank, alpha=16.0, gate="softmax", dropout=0.0):
        super().__init__(base, rank, alpha, dropout)
        if gate not in GATES:
            raise ValueError(f"gate {gate} is unknown: choose from {' '.join(GATES)}")
        self.gate = gate
        share = torch.tensor(1 / rank, dtype=torch.float64)
        start = {"softmax": 0.0, "sigmoid": share.logit().item(), "none": share.item()}[gate]
        self.beta = nn.Parameter(torch.full_like(self.B[0], start))

    def scale(self):
        """s = α a, of shape (k,)."""
        return self.alpha * selection(self.beta, self.gate)


def ranks(model):
    """{module name: rank}, the number of aⱼ ≥ 1/k of each layer, to pass to `lora.inject`."""
    found = {}
    for name, m in lora.adapters(model).items():
        found[name] = int(above_threshold(selection(m.beta.detach(), m.gate)).sum())
    return found


def search_gradients(train, valid, omega, beta, eta, hypergrad="forward",
                     sum_over_processes=lambda tensors: None):
    """
    Fill the gradients of one step of the search: p.grad is ∇_ω L_tr(ω, β) for the tensors `omega`
    and dL_val/dβ for `beta`. Returns L_tr. The tensors themselves end exactly as they were.

    train(), valid()    yield the parts of a loss, the same at every call (dropout masks included)
    hypergrad           how the second term, ∇²_{βω} L_tr v, is computed: see `mixed_product`;
                        "first-order" leaves it out
    sum_over_processes  replaces each tensor of a list, in place, by its sum over the processes
    """
    if hypergrad not in HYPERGRADIENTS:
        raise ValueError(f"hypergrad {hypergrad} is unknown: choose from "
                         f"{' '.join(HYPERGRADIENTS)}")
    loss, g, g_beta = gradients(train, omega, beta, sum_over_processes)
    with moved(omega, -eta, g):                                 # ω' = ω − η ∇_ω L_tr(ω, β)
        _, v, d_beta = gradients(valid, omega, beta, sum_over_processes)    # v, ∇_β L_val(ω', β)
    if hypergrad != "first-order" and eta > 0:
        second = mixed_product(train, omega, beta, v, g_beta, hypergrad, sum_over_processes)
        d_beta = [a - eta * b for a, b in zip(d_beta, second)]              # dL_val/dβ
    for p, grad in zip([*omega, *beta], [*g, *d_beta]):
        p.grad = grad
    return loss


def mixed_product(train, omega, beta, v, g_beta, hypergrad, sum_over_processes):
    """
    ∇²_{βω} L_tr(ω, β) v for each tensor of `beta`. `g_beta` is ∇_β L_tr(ω, β).

    exact       differentiates twice, in the time of 4 to 6 passes for the whole step
    central     (∇_β L_tr(ω+εv) − ∇_β L_tr(ω−εv)) / 2ε, 4 passes, error O(ε²)
    forward     (∇_β L_tr(ω+εv) − ∇_β L_tr(ω)) / ε, 3 passes, error O(ε)
    """
    if hypergrad == "exact":
        products = partial(inner_products, train, omega, v)
        with sdpa_kernel(SDPBackend.MATH):      # the fused kernels cannot be differentiated twice
            _, _, product = gradients(products, [], beta, sum_over_processes)
        return product
    eps = 0.01 / nn.utils.get_total_norm(v).clamp(min=1e-30)    # as in DARTS (1806.09055)
    lower = g_beta
    width = eps
    if hypergrad == "central":
        with moved(omega, -eps, v):
            _, _, lower = gradients(train, [], beta, sum_over_processes)
        width = 2 * eps
    with moved(omega, eps, v):
        _, _, upper = gradients(train, [], beta, sum_over_processes)
    return [(a - b) / width for a, b in zip(upper, lower)]


@contextmanager
def moved(omega, step, direction):
    """In the block, ω is ω + step · direction. Afterwards it is exactly what it was."""
    start = [w.data for w in omega]
    try:
        for w, d in zip(omega, direction):
            w.data = w.data + step * d          # a new tensor: that of `start` does not change
        yield
    finally:
        for w, w0 in zip(omega, start):
            w.data = w0


def gradients(losses, omega, beta, sum_over_processes):
    """(L, ∇_ω L, ∇_β L) of the sum L of losses()."""
    tensors = [*omega, *beta]
    total = torch.zeros((), device=beta[0].device, dtype=beta[0].dtype)
    sums = list(map(torch.zeros_like, tensors))
    for loss in losses():
        total += loss.detach()
        for t, grad in zip(sums, torch.autograd.grad(loss, tensors)):
            t += grad
    sum_over_processes([total, *sums])
    return total, sums[:len(omega)], sums[len(omega):]


def inner_products(losses, omega, v):
    """Yield ⟨∇_ω L, v⟩, whose gradient by β is ∇²_{βω} L v, for each part L of a loss."""
    for loss in losses():
        g = torch.autograd.grad(loss, omega, create_graph=True)
        yield sum((a * b).sum() for a, b in zip(g, v))
