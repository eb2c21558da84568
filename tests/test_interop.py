"""support/interop.py: adapters as peft and loralib store them, written out by hand here. The files
that peft itself writes are in test_oracles.py."""
import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn as nn

import evaluate
import lora
import train
from autolora import AutoLoRALinear
from conftest import close, random_gpt, randomise, same
from model import GPT, GPTConfig
from multilora import MultiLoRALinear
from support import adapter_state, checkpoint, interop

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


def renamed(tensors, pattern):
    """The tensors of PEFT under other keys."""
    found = {}
    for key, t in tensors.items():
        layer, side = re.search(r"transformer\.(.+)\.lora_(.)", key).groups()
        found[pattern.format(layer, side)] = t
    return found


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
    torch.save({"model_state_dict": LORALIB, "epoch": torch.ones(1)}, "wrapped.pt")
    assert same(delta_weights("wrapped.pt", alpha=1.0), delta_weights("loralib.pt", alpha=1.0))
    peft(folder, "wrapped", {"model_state_dict": PEFT})
    assert same(delta_weights("wrapped"), delta_weights("theirs"))


def test_names_without_gpt2s_prefix_and_names_of_other_models(folder):
    peft(folder, "bare", {key.replace("transformer.", ""): t for key, t in PEFT.items()})
    assert delta_weights("bare").keys() == delta_weights("theirs").keys()
    names = ["model.layers.11.self_attn.q_proj", "model.layers.2.mlp.gate_proj",
             "encoder.block.0.layer.0.SelfAttention.q", "decoder.block.3.layer.2.DenseReluDense.wo"]
    shapes = dict.fromkeys(names, ((R, C), (16, R)))
    peft(folder, "llama", stored("base_model.model.{}.lora_{}.weight", shapes))
    assert list(delta_weights("llama")) == names


@pytest.mark.parametrize("pattern", [
    "base_model.model.base_model.model.transformer.{}.lora_{}.weight",          # wrapped twice
    "_orig_mod.base_model.model.transformer.{}.lora_{}.weight",                 # compiled
    "base_model.model._orig_mod.transformer.{}.lora_{}.weight",
    "base_model.model.transformer._orig_mod.{}.lora_{}.weight",
    "module._orig_mod.base_model.model.transformer.{}.lora_{}.weight",          # DataParallel
    "base_model.model.transformer.{}.lora_{}.default.weight",                   # state_dict()
])
def test_names_of_wrapped_models(folder, pattern):
    peft(folder, "wrapped", renamed(PEFT, pattern))
    assert same(delta_weights("wrapped"), delta_weights("theirs"))


def test_the_state_dict_of_a_peft_model_has_no_config_and_contains_the_base_too(folder):
    tensors = renamed(PEFT, "base_model.model.transformer.{}.lora_{}.default.weight")
    tensors["base_model.model.transformer.h.0.attn.c_attn.base_layer.weight"] = matrix(C, 3 * C)
    torch.save(tensors, "whole.pt")
    assert same(delta_weights("whole.pt", alpha=6.0), delta_weights("theirs"))
    saved, settings = checkpoint.open_run("whole.pt")
    assert saved["ignored"] == ["base_model.model.transformer.h.0.attn.c_attn.base_layer.weight"]
    assert set(saved["adapter"]["scale"].values()) == {None}
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))             # beside the file
    assert same(delta_weights("whole.pt"), delta_weights("theirs"))
    close(delta_weights("whole.pt", alpha=12.0)["h.0.mlp.up"],
          2 * delta_weights("theirs")["h.0.mlp.up"])


def test_the_base_model_has_one_name_with_and_without_its_organisation(folder):
    for name, want in (("openai-community/gpt2", "gpt2"), ("gpt2-medium", "gpt2-medium"),
                       ("other/gpt2", "other/gpt2"), (None, None)):
        config = CONFIG | {"base_model_name_or_path": name}
        (folder / "theirs" / "adapter_config.json").write_text(json.dumps(config))
        assert checkpoint.open_run("theirs")[1].model == want


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
    ({f"module.{A_OF_UP}": matrix(R, C)}, "bad has two matrices A for transformer.h.0.mlp.c_fc"),
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


