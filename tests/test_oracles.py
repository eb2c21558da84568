"""The same numbers from other people's code, and real data. What is not there is skipped."""
import json

import pytest
import torch

import analyze
import lora
from conftest import ROOT, close, random_gpt, randomise
from model import GPT, GPTConfig, HF_NAMES
from support import changes, checkpoint, data

SHARED = ROOT.parent / "shared"
SIZES = GPTConfig(vocab_size=101, block_size=64, n_layer=2, n_head=2, n_embd=32)


def transformers_gpt2(state=None):
    """A transformers GPT-2 of these sizes in float64, with this state or random weights."""
    transformers, c = pytest.importorskip("transformers"), SIZES
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_layer=c.n_layer, n_head=c.n_head,
        n_embd=c.n_embd, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, eos_token_id=0,
        bos_token_id=0)).double()
    torch.manual_seed(0)
    for p in model.parameters():
        p.data = (torch.randn(p.shape) * 0.3).double()
    if state:
        model.transformer.load_state_dict(state)
    return model


@pytest.fixture
def pair(tmp_path):
    """A transformers GPT-2, and ours read from its state dict."""
    theirs = transformers_gpt2()
    torch.save(theirs.state_dict(), tmp_path / "hf.bin")
    return theirs, GPT.from_pretrained(tmp_path / "hf.bin", n_head=SIZES.n_head).double()


def test_transformers_logits_and_gradients(pair):
    theirs, ours = pair
    idx = torch.randint(101, (2, 20))
    logits, loss = ours(idx[:, :-1], idx[:, 1:])
    want = theirs(input_ids=idx, labels=idx)
    close(logits, want.logits[:, :-1], 1e-10)
    assert abs(loss - want.loss) <= 1e-6                # transformers takes the loss in float32
    loss.backward()
    torch.nn.functional.nll_loss(want.logits[:, :-1].log_softmax(-1).mT, idx[:, 1:]).backward()
    for p in ours.parameters():
        p.data = p.grad
    for name, grad in ours.hf_state_dict().items():     # the gradients in their layout
        close(grad, theirs.transformer.get_parameter(name).grad, 1e-10)


def test_transformers_generation(pair):
    """Prompts of different lengths too: they are padded in front there as here."""
    theirs, ours = pair
    prompts = [torch.randint(1, 101, (n,)).tolist() for n in (7, 3, 7)]
    idx = torch.tensor([[0] * (7 - len(p)) + p for p in prompts])
    want = theirs.generate(idx, attention_mask=(idx > 0).long(), max_new_tokens=20, do_sample=False,
                           eos_token_id=None, pad_token_id=0)
    assert ours.generate(prompts, 20) == want[:, 7:].tolist()


def test_transformers_loads_what_was_trained_here():
    ours = random_gpt(SIZES)
    randomise(lora.inject(ours, "q down", rank=4))
    idx = torch.randint(101, (2, 20))
    want = ours(idx)[0]
    lora.merge(ours)
    close(transformers_gpt2(ours.hf_state_dict())(input_ids=idx).logits, want, 1e-10)


def test_peft_outputs_gradients_and_merge():
    peft = pytest.importorskip("peft")
    ours, theirs = random_gpt(SIZES), random_gpt(SIZES)
    randomise(lora.inject(ours, "q v up", rank=4, alpha=6.0))
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q", "v", "up"])
    peft.inject_adapter_in_model(config, theirs)
    pairs = [(m, theirs.get_submodule(name)) for name, m in lora.adapters(ours).items()]
    for mine, other in pairs:
        other.lora_A["default"].weight.data = mine.A.data.clone()
        other.lora_B["default"].weight.data = mine.B.data.clone()
    idx = torch.randint(101, (2, 20))
    (mine_out, mine_loss), (out, loss) = ours(idx, idx), theirs(idx, idx)
    close(mine_out, out)
    mine_loss.backward()
    loss.backward()
    for mine, other in pairs:
        close(mine.A.grad, other.lora_A["default"].weight.grad)
        close(mine.B.grad, other.lora_B["default"].weight.grad)
    lora.merge(ours)
    for mine, other in pairs:
        other.merge()
        close(mine.base.weight, other.base_layer.weight)


# Adapters that they wrote -------------------------------------------------------------------------
SETTINGS = {"plain": {}, "root": {"use_rslora": True}, "bin": {},
            "patterns": {"rank_pattern": {"c_fc": 2, "h.1.attn.c_attn": 5},
                         "alpha_pattern": {"attn.c_proj": 3, r"h\.0\.mlp\.c_proj": 7}}}


