"""The same numbers from other people's code, and real data. What is not installed is skipped."""
import copy
import json
from argparse import Namespace

import pytest
import torch
import torch.nn as nn

import analyze
import evaluate
import lora
from autolora import AutoLoRALinear
from conftest import ROOT, close, random_gpt, randomise, same, snapshot
from model import GPT, GPTConfig, HF_NAMES
from multilora import MultiLoRALinear
from support import checkpoint, data, deltas, interop
from support.adapter_state import load_state_dict, state_dict

SHARED = ROOT.parent / "shared"
SIZES = GPTConfig(vocab_size=101, block_size=64, n_layer=2, n_head=2, n_embd=32)
IDX = torch.randint(101, (2, 20), generator=torch.Generator().manual_seed(0))


# GPT-2 in transformers

def transformers_gpt2(state=None):
    """A transformers GPT-2 of these sizes in float64, with this state or random weights."""
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=SIZES.vocab_size, n_positions=SIZES.block_size,
        n_layer=SIZES.n_layer, n_head=SIZES.n_head, n_embd=SIZES.n_embd,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        eos_token_id=0, bos_token_id=0)).double()
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
    logits, loss = ours(IDX[:, :-1], IDX[:, 1:])
    want = theirs(input_ids=IDX, labels=IDX)
    close(logits, want.logits[:, :-1], 1e-10)
    assert abs(loss - want.loss) <= 1e-6                # transformers takes the loss in float32
    loss.backward()
    log_probabilities = want.logits[:, :-1].log_softmax(-1).mT
    nn.functional.nll_loss(log_probabilities, IDX[:, 1:]).backward()
    for p in ours.parameters():
        p.data = p.grad
    for name, grad in ours.hf_state_dict().items():     # the gradients in transformers' layout
        close(grad, theirs.transformer.get_parameter(name).grad, 1e-10)


def test_transformers_generation(pair):
    """The prompts differ in length: both models pad them on the left."""
    theirs, ours = pair
    prompts = [torch.randint(1, 101, (n,)).tolist() for n in (7, 3, 7)]
    idx = torch.tensor([[0] * (7 - len(p)) + p for p in prompts])
    want = theirs.generate(idx, attention_mask=(idx > 0).long(), max_new_tokens=20, do_sample=False,
                           eos_token_id=None, pad_token_id=0)
    assert ours.generate(prompts, 20) == want[:, 7:].tolist()


def test_transformers_reads_a_model_that_was_trained_here(tmp_path):
    ours = random_gpt(SIZES)
    randomise(lora.inject(ours, "q down", rank=4))
    want = ours(IDX)[0]
    with pytest.raises(ValueError, match=r"h\.0 attn\.q .*must be plain nn.Linear"):
        ours.hf_state_dict()
    evaluate.export(ours, Namespace(method="lora"), str(tmp_path / "model.bin"))
    state = torch.load(tmp_path / "model.bin")
    close(transformers_gpt2(state)(input_ids=IDX).logits, want, 1e-10)


def replace_conv1d(model):
    from transformers.pytorch_utils import Conv1D
    for name, m in list(model.named_modules()):
        if isinstance(m, Conv1D):                       # it stores W as (d_in, d_out)
            model.set_submodule(name, nn.Linear(*m.weight.shape).to(m.weight))
            model.get_submodule(name).load_state_dict({"weight": m.weight.T, "bias": m.bias})


@pytest.mark.parametrize("targets", ["c_attn", ["h.0.attn.c_attn"], "all"])
def test_a_conv1d_is_refused_with_a_hint(targets):
    model = transformers_gpt2().transformer             # without the head it has no nn.Linear
    before = snapshot(model)
    with pytest.raises(ValueError, match="c_attn.* Conv1D"):
        lora.inject(model, targets)
    assert same(snapshot(model), before)
    with pytest.raises(ValueError, match="^(?!.*Conv1D)"):
        lora.inject(random_gpt(), "c_attn")             # there is none in this model


