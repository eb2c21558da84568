"""support/foreign.py: adapters as peft and loralib store them, made by hand here; what peft itself
wrote is in test_oracles.py."""
import json
import math
import re

import pytest
import torch

import analyze
import evaluate
import lora
import multilora
import train
from conftest import close, random_gpt, randomise
from model import GPT, GPTConfig
from support import changes, checkpoint

C, R = 48, 3                                                # width and rank
SIZES = GPTConfig(257, 64, n_layer=2, n_head=2, n_embd=C)


def matrix(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layers_of(kind, **shapes):
    """{key: tensor} as `kind` (peft, loralib) names the A and B of layers with these shapes."""
    front, end = {"peft": ("base_model.model.transformer.", ".weight"),
                  "loralib": ("module.transformer.", "")}[kind]
    saved = {}
    for layer, (A, B) in shapes.items():
        saved[f"{front}{layer}.lora_A{end}"] = matrix(*A, seed=len(saved))
        saved[f"{front}{layer}.lora_B{end}"] = matrix(*B, seed=len(saved))
    return saved


FUSED, MERGED = ((R, C), (3 * C, R)), ((2 * R, C), (2 * C, R))
PEFT = layers_of("peft", **{"h.0.attn.c_attn": FUSED, "h.1.attn.c_proj": ((R, C), (C, R)),
                            "h.0.mlp.c_fc": ((R, C), (4 * C, R)),
                            "h.1.mlp.c_proj": ((R, 4 * C), (C, R))})
LORALIB = layers_of("loralib", **{f"h.{i}.attn.c_attn": MERGED for i in (10, 0, 1)})
CONFIG = {"peft_type": "LORA", "r": R, "lora_alpha": 6, "fan_in_fan_out": True, "bias": "none",
          "base_model_name_or_path": "base.pt"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A base, a file of some of its matrices, a peft folder, a loralib file; here."""
    monkeypatch.chdir(tmp_path)
    base = random_gpt(SIZES, dtype=torch.float32)
    torch.save({"model": base.state_dict(), "config": vars(SIZES)}, "base.pt")
    some = {f"h.{i}.attn.{t}.weight": base.state_dict()[f"h.{i}.attn.{t}.weight"].half()
            for i in range(2) for t in "qkvo"}
    torch.save(some, "some.pt")
    peft(tmp_path)
    first = {key: t for key, t in LORALIB.items() if ".h.10." not in key}
    torch.save(first, "loralib.pt")
    return tmp_path


def peft(folder, name="theirs", tensors=PEFT, **config):
    (folder / name).mkdir()
    torch.save(tensors, folder / name / "adapter_model.bin")
    (folder / name / "adapter_config.json").write_text(json.dumps(CONFIG | config))


def deltas(path, **flags):
    """{name: ΔW in float64} of a file."""
    c, = changes.load([path], **flags)
    return {name: B.double() @ A.double() for name, (B, A) in c.delta.items()}


def test_a_fused_layer_is_three_matrices_with_one_a(folder):
    A, B = (PEFT[f"base_model.model.transformer.h.0.attn.c_attn.lora_{s}.weight"] for s in "AB")
    got = deltas("theirs")
    assert set(got) == {"h.0.attn.q", "h.0.attn.k", "h.0.attn.v", "h.1.attn.o", "h.0.mlp.up",
                        "h.1.mlp.down"}
    for i, target in enumerate("qkv"):
        close(got[f"h.0.attn.{target}"], 6 / R * (B.double() @ A.double())[i * C:][:C], 1e-6)
    for theirs, ours in (("h.1.attn.c_proj", "h.1.attn.o"), ("h.0.mlp.c_fc", "h.0.mlp.up"),
                         ("h.1.mlp.c_proj", "h.1.mlp.down")):
        A, B = (PEFT[f"base_model.model.transformer.{theirs}.lora_{s}.weight"] for s in "AB")
        close(got[ours], 6 / R * B.double() @ A.double(), 1e-6)


def test_a_merged_linear_of_loralib_has_an_a_for_each_matrix(folder):
    """loralib: a grouped convolution, whose group g sees rows gr to (g+1)r of A x."""
    torch.save(LORALIB, "l.pt")
    got = deltas("l.pt", alpha=12.0)
    assert list(got) == [f"h.{i}.attn.{t}" for i in (0, 1, 10) for t in "qv"]   # in layers' order
    for i in (0, 1, 10):
        A, B = (LORALIB[f"module.transformer.h.{i}.attn.c_attn.lora_{s}"].double() for s in "AB")
        x = matrix(5, C).double()
        z = torch.nn.functional.conv1d((x @ A.T).T[None], B[:, :, None], groups=2)[0].T
        close(x @ got[f"h.{i}.attn.q"].T, 4 * z[:, :C], 1e-5)
        close(x @ got[f"h.{i}.attn.v"].T, 4 * z[:, C:], 1e-5)
    three = layers_of("loralib", **{"h.0.attn.c_attn": ((3 * R, C), (3 * C, R))})
    torch.save(three, "three.pt")
    A, B = three.values()
    close(deltas("three.pt", alpha=R)["h.0.attn.k"], (B[C:2 * C] @ A[R:2 * R]).double(), 1e-6)


def test_names_of_other_models_stay_and_have_layers_and_targets(folder):
    shapes = ((R, C), (16, R))
    names = ["model.layers.11.self_attn.q_proj", "model.layers.2.mlp.gate_proj", "vision1.v"]
    saved = {f"base_model.model.{name}.lora_{s}.weight": matrix(*shape)
             for name in names for s, shape in zip("AB", shapes)}
    peft(folder, "llama", saved)
    c, = changes.load(["llama"])
    assert list(c.delta) == [names[2], names[1], names[0]]              # v is in no layer: 0
    assert [changes.layer_of(name) for name in c.delta] == [0, 2, 11]
    found = analyze.main(["llama", "--targets", "q_proj", "v"])
    assert {r["target"] for r in found["records"]} == {"q_proj", "v"}


@pytest.mark.parametrize("config, layer, scale", [
    ({}, "h.0.mlp.c_fc", 6 / R), ({"use_rslora": True}, "h.0.mlp.c_fc", 6 / math.sqrt(R)),
    ({"alpha_pattern": {"c_fc": 2}}, "h.0.mlp.c_fc", 2 / R),
    ({"alpha_pattern": {r"h\.1\..*": 2, "c_proj": 9}}, "h.1.mlp.c_proj", 2 / R),
    ({"alpha_pattern": {"fc": 2, "transformer.h.0": 3}}, "h.0.mlp.c_fc", 6 / R),
])
def test_alpha_is_what_the_config_says_of_a_layer(folder, config, layer, scale):
    peft(folder, "other", **config)
    ours = {"h.0.mlp.c_fc": "h.0.mlp.up", "h.1.mlp.c_proj": "h.1.mlp.down"}[layer]
    A, B = (PEFT[f"base_model.model.transformer.{layer}.lora_{s}.weight"] for s in "AB")
    close(deltas("other")[ours], scale * B.double() @ A.double(), 1e-6)


def test_without_alpha_or_w_only_what_needs_neither_is_shown(folder, capsys):
    """And it is the same as with them."""
    bare = analyze.main(["loralib.pt"])
    said = capsys.readouterr().out
    assert re.search("left out +amplification, intruders.*--alpha", said)
    assert re.search("left out +directions.*--base", said)
    with_W = analyze.main(["loralib.pt", "--base", "some.pt"])
    whole = analyze.main(["loralib.pt", "--base", "base.pt", "--alpha", "12"])
    assert "left out" not in capsys.readouterr().out.split("figures")[-2]
    assert not {"intruders", "directions", "subspace", "ranks"} & bare.keys()
    assert "directions" in with_W and not {"amplification", "intruders"} & with_W.keys()
    assert {"directions", "amplification", "intruders", "spectrum"} <= whole.keys()
    for a, b, c in zip(bare["records"], with_W["records"], whole["records"], strict=True):
        assert "delta" not in {**a, **b} and "amplification" not in {**a, **b}
        for key in ("top1", "effective_rank", "stable_rank"):
            assert a[key] == pytest.approx(b[key]) == pytest.approx(c[key])
        assert b["projection"] == pytest.approx(c["projection"], rel=1e-3)      # W in half
        assert c["delta"] == pytest.approx(4 * math.hypot(*a["S"]), rel=1e-4)


def test_matrices_that_the_base_lacks_are_left_out_where_w_is_needed(folder, capsys):
    found = analyze.main(["theirs", "--base", "some.pt"])
    assert re.search(r"left out .*: up down,", capsys.readouterr().out)
    assert {r["target"] for r in found["records"] if "amplification" in r} == set("qkvo")
    assert {line["name"].split(".")[-1] for line in found["directions"]} == set("qkvo")
    assert {r["target"] for r in found["records"]} == {*"qkvo", "up", "down"}


def test_a_rank_above_a_side_and_two_matrices_of_one_layer_and_target(folder):
    shapes = {"encoder.0.v": ((6, 4), (9, 6)), "decoder.0.v": ((6, 4), (9, 6))}
    saved = {}
    for name, (A, B) in shapes.items():
        saved[f"base_model.model.{name}.lora_A.weight"] = matrix(*A)
        saved[f"base_model.model.{name}.lora_B.weight"] = matrix(*B)
    peft(folder, "deep", saved, r=6)
    torch.save({f"{name}.weight": matrix(9, 4) for name in shapes}, folder / "W.pt")
    found = analyze.main(["deep", "--base", "W.pt"])
    A, B = (matrix(*shape).double() for shape in ((6, 4), (9, 6)))
    S = torch.linalg.svdvals(B @ A)
    for record in found["records"]:
        assert record["S"] == pytest.approx(S.tolist(), rel=1e-5) and record["r"] == 4


def test_an_adapter_cannot_be_resumed(folder, capsys):
    with pytest.raises(SystemExit, match="2"):
        train.main(["--resume", "theirs/adapter_model.bin"])
    assert "has ended" in capsys.readouterr().err


def test_a_folder_gives_its_name_and_its_seed(folder):
    for seed in (0, 1):
        peft(folder, f"run-v1.5-seed{seed}")
    cs = changes.load(["run-v1.5-seed0", "run-v1.5-seed1/adapter_model.bin", "loralib.pt"])
    assert [c.id["checkpoint"] for c in cs] == ["run-v1.5", "run-v1.5", "loralib"]
    assert [c.id["seed"] for c in cs] == ["0", "1", None]


def test_a_state_that_was_saved_by_hand(folder, capsys):
    model = GPT.from_pretrained("base.pt")
    randomise(lora.inject(model, "q", 4, multilora.MultiLoRALinear, n_blocks=2))
    torch.save(lora.state_dict(model), "state.pt")
    want = lora.adapters(model)["h.1.attn.q"].delta_weight().detach()
    close(deltas("state.pt", base="base.pt")["h.1.attn.q"], want.double(), 1e-6)
    assert changes.load(["state.pt"], base="base.pt")[0].id["method"] == "multilora"
    evaluate.main("state.pt --base base.pt --prompt a --device cpu".split())
    for main in (analyze.main, evaluate.main):
        with pytest.raises(SystemExit, match="2"):
            main(["state.pt"])
        assert "--base" in capsys.readouterr().err


def test_evaluate_puts_it_on_the_base(folder, capsys):
    """The export is W + ΔW, matrix by matrix."""
    (folder / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 30
                                       + '{"prompt": "c", "completion": "d"}\n' * 30)
    evaluate.main(["theirs", "--data", "rows.jsonl", "--device", "cpu"])
    evaluate.main("loralib.pt --base base.pt --alpha 12 --export out.bin --device cpu".split())
    merged, base = GPT.from_pretrained("out.bin", n_head=2), GPT.from_pretrained("base.pt")
    delta = deltas("loralib.pt", alpha=12.0)
    for name, W in base.named_parameters():
        want = W.double() + delta.get(name.removesuffix(".weight"), 0)
        close(merged.get_parameter(name).double(), want, 1e-6)


def spoilt(folder):
    """Files of which each has one fault."""
    key = "base_model.model.transformer.h.0.mlp.c_fc.lora_A.weight"
    peft(folder, "half", {k: t for k, t in PEFT.items() if k != key})
    peft(folder, "misfit", PEFT | {key: matrix(R + 1, C)})
    peft(folder, "cube", PEFT | {key: matrix(R, C, 1)})
    peft(folder, "wide", PEFT | {key: matrix(R, C + 1)})
    peft(folder, "cut_config")
    (folder / "cut_config" / "adapter_config.json").write_text("{")
    peft(folder, "no_config")
    (folder / "no_config" / "adapter_config.json").unlink()
    peft(folder, "cut")
    (folder / "cut" / "adapter_model.bin").write_bytes(b"PK")
    (folder / "cut.safetensors").write_bytes(b"\x00")
    peft(folder, "more", PEFT | {"classifier.weight": matrix(2, 2)})
    for name, config in (("dora", {"use_dora": True}), ("loha", {"peft_type": "LOHA"}),
                         ("pissa", {"init_lora_weights": "pissa_niter_4"})):
        peft(folder, name, **config)
    peft(folder, "cap_start", init_lora_weights="PiSSA")
    torch.save({3: torch.ones(2), "h.0.lora_A": "text"}, folder / "mixed.pt")
    peft(folder, "flat")
    torch.save({"h.0.attn.q.weight": torch.zeros(C, C)}, folder / "flat.pt")
    (folder / "empty").mkdir()
    one = layers_of("loralib", **{"h.0.attn.c_attn": ((R, C), (C, R))})     # of q, k or v?
    torch.save(one, folder / "one.pt")
    torch.save({"a": torch.ones(1)}, folder / "nothing.pt")


@pytest.mark.parametrize("argv, message", [
    ("half", "c_fc should have two matrices"), ("cube", "c_fc should have two matrices"),
    ("misfit", "do not fit each other"), ("wide --base base.pt", "h.0.mlp.up is .*one base"),
    ("wide theirs", "h.0.mlp.up is .*one base"), ("cut_config", "not a config of peft"),
    ("no_config", "adapter_config.json"), ("cut", "not a whole"),
    ("cut.safetensors", "not a whole|pip install"),
    ("dora", "use_dora"), ("loha", "LOHA"), ("pissa", "pissa"), ("empty", "adapter_model"),
    ("one.pt", "do not fit each other"), ("nothing.pt", "nor an adapter"), ("gone", "gone"),
    ("theirs --study directions", "--base"), ("loralib.pt --study intruders", "--"),
    ("theirs --base gone.pt", "gone.pt"), ("theirs theirs", "have one name"),
    ("cap_start", "PiSSA".lower()), ("mixed.pt", "nor an adapter"), ("flat --base flat.pt", "W of"),
])
def test_errors_are_one_line(folder, argv, message, capsys):
    spoilt(folder)
    with pytest.raises(SystemExit, match="2"):
        analyze.main(argv.split())
    err = capsys.readouterr().err
    assert re.search(message, err) and err.count("\n") == 1, err


@pytest.mark.parametrize("argv, message", [
    ("loralib.pt --alpha 12 --prompt a", "--base"), ("theirs", "--data"),
    ("loralib.pt --base base.pt --prompt a", "--alpha"), ("more --prompt a", "classifier.weight"),
    ("wide --prompt a", "h.0.mlp.up should"), ("theirs --base nano --prompt a", "should have"),
])
def test_evaluate_refuses_what_is_not_whole(folder, argv, message, capsys):
    spoilt(folder)
    with pytest.raises(SystemExit, match="2"):
        evaluate.main([*argv.split(), "--device", "cpu"])
    err = capsys.readouterr().err
    assert re.search(message, err) and err.count("\n") == 1, err


def test_names_have_gpt2s_prefix_or_not_and_numbers_that_are_no_layers(folder):
    peft(folder, "bare", {key.replace("transformer.", ""): t for key, t in PEFT.items()})
    assert deltas("bare").keys() == deltas("theirs").keys()
    assert changes.layer_of("model.layers.2.mlp.experts.5.w1") == 2


@pytest.mark.parametrize("config", [
    {"target_parameters": ["w"]}, {"lora_bias": True}, {"use_qalora": True}, {"use_bdlora": [1]},
    {"kasa_config": [1]}, {"layer_replication": [[0, 1]]}, {"alora_invocation_tokens": [1]},
    {"init_lora_weights": "OLoRA"}, {"init_lora_weights": "corda"}, {"init_lora_weights": "loftq"}])
def test_what_is_more_than_lora_is_refused(folder, config):
    peft(folder, "odd", **config)
    with pytest.raises(ValueError, match="not LoRA alone"):
        changes.load(["odd"])


@pytest.mark.parametrize("text", ["null", "3", "[1]"])
def test_a_config_that_is_none(folder, text):
    (folder / "theirs" / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match="config of peft"):
        changes.load(["theirs"])


def test_a_pattern_is_of_a_whole_name_and_may_have_alternatives(folder):
    A, B = (PEFT[f"base_model.model.transformer.h.0.mlp.c_fc.lora_{s}.weight"] for s in "AB")
    for i, (pattern, alpha) in enumerate([("c_fc|nothing", 2), ("attn|mlp.c", 6), ("mlp|c_f", 6)]):
        peft(folder, f"alternatives{i}", alpha_pattern={pattern: 2})
        want = alpha / R * B.double() @ A.double()
        close(deltas(f"alternatives{i}")["h.0.mlp.up"], want, 1e-6)


def test_half_precision_and_the_folder_one_is_in(folder, monkeypatch):
    peft(folder, "half", {key: t.bfloat16() for key, t in PEFT.items()})
    c, = changes.load(["half"])
    assert c.parameters == sum(t.numel() for t in PEFT.values())
    analyze.main(["half", "--base", "some.pt"])
    monkeypatch.chdir("half")
    assert changes.load(["."])[0].label == "half"


def test_of_two_adapters_one_has_no_alpha(folder, capsys):
    found = analyze.main("theirs loralib.pt --base base.pt".split())
    for record in found["records"]:
        for part in (record, record["null"]):
            known = record["checkpoint"] == "theirs"
            assert ("amplification" in part) == ("delta" in part) == known
    assert {line["checkpoint"] for line in found["intruders"]} == {"theirs"}
    assert {line["checkpoint"] for line in found["directions"]} == {"theirs", "loralib"}
    assert "nan" not in capsys.readouterr().out


def test_w_of_one_and_alpha_of_the_other_are_not_enough(folder, capsys):
    mlp = {key: t for key, t in PEFT.items() if "mlp" in key}
    peft(folder, "mlp", mlp)
    found = analyze.main("mlp loralib.pt --base some.pt".split())
    assert "directions" in found and not {"amplification", "intruders"} & found.keys()
    assert "--alpha" in capsys.readouterr().out


def test_what_is_no_lora_of_a_file_is_named(folder, capsys):
    peft(folder, "more", PEFT | {"classifier.weight": matrix(2, 2)})
    analyze.main(["more", "--study", "spectrum"])
    out = capsys.readouterr().out
    assert "left out  1 tensors of more, such as classifier.weight" in out
    assert "amplification" not in out and "results" not in out


def test_seeds_of_other_ranks_are_none_and_a_delta_of_zero_is_refused(folder):
    peft(folder, "run-seed0")
    peft(folder, "run-seed1", lora_alpha=7)
    with pytest.raises(ValueError, match="have one name"):
        changes.load(["run-seed0", "run-seed1"])
    orthogonal = torch.zeros(2, C), torch.zeros(C, 2)           # neither is 0, but their product
    orthogonal[0][0], orthogonal[1][:, 1] = 1, 1
    torch.save({"h.0.x.lora_A": orthogonal[0], "h.0.x.lora_B": orthogonal[1]}, "zero.pt")
    with pytest.raises(SystemExit, match="2"):
        analyze.main(["zero.pt"])


def test_the_amplification_of_a_layer_is_the_mean_of_its_matrices(folder, monkeypatch):
    saved, lines = {}, []
    for i, name in enumerate(["encoder.0.v", "decoder.0.v", "decoder.1.v"]):
        for j, (side, shape) in enumerate((("A", (R, C)), ("B", (C, R)))):
            saved[f"base_model.model.{name}.lora_{side}.weight"] = matrix(*shape, seed=2 * i + j)
    peft(folder, "t5", saved)
    W = {key[17:].split(".lora_")[0] + ".weight": matrix(C, C, seed=9) for key in saved}
    torch.save(W, "W.pt")
    monkeypatch.setattr(analyze.show, "figure", lambda path, title, drawn, **_: lines.extend(drawn))
    found = analyze.main(["t5", "--base", "W.pt", "--study", "amplification"])
    line, = lines
    values = [record["amplification"] for record in found["records"]]
    assert line["x"] == [0, 1]
    assert line["real"] == pytest.approx([(values[0] + values[1]) / 2, values[2]])