@pytest.mark.parametrize("kind", SETTINGS)
def test_peft_adapters(pair, tmp_path, kind):
    """Each ΔW is peft's own, and the logits on our GPT-2 are those on transformers'."""
    peft, (theirs, ours) = pytest.importorskip("peft"), pair
    config = peft.LoraConfig(r=4, lora_alpha=6, fan_in_fan_out=True, task_type="CAUSAL_LM",
                             target_modules=["c_attn", "c_proj", "c_fc"], **SETTINGS[kind])
    theirs = peft.get_peft_model(theirs, config).eval()
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            p.data = torch.randn_like(p, dtype=torch.float32) * 0.2
    theirs.save_pretrained(tmp_path, safe_serialization=kind != "bin")
    if kind == "bin":                                   # recent versions write safetensors alone
        state = peft.get_peft_model_state_dict(theirs)
        (tmp_path / "adapter_model.safetensors").unlink(missing_ok=True)
        torch.save(state, tmp_path / "adapter_model.bin")
    c, = changes.load([tmp_path])
    assert len(c.delta) == 12
    for i, block in enumerate(theirs.base_model.model.transformer.h):
        for layer, names in HF_NAMES.items():
            want = block.get_submodule(layer).get_delta_weight("default").T
            got = [c.delta[f"h.{i}.{name}"] for name in names]
            close(torch.cat([B @ A for B, A in got]), want.float(), 1e-6)
    saved, _ = checkpoint.open_run(tmp_path)
    checkpoint.restore(saved, ours)
    idx = torch.randint(101, (2, 20))
    close(ours(idx)[0], theirs(input_ids=idx).logits, 1e-5)         # A and B are float32


def test_peft_adapters_of_other_models(tmp_path):
    """Llama and BERT of random weights, without a change: names as they are, ΔW as peft has it."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 48, "vocab_size": 99}
    both = {"Llama": ["q_proj", "v_proj", "down_proj"], "Bert": ["query", "value"]}
    for kind, targets in both.items():
        sizes = getattr(transformers, f"{kind}Config")(**small)
        model = getattr(transformers, f"{kind}Model")(sizes)
        config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        model = peft.get_peft_model(model, config)
        model.save_pretrained(tmp_path / kind)
        c, = changes.load([tmp_path / kind])
        assert len(c.delta) == 2 * len(targets) and set(map(changes.layer_of, c.delta)) == {0, 1}
        for name, (B, A) in c.delta.items():
            want = model.base_model.model.get_submodule(name).get_delta_weight("default")
            close(B @ A, want.detach(), 1e-6)
        analyze.main([str(tmp_path / kind), "--out", str(tmp_path / f"{kind}-out")])


def test_loralib_adapters(tmp_path):
    """ΔW is what merging adds there, of a Linear and of GPT-2's fused layer with two and three."""
    loralib = pytest.importorskip("loralib")
    for enabled, names in (([True, False, True], "qv"), ([True, True, True], "qkv")):
        layers = torch.nn.ModuleDict({"attn": torch.nn.ModuleDict({
            "c_attn": loralib.MergedLinear(32, 96, r=4, lora_alpha=6, enable_lora=enabled)}),
            "other": loralib.Linear(32, 20, r=3, lora_alpha=6)})
        model = torch.nn.ModuleDict({"transformer": torch.nn.ModuleDict({
            "h": torch.nn.ModuleList([layers])})})
        merged = {}
        for name, m in (("c_attn", layers["attn"]["c_attn"]), ("other", layers["other"])):
            m.lora_B.data.normal_()
            W = m.weight.data.clone()
            m.eval()                                                # this merges
            merged[name] = m.weight.data - W
        torch.save(loralib.lora_state_dict(model), tmp_path / "l.pt")
        c, = changes.load([tmp_path / "l.pt"], alpha=6.0)
        assert list(c.delta) == [f"h.0.attn.{t}" for t in names] + ["transformer.h.0.other"]
        for name, (B, A) in c.delta.items():
            at = "qkv".find(name[-1])
            want = merged["other"] if at < 0 else merged["c_attn"][32 * at:][:32]
            close(B @ A, want, 1e-6)


# Real data ----------------------------------------------------------------------------------------
def test_real_rows_in_gpt2s_tokens():
    folder = SHARED / "data" / "e2e"
    if not (SHARED / "tiktoken").is_dir() or not folder.is_dir():
        pytest.skip("no ../shared/tiktoken (GPT-2's vocabulary) or no ../shared/data/e2e")
    bpe = data.tokenizer(50257)
    assert bpe.encode_ordinary("Hello world") == [15496, 995] and bpe.eot_token == 50256
    task, = data.load([str(folder)], bpe, 1024)
    assert len(task.train) == 31_849 and len(task.valid) == 200 and task.note == ""
    with open(folder / "train.jsonl") as f:
        first, row = json.loads(f.readline()), task.train[0]
    assert bpe.decode(row.ids[:row.given]) == f"{first['prompt']}<|endoftext|>"
    assert bpe.decode(row.ids[row.given:]) == f" {first['completion']}<|endoftext|>"