def test_transformers_gpt2_after_its_conv1d_layers_are_replaced():
    """The README shows the lines of replace_conv1d."""
    model = transformers_gpt2()
    want = model(input_ids=IDX).logits
    replace_conv1d(model)
    base = model(input_ids=IDX).logits
    close(base, want, 1e-10)
    with pytest.raises(ValueError, match="lm_head: .* tied"):
        lora.inject(model, "all")
    lora.inject(model, "c_attn c_proj", rank=4)
    assert len(lora.adapters(model)) == 3 * SIZES.n_layer       # c_proj is in attn and in mlp
    assert torch.equal(model(input_ids=IDX).logits, base)
    model(input_ids=IDX, labels=IDX).loss.backward()
    assert {name[-1] for name, p in model.named_parameters() if p.grad is not None} == set("AB")
    randomise(model)
    state = state_dict(model)
    trained = model(input_ids=IDX).logits
    assert not torch.allclose(trained, base)
    lora.merge(model.eval())
    close(model(input_ids=IDX).logits, trained, 1e-10)
    fresh = transformers_gpt2()
    replace_conv1d(fresh)
    close(load_state_dict(fresh, state)(input_ids=IDX).logits, trained, 1e-10)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_transformers_t5(gated, dtype, tol):
    """T5 reads the dtype of the weight of `wo`, which may stay in float32."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = transformers.T5Config(
        vocab_size=99, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu" if gated else "relu", decoder_start_token_id=0)
    model = transformers.T5ForConditionalGeneration(sizes).to(dtype).eval()
    for name, m in model.named_modules():
        if name.endswith("wo"):
            m.float()
    fresh = copy.deepcopy(model)

    def logits(model):
        return model(input_ids=IDX % 99, labels=IDX % 99).logits.double()

    def difference(a, b):
        return (a - b).norm() / b.norm()

    base = logits(model)
    lora.inject(model, "wo q", rank=4)
    assert difference(logits(model), base) < tol
    logits(model).sum().backward()
    assert all(m.B.grad.any() for m in lora.adapters(model).values())
    randomise(model)
    trained = logits(model)
    assert difference(trained, base) > 5 * tol
    assert torch.equal(logits(load_state_dict(fresh, state_dict(model))), trained)
    lora.merge(model)
    assert difference(logits(model), trained) < tol


# peft

def test_peft_outputs_gradients_and_merge():
    peft = pytest.importorskip("peft")
    ours = random_gpt(SIZES)
    theirs = random_gpt(SIZES)
    randomise(lora.inject(ours, "q v up", rank=4, alpha=6.0))
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q", "v", "up"])
    peft.inject_adapter_in_model(config, theirs)
    pairs = [(m, theirs.get_submodule(name)) for name, m in lora.adapters(ours).items()]
    for mine, other in pairs:
        other.lora_A["default"].weight.data = mine.A.data.clone()
        other.lora_B["default"].weight.data = mine.B.data.clone()
    logits, loss = ours(IDX, IDX)
    want, want_loss = theirs(IDX, IDX)
    close(logits, want)
    loss.backward()
    want_loss.backward()
    for mine, other in pairs:
        close(mine.A.grad, other.lora_A["default"].weight.grad)
        close(mine.B.grad, other.lora_B["default"].weight.grad)
    lora.merge(ours)
    for mine, other in pairs:
        other.merge()
        close(mine.W_merged, other.base_layer.weight)


SETTINGS = {
    "plain": {},
    "bin": {},
    "root": {"use_rslora": True},
    "patterns": {"rank_pattern": {"c_fc": 2, "h.1.attn.c_attn": 5},
                 "alpha_pattern": {"attn.c_proj": 3, r"h\.0\.mlp\.c_proj": 7}},
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_adapters_that_peft_wrote_for_gpt2(pair, tmp_path, kind):
    """Each ΔW equals peft's, and the logits on our GPT-2 equal those on transformers'."""
    peft = pytest.importorskip("peft")
    theirs, ours = pair
    config = peft.LoraConfig(r=4, lora_alpha=6, fan_in_fan_out=True, task_type="CAUSAL_LM",
                             target_modules=["c_attn", "c_proj", "c_fc"], **SETTINGS[kind])
    theirs = peft.get_peft_model(theirs, config).eval()
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            p.data = torch.randn_like(p, dtype=torch.float32) * 0.2
    theirs.save_pretrained(tmp_path, safe_serialization=kind != "bin")
    if kind == "bin":                                   # recent versions write only safetensors
        state = peft.get_peft_model_state_dict(theirs)
        (tmp_path / "adapter_model.safetensors").unlink(missing_ok=True)
        torch.save(state, tmp_path / "adapter_model.bin")
    c, = deltas.load([tmp_path])
    assert len(c.delta) == 12
    for i, block in enumerate(theirs.base_model.model.transformer.h):
        for layer, names in HF_NAMES.items():
            want = block.get_submodule(layer).get_delta_weight("default").T
            pairs = [c.delta[f"h.{i}.{name}"] for name in names]
            close(torch.cat([B @ A for B, A in pairs]), want.float(), 1e-6)
    saved, _ = checkpoint.open_run(tmp_path)
    checkpoint.restore(saved, ours)
    close(ours(IDX)[0], theirs(input_ids=IDX).logits, 1e-5)         # A and B are float32


@pytest.mark.parametrize("kind, targets", [("Llama", ["q_proj", "v_proj", "down_proj"]),
                                           ("Bert", ["query", "value"])])
def test_adapters_that_peft_wrote_for_other_models(tmp_path, kind, targets):
    """Models with random weights: the names are kept, and ΔW equals peft's."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    sizes = getattr(transformers, f"{kind}Config")(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        vocab_size=99)
    model = getattr(transformers, f"{kind}Model")(sizes)
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    model.save_pretrained(tmp_path / kind)
    c, = deltas.load([tmp_path / kind])
    assert len(c.delta) == 2 * len(targets)
    assert set(map(deltas.layer_of, c.delta)) == {0, 1}
    for name, (B, A) in c.delta.items():
        want = model.base_model.model.get_submodule(name).get_delta_weight("default")
        close(B @ A, want.detach(), 1e-6)
    analyze.main([str(tmp_path / kind), "--out", str(tmp_path / "out")])


