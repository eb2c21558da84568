"""model.py against a NumPy GPT-2 written from the paper's formulas, and its promises one by one."""
import math
import urllib.error
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from conftest import TINY, random_gpt
from model import GPT, PRESETS, RELEASED, GPTConfig


def numpy_gpt2(w, idx, n_layer, n_head):
    """[T] -> [T, V] in float64, one row, one head at a time, no torch."""
    def ln(x, name):
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(var + 1e-5) * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    T = len(idx)
    x = w["wte.weight"][idx] + w["wpe.weight"][:T]                      # [T, C]
    for i in range(n_layer):
        a = ln(x, f"h.{i}.ln_1")
        q, k, v = (np.split(linear(a, f"h.{i}.attn.{m}"), n_head, -1) for m in "qkv")
        heads = []
        for q1, k1, v1 in zip(q, k, v):                                 # [T, hs] each
            s = q1 @ k1.T / math.sqrt(q1.shape[1])
            s[np.triu_indices(T, 1)] = -np.inf
            p = np.exp(s - s.max(-1, keepdims=True))
            heads.append(p / p.sum(-1, keepdims=True) @ v1)
        x = x + linear(np.concatenate(heads, -1), f"h.{i}.attn.o")
        u = linear(ln(x, f"h.{i}.ln_2"), f"h.{i}.mlp.up")
        gelu = 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        x = x + linear(gelu, f"h.{i}.mlp.down")
    return ln(x, "ln_f") @ w["wte.weight"].T


def test_forward_equals_numpy(gpt):
    idx = torch.randint(257, (3, 20))
    logits, loss = gpt(idx)
    w = {k: v.numpy() for k, v in gpt.state_dict().items()}
    want = np.stack([numpy_gpt2(w, row, TINY.n_layer, TINY.n_head) for row in idx.numpy()])
    assert loss is None and logits.shape == (3, 20, 257)
    assert np.abs(logits.detach().numpy() - want).max() <= 1e-10


def test_no_token_sees_the_next(gpt):
    a = torch.randint(257, (1, 20))
    b = a.clone()
    b[0, 12] = (b[0, 12] + 1) % 257
    diff = (gpt(a)[0] - gpt(b)[0]).abs().amax(-1)[0]
    assert diff[:12].max() <= 1e-12 and diff[12:].min() > 1e-6


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_counts_only_the_targets_that_matter(gpt, smoothing):
    idx, targets = torch.randint(257, (2, 9)), torch.randint(257, (2, 9))
    targets[0, :5] = targets[1, 7:] = -100
    logits, loss = gpt(idx, targets, smoothing)
    logp = logits.log_softmax(-1)
    each = [-(1 - smoothing) * logp[b, t, targets[b, t]] - smoothing * logp[b, t].mean()
            for b in range(2) for t in range(9) if targets[b, t] != -100]
    assert len(each) == 11 and abs(loss - sum(each) / 11) <= 1e-12


def test_loss_of_a_bf16_model_is_taken_in_float32():
    model = random_gpt(dtype=torch.bfloat16)
    idx = torch.randint(257, (2, 9))
    assert model(idx, idx)[1].dtype == torch.float32


def test_gradient_checkpointing_changes_nothing(gpt):
    idx = torch.randint(257, (2, 9))
    grads = []
    for flag in (False, True):
        gpt.config = replace(gpt.config, grad_checkpoint=flag)
        gpt.zero_grad()
        gpt(idx, idx)[1].backward()
        grads.append([p.grad.clone() for p in gpt.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_gradient_checkpointing_keeps_less(gpt):
    idx, sizes = torch.randint(257, (2, 9)), []
    for flag in (False, True):
        gpt.config, kept = replace(gpt.config, grad_checkpoint=flag), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            gpt(idx, idx)
        sizes.append(sum(kept))
    assert sizes[1] < 0.7 * sizes[0]


def test_initial_weights():
    model = GPT(replace(TINY, n_embd=64, n_layer=8))
    for name, p in model.named_parameters():
        if "ln_" in name or name.endswith("bias"):
            assert (p == ("ln_" in name and name.endswith("weight"))).all()
        else:
            want = 0.02 / 4 if name.endswith(("attn.o.weight", "mlp.down.weight")) else 0.02    # 4 = √(2 · 8 layers)
            assert abs(p.std() / want - 1) < 0.1, name


def test_row_longer_than_the_block(gpt):
    with pytest.raises(ValueError, match="65 tokens does not fit the model's block of 64"):
        gpt(torch.zeros(1, 65, dtype=torch.long))


@pytest.mark.parametrize("name, count", [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168),
                                         ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)])
