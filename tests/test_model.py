"""model.py against a GPT-2 in NumPy, written from the paper's formulas; generation; weights."""
import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

import lora
from conftest import TINY, close, random_gpt, randomise, same
from model import GPT, PRESETS, GPTConfig


def numpy_gpt2(w, idx, n_layer, n_head):
    """(T,) -> (T, V) in float64, for one row and one head at a time, without torch."""
    def ln(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    x = w["wte.weight"][idx] + w["wpe.weight"][:len(idx)]               # (T, C)
    for i in range(n_layer):
        a = ln(x, f"h.{i}.ln_1")
        q, k, v = (np.split(linear(a, f"h.{i}.attn.{m}"), n_head, -1) for m in "qkv")
        heads = []
        for q1, k1, v1 in zip(q, k, v):                                 # (T, hs) each
            s = q1 @ k1.T / np.sqrt(q1.shape[1])
            s[np.triu_indices(len(idx), 1)] = -np.inf
            p = np.exp(s - s.max(-1, keepdims=True))
            heads.append(p / p.sum(-1, keepdims=True) @ v1)
        x = x + linear(np.concatenate(heads, -1), f"h.{i}.attn.o")
        u = linear(ln(x, f"h.{i}.ln_2"), f"h.{i}.mlp.up")
        gelu = 0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))
        x = x + linear(gelu, f"h.{i}.mlp.down")
    return ln(x, "ln_f") @ w["wte.weight"].T


def test_forward_equals_numpy(gpt):
    idx = torch.randint(257, (3, 20))
    logits, loss = gpt(idx)
    w = {name: p.numpy() for name, p in gpt.state_dict().items()}
    want = np.stack([numpy_gpt2(w, row, TINY.n_layer, TINY.n_head) for row in idx.numpy()])
    assert loss is None and logits.shape == (3, 20, 257)
    assert np.abs(logits.detach().numpy() - want).max() <= 1e-10


def test_no_token_sees_the_next(gpt):
    a = torch.randint(257, (1, 20))
    b = a.clone()
    b[0, 12] = (b[0, 12] + 1) % 257
    diff = (gpt(a)[0] - gpt(b)[0]).abs().amax(-1)[0]
    assert diff[:12].max() <= 1e-12 and diff[12:].min() > 1e-6


@pytest.mark.parametrize("dtype, rounding", [(torch.float64, 1e-12), (torch.bfloat16, 1e-6)])
def test_the_loss_ignores_targets_of_minus_100_and_smooths_the_others(dtype, rounding):
    """It is computed in float32 even from a bfloat16 model's logits."""
    idx = torch.randint(257, (2, 9))
    targets = torch.randint(257, (2, 9))
    targets[0, :5] = -100
    targets[1, 7:] = -100
    logits, loss = random_gpt(dtype=dtype)(idx, targets, 0.1)
    logp = logits.double().log_softmax(-1)
    total = 0
    for b, t in torch.nonzero(targets != -100).tolist():
        total -= 0.9 * logp[b, t, targets[b, t]] + 0.1 * logp[b, t].mean()
    assert (targets != -100).sum() == 11 and abs(loss - total / 11) <= rounding * loss


def test_initial_weights():
    model = GPT(replace(TINY, n_embd=64, n_layer=8))            # √(2 · 8 layers) = 4
    for name, p in model.named_parameters():
        if "ln_" in name or name.endswith("bias"):
            assert (p == ("ln_" in name and name.endswith("weight"))).all()
        else:
            want = 0.02 / 4 if name.endswith(("attn.o.weight", "mlp.down.weight")) else 0.02
            assert abs(p.std() / want - 1) < 0.1, name


RELEASED = {        # name: layers, heads, width, parameters
    "gpt2": (12, 12, 768, 124_439_808), "gpt2-medium": (24, 16, 1024, 354_823_168),
    "gpt2-large": (36, 20, 1280, 774_030_080), "gpt2-xl": (48, 25, 1600, 1_557_611_200),
}