# loralib

@pytest.mark.parametrize("enabled, names", [([True, False, True], "qv"),
                                            ([True, True, True], "qkv")])
def test_adapters_that_loralib_wrote(tmp_path, enabled, names):
    """ΔW is what loralib's merging adds, for a Linear and for GPT-2's fused q, k and v."""
    loralib = pytest.importorskip("loralib")
    c_attn = loralib.MergedLinear(32, 96, r=4, lora_alpha=6, enable_lora=enabled)
    other = loralib.Linear(32, 20, r=3, lora_alpha=6)
    block = nn.ModuleDict({"attn": nn.ModuleDict({"c_attn": c_attn}), "other": other})
    model = nn.ModuleDict({"transformer": nn.ModuleDict({"h": nn.ModuleList([block])})})
    merged = []
    for m in (c_attn, other):
        m.lora_B.data.normal_()
        W = m.weight.data.clone()
        m.eval()                                        # loralib merges here
        merged.append(m.weight.data - W)
    want = dict(zip("qkv", merged[0].chunk(3))) | {"other": merged[1]}
    torch.save(loralib.lora_state_dict(model), tmp_path / "l.pt")
    c, = deltas.load([tmp_path / "l.pt"], alpha=6.0)
    assert list(c.delta) == [f"h.0.attn.{t}" for t in names] + ["transformer.h.0.other"]
    for name, (B, A) in c.delta.items():
        close(B @ A, want[deltas.target_of(name)], 1e-6)