def test_presets_have_the_published_sizes(name, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT(PRESETS[name]).parameters()) == count


# generation

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [200], [3, 1, 4, 1]]


def test_cached_generation_equals_rerunning_the_whole_row(gpt):
    want = []
    for p in PROMPTS:
        ids = list(p)
        for _ in range(20):
            ids.append(gpt(torch.tensor([ids]))[0][0, -1].argmax().item())
        want.append(ids[len(p):])
    assert len({tuple(w) for w in want}) == 3
    assert gpt.generate(PROMPTS, 20) == want                            # prompts of different lengths together
    assert gpt.generate(torch.tensor([PROMPTS[0]]), 20) == want[:1]     # a tensor


def test_generation_runs_each_position_once(gpt):
    seen = []
    gpt.ln_f.register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
    gpt.generate(PROMPTS, 20)
    assert seen == [7] + [1] * 19


def test_generation_stops(gpt):
    free = gpt.generate(PROMPTS, 20)
    stop = free[0][3]
    ended = gpt.generate(PROMPTS, 20, stop=stop)
    assert ended == [r[:r.index(stop)] if stop in r else r for r in free] and len(ended[0]) < 20
    steps = []
    gpt.ln_f.register_forward_hook(lambda *a: steps.append(1))
    gpt.generate(PROMPTS[:1], 20, stop=stop)
    assert len(steps) == len(ended[0]) + 1                              # and no longer


def test_generation_fills_the_block_exactly(gpt):
    assert len(gpt.generate([[1] * 60], 5)[0]) == 5        # the last token needs no position
    with pytest.raises(ValueError, match="room for 5 new ones, not 6"):
        gpt.generate([[1] * 60], 6)
    with pytest.raises(ValueError, match="at least one token"):
        gpt.generate([[1], []], 6)
    for wrong in (dict(temperature=-1), dict(temperature=1, top_k=0)):
        with pytest.raises(ValueError, match="temperature .* must be at least 0 and top_k .* at least 1"):
            gpt.generate([[1]], 6, **wrong)


def test_sampling(gpt):
    gpt.train()
    probs = (gpt(torch.tensor([[1, 2]]))[0][0, -1] / 0.1).softmax(-1)
    torch.manual_seed(0)
    draws = torch.tensor(gpt.generate([[1, 2]] * 4000, 1, temperature=0.1)).flatten()
    share = torch.bincount(draws, minlength=257) / 4000
    assert ((share - probs).abs() < 5 * (probs * (1 - probs) / 4000).sqrt() + 1 / 4000).all()   # five standard deviations
    top = set(probs.topk(3).indices.tolist())
    assert {r[0] for r in gpt.generate([[1, 2]] * 200, 1, temperature=1.0, top_k=3)} == top
    assert gpt.generate(PROMPTS, 9, temperature=1.0, top_k=1) == gpt.generate(PROMPTS, 9)
    assert gpt.training


# loading

