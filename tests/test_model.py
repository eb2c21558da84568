"""model.py against a NumPy GPT-2 written from the paper's formulas, and its promises one by one."""
from dataclasses import replace

import numpy as np
import pytest
import torch

import lora
from conftest import TINY, close, random_gpt, randomise, same
from model import GPT, NANO, PRESETS, GPTConfig


def numpy_gpt2(w, idx, n_layer, n_head):
    """(T,) -> (T, V) in float64: one row, one head at a time, no torch."""
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
def test_loss_counts_only_the_targets_that_matter(dtype, rounding):
    """Of a bfloat16 model's logits too it is taken in float32."""
    idx, targets = torch.randint(257, (2, 9)), torch.randint(257, (2, 9))
    targets[0, :5] = targets[1, 7:] = -100
    logits, loss = random_gpt(dtype=dtype)(idx, targets, 0.1)
    logp = logits.double().log_softmax(-1)
    each = [-0.9 * logp[b, t, targets[b, t]] - 0.1 * logp[b, t].mean()
            for b in range(2) for t in range(9) if targets[b, t] != -100]
    assert len(each) == 11 and abs(loss - sum(each) / 11) <= rounding * loss


def test_initial_weights():
    model = GPT(replace(TINY, n_embd=64, n_layer=8))            # √(2 · 8 layers) = 4
    for name, p in model.named_parameters():
        if "ln_" in name or name.endswith("bias"):
            assert (p == ("ln_" in name and name.endswith("weight"))).all()
        else:
            want = 0.02 / 4 if name.endswith(("attn.o.weight", "mlp.down.weight")) else 0.02
            assert abs(p.std() / want - 1) < 0.1, name


@pytest.mark.parametrize("name, count", [
    ("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080),
    ("gpt2-xl", 1_557_611_200), ("tiny", 3_382_080)])
def test_presets_have_gpt2s_vocabulary_and_the_published_sizes(name, count):
    with torch.device("meta"):
        model = GPT(PRESETS[name])
    assert model.wte.weight.size(0) == 50257 and model.wpe.weight.size(0) == 1024
    assert sum(p.numel() for p in model.parameters()) == count


# Generation ---------------------------------------------------------------------------------------
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [200], [3, 1, 4, 1]]


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[::-1], PROMPTS[:1], [[1, 2], [3, 4]]])
def test_cached_generation_equals_rerunning_the_whole_row(gpt, prompts):
    """Each new token is the likeliest, of final hidden states right to float64's rounding."""
    seen = []
    gpt.ln_f.register_forward_hook(lambda m, args, out: seen.append(out))
    new = gpt.generate(prompts, 20)
    assert [x.size(1) for x in seen] == [max(map(len, prompts))] + [1] * 19     # each once
    for p, tokens, got in zip(prompts, new, torch.stack([x[:, -1] for x in seen], 1)):
        logits, _ = gpt(torch.tensor([p + tokens[:-1]]))
        assert logits[0, len(p) - 1:].argmax(-1).tolist() == tokens
        close(got, seen[-1][0, len(p) - 1:])


def test_generation_stops_and_is_without_dropout_and_training_goes_on(gpt):
    randomise(lora.inject(gpt, rank=4, dropout=0.9))
    free = gpt.eval().generate(PROMPTS, 20)
    stop = free[0][3]
    ended = gpt.train().generate(PROMPTS, 20, stop=stop)
    assert ended == [r[:r.index(stop)] if stop in r else r for r in free]
    assert len(ended[0]) < 20 and gpt.training


def test_the_block_can_be_filled_exactly(gpt):
    prompts = [[1] * 60, [2]]
    assert [len(r) for r in gpt.generate(prompts, 5)] == [5, 5]         # the last needs no position
    with pytest.raises(ValueError, match="room for 5 new ones, not 6"):
        gpt.generate(prompts, 6)
    with pytest.raises(ValueError, match="prompt"):
        gpt.generate([[1], []], 6)
    with pytest.raises(ValueError, match="row of 65 tokens .* block of 64"):
        gpt(torch.zeros(1, 65, dtype=torch.long))


# Weights in and out -------------------------------------------------------------------------------
HF = random_gpt(dtype=torch.float32).hf_state_dict()


