"""
MultiLoRA: Democratizing LoRA for Better Multi-Task Learning (Wang et al. 2023, arXiv 2311.11501).

    h = W x + b + Σᵢ sᵢ Bᵢ Aᵢ dropout(x),    i = 1 … n,    Aᵢ: (r/n, d_in)    Bᵢ: (d_out, r/n)

n small LoRAs side by side, each with a learned factor sᵢ instead of α/r. A few singular vectors
rule LoRA's ΔW, the paper finds; n blocks that start apart share the work more evenly. So each Bᵢ
starts random, as each Aᵢ does, and sᵢ at zero, so that training starts at the base model.

The sum as the paper has it:

    h = base(x)
    for s_i, B_i, A_i in blocks:
        h = h + s_i * (dropout(x) @ A_i.T @ B_i.T)

It keeps n activations for the backward pass. But with the Aᵢ stacked by rows into A (r, d_in) and
the Bᵢ by columns into B (d_out, r), Σᵢ sᵢ Bᵢ Aᵢ = (B ∘ s) A, with sᵢ repeated for each column of
Bᵢ: this is LoRA's own forward, two products and one activation whatever n is.

`rank` is the sum over the blocks, so that LoRA of the same rank can express the same ΔW and has as
many parameters, but for s: what differs is how they learn. With scaling="vector", sᵢ has a factor
for every row of ΔW. There is no α: s is learned.
"""
import math

import torch
import torch.nn as nn

import lora


class MultiLoRALinear(lora.LoRALinear):
    """`n_blocks` LoRAs of rank `rank / n_blocks` beside an nn.Linear. s is (n,), or (d_out, n) with
    scaling="vector". Raises ValueError where the blocks do not divide the rank."""

    def __init__(self, base, rank, n_blocks=4, scaling="scalar", dropout=0.0):
        super().__init__(base, rank, dropout=dropout)
        if not 1 <= n_blocks <= rank or rank % n_blocks:
            fit = " ".join(str(n) for n in range(1, rank + 1) if rank % n == 0)
            raise ValueError(f"rank {rank} in {n_blocks} blocks of equal rank: choose --n_blocks "
                             f"from {fit}, or another rank")
        if scaling not in ("scalar", "vector"):
            raise ValueError(f"scaling {scaling}: choose scalar or vector")
        self.repeat = self.rank // n_blocks                     # columns of B that share a factor
        for Bi in self.B.data.split(self.repeat, dim=1):        # LoRA's A starts like this already
            nn.init.kaiming_uniform_(Bi, a=math.sqrt(5))        # U(±1/√(r/n))
        rows = self.B if scaling == "vector" else self.B[0]
        self.s = nn.Parameter(torch.zeros_like(rows[..., :n_blocks]))

    def scale(self):
        """s, one for each column of B: (r,) or (d_out, r)."""
        return self.s.repeat_interleave(self.repeat, dim=-1)