@pytest.mark.parametrize("layer, A, B", [
    ("h.0.attn.c_proj", (C, R), (R, C)),
    ("h.0.mlp.c_fc", (C, R), (R, 4 * C)),
    ("h.0.mlp.c_proj", (4 * C, R), (R, C)),
    ("h.0.attn.c_attn", (C, R), (R, 3 * C)),
    ("h.0.attn.c_attn", (C, R), (R, C)),
    ("h.0.attn.c_proj", (C, 1), (1, C)),
    ("model.layers.0.q_proj", (C, R), (R, 2 * C)),
])
@pytest.mark.parametrize("key", [IN_PEFT, IN_LORALIB])
def test_transposed_factors_are_refused(folder, layer, A, B, key):
    """Their product would have the right shape in square layers."""
    torch.save(stored(key, {layer: (A, B)}), "transposed.pt")
    message = rf"^transposed.pt: \S*{layer} has .*A should be \(r, d_in\) and B \(d_out, r\) with r"
    with pytest.raises(ValueError, match=message):
        checkpoint.open_run("transposed.pt")


def test_factors_that_only_look_transposed(folder):
    for r in (1, 7, C - 1, C):
        torch.save(stored(IN_PEFT, {"h.0.attn.c_proj": ((r, C), (C, r))}), "good.pt")
        assert delta_weights("good.pt", alpha=1.0).keys() == {"h.0.attn.o"}


@pytest.mark.parametrize("key", ["lora_magnitude_vector", "lora_magnitude_vector.default.weight",
                                 "lora_E", "lora_E.default"])
def test_dora_and_adalora_are_recognised_without_a_config(folder, key):
    torch.save(PEFT | {f"base_model.model.transformer.h.0.mlp.c_fc.{key}": matrix(R, 1)}, "x.pt")
    with pytest.raises(ValueError, match="^x.pt: .* belongs to DoRA or AdaLoRA, whose ΔW is not"):
        checkpoint.open_run("x.pt")


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors"])
def test_a_git_lfs_pointer_is_not_the_file(folder, name):
    (folder / "pointer").mkdir()
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 100\n"
    for path in (folder / "pointer" / name, folder / "run.pt"):
        path.write_text(text)
    for path in ("pointer", f"pointer/{name}", "run.pt"):
        with pytest.raises(ValueError, match=rf"^{path}\S* is a Git LFS pointer: git lfs pull"):
            checkpoint.open_run(path)
    with pytest.raises(ValueError, match="^run.pt is a Git LFS pointer"):
        checkpoint.base_matrices("run.pt", "cpu")           # --base of analyze.py


def test_an_adapter_of_another_kind_is_named_although_it_has_no_factors(folder):
    peft(folder, "prompt", {"prompt_embeddings": matrix(8, 64)}, peft_type="PROMPT_TUNING")
    with pytest.raises(ValueError, match="prompt/.*: .*PROMPT_TUNING, not LORA: it has no ΔW"):
        checkpoint.open_run("prompt")


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


def test_evaluate_exports_an_adapter_to_pefts_format(folder):
    pytest.importorskip("safetensors")
    evaluate.main("loralib.pt --base base.pt --alpha 12 --export out --device cpu".split())
    got = delta_weights("out")
    for name, want in delta_weights("loralib.pt", alpha=12.0).items():
        close(got[name], want, 1e-6)
    assert checkpoint.open_run("out")[1].model == "base.pt"


def test_evaluate_measures_an_adapter_on_rows(folder):
    rows = [json.dumps({"prompt": prompt, "completion": "b"}) for prompt in "ac"]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    after = evaluate.main(["theirs", "--data", "rows.jsonl", "--device", "cpu"])
    assert math.isfinite(after["rows.jsonl"]["loss"])


