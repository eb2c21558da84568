"""
AutoLoRA: Automatically Tuning Matrix Ranks in Low-Rank Adaptation (Zhang et al. 2024, arXiv 2403.09113).

    h = W x + b + α Σⱼ aⱼ Bⱼ Aⱼᵀ dropout(x),    a = softmax(β),    j = 1 … k

Bⱼ is a column of B (d_out, k), Aⱼᵀ a row of A (k, d_in): k candidates of rank one, each with a selection variable.
ω, all A and B, learns from one part of the training rows and β from the other, so that β measures which candidates
help on rows they were not fitted to:

    min_β L_val(ω'(β), β),    ω' = ω − η ∇_ω L_tr(ω, β)
    dL_val/dβ = ∇_β L_val(ω', β) − η ∇²_{βω} L_tr(ω, β) v,    v = ∇_ω L_val(ω', β)

A layer's rank is then the number of j with aⱼ ≥ 1/k, and a fresh LoRA of those ranks is trained on all rows.

What differs from the official code, and why:
- s = α a, so that at the start, β = 0, the layer is LoRA of rank k to the letter. The official code has α/k · a.
- The threshold is applied to the a of the forward pass. The official script for GLUE applies it to β / Σβ.
- One pass over the training rows serves the look-ahead ω', the real step and, with `forward`, one end of the finite
  difference: three passes an iteration. The official code takes five, because its real step comes after β's and so
  needs a pass of its own, and its ω' is a step of its optimizer where ours is the equation's plain gradient step.
- The ranks come out as a dict that `lora.inject` takes. The official code has them pasted into a list by hand.
"""
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import lora

# {name: (a from β, β at which a = 1/k)}; the second and third are the paper's ablations
GATES = {
    "softmax": (lambda beta: beta.softmax(0), lambda k: 0.0),
    "sigmoid": (torch.sigmoid, lambda k: torch.logit(torch.tensor(1 / k, dtype=torch.float64))),
    "none": (lambda beta: beta, lambda k: 1 / k),
}
HYPERGRADIENTS = ("exact", "central", "forward", "first-order")


class AutoLoRALinear(lora.LoRALinear):
    """
    An nn.Linear `base` (frozen) and `max_rank` candidates of rank one beside it, with selection variables
    a = gate(β), all 1/max_rank at the start. Raises ValueError for a gate that does not exist.
    """

    def __init__(self, base, max_rank, alpha=16.0, gate="softmax", dropout=0.0):
        super().__init__(base, max_rank, alpha, dropout)
        if gate not in GATES:
            raise ValueError(f"gate {gate}: choose from {' '.join(GATES)}")
        self.gate = gate
        self.beta = nn.Parameter(torch.full_like(self.B[0], GATES[gate][1](max_rank)))

    def selection(self):
        """a (k,), the selection variables."""
        return GATES[self.gate][0](self.beta)

    def scale(self):
        """s = α a, of shape (k,)."""
        return self.alpha * self.selection()

    @torch.no_grad()
    def kept_candidates(self):
        """(k,) booleans: a ≥ 1/k, and the largest in any case: at the start, where all are equal, all of them."""
        a = self.selection()
        return (a >= 1 / self.rank) | (a == a.max())


def hypergradient(train, valid, omega, beta, eta, how="forward"):
    """
    One iteration's loss and gradients: L_tr (ω, β), its gradient for each tensor of the list `omega`, and dL_val/dβ
    for each of `beta`. `train()` and `valid()` yield the parts of a loss one by one, the same at every call (so a
    dropout mask has to come back). Under torchrun the gradients are summed over the processes, the loss is not. ω is
    moved on the way and put back: the very tensors, as they were. `how`:

        exact        ∇²_{βω} L_tr v by differentiating twice: the time of four to six passes
        central      (∇_β L_tr(ω + εv) − ∇_β L_tr(ω − εv)) / 2ε with ε = 0.01 / ‖v‖: four passes, error O(ε²)
        forward      (∇_β L_tr(ω + εv) − ∇_β L_tr(ω)) / ε: three passes, error O(ε)
        first-order  without the second term: two passes
    """
    if how not in HYPERGRADIENTS:
        raise ValueError(f"hypergradient {how}: choose from {' '.join(HYPERGRADIENTS)}")
    start = [w.data for w in omega]

    def place(direction, step):                                         # ω ← start + step · direction
        for w, w0, d in zip(omega, start, direction):
            w.data = w0 + step * d

    try:
        loss, g, g_beta = gradients(train, omega, beta)
        place(g, -eta)                                                  # the look-ahead ω'
        _, v, h = gradients(valid, omega, beta)                         # v and ∇_β L_val(ω', β)
        if how == "first-order" or eta == 0:
            return loss, g, h
        if how == "exact":
            place(v, 0)                                                 # at ω again
            second = mixed_derivative(train, omega, beta, v)
        else:
            eps = 0.01 / nn.utils.get_total_norm(v).clamp(min=1e-30)
            place(v, eps)
            _, _, above = gradients(train, [], beta)
            below, width = g_beta, eps
            if how == "central":
                place(v, -eps)
                _, _, below = gradients(train, [], beta)
                width = 2 * eps
            second = [(a - b) / width for a, b in zip(above, below)]
        return loss, g, [a - eta * b for a, b in zip(h, second)]        # dL_val/dβ
    finally:
        for w, w0 in zip(omega, start):
            w.data = w0


def gradients(losses, omega, beta):
    """The sum of `losses()` in this process and, over all processes, its gradients for ω and for β."""
    params, value = [*omega, *beta], 0.0
    total = [torch.zeros_like(p) for p in params]
    for loss in losses():
        value = value + loss.detach()
        for t, grad in zip(total, torch.autograd.grad(loss, params)):
            t += grad
    total = over_processes(total)
    return value, total[:len(omega)], total[len(omega):]


def mixed_derivative(losses, omega, beta, v):
    """∇_β ⟨∇_ω L, v⟩ = ∇²_{βω} L v, for each of `beta`."""
    total = [torch.zeros_like(p) for p in beta]
    with sdpa_kernel(SDPBackend.MATH):                                  # the fused attentions differentiate once
        for loss in losses():
            g = torch.autograd.grad(loss, omega, create_graph=True)
            inner = sum((a * b).sum() for a, b in zip(g, v))
            for t, grad in zip(total, torch.autograd.grad(inner, beta)):
                t += grad
    return over_processes(total)


def over_processes(tensors):
    """Each summed over the processes of torchrun, if there are several."""
    if dist.is_initialized():
        for t in tensors:
            dist.all_reduce(t)
    return tensors


def ranks(model):
    """{name: rank} that a model's selection variables ask for, as `lora.inject` takes it."""
    return {name: int(m.kept_candidates().sum()) for name, m in lora.adapters(model).items()}


@torch.no_grad()
def prune(model):
    """Turn a model's AutoLoRA layers into LoRA layers of the kept candidates, the others left out. Returns the model."""
    found, layers = ranks(model), lora.adapters(model)
    first = next(iter(layers.values()))
    lora.remove(model)
    lora.inject(model, rank=found, alpha=first.alpha, dropout=first.dropout.p)
    for name, m in lora.adapters(model).items():
        keep = layers[name].kept_candidates()
        Bs, A = layers[name].factors()
        m.A.copy_(A[keep])
        m.B.copy_(Bs[:, keep] / m.scale())
    return model
