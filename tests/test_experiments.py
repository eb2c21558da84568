"""The experiments: the grid is that of the published runs, and every script works in small."""
import json
import random

import pytest
import torch

pytest.importorskip("scipy", reason="the evidence needs scipy: experiments/requirements.txt")

import analyze
import bench
import controls
import lora
import measure
import planted
import results
import runs
import train
from results import read_csv
from support import checkpoint, data
from support.tasks import builtin

SMALL = "--data facts --steps 2 --batch_size 4 --eval_rows 2 --device cpu".split()


# The grid and the pool ---------------------------------------------------------------------------

def test_the_grid_is_that_of_the_published_runs():
    for model in ("nano", "smollm"):
        checked = len(results.parse_csv(results.RESULTS / f"{model}_runs.csv"))
        for name, row in runs.read_grid(runs.SETTINGS[model]).items():
            published = results.runs(name, f"{model}_runs.csv")
            checked -= len(published)
            if row["measure"] == "no training":
                continue
            flags = runs.FLAGS[row["setting"]].format(shared="shared") + " " + row["flags"]
            settings, _ = train.parse(flags.split())
            for seed, run in published.items():
                for key in ("method", "lr", "steps", "batch_size", "rank", "n_blocks", "targets",
                            "search_steps", "hypergrad"):
                    expected = getattr(settings, key)
                    assert run.get(key, expected) == expected, (name, key)
                assert run["seed"] == seed + int(row["seed_offset"] or 0)
                assert seed in row["seeds"]
        assert checked == 0                         # each published run is in the grid


def test_a_group_comes_after_the_groups_that_it_needs():
    grid = runs.read_grid(["nano"])
    assert list(runs.choose(grid, ["fixed-uniform", "lora-r1"])) == ["lora-r1", "autolora",
                                                                     "fixed-uniform"]
    sweep = runs.choose(grid, ["pilot-r8"])
    assert len(sweep) == 4 and all(name.startswith("pilot-r8-lr") for name in sweep)