# Real data

def test_real_rows_in_gpt2s_tokens():
    folder = SHARED / "data" / "e2e"
    if not (SHARED / "tiktoken").is_dir() or not folder.is_dir():
        pytest.skip("no ../shared/tiktoken (GPT-2's vocabulary) or no ../shared/data/e2e")
    bpe = data.tokenizer(50257)
    assert bpe.encode_ordinary("Hello world") == [15496, 995]
    assert bpe.eot_token == 50256
    task, = data.load([str(folder)], bpe, 1024)
    assert (len(task.train), len(task.valid), task.note) == (31_849, 200, "")
    with open(folder / "train.jsonl") as f:
        first = json.loads(f.readline())
    row = task.train[0]
    assert bpe.decode(row.ids[:row.prompt_len]) == f"{first['prompt']}<|endoftext|>"
    assert bpe.decode(row.ids[row.prompt_len:]) == f" {first['completion']}<|endoftext|>"


# The export to peft's format

EXPORTED = {
    "lora q v": ("q v", 4, lora.LoRALinear, {"alpha": 6.0}),
    "lora all": ("all", 4, lora.LoRALinear, {"alpha": 6.0}),
    "multilora q v": ("q v", 4, MultiLoRALinear, {"n_blocks": 2}),
    "multilora all": ("all", 4, MultiLoRALinear, {"n_blocks": 2}),
    "autolora all": ("all", 4, AutoLoRALinear, {}),
    "autolora's ranks": (None, {"h.0.attn.q": 2, "h.0.attn.v": 5, "h.0.mlp.up": 1,
                                "h.1.attn.k": 3, "h.1.mlp.down": 4}, lora.LoRALinear, {}),
}


@pytest.mark.parametrize("kind", EXPORTED)
def test_peft_reads_an_exported_adapter(tmp_path, kind):
    """With transformers' GPT-2 of the exported base, the logits are those of our model, and the
    folder has the spectra of the adapter's state."""
    peft = pytest.importorskip("peft")
    targets, rank, layer, settings = EXPORTED[kind]
    base = random_gpt(SIZES)
    theirs = transformers_gpt2(base.hf_state_dict())
    ours = randomise(lora.inject(base, targets, rank, layer, **settings)).eval()
    state = state_dict(ours)
    interop.write_peft(state, "gpt2", tmp_path / "exported")
    torch.save(state, tmp_path / "state.pt")
    before = theirs(input_ids=IDX).logits
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "exported").eval()
    want = ours(IDX)[0]
    close(theirs(input_ids=IDX).logits, want, 1e-5)                 # A and B are float32
    assert (want - before).abs().max() > 0.01
    exported, saved = deltas.load([tmp_path / "exported", tmp_path / "state.pt"])
    assert exported.delta.keys() == saved.delta.keys()
    for name in saved.delta:
        spectra = [analyze.record(c, name)["S"] for c in (exported, saved)]
        assert spectra[0] == pytest.approx(spectra[1], rel=1e-4)


@pytest.mark.parametrize("initialisation", [True, False, "gaussian", "orthogonal", "olora",
                                            "pissa", "pissa_niter_2", "mica"])
def test_initialisations_of_peft_that_change_w_are_refused(tmp_path, initialisation):
    """And only these: for the others, ΔW is B A."""
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(16, 12))
    W = model[0].weight.detach().clone()
    try:
        config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=initialisation)
        model = peft.get_peft_model(model, config)
    except ValueError:
        pytest.skip(f"this version of peft has no initialisation {initialisation}")
    changed = not torch.equal(model.base_model.model[0].base_layer.weight, W)
    model.save_pretrained(tmp_path)
    if changed:
        with pytest.raises(ValueError, match="changed the base model's weights"):
            checkpoint.open_run(tmp_path)
    else:
        assert checkpoint.open_run(tmp_path)[0]["adapter"]["tensors"].keys() == {"0"}
