"""Shared by the tests: a small GPT with random weights, and comparisons of tensors."""
import copy
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
os.environ["OMP_NUM_THREADS"] = "1"     # faster for small models, and the same sums everywhere
os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(ROOT.parent / "shared" / "tiktoken"))

import pytest
import torch

import lora
from model import GPT, GPTConfig

TINY = GPTConfig(vocab_size=257, block_size=64, n_layer=2, n_head=2, n_embd=16)
IDX = torch.arange(18).view(2, 9) * 14 % 257                # two rows of tokens


def random_gpt(config=TINY, seed=0, dtype=torch.float64):
    """A GPT whose parameters are all random, including LayerNorms and biases."""
    torch.manual_seed(seed)
    model = GPT(config)
    for p in model.parameters():
        p.data = torch.randn(p.shape) * 0.3
    return model.to(dtype)


@pytest.fixture
def gpt():
    return random_gpt()


def randomise(model, seed=1):
    """Give every tensor of the model's adapters random values, as if they had been trained."""
    torch.manual_seed(seed)
    for m in lora.adapters(model).values():
        for p in m.parameters(recurse=False):
            p.data = torch.randn_like(p) * 0.2
    return model


def close(a, b, tol=1e-12):
    """Assert that two tensors are equal within `tol` of the largest value (or of 1, if larger)."""
    assert a.shape == b.shape
    difference = (a - b).abs().max()
    assert difference <= tol * max(1, b.abs().max()), difference


def logits(model):
    """The model's logits of IDX."""
    return model(IDX)[0]


def same(a, b):
    """Whether two tensors, or nested dicts, lists and tuples of tensors, are exactly equal."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b


def snapshot(model):
    """What a call that raises an error must not change."""
    layers = {name: type(m) for name, m in model.named_modules()}
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    return {"layers": layers, "trained": trained, "values": copy.deepcopy(model.state_dict())}