def test_the_commands_of_a_rehearsal(capsys):
    runs.main(["medium", "autolora", "e2e", "--list", "--quick", "--shared", "here"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert "--search_steps 2 " in lines[2] and "--search_steps 2000" not in lines[2]
    assert lines[0].startswith("python train.py --model gpt2-medium --data here/data/e2e ")
    assert lines[0].endswith("--model nano --steps 3 --eval_rows 2 --eval_every 2 --seed 0 "
                             "--out out/medium-quick/e2e-seed0.pt")
    assert lines[1] == ("python experiments/e2e.py score out/medium-quick/e2e-seed0.pt "
                        "--data here/data/e2e --prompts 2")
    args = runs.parse(["medium"])
    row = runs.read_grid(["medium"])["e2e"]
    job, measuring = runs.jobs_of("e2e", row, args, args.shared)
    assert job.resume == "python train.py --resume ../shared/e2e-seed0.pt"
    assert "--prompts" not in measuring.command and measuring.needs == ["e2e-seed0"]


def test_controls_say_which_flag_is_missing(capsys):
    for flags, missing in ((["--ranks", "random"], "--found"),
                           (["--ranks", "null", "--found", "a.pt"], "--null"),
                           (["--ranks", "random", "--found", "missing.pt"], "missing.pt")):
        with pytest.raises(SystemExit) as e:
            controls.main(flags)
        assert e.value.code == 2 and missing in capsys.readouterr().err.splitlines()[-1]


def test_missing_jobs_run_once_in_order_and_resume(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.py").write_text(
        "import sys; open('log', 'a').write(' '.join(sys.argv[1:]) + '\\n')\n"
        "sys.exit('fail' in sys.argv)\n")
    monkeypatch.setattr(runs, "ROOT", tmp_path)

    def call(*jobs):
        runs.run_all(jobs, tmp_path, 2)
        return (tmp_path / "log").read_text().split("\n")[:-1]

    first = runs.Job("a", "python job.py --train", [], "python job.py --resume a.pt")
    second = runs.Job("b", "python job.py --measure", ["a"])
    assert call(second, first) == ["--train", "--measure"]
    assert (tmp_path / "a.commit").read_text() == ""                # this folder has no history
    third = runs.Job("c", "python job.py --train fail", [], "python job.py --resume c.pt")
    with pytest.raises(SystemExit, match="failed"):
        call(first, third, runs.Job("d", "python job.py --after", ["c"]))
    (tmp_path / "c.pt").write_text("unfinished")
    assert call(first, third)[2:] == ["--train fail", "--resume c.pt"]
    with pytest.raises(SystemExit, match="another command"):
        call(runs.Job("a", "python job.py --other", []))


# Controls ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(5))
def test_other_ranks_have_as_many_parameters(seed):
    rng = random.Random(seed)
    found = {name: rng.randint(1, 16) for name in "abcdefgh"}
    cost = {name: 256 if name < "e" else 640 for name in found}
    null = dict.fromkeys(found, rng.randint(1, 16))
    for kind in controls.KINDS:
        new = controls.other_ranks(dict(found), kind, cost, 16, rng, null)
        left = controls.total(found, cost) - controls.total(new, cost)
        assert new.keys() == found.keys() and all(1 <= r <= 16 for r in new.values())
        assert 0 <= left < 640 and (left == 0 or kind not in ("found", "shuffled"))
        assert kind != "uniform" or max(new.values()) - min(new.values()) <= 1
        for shape in (256, 640):
            names = [name for name in found if cost[name] == shape]
            same = sorted(found[n] for n in names) == sorted(new[n] for n in names)
            assert same or kind not in ("found", "shuffled")


def test_chance_finds_half_of_the_candidates():
    rng = random.Random(0)
    found = [controls.chance_rank(16, rng) for _ in range(2000)]
    assert 7.8 < sum(found) / len(found) < 8.2 and min(found) < 6 and max(found) > 10


def test_a_layer_differs_in_one_thing(gpt):
    expected = {controls.FixedScale: (2, False), controls.LearnedScale: (4, False),
                controls.RandomB: (4, True)}
    for layer, (scale, random_b) in expected.items():
        lora.inject(gpt, "q", 4, layer, alpha=16)
        m = lora.adapters(gpt)["h.0.attn.q"]
        found = torch.as_tensor(m.scale()).detach().tolist()
        assert found in (scale, [scale]) and bool(m.B.any()) == random_b        # α/8 with k = 8
        assert hasattr(m, "s") == (layer is controls.LearnedScale)
        lora.remove(gpt)


def test_permuted_labels_are_the_same_prompts_and_labels_in_other_pairs():
    tasks = data.load(["arith"], data.tokenizer(257), 512)
    first, second = controls.split_for_search(tasks, 0.7, 0)
    same, permuted = controls.permuted_split(tasks, 0.7, 0)
    assert same[0].train == first[0].train
    prompts = []
    labels = []
    for rows in (second[0].train, permuted[0].train):
        prompts.append([row.ids[:row.prompt_len] for row in rows])
        labels.append([row.ids[row.prompt_len:] for row in rows])
    assert prompts[0] == prompts[1] and labels[0] != labels[1]
    assert sorted(labels[0]) == sorted(labels[1])


# From runs to results ----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A search, and controls that need its ranks or another layer."""
    folder = tmp_path_factory.mktemp("runs")
    found = str(folder / "auto-seed0.pt")
    train.main([*"--method autolora --targets q up --rank 4 --search_steps 3".split(), *SMALL,
                "--out", found])
    methods = dict(train.METHODS)
    read_ranks = checkpoint.read_ranks
    controls.main(["--found", found, "--ranks", "random", "--layer", "fixed-scale", *SMALL,
                   "--seed", "1", "--out", str(folder / "lora-seed1.pt")])
    train.METHODS.update(methods)
    checkpoint.read_ranks = read_ranks
    return folder


def test_a_control_has_other_ranks_and_another_layer(folder):
    found, _ = checkpoint.open_run(folder / "auto-seed0.pt")
    control, settings = checkpoint.open_run(folder / "lora-seed1.pt")
    ranks = [[len(own["A"]) for own in saved["adapter"]["tensors"].values()]
             for saved in (found, control)]
    cost = {}
    for name, own in found["adapter"]["tensors"].items():
        cost[name] = own["A"].size(1) + own["B"].size(0)
    expected = controls.other_ranks(dict(zip(cost, ranks[0])), "random", cost, 4, random.Random(1))
    assert list(expected.values()) == ranks[1] != ranks[0] and settings.seed == 1
    assert settings.ranks_from.endswith("auto-seed0.pt (random)")
    assert control["adapter"]["layer"] == "FixedScale"
    assert measure.measure(folder / "lora-seed1.pt")["mean.loss"] > 0       # it can be loaded


def test_runs_and_analyses_become_the_published_tables(folder, tmp_path, monkeypatch):
    (folder / "lora-seed1-test.json").write_text('{"mean.loss": 0.5, "text": "not a number"}')
    (folder / "lora-seed1-untrained.json").write_text('{"mean.loss": 0.9}')
    (folder / "lora-summed-seed2-test.json").write_text('{"weight": 0.4, "mean.loss": 0.7}')
    results.collect(folder, tmp_path / "runs.csv")
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    run = results.runs("lora", "runs.csv")[1]
    assert run["test.mean.loss"] == 0.5 and run["method"] == "lora"
    assert run["untrained.mean.loss"] == 0.9
    assert "rank" not in run and "test.text" not in run
    assert len(run.get("ranks", "1 1").split()) == 8
    summed = {"name": "lora-summed-seed2", "test.weight": 0.4, "test.mean.loss": 0.7}
    assert results.runs("lora-summed", "runs.csv") == {2: summed}
    assert "commit" not in run
    (tmp_path / "lora-seed0-score.json").write_text("{}")
    with pytest.raises(ValueError, match="an earlier version"):
        results.collect(tmp_path, tmp_path / "runs.csv")
    paths = [str(path) for path in sorted(folder.glob("*.pt"))]
    studies = "--study amplification subspace intruders --layers 0 --targets q --device cpu --out"
    analyze.main([*paths, *studies.split(), str(tmp_path)])
    results.flatten(tmp_path, tmp_path / "own")
    for own, stored in (("own", "nano_methods"), ("own_pairs", "nano_subspaces_pairs"),
                        ("own_intruders", "nano_methods_intruders")):
        columns = read_csv(f"{own}.csv")[0].keys()
        published = results.parse_csv(runs.ROOT / "experiments" / "results" / f"{stored}.csv")
        assert published[0].keys() <= columns, own


def test_rows_of_other_runs_remain_in_a_table(tmp_path):
    path = tmp_path / "a.csv"
    results.write_csv([{"name": "x", "seed": "0", "loss": 1}, {"name": "x", "seed": None}], path)
    new = [{"name": "x", "seed": "0", "loss": 2.0, "commit": ["827e313", "1234567"]},
           {"name": "y", "seed": "0"}]
    results.update_csv(new, path, ["name", "seed"])
    assert path.read_text() == "name,seed,loss,commit\nx,,,\nx,0,2,827e313 1234567\ny,0,,\n"
    results.update_csv(new[:1], path, ["name"])         # all rows of x are replaced
    assert path.read_text() == "name,seed,loss,commit\ny,0,,\nx,0,2,827e313 1234567\n"


def test_blocks_have_a_row_for_each_matrix():
    share = [0.5, 0.3, 0.2]
    record = {"checkpoint": "a", "seed": "0", "method": "multilora", "name": "h.0.q", "n": 3,
              "share": share, "input": [0.1, 0.2], "output": [0.3, 0.4],
              "null": {"share": share, "input": [0.5, 0.6], "output": [0.7, 0.8]}}
    assert results.block_rows([record]) == [{
        "checkpoint": "a", "seed": "0", "name": "h.0.q", "n": 3, "largest": 0.5, "smallest": 0.2,
        "input": 0.2, "output": 0.4, "null.input": 0.6, "null.output": 0.8}]


def test_no_run_counts_twice_in_phi(tmp_path, monkeypatch):
    records = []
    for a, b, phi in ((0, 1, 0.2), (1, 0, 0.4), (0, 2, 0.9), (1, 2, 0.9), (2, 3, 0.6), (3, 5, 0.9)):
        for target, more in (("q", 0), ("v", 0.1)):
            ends = [phi + more, 1]
            records.append({"pair": "x and y", "a": f"x-seed{a}", "b": f"y-seed{b}",
                            "name": f"h.0.{target}", "input": ends, "output": ends, "random": ends})
    records.append({**records[0], "pair": "x and z", "input": [0.9, 1]})
    results.write_csv(results.pair_rows(records), tmp_path / "pairs.csv")
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    found = results.study("pairs.csv", "x and y", "input.first")
    assert found == pytest.approx({0: 0.35, 2: 0.65})
    q = results.study("pairs.csv", "x and y", "input.first", target="q")
    assert q == pytest.approx({0: 0.3, 2: 0.6})
    assert len(results.pair_rows([{**records[0], "a": "gpt2-demo", "b": "gpt2-rows"}])) == 1


# Measuring ---------------------------------------------------------------------------------------

def test_test_rows_are_neither_training_nor_validation_rows():
    for name in ("arith", "infer"):
        train_rows, valid = builtin(name)
        others = {prompt for prompt, _ in train_rows + valid}
        rows = measure.test_rows(name)
        assert len(rows) == 200 and not others & {prompt for prompt, _ in rows}
        assert rows == measure.test_rows(name)
    with pytest.raises(ValueError, match="copy has no test rows"):
        measure.test_rows("copy")


def test_rows_on_which_forgetting_is_measured(folder, tmp_path):
    run = measure.Measured(folder / "lora-seed1.pt")
    task, = run.load(["copy"], 100)
    assert [row.ids for row in task.valid] == [
        data.encode(run.tok, *row).ids for row in builtin("copy")[1][::2]]
    (tmp_path / "text.txt").write_text("a" * 3000)
    task, = run.load([str(tmp_path / "text.txt")], 50, measure.WINDOW)
    assert len(task.valid[0].ids) == 513


def test_results_of_another_script_are_kept(folder, tmp_path):
    path = tmp_path / "a-test.json"
    measure.write(path, {"mean.loss": 1, "mean.exact": 0})
    measure.write(path, {"mean.loss": 2, "mean.exact": 0})              # its own may be repeated
    assert json.loads(path.read_text())["mean.loss"] == 2
    path.write_text('{"mean.loss": 1, "texts": {}}')
    with pytest.raises(ValueError, match="results of e2e.py"):
        measure.write(path, {"mean.loss": 1, "mean.exact": 0})


def test_two_halves_of_one_adapter_are_the_adapter(tmp_path, monkeypatch):
    """And the weight with the lowest validation loss is taken."""
    path = tmp_path / "a.pt"
    train.main([*SMALL, "--rank", "2", "--out", str(path)])
    monkeypatch.setattr(measure, "MIXTURE", ["facts"])
    alone = measure.measure(path)
    monkeypatch.setattr(measure, "WEIGHTS", (0.5,))
    assert measure.measure_sum([path] * 2)["facts.loss"] == pytest.approx(alone["facts.loss"],
                                                                         rel=1e-4)
    losses = {0.1: 3.0, 0.2: 1.0, 0.3: 2.0}
    weights = []
    combine = measure.adapter_state.combine
    monkeypatch.setattr(measure, "WEIGHTS", tuple(losses))
    monkeypatch.setattr(measure.adapter_state, "combine",
                        lambda states, w: weights.append(w) or combine(states, w))
    monkeypatch.setattr(measure.Measured, "loss", lambda run, tasks: losses[weights[-1][0]])
    assert measure.measure_sum([path] * 2)["weight"] == 0.2 and weights[-1] == [0.2, 0.2]


def test_the_benchmark_runs(tmp_path):
    out = tmp_path / "bench.json"
    bench.main([*"--rounds 2 --n_layer 1 --n_embd 64 --vocab_size 300 --batch 1 8 --latency 1x8 "
                 "--device cpu --out".split(), str(out)])
    found = json.loads(out.read_text())
    ours, full = found["training"]["LoRA"], found["training"]["full fine-tuning"]
    assert ours["ratio"] == 1 and ours["parameters"] == 8 * (4 * 2 * 64 + 2 * 5 * 64)
    block = 4 * (64 * 64 + 64) + (2 * 4 * 64 * 64 + 256 + 64) + 4 * 64
    assert full["parameters"] == 300 * 64 + 8 * 64 + block + 2 * 64
    published = results.read_json("bench_cpu.json")
    assert published["latency"]["1 x 128"].keys() == found["latency"]["1 x 8"].keys()
    missing = published["training"].keys() - found["training"].keys()
    assert all("peft" in name or "loralib" in name for name in missing)


def test_all_candidates_of_the_benchmark_compute_the_same(gpt):
    batch = torch.arange(18).view(2, 9) * 14 % 257
    gpt = gpt.float()
    expected = gpt(batch, batch)[1].item()
    found = bench.candidates(gpt, 4, (batch, batch))
    assert len(found) >= 5
    for name, candidate in found.items():
        loss, = candidate.losses()
        assert loss.item() == pytest.approx(expected, rel=1e-5), name


def test_parameters_are_not_counted_as_saved_for_the_backward_pass():
    """tanh saves its output, and a linear layer its input and its weight."""
    model = torch.nn.Sequential(torch.nn.Linear(100, 1000), torch.nn.Tanh())

    class Candidate:
        def losses(self):
            return [model(torch.ones(1, 100, requires_grad=True)).sum()]

    candidate = Candidate()
    candidate.model = model
    assert bench.saved_for_backward(candidate) == pytest.approx(4 * (100 + 1000) / 1e6)


def test_planted_ranks_are_searched(tmp_path):
    planted.main(["--seeds", "1", "--steps", "10", "--out", str(tmp_path / "planted.csv")])
    rows = results.parse_csv(tmp_path / "planted.csv")
    assert len(rows) == len(planted.SEARCHES)
    assert rows[0].keys() == read_csv("planted.csv")[0].keys()
    published = results.select(read_csv("planted.csv"), seed=100, step=10, search="default")[0]
    for key in published:
        if key.startswith("rank"):
            assert rows[0][key] == published[key]       # this run has been published
