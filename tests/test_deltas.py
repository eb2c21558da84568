"""support/deltas.py: the ΔW and W of each kind of file, and which files go together."""
import json
from pathlib import Path

import pytest
import torch

import lora
from autolora import AutoLoRALinear
from conftest import TINY, close, random_gpt, randomise
from multilora import MultiLoRALinear
from support import adapter_state, checkpoint, deltas

SETTINGS = dict(method="lora", model="base.pt", scratch=False, seed=0, rank=4, ranks_from=None,
                search_split=0.7, out="out/lora.pt", data=["rows.jsonl"], dtype="fp32",
                block_size=64, batch_size=8, eval_rows=200)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Each test runs in a folder of its own, with two base models."""
    monkeypatch.chdir(tmp_path)
    for seed, path in enumerate(["base.pt", "other.pt"]):
        torch.save({"model": base(seed).state_dict(), "config": vars(TINY)}, path)


def base(seed=0):
    return random_gpt(seed=seed, dtype=torch.float32)


def adapted(targets="q v", layer=lora.LoRALinear, seed=0, **settings):
    return randomise(lora.inject(base(seed), targets, 4, layer, **settings))


def save_by_hand(path, model):
    torch.save(adapter_state.state_dict(model), path)


def save_run(path, adapter, step=3, **settings):
    """Write the adapter's state as a checkpoint of train.py."""
    saved = dict.fromkeys(checkpoint.PARTS)
    saved["settings"] = SETTINGS | settings
    saved["history"] = {"loss": [], "valid": [], "beta": []}
    saved["step"] = step
    saved["base"] = adapter["base"]
    saved["adapter"] = adapter
    torch.save(saved, path)


def save_loralib(path, **shapes):
    """Write an adapter of loralib with random A and B of these shapes."""
    tensors = {}
    for name, (A, B) in shapes.items():
        tensors[f"{name}.lora_A"] = torch.randn(A)
        tensors[f"{name}.lora_B"] = torch.randn(B)
    torch.save(tensors, path)
    return list(tensors.values())


def save_peft(folder, base_name, d_in=8):
    """Write an adapter of peft, whose config contains the name of its base model."""
    Path(folder).mkdir()
    config = {"peft_type": "LORA", "lora_alpha": 4, "base_model_name_or_path": base_name}
    Path(folder, "adapter_config.json").write_text(json.dumps(config))
    key = "base_model.model.x.lora_{}.weight"
    tensors = {key.format("A"): torch.ones(2, d_in), key.format("B"): torch.ones(8, 2)}
    torch.save(tensors, Path(folder, "adapter_model.bin"))


@pytest.mark.parametrize("layer, settings", [
    (lora.LoRALinear, {"alpha": 3.0}),
    (MultiLoRALinear, {"n_blocks": 2}),
    (MultiLoRALinear, {"n_blocks": 2, "scaling": "vector"}),
    (AutoLoRALinear, {}),
])
def test_the_factors_of_an_adapter_and_the_weights_of_its_base(layer, settings):
    model = adapted(layer=layer, **settings)
    layers = lora.adapters(model)
    save_by_hand("state.pt", model)
    save_run("run.pt", adapter_state.state_dict(model))
    cases = [("run.pt", None, True), ("state.pt", None, False), ("state.pt", "base.pt", True)]
    for path, W_from, has_W in cases:
        c, = deltas.load([path], base=W_from)
        assert c.delta.keys() == layers.keys() and c.scale_known
        for name, (B, A) in c.delta.items():
            close(B @ A, layers[name].delta_weight().detach(), 1e-6)
        assert bool(c.W) == has_W
        for name, W in c.W.items():
            assert torch.equal(W, base().get_submodule(name).weight)


class Mine(lora.LoRALinear):
    """A user's own class. The figures have colours for the methods of train.py only."""


def test_a_state_saved_by_hand_is_identified_by_its_file_and_class():
    for layer, method in ((MultiLoRALinear, "multilora"), (Mine, "lora")):
        save_by_hand("mine-seed3.pt", adapted("q", layer))
        c, = deltas.load(["mine-seed3.pt"])
        assert c.identity == {"checkpoint": "mine", "seed": "3", "method": method}
        assert c.settings.seed == "3"
    assert c.saved["parameters"] == 2 * (4 * 16 + 16 * 4)


