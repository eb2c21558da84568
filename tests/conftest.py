import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
os.environ["OMP_NUM_THREADS"] = "1"     # faster for models this small, and the same sums in every process
os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(ROOT.parent / "shared" / "tiktoken"))

import pytest
import torch

from model import GPT, GPTConfig

TINY = GPTConfig(vocab_size=257, block_size=64, n_layer=2, n_head=2, n_embd=16)


def random_gpt(config=TINY, seed=0, dtype=torch.float64):
    """A GPT none of whose parameters is special: LayerNorms and biases are random too."""
    torch.manual_seed(seed)
    model = GPT(config)
    for p in model.parameters():
        p.data = torch.randn(p.shape) * 0.3
    return model.to(dtype)


@pytest.fixture
def gpt():
    return random_gpt()
