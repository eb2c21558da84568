"""support/interop.py: adapters as peft and loralib store them, written out by hand here. The files
that peft itself writes are in test_oracles.py."""
import json
import math
import re

import pytest
import torch

import evaluate
import lora
import train
from conftest import close, random_gpt
from model import GPT, GPTConfig
from support import adapter_state, checkpoint

C, R = 48, 3                                                # width and rank
SIZES = GPTConfig(257, 64, n_layer=2, n_head=2, n_embd=C)
CONFIG = {"peft_type": "LORA", "r": R, "lora_alpha": 6, "fan_in_fan_out": True, "bias": "none",
          "base_model_name_or_path": "base.pt"}
BEYOND_LORA = ("use_dora use_qalora use_bdlora kasa_config lora_bias layer_replication "
               "target_parameters alora_invocation_tokens arrow_config").split()


def matrix(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stored(key, shapes):
    """{key: tensor} for the A and B of {layer: (A's shape, B's shape)}; `key` is their pattern."""
    saved = {}
    for layer, pair in shapes.items():
        for side, shape in zip("AB", pair):
            saved[key.format(layer, side)] = matrix(*shape, seed=len(saved))
    return saved


IN_PEFT = "base_model.model.transformer.{}.lora_{}.weight"
IN_LORALIB = "module.transformer.{}.lora_{}"
PEFT = stored(IN_PEFT, {
    "h.0.attn.c_attn": ((R, C), (3 * C, R)),
    "h.1.attn.c_proj": ((R, C), (C, R)),
    "h.0.mlp.c_fc": ((R, C), (4 * C, R)),
    "h.1.mlp.c_proj": ((R, 4 * C), (C, R)),
})
Q_AND_V = ((2 * R, C), (2 * C, R))                          # in one MergedLinear of loralib
LORALIB = stored(IN_LORALIB, {"h.0.attn.c_attn": Q_AND_V, "h.1.attn.c_attn": Q_AND_V})
A_OF_UP = IN_PEFT.format("h.0.mlp.c_fc", "A")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a base model, a peft adapter (theirs) and a loralib adapter."""
    monkeypatch.chdir(tmp_path)
    base = random_gpt(SIZES, dtype=torch.float32)
    torch.save({"model": base.state_dict(), "config": vars(SIZES)}, "base.pt")
    torch.save(LORALIB, "loralib.pt")
    peft(tmp_path, "theirs")
    return tmp_path


def peft(folder, name, tensors=PEFT, **config):
    (folder / name).mkdir()
    torch.save(tensors, folder / name / "adapter_model.bin")
    (folder / name / "adapter_config.json").write_text(json.dumps(CONFIG | config))


def factors(saved, key, layer):
    """(A, B) of a layer in a file, in float64."""
    return [saved[key.format(layer, side)].double() for side in "AB"]


def delta_weights(path, alpha=None):
    """{module name: ΔW in float64} of a file."""
    adapter = checkpoint.open_run(path, alpha=alpha)[0]["adapter"]
    deltas = {}
    for name, own in adapter["tensors"].items():
        deltas[name] = adapter["scale"][name] * own["B"].double() @ own["A"].double()
    return deltas


def assert_one_line(main, argv, message, capsys):
    """A command must exit with status 2 and one line that matches the message."""
    with pytest.raises(SystemExit, match="2"):
        main([*argv.split(), "--device", "cpu"])
    err = capsys.readouterr().err
    assert re.search(message, err) and err.count("\n") == 1, err


# What is read

def test_peft_names_and_a_fused_layer_with_one_A_for_three_matrices(folder):
    got = delta_weights("theirs")
    assert set(got) == {"h.0.attn.q", "h.0.attn.k", "h.0.attn.v", "h.1.attn.o", "h.0.mlp.up",
                        "h.1.mlp.down"}
    for theirs, ours in (("h.1.attn.c_proj", "h.1.attn.o"), ("h.0.mlp.c_fc", "h.0.mlp.up"),
                         ("h.1.mlp.c_proj", "h.1.mlp.down")):
        A, B = factors(PEFT, IN_PEFT, theirs)
        close(got[ours], 6 / R * B @ A, 1e-6)
    A, B = factors(PEFT, IN_PEFT, "h.0.attn.c_attn")
    for i, target in enumerate("qkv"):
        close(got[f"h.0.attn.{target}"], 6 / R * B[i * C:(i + 1) * C] @ A, 1e-6)


def test_a_merged_linear_of_loralib_has_one_A_for_each_matrix(folder):
    """loralib multiplies with B by a grouped convolution: group g reads rows g·r to (g+1)·r of A x,
    and computes rows g·d to (g+1)·d of ΔW x."""
    got = delta_weights("loralib.pt", alpha=12.0)
    assert list(got) == [f"h.{i}.attn.{target}" for i in range(2) for target in "qv"]
    x = matrix(5, C).double()
    for i in range(2):
        A, B = factors(LORALIB, IN_LORALIB, f"h.{i}.attn.c_attn")
        y = torch.nn.functional.conv1d((x @ A.T).T[None], B[:, :, None], groups=2)[0].T
        close(x @ got[f"h.{i}.attn.q"].T, 12 / R * y[:, :C], 1e-5)
        close(x @ got[f"h.{i}.attn.v"].T, 12 / R * y[:, C:], 1e-5)
    three = stored(IN_LORALIB, {"h.0.attn.c_attn": ((3 * R, C), (3 * C, R))})
    torch.save(three, "three.pt")
    A, B = factors(three, IN_LORALIB, "h.0.attn.c_attn")
    got = delta_weights("three.pt", alpha=R)
    close(got["h.0.attn.k"], B[C:2 * C] @ A[R:2 * R], 1e-6)


def test_a_training_script_may_have_put_the_state_dict_under_a_key(folder):
    torch.save({"model_state_dict": LORALIB}, "wrapped.pt")
    assert delta_weights("wrapped.pt", alpha=1.0).keys() == delta_weights("loralib.pt", 1.0).keys()


def test_names_without_gpt2s_prefix_and_names_of_other_models(folder):
    peft(folder, "bare", {key.replace("transformer.", ""): t for key, t in PEFT.items()})
    assert delta_weights("bare").keys() == delta_weights("theirs").keys()
    names = ["model.layers.11.self_attn.q_proj", "model.layers.2.mlp.gate_proj"]
    shapes = dict.fromkeys(names, ((R, C), (16, R)))
    peft(folder, "llama", stored("base_model.model.{}.lora_{}.weight", shapes))
    assert list(delta_weights("llama")) == names


@pytest.mark.parametrize("config, layer, scale", [
    ({}, "h.0.mlp.c_fc", 6 / R),
    ({"use_rslora": True}, "h.0.mlp.c_fc", 6 / math.sqrt(R)),
    ({"alpha_pattern": {"c_fc": 2}}, "h.0.mlp.c_fc", 2 / R),
    ({"alpha_pattern": {r"h\.1\..*": 2, "c_proj": 9}}, "h.1.mlp.c_proj", 2 / R),    # the first
    ({"alpha_pattern": {"c_fc|nothing": 2}}, "h.0.mlp.c_fc", 2 / R),
    ({"alpha_pattern": {"fc": 2, "transformer.h.0": 2}}, "h.0.mlp.c_fc", 6 / R),    # only parts
    ({"alpha_pattern": {"attn|mlp.c": 2, "mlp|c_f": 2}}, "h.0.mlp.c_fc", 6 / R),
])
def test_scale_follows_the_config_for_each_layer(folder, config, layer, scale):
    peft(folder, "other", **config)
    ours = {"h.0.mlp.c_fc": "h.0.mlp.up", "h.1.mlp.c_proj": "h.1.mlp.down"}[layer]
    A, B = factors(PEFT, IN_PEFT, layer)
    close(delta_weights("other")[ours], scale * B @ A, 1e-6)


def test_tensors_in_half_precision_and_other_tensors(folder):
    half = {key: t.bfloat16() for key, t in PEFT.items()}
    peft(folder, "half", half | {"classifier.weight": matrix(2, 2)})
    saved, _ = checkpoint.open_run("half")
    for t in saved["adapter"]["tensors"]["h.1.attn.o"].values():
        assert t.dtype == torch.float32
    assert saved["parameters"] == sum(t.numel() for t in PEFT.values())     # c_attn's A only once
    assert saved["ignored"] == ["classifier.weight"]


# What is refused

@pytest.mark.parametrize("change, message", [
    ({A_OF_UP: None}, r"bad: transformer.h.0.mlp.c_fc should have two matrices A and B, but has"),
    ({A_OF_UP: matrix(R, C, 1)}, "c_fc should have two matrices"),
    ({A_OF_UP: matrix(R + 1, C)}, "A and B of transformer.h.0.mlp.c_fc do not fit together"),
])
def test_a_layer_must_have_one_A_and_one_B_that_fit(folder, change, message):
    tensors = {key: t for key, t in (PEFT | change).items() if t is not None}
    peft(folder, "bad", tensors)
    with pytest.raises(ValueError, match=message):
        checkpoint.open_run("bad")


def test_a_fused_layer_of_one_matrix_is_ambiguous(folder):
    one = stored(IN_LORALIB, {"h.0.attn.c_attn": ((R, C), (C, R))})         # q, k or v?
    torch.save(one, "one.pt")
    with pytest.raises(ValueError, match="one.pt: .* do not fit together"):
        checkpoint.open_run("one.pt")


@pytest.mark.parametrize("config, message", [
    ({"peft_type": "LOHA"}, "the adapter is peft's LOHA, not LORA"),
    *[({flag: [1]}, f"not plain LoRA, it uses {flag}") for flag in BEYOND_LORA],
    *[({"init_lora_weights": name}, f"initialisation {name.lower()} changed the base model's")
      for name in ("pissa_niter_4", "PiSSA", "OLoRA", "corda", "loftq", "lora_ga")],
])
def test_adapters_that_are_not_plain_lora_are_refused(folder, config, message):
    peft(folder, "odd", **config)
    with pytest.raises(ValueError, match=f"odd/adapter_config.json: .*{message}"):
        checkpoint.open_run("odd")


@pytest.mark.parametrize("text", ["{", "null", "3", "[1]"])
def test_a_config_that_is_not_a_dict_in_json(folder, text):
    (folder / "theirs" / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match="adapter_config.json is not a configuration of peft"):
        checkpoint.open_run("theirs")


def test_files_that_are_incomplete_or_contain_no_adapter(folder):
    (folder / "empty").mkdir()
    (folder / "cut.bin").write_bytes(b"PK")
    (folder / "cut.safetensors").write_bytes(b"\x00")
    torch.save({"a": torch.ones(1)}, "nothing.pt")
    torch.save({3: torch.ones(2), "h.0.lora_A": "text"}, "mixed.pt")
    for path, message in [("empty", "empty: the folder has no adapter_model.safetensors or"),
                          ("cut.bin", "cut.bin is not a complete file of torch.save"),
                          ("cut.safetensors", "cut.safetensors.*(not a complete|pip install)"),
                          ("nothing.pt", "nothing.pt is neither a checkpoint .* nor an adapter"),
                          ("mixed.pt", "mixed.pt is neither a checkpoint .* nor an adapter")]:
        with pytest.raises(ValueError, match=message):
            checkpoint.open_run(path)
    (folder / "theirs" / "adapter_config.json").unlink()
    with pytest.raises(OSError, match="theirs/adapter_config.json"):
        checkpoint.open_run("theirs")


# The commands

def test_evaluate_exports_the_base_model_plus_the_adapter(folder):
    evaluate.main("loralib.pt --base base.pt --alpha 12 --export out.bin --device cpu".split())
    merged = GPT.from_pretrained("out.bin", n_head=2)
    delta = delta_weights("loralib.pt", alpha=12.0)
    for name, W in GPT.from_pretrained("base.pt").named_parameters():
        want = W.double() + delta.get(name.removesuffix(".weight"), 0)
        close(merged.get_parameter(name).double(), want, 1e-6)


def test_evaluate_measures_an_adapter_on_rows(folder):
    rows = [json.dumps({"prompt": prompt, "completion": "b"}) for prompt in "ac"]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    after = evaluate.main(["theirs", "--data", "rows.jsonl", "--device", "cpu"])
    assert math.isfinite(after["rows.jsonl"]["loss"])


@pytest.mark.parametrize("argv, message", [
    ("loralib.pt --alpha 12 --prompt a", "name of its base model: pass --base"),
    ("loralib.pt --base base.pt --prompt a", "does not contain α: pass --alpha"),
    ("theirs", "--data"),
    ("theirs --base gone.pt --prompt a", "gone.pt is neither a file nor a model"),
    ("theirs --base nano --prompt a", r"h.0.attn.q: .*'A': \(3, 48\).*should be .*'A': \(3, 128\)"),
    ("more --prompt a", "more than A and B, such as classifier.weight"),
    ("llama --prompt a", "another base model: this one has no model.layers.0.q_proj"),
    ("state.pt --prompt a", "name of its base model: pass --base"),
    ("state.pt --base nano --prompt a", "another base model, with the fingerprint [0-9a-f]{16}; "),
])
def test_evaluate_says_what_is_missing_or_does_not_fit(folder, argv, message, capsys):
    peft(folder, "more", PEFT | {"classifier.weight": matrix(2, 2)})
    llama = {"model.layers.0.q_proj": ((R, C), (C, R))}
    peft(folder, "llama", stored("base_model.model.{}.lora_{}.weight", llama))
    state = adapter_state.state_dict(lora.inject(GPT.from_pretrained("base.pt"), "q", 2))
    torch.save(state, "state.pt")
    assert_one_line(evaluate.main, argv, message, capsys)


def test_an_adapter_cannot_be_resumed(folder, capsys):
    assert_one_line(train.main, "--resume theirs", "theirs is an adapter without a run", capsys)