def test_layers_are_in_numerical_order_and_other_names_have_layer_0():
    names = ["h.10.q", "h.2.q", "vision1.v"]
    save_loralib("l.pt", **dict.fromkeys(names, ((2, 8), (8, 2))))
    c, = deltas.load(["l.pt"], alpha=1.0)
    assert list(c.delta) == ["vision1.v", "h.2.q", "h.10.q"]
    assert [deltas.layer_of(name) for name in c.delta] == [0, 2, 10]
    assert [deltas.target_of(name) for name in c.delta] == ["v", "q", "q"]
    assert deltas.layer_of("model.layers.2.mlp.experts.5.w1") == 2


def test_without_alpha_the_size_of_a_delta_is_unknown():
    A, B = save_loralib("l.pt", x=((2, 8), (8, 2)))
    for alpha, scale in ((None, 1), (6.0, 3)):
        c, = deltas.load(["l.pt"], alpha=alpha)
        assert c.scale_known == (alpha is not None)
        assert torch.equal(c.delta["x"][0], B * scale)
        assert torch.equal(c.delta["x"][1], A)


def test_the_base_that_peft_names_is_not_loaded_without_being_asked_for():
    save_peft("theirs", "gone")
    c, = deltas.load(["theirs"])
    assert (c.settings.model, c.W) == ("gone", {})


def test_a_delta_of_zero_is_left_out():
    model = adapted("q v")
    untrained = lora.adapters(model)["h.1.attn.v"]
    untrained.B.data.zero_()
    save_by_hand("one.pt", model)
    save_by_hand("all.pt", lora.inject(base(), "q v", 4))
    save_run("full.pt", {"base": adapter_state.fingerprint(base())}, method="full")
    state = base().state_dict()
    state["h.0.mlp.up.weight"] += 1
    torch.save(torch.load("full.pt") | {"model": state}, "full.pt")
    c, = deltas.load(["one.pt"])
    assert list(c.delta) == ["h.0.attn.q", "h.0.attn.v", "h.1.attn.q"]
    assert c.zero == ["h.1.attn.v"]
    c, = deltas.load(["full.pt"])
    assert list(c.delta) == ["h.0.mlp.up"] and len(c.zero) == 11
    with pytest.raises(ValueError, match="^all.pt: all 4 ΔW are zero, so it was never trained"):
        deltas.load(["all.pt"])


# Names

def test_labels_and_seeds_come_from_the_name_of_the_file_or_of_pefts_folder(tmp_path, monkeypatch):
    (tmp_path / "run-v1.5-seed0").mkdir()
    for path in ("run-v1.5-seed0/adapter_model.bin", "run-v1.5-seed1.pt", "lora.pt"):
        save_by_hand(path, adapted())
    loaded = deltas.load(["run-v1.5-seed0", "run-v1.5-seed1.pt", "lora.pt"])
    assert [c.label for c in loaded] == ["run-v1.5-seed0", "run-v1.5-seed1", "lora"]
    assert [c.identity["checkpoint"] for c in loaded] == ["run-v1.5", "run-v1.5", "lora"]
    assert [c.identity["seed"] for c in loaded] == ["0", "1", None]
    assert deltas.load(["run-v1.5-seed0/adapter_model.bin"])[0].label == "run-v1.5-seed0"
    monkeypatch.chdir("run-v1.5-seed0")
    assert deltas.load(["."])[0].label == "run-v1.5-seed0"
    save_by_hand("two\nlines-seed0.pt", adapted())
    c, = deltas.load(["two\nlines-seed0.pt"])
    assert (c.label, c.identity["checkpoint"], c.identity["seed"]) == ("two_lines-seed0",
                                                                       "two_lines", "0")