@pytest.mark.parametrize("argv, message", [
    ("loralib.pt --alpha 12 --prompt a", "name of its base model: pass --base"),
    ("loralib.pt --base base.pt --prompt a", "does not contain α: pass --alpha"),
    ("theirs", "--data"),
    ("theirs --base gone.pt --prompt a", "gone.pt is neither a file nor one of nano"),
    ("theirs --base nano --prompt a", r"h.0.attn.q: .*'A': \(3, 48\).*should be .*'A': \(3, 128\)"),
    ("more --prompt a", "also contains classifier.weight, which is neither"),
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
    assert_one_line(train.main, "--resume theirs", "theirs contains an adapter but no run", capsys)


# What is written

def adapted(targets, rank, layer, **settings):
    """The bundled layout's GPT with random adapters of this kind, and their state."""
    base = random_gpt(SIZES, dtype=torch.float32)
    model = randomise(lora.inject(base, targets, rank, layer, **settings))
    return model, adapter_state.state_dict(model)


DIFFERENT = {"h.0.attn.q": 2, "h.0.attn.k": 5, "h.0.mlp.up": 3, "h.1.attn.v": 1, "h.1.attn.o": 4}


@pytest.mark.parametrize("targets, rank, layer, settings", [
    ("q v", 4, lora.LoRALinear, {"alpha": 6.0}),
    ("all", 4, lora.LoRALinear, {}),
    (None, DIFFERENT, lora.LoRALinear, {"alpha": 3.0}),
    ("all", 4, MultiLoRALinear, {"n_blocks": 2}),
    ("k up", 4, MultiLoRALinear, {"n_blocks": 2, "scaling": "vector"}),
    ("q k v", 4, AutoLoRALinear, {}),
])
def test_an_exported_adapter_has_the_same_delta_weights(folder, targets, rank, layer, settings):
    pytest.importorskip("safetensors")
    model, state = adapted(targets, rank, layer, **settings)
    interop.write_peft(state, "base.pt", folder / "a" / "exported")
    assert checkpoint.open_run("a/exported")[1].model == "base.pt"
    got = delta_weights("a/exported")
    for name, m in lora.adapters(model).items():
        close(got.pop(name), m.delta_weight().detach().double(), 1e-6)
    for name, rest in got.items():              # q, k and v that share a c_attn with another
        assert name.endswith(("q", "k", "v")) and not rest.any()
    with pytest.raises(OSError, match="exists"):
        interop.write_peft(state, "base.pt", folder / "a" / "exported")


def test_a_folder_that_could_not_be_written_is_removed(folder, monkeypatch):
    pytest.importorskip("safetensors")
    _, state = adapted("q", 2, lora.LoRALinear)

    def full_disk(*args, **options):
        raise OSError("no space left on device")

    with monkeypatch.context() as m:
        m.setattr(Path, "write_text", full_disk)
        with pytest.raises(OSError, match="no space"):
            interop.write_peft(state, "base.pt", folder / "exported")
    interop.write_peft(state, "base.pt", folder / "exported")
    assert delta_weights("exported")["h.1.attn.q"].any()


def test_the_exported_config_has_the_ranks_of_the_fused_layers():
    _, state = adapted(None, DIFFERENT, lora.LoRALinear)
    config, tensors = interop.to_peft(state, "gpt2")
    layers = [f"transformer.{name}" for name in
              ("h.0.attn.c_attn", "h.0.mlp.c_fc", "h.1.attn.c_attn", "h.1.attn.c_proj")]
    assert config["target_modules"] == layers
    assert (config["peft_type"], config["base_model_name_or_path"]) == ("LORA", "gpt2")
    assert config["fan_in_fan_out"] is True
    for layer, r in zip(layers, (2 + 5, 3, 1, 4), strict=True):
        assert len(tensors[f"base_model.model.{layer}.lora_A.weight"]) == r
        assert config["rank_pattern"].get(layer, config["r"]) == r
        assert config["alpha_pattern"].get(layer, config["lora_alpha"]) == r
    B = tensors[f"base_model.model.{layers[0]}.lora_B.weight"]
    assert B.shape == (3 * C, 7)
    assert B[:C, :2].all() and B[C:2 * C, 2:].all() and B.count_nonzero() == 7 * C


def test_names_of_other_models_are_exported_unchanged(folder):
    pytest.importorskip("safetensors")
    mine = nn.ModuleDict({"enc": nn.ModuleDict({"q_proj": nn.Linear(8, 6)})})
    state = adapter_state.state_dict(randomise(lora.inject(mine, "q_proj", 2)))
    config, tensors = interop.to_peft(state, None)
    assert config["target_modules"] == ["enc.q_proj"] and config["fan_in_fan_out"] is False
    assert {key.rpartition(".lora_")[0] for key in tensors} == {"base_model.model.enc.q_proj"}
    interop.write_peft(state, None, folder / "exported")
    assert delta_weights("exported").keys() == {"enc.q_proj"}
