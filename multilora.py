"""
MultiLoRA: Democratizing LoRA for Better Multi-Task Learning (Wang et al. 2023, arXiv 2311.11501).

    h = W x + b + Σᵢ sᵢ Bᵢ Aᵢ dropout(x),    i = 1 … n,    Aᵢ: (r/n, d_in)    Bᵢ: (d_out, r/n)

n small LoRAs side by side, each with a learned factor sᵢ instead of α/r. LoRA's ΔW is dominated by a few singular
vectors, the paper finds, and n blocks that start apart from each other share the work more evenly. So each Bᵢ starts
random, as each Aᵢ does, and sᵢ starts at zero, so that training still begins at the base model.

What differs from the paper, and why:
- No loop. With the Aᵢ stacked by rows into A (r, d_in) and the Bᵢ by columns into B (d_out, r), the sum is LoRA's
  ΔW = (B ∘ s) A with a factor for each column of B: two products and one (N, r) activation whatever n is.
- `rank` is the sum over the blocks, so LoRA of the same rank can express the same ΔW and has, but for s, as many
  parameters: what differs between the two is how they learn.
- sᵢ is a number, or with scaling="vector" one for every row of ΔW. There is no α: s is learned.
"""
import torch
import torch.nn as nn

import lora


class MultiLoRALinear(lora.LoRALinear):
    """
    An nn.Linear `base` (frozen) and `n_blocks` LoRAs of rank `rank / n_blocks` beside it. s is (n_blocks,), or
    (d_out, n_blocks) with scaling="vector". Raises ValueError where the blocks do not divide the rank.
    """

    def __init__(self, base, rank, n_blocks=4, scaling="scalar", dropout=0.0):
        super().__init__(base, rank, dropout=dropout)
        if not 1 <= n_blocks <= rank or rank % n_blocks:
            fit = [n for n in range(1, rank + 1) if rank % n == 0]
            raise ValueError(f"rank {rank} in {n_blocks} blocks of equal rank: choose --n_blocks from "
                             f"{' '.join(map(str, fit))}, or another rank")
        if scaling not in ("scalar", "vector"):
            raise ValueError(f"scaling {scaling}: choose scalar or vector")
        self.n_blocks = n_blocks
        for Bi in self.B.data.split(rank // n_blocks, dim=1):           # LoRA's A has this start already, row by row
            nn.init.kaiming_uniform_(Bi, a=5 ** 0.5)                    # U(±1/√(r/n))
        self.s = nn.Parameter(torch.zeros_like(self.B[:, :n_blocks] if scaling == "vector" else self.B[0, :n_blocks]))

    def scale(self):
        """s, one for each column of B: (r,) or (d_out, r)."""
        return self.s.repeat_interleave(self.rank // self.n_blocks, dim=-1)