def hf_layout(model, prefix=""):
    """The model as transformers writes it: c_attn fused and transposed, masks as buffers."""
    out = {}
    for k, v in model.state_dict().items():
        if ".attn.q." in k:
            parts = [model.state_dict()[k.replace(".q.", f".{m}.")] for m in "qkv"]
            k, v = k.replace(".q.", ".c_attn."), torch.cat(parts)
        elif ".attn.k." in k or ".attn.v." in k:
            continue
        k = k.replace("attn.o.", "attn.c_proj.").replace("mlp.up.", "mlp.c_fc.").replace("mlp.down.", "mlp.c_proj.")
        out[prefix + k] = v.T.clone() if ".c_" in k and v.ndim == 2 else v.clone()
    for i in range(model.config.n_layer):
        out[f"{prefix}h.{i}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
    return out


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_hf_layout(tmp_path, prefix):
    model = random_gpt(dtype=torch.float32)
    held = hf_layout(model, prefix)
    if prefix:
        held["lm_head.weight"] = held["transformer.wte.weight"].clone()
    torch.save(held, tmp_path / "hf.bin")
    with pytest.raises(ValueError, match="width 16 is no multiple of 64; say how many heads"):
        GPT.from_pretrained(tmp_path / "hf.bin")
    again = GPT.from_pretrained(tmp_path / "hf.bin", n_head=2)
    assert again.config == TINY
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize("spoil, message", [
    (lambda h: h.pop("h.1.ln_2.bias"), "missing h.1.ln_2.bias"),
    (lambda h: h.update({"h.1.attn.rotary": torch.zeros(2)}), "unexpected h.1.attn.rotary"),
    (lambda h: h.update({"h.0.mlp.c_fc.weight": torch.zeros(64, 16)}), r"h.0.mlp.up.weight is \(16, 64\), not \(64, 16\)"),
    (lambda h: h.update({"lm_head.weight": torch.zeros(257, 16)}), "lm_head.weight differs from wte.weight"),
    (lambda h: h.pop("wte.weight"), "no GPT-2 state dict: it has no .'wte.weight'"),
])
def test_hf_layout_that_does_not_fit(tmp_path, spoil, message):
    held = hf_layout(random_gpt(dtype=torch.float32))
    spoil(held)
    torch.save(held, tmp_path / "hf.bin")
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(tmp_path / "hf.bin", n_head=2)


def test_our_own_file_in_half_precision(tmp_path):
    model = random_gpt(dtype=torch.float16)
    torch.save({"config": asdict(TINY), "model": model.state_dict()}, tmp_path / "ours.pt")
    again = GPT.from_pretrained(tmp_path / "ours.pt")
    assert all(torch.equal(a, b.float()) and a.dtype == torch.float32
               for a, b in zip(again.state_dict().values(), model.state_dict().values()))


def test_released_weights_come_by_name(monkeypatch):
    model, asked = random_gpt(dtype=torch.float32, config=GPTConfig(50, 8, 1, 1, 64)), []

    def download(url, **options):
        asked.append((url, options))
        return hf_layout(model)

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    again = GPT.from_pretrained("gpt2-medium")
    assert torch.equal(again.h[0].attn.k.weight, model.h[0].attn.k.weight)
    assert asked[0][0] == RELEASED.format("gpt2-medium") and asked[0][1]["weights_only"] is True


def test_no_network(monkeypatch):
    def fail(*a, **k):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    with pytest.raises(ConnectionError, match="gpt2-medium: the weights could not be downloaded .* give its path"):
        GPT.from_pretrained("gpt2-medium")


def test_a_broken_download_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "gpt2.bin").write_text("<html>busy</html>")
    with pytest.raises(ValueError, match="gpt2: the download is broken .* delete .*gpt2.bin and try again"):
        GPT.from_pretrained("gpt2")


def test_files_that_hold_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="gpt3: no such file, and no preset either; presets are nano"):
        GPT.from_pretrained("gpt3")
    torch.save({"config": asdict(TINY), "model": random_gpt().state_dict()}, tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:5000])
    with pytest.raises(ValueError, match="cut.pt: not a complete file"):
        GPT.from_pretrained(tmp_path / "cut.pt")
    torch.save({"adapter": {}}, tmp_path / "adapter.pt")
    with pytest.raises(ValueError, match="holds an adapter, not a model"):
        GPT.from_pretrained(tmp_path / "adapter.pt")
    (tmp_path / "empty.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="empty.pt: not a complete file"):
        GPT.from_pretrained(tmp_path / "empty.pt")
    torch.save({"config": {"width": 3}, "model": {}}, tmp_path / "future.pt")
    with pytest.raises(ValueError, match="its sizes are not GPTConfig's"):
        GPT.from_pretrained(tmp_path / "future.pt")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list"):
        GPT.from_pretrained(tmp_path / "list.pt")


def test_nano_comes_along():
    from model import NANO
    assert NANO.stat().st_size < 2_000_000
    assert GPT.from_pretrained("nano").config == PRESETS["nano"]
