"""The same numbers from other people's code, and real data. What is not installed or not there is skipped."""
import json
from pathlib import Path

import pytest
import torch

import data
import lora
from conftest import ROOT, random_gpt
from model import GPT, GPTConfig
from test_model import hf_layout

SHARED = ROOT.parent / "shared"
SIZES = GPTConfig(vocab_size=101, block_size=64, n_layer=2, n_head=2, n_embd=32)


@pytest.fixture
def hf():
    """A transformers GPT-2 with random weights in float64, and ours with the same, read through its state dict."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    c = SIZES
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, eos_token_id=0, bos_token_id=0))
    for p in theirs.parameters():
        p.data = (torch.randn(p.shape) * 0.3).half().float()
    return theirs


def ours_from(theirs, tmp_path):
    torch.save(theirs.state_dict(), tmp_path / "hf.bin")
    return GPT.from_pretrained(tmp_path / "hf.bin", n_head=SIZES.n_head).double()


def test_transformers_logits_and_gradients(hf, tmp_path):
    ours, hf = ours_from(hf, tmp_path), hf.double()
    idx = torch.randint(101, (2, 20))
    logits, loss = ours(idx[:, :-1], idx[:, 1:])
    want = hf(input_ids=idx, labels=idx)
    assert (logits - want.logits[:, :-1]).abs().max() <= 1e-10
    assert abs(loss - want.loss) <= 1e-6                                # transformers takes the loss in float32
    loss.backward()
    torch.nn.functional.cross_entropy(want.logits[:, :-1].flatten(0, 1), idx[:, 1:].flatten()).backward()
    grads = hf_layout_of_gradients(ours)
    for name, p in hf.transformer.named_parameters():
        assert (p.grad - grads[name]).abs().max() <= 1e-10 * max(1, p.grad.abs().max()), name


def hf_layout_of_gradients(model):
    for p in model.parameters():
        p.data = p.grad
    return hf_layout(model)


def test_transformers_generation(hf, tmp_path):
    ours, hf = ours_from(hf, tmp_path), hf.double()
    idx = torch.randint(1, 101, (3, 7))
    want = hf.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert ours.generate(idx, 20) == want[:, 7:].tolist()


def test_peft_outputs_gradients_and_merge():
    peft = pytest.importorskip("peft")
    ours, theirs = random_gpt(SIZES), random_gpt(SIZES)
    lora.inject(ours, "q v up", rank=4, alpha=6.0)
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q", "v", "up"]), theirs)
    pairs = [(m, theirs.get_submodule(name)) for name, m in lora.adapters(ours).items()]
    for mine, other in pairs:
        mine.B.data.normal_()
        other.lora_A["default"].weight.data = mine.A.data.clone()
        other.lora_B["default"].weight.data = mine.B.data.clone()
    idx = torch.randint(101, (2, 20))
    a, b = ours(idx, idx), theirs(idx, idx)
    assert (a[0] - b[0]).abs().max() <= 1e-12 * a[0].abs().max()
    a[1].backward(), b[1].backward()
    for mine, other in pairs:
        for p, q in ((mine.A, other.lora_A), (mine.B, other.lora_B)):
            assert (p.grad - q["default"].weight.grad).abs().max() <= 1e-12 * max(1, p.grad.abs().max())
    lora.merge(ours)
    for mine, other in pairs:
        other.merge()
        assert (mine.base.weight - other.base_layer.weight).abs().max() <= 1e-12


def test_loralib_layer():
    loralib = pytest.importorskip("loralib")
    torch.manual_seed(0)
    mine = lora.LoRALinear(torch.nn.Linear(10, 6).double(), 3, alpha=5.0)
    other = loralib.Linear(10, 6, r=3, lora_alpha=5).double()
    mine.B.data.normal_()
    other.load_state_dict({"weight": mine.base.weight, "bias": mine.base.bias, "lora_A": mine.A, "lora_B": mine.B})
    x = torch.randn(4, 10, dtype=torch.float64)
    assert (mine(x) - other(x)).abs().max() <= 1e-12


# real data

@pytest.fixture
def gpt2_bpe():
    if not (SHARED / "tiktoken").is_dir():
        pytest.skip("no ../shared/tiktoken: the GPT-2 vocabulary would have to be downloaded")
    return data.tokenizer(50257)


def test_gpt2_bpe(gpt2_bpe):
    assert gpt2_bpe.encode_ordinary("Hello world") == [15496, 995] and gpt2_bpe.eot_token == 50256


def test_e2e_rows(gpt2_bpe):
    folder = SHARED / "data" / "e2e"
    if not folder.is_dir():
        pytest.skip("no ../shared/data/e2e")
    task, = data.load([str(folder)], gpt2_bpe, 1024)
    assert len(task.train) == 31_849 and len(task.valid) == 200 and task.note == ""
    first = json.loads(open(folder / "train.jsonl").readline())
    row = task.train[0]
    assert gpt2_bpe.decode(row.ids) == f"{first['prompt']}<|endoftext|>{first['completion']}<|endoftext|>"
    assert gpt2_bpe.decode(row.ids[:row.given]) == f"{first['prompt']}<|endoftext|>"
