"""
MultiLoRA: Democratizing LoRA for Better Multi-Task Learning (Wang et al. 2023, arXiv 2311.11501).

    h = W x + b + Σᵢ sᵢ Bᵢ Aᵢ dropout(x),    i = 1 … n,    Aᵢ: (r/n, d_in)    Bᵢ: (d_out, r/n)

n small LoRAs work in parallel, each scaled by a learned factor sᵢ instead of α/r. The paper finds
that a few singular vectors dominate LoRA's ΔW, and that n blocks with different initialisations
share the work more evenly. Therefore each Bᵢ is initialised randomly, as each Aᵢ is, and each sᵢ
with zero, so that training starts at the base model. The sum as the paper writes it:

    h = base(x)
    for s_i, B_i, A_i in blocks:
        h = h + s_i * (dropout(x) @ A_i.T @ B_i.T)

This keeps n activations for the backward pass. With the Aᵢ stacked by rows into A (r, d_in) and the
Bᵢ by columns into B (d_out, r), however, Σᵢ sᵢ Bᵢ Aᵢ = B diag(s) A if sᵢ is repeated for each
column of Bᵢ. That is LoRA's own forward pass: two products and one activation for any n.

`rank` is the total rank r of all blocks. LoRA of the same rank can express the same ΔW and has the
same number of parameters except s, so only the way they learn differs. With scaling="vector", sᵢ
has one factor for each row of ΔW. There is no α, because s is learned.
"""
import math

import torch.nn as nn

import lora


class MultiLoRALinear(lora.LoRALinear):
    """
    An nn.Linear plus `n_blocks` LoRAs of rank `rank / n_blocks`. `scaling` is "scalar" or "vector".
    Raises ValueError if `n_blocks` does not divide `rank`, or for another scaling.
    """

    def __init__(self, base, rank, n_blocks=4, scaling="scalar", dropout=0.0):
        super().__init__(base, rank, dropout=dropout)
        if n_blocks < 1 or rank % n_blocks:
            divisors = " ".join(str(n) for n in range(1, rank + 1) if rank % n == 0)
            raise ValueError(f"n_blocks {n_blocks} does not divide rank {rank}: choose n_blocks "
                             f"from {divisors}, or another rank")
        if scaling not in ("scalar", "vector"):
            raise ValueError(f'scaling {scaling} is unknown: choose "scalar" or "vector"')
        self.n_blocks = n_blocks
        self.scaling = scaling
        self.block_rank = self.rank // n_blocks                 # r/n, columns of B that share an sᵢ
        for Bi in self.B.data.split(self.block_rank, dim=1):    # LoRA's A is initialised like this
            nn.init.kaiming_uniform_(Bi, a=math.sqrt(5))        # uniform in ±1/√(r/n)
        shape = (base.out_features, n_blocks) if scaling == "vector" else (n_blocks,)
        self.s = nn.Parameter(self.B.data.new_zeros(shape))

    def scale(self):
        """s with one factor for each column of B: (r,), or (d_out, r) with scaling="vector"."""
        return self.s.repeat_interleave(self.block_rank, dim=-1)