def test_hf_state_dict_is_the_released_layout_with_merged_adapters_in_it(gpt):
    """Query, key and value side by side, all matrices (d_in, d_out). Refused while not merged."""
    plain = random_gpt()
    randomise(lora.inject(gpt, "v", rank=4))
    for name, m in lora.adapters(gpt).items():
        plain.get_submodule(name).weight.data += m.delta_weight()
    with pytest.raises(ValueError, match="merge"):
        gpt.hf_state_dict()
    lora.merge(gpt)
    saved = gpt.hf_state_dict()
    lora.unmerge(gpt)                                           # what was taken out is a copy
    for theirs, ours in [("attn.c_attn", "attn.q attn.k attn.v"), ("attn.c_proj", "attn.o"),
                         ("mlp.c_fc", "mlp.up"), ("mlp.c_proj", "mlp.down")]:
        linears = [plain.h[1].get_submodule(name) for name in ours.split()]
        W, b = torch.cat([m.weight for m in linears]), torch.cat([m.bias for m in linears])
        assert (saved[f"h.1.{theirs}.weight"] - W.T).abs().max() <= 1e-12
        assert torch.equal(saved[f"h.1.{theirs}.bias"], b)


def test_hf_layout_round_trip_to_the_bit(tmp_path):
    model = random_gpt(dtype=torch.float32)                     # stored as whole models are
    saved = {f"transformer.{name}": tensor for name, tensor in model.hf_state_dict().items()}
    saved["lm_head.weight"] = model.wte.weight.data
    saved["transformer.h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
    saved["transformer.h.1.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save(saved, tmp_path / "hf.bin")
    with pytest.raises(ValueError, match="width 16 .*n_head"):
        GPT.from_pretrained(tmp_path / "hf.bin")
    again = GPT.from_pretrained(tmp_path / "hf.bin", n_head=2)
    assert again.config == TINY and same(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("saved, size, reason", [
    ({k: v for k, v in HF.items() if k != "wte.weight"}, None, "no GPT-2: .*wte.weight"),
    ({k: v for k, v in HF.items() if k != "h.1.ln_2.bias"}, None, "no GPT-2: .*h.1.ln_2.bias"),
    (HF | {"h.1.attn.rotary": torch.zeros(2)}, None, "no GPT-2: .*h.1.attn.rotary"),
    (HF | {"h.0.mlp.c_fc.weight": torch.zeros(64, 16)}, None, "no GPT-2: .*h.0.mlp.up.weight"),
    (HF | {"lm_head.weight": torch.zeros(257, 16)}, None, "no GPT-2: .*lm_head.weight"),
    ({"adapter": {}}, None, "holds an adapter"),
    ({"config": {"width": 3}, "model": {}}, None, "no GPT-2: .*width"),
    ([1], None, "not a whole checkpoint or model"),
    (HF, 0, "not a whole checkpoint or model"),
    (HF, 5000, "not a whole checkpoint or model"),                      # cut off
])
def test_a_file_that_holds_no_model_is_named(tmp_path, saved, size, reason):
    torch.save(saved, tmp_path / "a.pt")
    (tmp_path / "a.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:size])
    with pytest.raises(ValueError, match=f"(?s)a.pt:? .*{reason}"):
        GPT.from_pretrained(tmp_path / "a.pt", n_head=2)


def test_released_weights_come_by_name(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))             # where torch keeps downloads
    file = tmp_path / "hub" / "checkpoints" / "gpt2.bin"
    file.parent.mkdir(parents=True)
    model = random_gpt(GPTConfig(50, 8, 1, 12, 768), dtype=torch.float32)
    torch.save(model.hf_state_dict(), file)
    assert same(GPT.from_pretrained("gpt2").state_dict(), model.state_dict())
    file.write_text("<html>busy</html>")
    with pytest.raises(ConnectionError, match=f"(?s)https://.*/gpt2/.* {file}"):
        GPT.from_pretrained("gpt2")
    for name in ("gpt3", "tiny"):                               # tiny has no trained weights
        with pytest.raises(FileNotFoundError, match=f"{name}: no such file"):
            GPT.from_pretrained(name)
