"""
AutoLoRA: Automatically Tuning Matrix Ranks in Low-Rank Adaptation (2024, arXiv 2403.09113).

    h = W x + b + α Σⱼ aⱼ Bⱼ Aⱼᵀ dropout(x),    a = softmax(β),    j = 1 … k

Bⱼ is a column of B (d_out, k), Aⱼᵀ a row of A (k, d_in): k candidates of rank one, each with a
selection variable. ω, all A and B, learns from one part of the training rows and β from the other,
so that β measures which candidates help on rows they were not fitted to:

    min_β L_val(ω'(β), β),    ω' = ω − η ∇_ω L_tr(ω, β)
    dL_val/dβ = ∇_β L_val(ω', β) − η ∇²_{βω} L_tr(ω, β) v,    v = ∇_ω L_val(ω', β)

A layer's rank is then the number of j with aⱼ ≥ 1/k, and a fresh LoRA of those ranks is trained on
all rows.

What differs from the official code: s = α a, so that the layer starts as LoRA of rank k (there it
is α/k · a). The threshold is applied to the a of the forward pass (not to β / Σβ, as there). One
pass over the training rows serves ω', the real step and, with `forward`, one end of the finite
difference: three passes a step, not five. The ranks come out as `lora.inject` takes them.
"""
import torch
import torch.nn as nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import lora

GATES = ("softmax", "sigmoid", "none")              # the paper's, and its two ablations
HYPERGRADIENTS = ("exact", "central", "forward", "first-order")


def selection(beta, gate="softmax"):
    """a (..., k), the selection variables of β (..., k)."""
    if gate == "softmax":
        return beta.softmax(-1)
    return beta.sigmoid() if gate == "sigmoid" else beta


def above_threshold(a):
    """(..., k) booleans: aⱼ ≥ 1/k, but for rounding; without softmax, the largest in any case."""
    return (a >= (1 - 1e-6) / a.size(-1)) | (a == a.amax(-1, keepdim=True))


class AutoLoRALinear(lora.LoRALinear):
    """k = `rank` candidates of rank one beside an nn.Linear, whose a are all 1/k at the start.
    Raises ValueError for a gate that does not exist."""

    def __init__(self, base, rank, alpha=16.0, gate="softmax", dropout=0.0):
        super().__init__(base, rank, alpha, dropout)
        if gate not in GATES:
            raise ValueError(f"gate {gate}: choose from {' '.join(GATES)}")
        self.gate = gate
        share = torch.tensor(1 / rank, dtype=torch.float64)
        start = {"softmax": 0.0, "sigmoid": share.logit().item(), "none": share.item()}[gate]
        self.beta = nn.Parameter(torch.full_like(self.B[0], start))

    def scale(self):
        """s = α a, of shape (k,)."""
        return self.alpha * selection(self.beta, self.gate)


def ranks(model):
    """{name: rank} that a model's selection variables ask for, as `lora.inject` takes it."""
    found = {}
    for name, m in lora.adapters(model).items():
        found[name] = int(above_threshold(selection(m.beta.detach(), m.gate)).sum())
    return found


def rank_table(found):
    """Ranks as text: a line for each layer of the model, a column for each target."""
    grid = {}
    for name, rank in found.items():
        layer, _, target = name.rpartition(".")
        grid.setdefault(layer.rpartition(".")[0], {})[target] = rank
    targets = list(dict.fromkeys(name.split(".")[-1] for name in found))
    first = max(15, *map(len, grid))
    lines = ["ranks".ljust(first) + "".join(f" {t:>5}" for t in targets)]
    for layer, row in grid.items():
        cells = [str(row.get(t, "-")).rjust(max(5, len(t))) for t in targets]
        lines.append(" ".join([layer.ljust(first), *cells]))
    return "\n".join(lines)


def search_gradients(train, valid, omega, beta, eta, how="forward", over_processes=list):
    """
    Fill the gradients of one step of the search: p.grad of the tensors `omega` is ∇_ω L_tr(ω, β),
    that of `beta` is dL_val/dβ. Returns L_tr. ω is moved on the way and put back, to the bit.

    train(), valid()    yield the parts of a loss, the same at every call (dropout masks too)
    over_processes      sums each tensor of a list over the processes, where there are several
    how                 exact: ∇²_{βω} L_tr v by differentiating twice, the time of 4 to 6 passes
                        central: (∇_β L_tr(ω+εv) − ∇_β L_tr(ω−εv)) / 2ε, 4 passes, error O(ε²)
                        forward: (∇_β L_tr(ω+εv) − ∇_β L_tr(ω)) / ε, 3 passes, error O(ε)
                        first-order: without that term, 2 passes
    """
    if how not in HYPERGRADIENTS:
        raise ValueError(f"hypergradient {how}: choose from {' '.join(HYPERGRADIENTS)}")
    start, n, second = [w.data for w in omega], len(omega), None
    try:
        loss, at_omega = gradients(train, [*omega, *beta], over_processes)
        g = at_omega[:n]                                                # ∇_ω L_tr(ω, β)
        move(omega, start, -eta, g)                                     # the look-ahead ω'
        _, ahead = gradients(valid, [*omega, *beta], over_processes)
        v, d_beta = ahead[:n], ahead[n:]                                # v, ∇_β L_val(ω', β)
        eps = 0.01 / nn.utils.get_total_norm(v).clamp(min=1e-30)        # DARTS' (1806.09055)
        if how == "exact" and eta > 0:
            move(omega, start, 0, v)                                    # back at ω
            second = mixed_derivative(train, omega, beta, v, over_processes)
        elif how in ("forward", "central") and eta > 0:
            lower, width = at_omega[n:], eps                            # ∇_β L_tr(ω, β)
            if how == "central":
                move(omega, start, -eps, v)
                _, lower = gradients(train, beta, over_processes)
                width = 2 * eps
            move(omega, start, eps, v)
            _, upper = gradients(train, beta, over_processes)
            second = [(a - b) / width for a, b in zip(upper, lower)]
    finally:
        for w, w0 in zip(omega, start):
            w.data = w0
    if second is not None:
        d_beta = [a - eta * b for a, b in zip(d_beta, second)]          # dL_val/dβ
    for p, grad in zip([*omega, *beta], [*g, *d_beta]):
        p.grad = grad
    return loss


def move(omega, start, step, direction):
    """ω ← start + step · direction"""
    for w, w0, d in zip(omega, start, direction):
        w.data = w0 + step * d


def gradients(losses, tensors, over_processes):
    """The sum of losses(), and its gradient for each of `tensors`."""
    zero = torch.zeros((), device=tensors[0].device, dtype=tensors[0].dtype)
    total = [zero, *map(torch.zeros_like, tensors)]
    for loss in losses():
        for t, grad in zip(total, [loss.detach(), *torch.autograd.grad(loss, tensors)]):
            t += grad
    value, *grads = over_processes(total)
    return value, grads


def mixed_derivative(losses, omega, beta, v, over_processes):
    """∇_β ⟨∇_ω L, v⟩ = ∇²_{βω} L v, for each of `beta`."""
    total = list(map(torch.zeros_like, beta))
    with sdpa_kernel(SDPBackend.MATH):         # the fused attentions differentiate once
        for loss in losses():
            g = torch.autograd.grad(loss, omega, create_graph=True)
            inner = sum((a * b).sum() for a, b in zip(g, v))
            for t, grad in zip(total, torch.autograd.grad(inner, beta)):
                t += grad
    return over_processes(total)
