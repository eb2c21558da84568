"""The experiments: the pages' tables are those of the results, and the scripts work in small."""
import json
import random

import pytest
import torch

import analyze
import bench
import collect
import flatten
import lora
import measure
import ranks
import results
import summed
import tables
import train
import variants
from results import read_csv
from support import adapter_state, data
from support.tasks import builtin

CPU = torch.device("cpu")


@pytest.mark.parametrize("page", tables.READMES, ids=["README", "experiments"])
def test_the_tables_of_the_pages_are_those_of_the_results(page):
    text = page.read_text()
    assert "<!-- end -->" in text
    assert tables.fill(text) == text


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of a run of AutoLoRA and one of its ranks shuffled, and their results."""
    folder = tmp_path_factory.mktemp("runs")
    small = "--data facts --steps 2 --batch_size 4 --eval_rows 2 --out".split()
    auto, lora, new = (str(folder / f) for f in ("auto-seed0.pt", "lora-seed1.pt", "new/ranks.pt"))
    search = "--method autolora --targets q up --rank 4 --search_steps 3".split()
    found = {"auto-seed0": train.main([*search, *small, auto])}
    ranks.main([auto, "shuffled", "0", new])
    return folder, found | {"lora-seed1": train.main(["--ranks_from", new, *small, lora, "--seed", "1"])}


def test_analyses_become_the_tables_that_the_claims_are_read_from(runs, tmp_path):
    paths = [str(path) for path in sorted(runs[0].glob("*.pt"))]
    studies = "--study subspace intruders --layers 0 --targets q --device cpu --out".split()
    analyze.main([*paths, *studies, str(tmp_path)])
    flatten.main(tmp_path, tmp_path / "own")
    for own, stored in (("own", "nano_methods"), ("own_pairs", "nano_subspaces_pairs"),
                        ("own_intruders", "nano_methods_intruders")):
        row = read_csv(tmp_path / f"{own}.csv")[0]
        assert row.keys() == read_csv(f"{stored}.csv")[0].keys()


@pytest.mark.parametrize("seed", range(5))
def test_other_ranks_cost_what_the_found_ones_cost(seed):
    dice = random.Random(seed)
    found = {name: dice.randint(1, 16) for name in "abcdefgh"}
    cost = {name: 256 if name < "e" else 640 for name in found}
    null = dict.fromkeys(found, dice.randint(1, 16))
    for kind in ("uniform", "random", "shuffled", "chance", "null"):
        new = ranks.deal(dict(found), kind, cost, 16, dice, null)
        left = sum(cost[name] * (found[name] - new[name]) for name in found)
        assert new.keys() == found.keys() and all(1 <= r <= 16 for r in new.values())
        assert 0 <= left < 640 and (left == 0 or kind != "shuffled")
        assert kind != "uniform" or max(new.values()) - min(new.values()) <= 1


def test_ranks_of_a_null_stay_if_they_cost_as_much():
    found, null = {"a": 1, "b": 5, "c": 2}, {"a": 4, "b": 2, "c": 2}
    for kind, expected in (("null", null), ("shuffled", found)):
        new = ranks.deal(found, kind, dict.fromkeys(found, 256), 8, random.Random(0), null)
        assert sorted(new.values()) == sorted(expected.values())


def test_the_benchmark_runs(tmp_path):
    small = "--rounds 2 --n_layer 1 --n_embd 64 --vocab_size 300 --batch 1 8 --latency 1x8"
    more, d, out = "--generate 4 4 --device cpu --out", 64, tmp_path / "bench.json"
    bench.main([*small.split(), *more.split(), str(out)])
    found = json.loads(out.read_text())
    ours, full = found["training"]["LoRA"], found["training"]["full fine-tuning"]
    assert ours["ratio"] == 1 and ours["parameters"] == 8 * (4 * 2 * d + 2 * 5 * d)
    assert full["optimizer_MB"] == pytest.approx(8e-6 * full["parameters"], rel=0.01)
    assert full["file_MB"] == pytest.approx(4e-6 * full["parameters"], rel=0.05)
    assert full["flops"] == pytest.approx(3 * 2 * 8 * full["parameters"], rel=0.2)
    assert tables.BENCH["latency"]["1 x 128"].keys() == found["latency"]["1 x 8"].keys()
    missing = tables.BENCH["training"].keys() - found["training"].keys()
    assert all("peft" in name or "loralib" in name for name in missing)


def test_test_rows_are_in_no_other_part():
    for name in ("arith", "infer"):
        train_rows, valid = builtin(name)
        others = {prompt for prompt, _ in train_rows + valid}
        rows = measure.test_rows(name)
        assert len(rows) == 200 and not others & {prompt for prompt, _ in rows}
        assert rows == measure.test_rows(name)


def test_two_halves_of_one_adapter_are_the_adapter(tmp_path, monkeypatch):
    """And of three weights the one of the lowest held-out loss is taken."""
    small = "--data facts --steps 10 --batch_size 8 --eval_rows 5 --rank 2 --device cpu --out".split()
    train.main([*small, str(tmp_path / "a.pt")])
    monkeypatch.setattr(measure, "ROWS", 2)
    monkeypatch.setattr(summed, "WEIGHTS", (0.5,))
    found = summed.summed([tmp_path / "a.pt"] * 2, CPU)
    alone = measure.measure(tmp_path / "a.pt", False, CPU)
    assert "arith.loss" not in alone
    forgot = measure.measure(tmp_path / "a.pt", True, CPU)
    assert forgot.keys() - alone.keys() == {"skills.loss"} and forgot["skills.loss"] > 0
    assert found["test.facts.loss"] == pytest.approx(alone["facts.loss"], rel=1e-4)
    losses = {0.1: 3.0, 0.2: 1.0, 0.3: 2.0}
    monkeypatch.setattr(summed, "WEIGHTS", tuple(losses))
    monkeypatch.setattr(summed, "means", lambda *_: {"loss": losses[weights[-1][0]]})
    weights, combine = [], adapter_state.combine
    monkeypatch.setattr(lora, "combine", lambda a, w: weights.append(w) or combine(a, w))
    found = summed.summed([tmp_path / "a.pt"] * 2, CPU)
    assert found["weight"] == 0.2 and weights[-1] == [0.2, 0.2]


def test_a_variant_differs_in_one_thing(gpt):
    lora.inject(gpt, "q", 4, variants.FixedScale, alpha=16)
    m = lora.adapters(gpt)["h.0.attn.q"]
    assert m.scale() == 2 and not m.B.any()                     # α/k with k = 8, not α/r
    lora.remove(gpt)
    lora.inject(gpt, "q", 4, variants.LearnedScale, alpha=16)
    m = lora.adapters(gpt)["h.0.attn.q"]
    assert m.scale().tolist() == [4] and m.s.requires_grad and not m.B.any()
    lora.remove(gpt)
    lora.inject(gpt, "q", 4, variants.RandomB, alpha=16)
    m = lora.adapters(gpt)["h.0.attn.q"]
    assert m.scale() == 4 and m.B.any()


def test_shuffled_rows_are_the_same_prompts_and_answers_but_not_together():
    tok = data.tokenizer(257)
    tasks = data.load(["arith"], tok, 512)
    first, second = data.split_for_search(tasks, 0.7, 0)
    same, shuffled = variants.shuffled_halves(tasks, 0.7, 0)
    assert same[0].train == first[0].train
    prompts, answers = [], []
    for rows in (second[0].train, shuffled[0].train):
        prompts.append([row.ids[:row.prompt_len] for row in rows])
        answers.append([row.ids[row.prompt_len:] for row in rows])
    assert prompts[0] == prompts[1] and answers[0] != answers[1]
    assert sorted(answers[0]) == sorted(answers[1])


def test_no_run_counts_twice_in_phi(tmp_path, monkeypatch):
    found = []
    for a, b, phi in ((0, 1, 0.2), (1, 0, 0.4), (0, 2, 0.9), (1, 2, 0.9), (2, 3, 0.6), (3, 5, 0.9)):
        for target, more in (("q", 0), ("v", 0.1)):
            ends = [phi + more, 1]
            found.append({"pair": "x and y", "a": f"x-seed{a}", "b": f"y-seed{b}",
                          "name": f"h.0.{target}", "input": ends, "output": ends, "random": ends})
    found.append({**found[0], "pair": "x and z", "input": [0.9, 1]})
    collect.write(flatten.pairs(found), tmp_path / "pairs.csv")
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    assert results.phi("pairs.csv", "x and y", "first") == pytest.approx([0.35, 0.65])
    assert results.phi("pairs.csv", "x and y", "first", target="q") == pytest.approx([0.3, 0.6])
    assert flatten.couple("gpt2-demo", "gpt2-rows")             # others' adapters have no seeds


def test_a_missing_seed_is_no_end(tmp_path, monkeypatch):
    collect.write([{"name": f"x-seed{seed}"} for seed in (0, 1, 3)], tmp_path / "runs.csv")
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    for name in ("x", "y"):
        with pytest.raises(KeyError, match="x-seed2|y-seed0"):
            results.seeds(name, "runs.csv")


def test_chance_finds_half_of_the_candidates():
    found = ranks.chance_ranks(dict.fromkeys(range(2000), 3), 16, random.Random(0))
    mean = sum(found.values()) / len(found)
    assert 7.8 < mean < 8.2 and min(found.values()) < 6 and max(found.values()) > 10
