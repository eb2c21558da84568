"""What is read from the results for a claim: on made-up results whose answer is known."""
import math
from itertools import combinations
from statistics import mean

import pytest

import claims
import collect
import results


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """A function that puts rows into a results file of this name."""
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    return lambda file, rows: collect.write(rows, tmp_path / file)


def run(name, seed, **columns):
    row = {"name": f"{name}-seed{seed}"}
    for key, value in columns.items():
        row["test." + key.replace("_", ".")] = value
    return row


def test_a_lower_loss_is_a_gain_and_is_paired_by_seed(made_up):
    rows = [run("a", seed, mean_loss=0.2 + seed / 10, mean_exact=0.5) for seed in range(3)]
    rows += [run("b", seed, mean_loss=0.4 + seed / 5, mean_exact=0.25) for seed in (0, 1)]
    made_up("nano_runs.csv", rows)
    row = claims.compared("LoRA", "", "", "a", "b")
    assert row.claim.gains() == pytest.approx([math.log(2)] * 2)        # the first two seeds
    assert row.shown() == "a and b: loss 0.250 and 0.500; exact match 0.500 and 0.250"
    assert claims.gain(row.claim) == "+0.693 (+0.693 to +0.693; 2)"
    assert row.claim.verdict() == "holds"
    assert claims.compared("LoRA", "", "", "b", "a").claim.verdict() == "does not hold here"


def test_the_best_rate_is_the_lowest_point_of_a_parabola(made_up):
    rows = []
    for exponent in (-9, -8, -7.5, -6):                                 # the lowest at 2 ** -7.25
        lr = 2 ** exponent
        loss = math.exp((exponent + 7.25) ** 2)
        name = f"pilot-r8-lr{lr:.1e}-seed10"
        for seed, value in enumerate((loss, lr, 1 / lr)):
            rows.append({"name": f"{name}{seed}", "lr": lr, "mean.loss.after": value})
    rows.append({"name": "pilot-r8-arith-lr1e-2-seed100", "lr": 0.01, "mean.loss.after": 0})
    made_up("nano_runs.csv", rows)
    assert claims.best_rate("r8") == pytest.approx([-7.25, -9, -6])     # or the end of the sweep


def test_what_multilora_gains_in_the_mixture_and_alone(made_up):
    rows = []
    for task, alone in (("instruct", 1.0), ("arith", 1.3), ("infer", 0.8), ("facts", 2.0),
                        ("data2text", 3.0)):
        key = f"{task}_loss"
        for seed in (0, 1):
            rows.append(run(f"{task}-lora-fresh", seed, **{key: alone}))
            rows.append(run(f"{task}-multilora-fresh", seed, **{key: 1.0}))
    for seed in (0, 1):
        for name, loss in (("lora", 1.0), ("lora-fresh", math.exp(0.8)), ("multilora", 1.0),
                           ("multilora-fresh", 1.0)):
            rows.append(run(name, seed, mean_loss=loss))
    made_up("nano_runs.csv", rows)
    summed = [run(f"{method}-summed", 0, mean_loss=2.0) for method in ("lora", "multilora")]
    made_up("nano_summed.csv", summed)
    of_five, lora, _ = (row.claim for row in claims.single())
    assert of_five.ours == pytest.approx([0.8, 0.8])
    assert of_five.control == pytest.approx([math.log(8.1 / 5)] * 2)
    assert lora.gains() == pytest.approx([-math.log(2)])


def test_searches_that_agree(made_up):
    ranks = ["1 2 3", "2 4 6", "1 2 3", "3 2 1", "1 1 2"]
    rows = [{"name": f"autolora-seed{i}", "ranks": r} for i, r in enumerate(ranks)]
    made_up("nano_runs.csv", rows)
    numbers = [list(map(int, r.split())) for r in ranks]

    def mean_over_couples(some):
        return mean(claims.correlation_or_none(a, b) for a, b in combinations(some, 2))

    of_all, found = mean_over_couples(numbers), []
    for i in range(5):                                          # the jackknife, by its definition
        found.append(5 * of_all - 4 * mean_over_couples(numbers[:i] + numbers[i + 1:]))
    assert claims.alike("autolora") == pytest.approx(found)
    assert mean(found) == pytest.approx(of_all)


def test_how_far_ranks_are_from_the_planted_ones(made_up):
    def found(search, step, ranks):
        row = {"search": search, "step": step}
        return row | {f"rank of {p}": r for p, r in zip(results.PLANTED_RANKS, ranks)}

    made_up("planted.csv", [found("none", 300, (1, 1, 2, 4, 6)),
                            found("none", 300, (2, 2, 2, 2, 2)),
                            found("none", 100, (8, 8, 8, 8, 8)),
                            found("default", 1000, (1, 2, 3, 4, 5))])
    assert claims.off_planted("none") == pytest.approx([0, (1 + 1 + 0 + 2 + 4) / 5])
    assert claims.off_planted("default") == pytest.approx([(0 + 1 + 1 + 0 + 1) / 5])


def test_intruders_that_go_with_what_was_forgotten(made_up):
    runs, counts = [], []
    for i, name in enumerate(claims.FORGOTTEN):
        for seed, number in ((0, i), (1, 5 - i)):
            runs.append(run(name, seed, skills_loss=math.exp(i)))
            counts.insert(0, {"checkpoint": name, "seed": seed, "real": number, "null": 0})
    made_up("nano_runs.csv", runs)
    made_up("nano_forgetting_intruders.csv", counts)
    assert claims.go_with_forgetting() == pytest.approx([1, -1])


def test_one_shared_direction_is_no_sign_of_others(made_up):
    """φ(8, 64) of one shared direction and seven random ones."""
    sides = {"output.first": 0, "output.all": 0, "input.first": 0.9, "random.first": 0.1}
    rows = []
    for pair in (claims.R8_AND_R64, claims.R64, claims.R8):
        for seed in (0, 2):
            for target, more in (("q", 0.01), ("v", -0.01)):
                phi = (1 + 7 * 0.5) / 8 + 0.001 * seed + more
                rows.append({"pair": pair, "a": f"a-seed{seed}", "b": f"b-seed{seed + 1}",
                             "name": f"h.0.attn.{target}", "input.all": phi, "random.all": 0.5})
                rows[-1] |= sides
    made_up("nano_subspaces_pairs.csv", rows)
    measures = dict.fromkeys("effective_rank projection top_W amplification null.projection "
                             "null.amplification".split(), 2.0)
    rows = []
    for name in ("lora-qv-r8", "lora-qv-r64"):
        for seed in (0, 1):
            for target in "qv":
                rows.append({"checkpoint": name, "seed": seed, "target": target} | measures)
    made_up("nano_subspaces.csv", rows)
    found = {row.claim.name: row.claim for row in claims.subspaces()}
    assert found["and share no others"].gains() == pytest.approx([0, -0.002])
    assert found["φ(1, 1) above 0.5"].gains() == pytest.approx([0.4, 0.4])
    assert found["two seeds share more of ΔW_q"].gains() == pytest.approx([0.02, 0.02])
    assert found["but not W_q's top directions"].gains() == pytest.approx([-1, -1])