@pytest.mark.parametrize("paths, labels", [
    ("x/lora.pt y/lora.pt", "x-lora y-lora"),
    ("x/d/lora.pt y/d/lora.pt", "x-d-lora y-d-lora"),
    ("x/lora.pt y/lora.pt z/other.pt", "x-lora y-lora z-other"),
    ("x/run-seed0.pt x/run-seed1.pt y/run-seed0.pt", "x-run-seed0 x-run-seed1 y-run-seed0"),
    ("x/theirs/adapter_model.bin y/theirs/", "x-theirs y-theirs"),
    ("p/x/d-lora.pt y/d/lora.pt z/d/lora.pt", "p-x-d-lora y-d-lora z-d-lora"),
])
def test_files_of_one_name_get_the_names_of_their_folders(paths, labels):
    for path in paths.split():
        if path.endswith("/"):
            path += "adapter_model.bin"
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_by_hand(path, adapted())
    loaded = deltas.load(paths.split())
    assert [c.label for c in loaded] == labels.split()
    for c in loaded:
        seed = "" if c.identity["seed"] is None else f"-seed{c.identity['seed']}"
        assert c.label == c.identity["checkpoint"] + seed


def test_one_file_cannot_be_given_twice():
    save_by_hand("a.pt", adapted())
    for again in ("a.pt", "./a.pt", str(Path("a.pt").absolute())):
        with pytest.raises(ValueError, match="a.pt, .*a.pt have the same name: rename one"):
            deltas.load(["a.pt", again])


def test_two_seeds_may_come_from_an_earlier_version_and_from_this_one():
    state = adapter_state.state_dict(adapted())
    save_run("run-seed0.pt", state)
    save_run("run-seed1.pt", state, seed=1, out="elsewhere.pt")
    saved = torch.load("run-seed0.pt")
    settings = saved["settings"]
    settings["ranks"] = settings.pop("ranks_from")          # the flags' names at that time
    settings["split"] = settings.pop("search_split")
    torch.save(saved, "run-seed0.pt")
    loaded = deltas.load(["run-seed0.pt", "run-seed1.pt"])
    assert [c.settings.search_split for c in loaded] == [0.7, 0.7]


@pytest.mark.parametrize("change", [{"rank": 5}, {"seed": 0}, {"method": "full"}, {"step": 2},
                                    {"ranks_from": "a.pt"}, {"checksums": {"rows": 1}}])
def test_files_of_one_name_must_be_seeds_of_the_same_settings(change):
    state = adapter_state.state_dict(adapted())
    save_run("run-seed0.pt", state)
    settings = {key: value for key, value in change.items() if key != "checksums"}
    save_run("run-seed1.pt", state, **{"seed": 1} | settings)
    saved = torch.load("run-seed1.pt")
    saved["checksums"] = change.get("checksums")
    torch.save(saved | {"model": base(1).state_dict()}, "run-seed1.pt")
    message = "run-seed0.pt and run-seed1.pt have the same name, but are not two seeds"
    with pytest.raises(ValueError, match=message):
        deltas.load(["run-seed0.pt", "run-seed1.pt"])


def test_adapters_saved_by_hand_under_one_name_must_have_equal_settings():
    for seed, ranks in ((0, 2), (1, 3)):
        model = randomise(lora.inject(base(), None, ranks))
        torch.save(adapter_state.state_dict(model), f"x-seed{seed}.pt")
    with pytest.raises(ValueError, match="not two seeds of the same settings"):
        deltas.load(["x-seed0.pt", "x-seed1.pt"])


# Base models

@pytest.fixture
def runs():
    """Files of two base models, with and without the name of the model."""
    for path, seed in (("base.pt", 0), ("other.pt", 1)):
        state = adapter_state.state_dict(adapted(seed=seed))
        save_run(f"run-of-{path}", state, model=path)
        torch.save(state, f"state-of-{path}")