@pytest.mark.parametrize("name", [*RELEASED, "tiny", "nano"])
def test_presets_have_the_published_sizes(name):
    with torch.device("meta"):
        model = GPT(PRESETS[name])
    layers, heads, width, count = RELEASED.get(name, (2, 1, 64, 3_382_080))
    V, T = 50257, 1024
    if name == "nano":
        model = GPT.from_pretrained(name)
        layers, heads, width, count = 4, 4, 128, 891_776
        V, T = 257, 512
    assert model.config == PRESETS[name] == GPTConfig(V, T, layers, heads, width)
    assert len(model.h) == layers and {block.attn.n_head for block in model.h} == {heads}
    assert model.wte.weight.shape == (V, width) and model.wpe.weight.shape == (T, width)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("name", RELEASED)
def test_released_files_have_heads_of_64_at_every_width(name, tmp_path):
    """They do not contain the number of heads."""
    _, heads, width, _ = RELEASED[name]
    with torch.device("meta"):
        released = GPT(GPTConfig(9, 8, 1, heads, width)).hf_state_dict()
    torch.save({key: torch.zeros(t.shape) for key, t in released.items()}, tmp_path / "a.bin")
    model = GPT.from_pretrained(tmp_path / "a.bin")
    assert model.config == GPTConfig(9, 8, 1, heads, width)
    assert model.h[0].attn.n_head == heads and width == 64 * heads


# Generation ---------------------------------------------------------------------------------------
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [200], [3, 1, 4, 1]]


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[::-1], PROMPTS[:1], [[1, 2], [3, 4]]])
def test_cached_generation_equals_rerunning_the_whole_row(gpt, prompts):
    """Every new token is the most likely one, and the final hidden states are the same, too."""
    seen = []
    gpt.ln_f.register_forward_hook(lambda m, args, out: seen.append(out))
    new = gpt.generate(prompts, 20)
    assert [x.size(1) for x in seen] == [max(map(len, prompts))] + [1] * 19     # no token twice
    for p, tokens, got in zip(prompts, new, torch.stack([x[:, -1] for x in seen], 1)):
        logits, _ = gpt(torch.tensor([p + tokens[:-1]]))
        assert logits[0, len(p) - 1:].argmax(-1).tolist() == tokens
        close(got, seen[-1][0, len(p) - 1:])


def test_generation_stops_at_the_stop_token_and_without_dropout(gpt):
    randomise(lora.inject(gpt, rank=4, dropout=0.9))
    free = gpt.eval().generate(PROMPTS, 20)
    assert not gpt.training
    stop = free[0][3]
    ended = gpt.train().generate(PROMPTS, 20, stop=stop)
    assert ended == [r[:r.index(stop)] if stop in r else r for r in free]
    assert gpt.training                                                 # its mode is restored


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS[1:], PROMPTS])
def test_generation_stops_when_the_last_row_has_ended(gpt, prompts):
    """It makes no pass through the model whose result would be cut off."""
    free = gpt.generate(prompts, 20)
    longest = 0
    stop = free[0][3]
    for row in free:
        longest = max(longest, row.index(stop) if stop in row else 19)
    passes = []
    gpt.ln_f.register_forward_hook(lambda *_: passes.append(1))
    ended = gpt.generate(prompts, 20, stop=stop)
    assert ended == [row[:row.index(stop)] if stop in row else row for row in free]
    assert len(passes) == longest + 1                                   # one for the stop token
    assert len(prompts) > 1 or len(passes) <= 4


def test_the_block_can_be_filled_exactly(gpt):
    prompts = [[1] * 60, [2]]
    new = gpt.generate(prompts, 5)                  # the last new token needs no position
    assert [len(row) for row in new] == [5, 5]
    with pytest.raises(ValueError, match="leaves room for 5 new tokens, not for 6"):
        gpt.generate(prompts, 6)
    with pytest.raises(ValueError, match="every prompt must have at least one token"):
        gpt.generate([[1], []], 6)
    with pytest.raises(ValueError, match="row of 65 tokens exceeds the block size, 64"):
        gpt(torch.zeros(1, 65, dtype=torch.long))


# Weights in and out -------------------------------------------------------------------------------
HF = random_gpt(dtype=torch.float32).hf_state_dict()