@pytest.mark.parametrize("paths, W_from, first, second", [
    ("run-of-base.pt run-of-other.pt", None, "base model base.pt", "run-of-other.pt"),
    ("run-of-base.pt state-of-other.pt", None, "base model base.pt", "state-of-other.pt"),
    ("state-of-base.pt run-of-other.pt", None, "base model other.pt", "state-of-base.pt"),
    ("state-of-base.pt state-of-other.pt", None, "state-of-base.pt", "state-of-other.pt"),
    ("run-of-base.pt", "other.pt", "base model other.pt", "run-of-base.pt"),
    ("state-of-base.pt", "other.pt", "base model other.pt", "state-of-base.pt"),
])
def test_all_files_must_belong_to_one_base_model(runs, paths, W_from, first, second):
    with pytest.raises(ValueError, match="different base models|same base model") as e:
        deltas.load(paths.split(), base=W_from)
    assert first in str(e.value) and second in str(e.value)


def test_the_base_model_must_be_found_and_may_have_moved():
    state = adapter_state.state_dict(adapted())
    save_run("moved.pt", state, model="away.pt")
    save_run("scratch.pt", state, scratch=True)
    assert deltas.load(["moved.pt"], base="base.pt")[0].W
    save_by_hand("a.pt", adapted())
    for paths in (["moved.pt"], ["a.pt", "moved.pt"], ["moved.pt", "a.pt"]):
        with pytest.raises(ValueError, match="^moved.pt: .*away.pt is neither a file nor .*--base"):
            deltas.load(paths)
    with pytest.raises(ValueError, match="moved.pt: .*gone.pt is neither a file nor .*--base"):
        deltas.load(["moved.pt"], base="gone.pt")
    with pytest.raises(ValueError, match="scratch.pt was trained from random weights"):
        deltas.load(["scratch.pt"])


def test_adapters_of_different_base_models_have_no_w_unless_it_is_given():
    save_peft("a", "gpt2")
    save_peft("b", "distilgpt2", d_in=9)
    save_peft("c", "openai-community/gpt2")
    save_run("run.pt", adapter_state.state_dict(adapted()))
    save_run("again.pt", adapter_state.state_dict(adapted()), model="away.pt")
    torch.save({"x.weight": torch.ones(8, 8)}, "W.pt")
    names = {}
    for paths in ("a b", "a c", "a run.pt", "run.pt again.pt"):
        loaded = deltas.load(paths.split())
        names[paths] = deltas.base_names(loaded)
        assert all(c.delta for c in loaded)
        assert any(c.W for c in loaded) == (paths == "run.pt again.pt")
    assert names == {"a b": ["gpt2", "distilgpt2"], "a c": ["gpt2"],
                     "a run.pt": ["gpt2", "base.pt"], "run.pt again.pt": ["base.pt"]}
    for c in deltas.load(["a", "c"], base="W.pt"):
        assert list(c.W) == ["x"]
    with pytest.raises(ValueError, match="b: ΔW of x has shape"):
        deltas.load(["a", "b"], base="W.pt")


def test_shapes_must_agree_with_the_base_model_and_with_other_files():
    save_loralib("narrow.pt", x=((2, 8), (8, 2)))
    save_loralib("wide.pt", x=((2, 9), (8, 2)))
    torch.save({"x.weight": torch.ones(8, 8)}, "W.pt")
    message = r"wide.pt: ΔW of x has shape \(8, 9\), but .* has \(8, 8\)"
    for paths, W_from in ((["narrow.pt", "wide.pt"], None), (["wide.pt"], "W.pt")):
        with pytest.raises(ValueError, match=message):
            deltas.load(paths, base=W_from, alpha=1.0)


def test_only_the_selected_matrices_are_kept():
    save_by_hand("state.pt", adapted("q v up"))
    c, = deltas.load(["state.pt"])
    deltas.keep_only(c, "targets", None, deltas.target_of)
    assert len(c.delta) == 6 and not c.selected
    deltas.keep_only(c, "targets", ["q", "up"], deltas.target_of)
    deltas.keep_only(c, "layers", [1], deltas.layer_of)
    assert list(c.delta) == ["h.1.attn.q", "h.1.mlp.up"] and c.selected
    with pytest.raises(ValueError, match="--targets v: state.pt has no such ΔW; choose from q up"):
        deltas.keep_only(c, "targets", ["v"], deltas.target_of)