def test_hf_state_dict_has_the_released_layout(gpt):
    """Query, key and value side by side, all matrices (d_in, d_out)."""
    saved = gpt.hf_state_dict()
    for theirs, ours in [("attn.c_attn", "attn.q attn.k attn.v"), ("attn.c_proj", "attn.o"),
                         ("mlp.c_fc", "mlp.up"), ("mlp.c_proj", "mlp.down")]:
        linears = [gpt.h[1].get_submodule(name) for name in ours.split()]
        W = torch.cat([m.weight for m in linears])
        b = torch.cat([m.bias for m in linears])
        assert torch.equal(saved[f"h.1.{theirs}.weight"], W.T)
        assert torch.equal(saved[f"h.1.{theirs}.bias"], b)
    before = copy.deepcopy(saved)
    for p in gpt.parameters():
        p.data.zero_()
    assert same(saved, before)                                  # it is a copy


class Scaled(torch.nn.Linear):
    """A layer that computes something else than its weights say, as an adapter does."""


@pytest.mark.parametrize("name", ["h.1.attn.v", "h.0.mlp.down"])
def test_hf_state_dict_refuses_layers_of_any_other_class_than_linear(gpt, name):
    old = gpt.get_submodule(name)
    gpt.set_submodule(name, Scaled(old.in_features, old.out_features))
    with pytest.raises(ValueError, match=f"{name[:3]} .*{name[4:]} must be plain nn.Linear"):
        gpt.hf_state_dict()


def test_the_hf_layout_is_read_back_exactly(tmp_path):
    """With the prefix, the head and the masks that complete files of transformers have."""
    model = random_gpt(dtype=torch.float32)
    saved = {f"transformer.{name}": tensor for name, tensor in model.hf_state_dict().items()}
    saved["lm_head.weight"] = model.wte.weight.data
    saved["transformer.h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
    saved["transformer.h.1.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save(saved, tmp_path / "hf.bin")
    with pytest.raises(ValueError, match="hf.bin .*number of heads is unknown for width 16"):
        GPT.from_pretrained(tmp_path / "hf.bin")
    again = GPT.from_pretrained(tmp_path / "hf.bin", n_head=2)
    assert again.config == TINY and same(again.state_dict(), model.state_dict())


UNREADABLE = "cannot be read as a complete GPT-2 "


@pytest.mark.parametrize("saved, size, reason", [
    ({k: v for k, v in HF.items() if k != "wte.weight"}, None, UNREADABLE + ".*wte.weight"),
    ({k: v for k, v in HF.items() if k != "h.1.ln_2.bias"}, None, UNREADABLE + ".*h.1.ln_2.bias"),
    (HF | {"h.1.attn.rotary": torch.zeros(2)}, None, UNREADABLE + ".*h.1.attn.rotary"),
    (HF | {"h.0.mlp.c_fc.weight": torch.zeros(64, 16)}, None, UNREADABLE + ".*h.0.mlp.up.weight"),
    (HF | {"lm_head.weight": torch.zeros(257, 16)}, None, UNREADABLE + ".*lm_head.weight"),
    ({"config": {"width": 3}, "model": {}}, None, UNREADABLE + ".*width"),
    ({"adapter": {}}, None, "contains an adapter, not a model"),
    ({"tensors": {}, "layer": "LoRALinear"}, None, "contains an adapter, not a model"),
    ([1], None, "not a complete file of torch.save"),
    (HF, 0, "not a complete file of torch.save"),
    (HF, 5000, "not a complete file of torch.save"),                 # truncated
])
def test_an_error_names_the_file_that_contains_no_model(tmp_path, saved, size, reason):
    torch.save(saved, tmp_path / "a.pt")
    (tmp_path / "a.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:size])
    with pytest.raises(ValueError, match=f"(?s)a.pt (is )?{reason}"):
        GPT.from_pretrained(tmp_path / "a.pt", n_head=2)


def test_released_weights_are_read_from_the_cache_of_torch_hub(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / "gpt2.bin"
    file.parent.mkdir(parents=True)
    model = random_gpt(GPTConfig(50, 8, 1, 12, 768), dtype=torch.float32)
    torch.save(model.hf_state_dict(), file)
    assert same(GPT.from_pretrained("gpt2").state_dict(), model.state_dict())
    file.write_text("<html>busy</html>")
    with pytest.raises(ConnectionError, match=f"(?s)https://.*/gpt2/.* gpt2.bin in {file.parent}"):
        GPT.from_pretrained("gpt2")
    for name in ("gpt3", "tiny"):                               # tiny has no trained weights
        with pytest.raises(FileNotFoundError, match=f"{name} is neither a file nor one of nano"):
            GPT.from_pretrained(name)
