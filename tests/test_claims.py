"""The rule that decides claims, on worked examples, and what it reads, from made-up results."""
import math
from itertools import combinations
from statistics import mean

import pytest

pytest.importorskip("scipy", reason="the evidence needs scipy: experiments/requirements.txt")

import claims
import results
import runs
from claims import Comparison, judge

SLEEP = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]


def compare(effects, delta=0.01, **options):
    ours = {seed: 0.5 + effect for seed, effect in enumerate(effects)}
    return Comparison(ours, dict.fromkeys(ours, 0.5), delta, smaller=False, **options)


def test_the_interval_and_p_of_a_textbook():
    """Student's own sleep data (1908): mean 1.58, 0.70 to 2.46, p = 0.002833."""
    found = judge("better", compare(SLEEP))
    expected = {"effect": 1.58, "low": 0.7001, "high": 2.4599, "p": 0.002833}
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-4)
    assert found["n"] == 10 and found["verdict"] == "supported"
    shifted = compare([effect - 0.01 for effect in SLEEP])
    assert judge("no worse", shifted)["p"] == pytest.approx(0.002833, abs=1e-4)
    for effects in (SLEEP, [-effect for effect in SLEEP]):          # the mean is at one of ±δ
        assert judge("equal", compare(effects, delta=1.58))["p"] == pytest.approx(1, abs=1e-4)
    assert judge("better", compare([0.0, 0.0]))["p"] == 1           # counts may be equal


@pytest.mark.parametrize("low, high, better, no_worse, equal", [
    (0.02, 0.04, "supported", "supported", "contradicted"),
    (0.002, 0.04, "supported", "supported", "inconclusive"),
    (0.002, 0.004, "negligible", "supported", "supported"),
    (-0.002, 0.004, "negligible", "supported", "supported"),
    (-0.004, -0.002, "negligible", "supported", "supported"),
    (-0.002, 0.04, "inconclusive", "supported", "inconclusive"),
    (-0.04, 0.002, "inconclusive", "inconclusive", "inconclusive"),
    (-0.04, 0.04, "inconclusive", "inconclusive", "inconclusive"),
    (-0.04, -0.002, "contradicted", "inconclusive", "inconclusive"),
    (-0.04, -0.02, "contradicted", "contradicted", "contradicted"),
])
def test_the_verdicts(low, high, better, no_worse, equal):
    found = [claims.verdict_of(kind, low, high, 0.01) for kind in ("better", "no worse", "equal")]
    assert found == [better, no_worse, equal]


def test_one_run_is_inconclusive_and_none_is_not_run_yet():
    assert judge("better", compare([0.5]))["verdict"] == "inconclusive"
    assert judge("better", compare([]))["verdict"] == "not run yet"


def test_groups_are_paired_by_seed_and_compared_in_the_claims_direction():
    lower = Comparison({0: 0.2, 2: 0.3, 5: 9.0}, {0: 0.4, 1: 9.0, 2: 0.62}, 0.1,
                       transform=math.log)
    assert lower.units() == [0, 2] and lower.means() == pytest.approx((0.25, 0.51))
    assert lower.effects() == pytest.approx([math.log(0.4 / 0.2), math.log(0.62 / 0.3)])
    assert judge("better", lower)["verdict"] == "supported"


def test_holms_correction():
    assert claims.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert claims.holm([0.6, 0.7]) == [1.0, 1.0]


def test_every_run_that_a_claim_names_is_in_the_grid():
    grid = runs.read_grid(["nano", "e2e", "mixture"])
    groups = {row["group"] for row in grid.values()}
    for test in claims.tests():
        if test.claim[test.setting].startswith("loss "):
            for name in test.names:
                assert name in {*groups, "skills", "text"}, test.claim["claim"]


def test_losses_on_a_task_and_in_nats(made_up):
    made_up("nano_runs.csv", [
        {"name": "a-seed0", "test.mean.loss": 1.0, "test.skills.loss": math.exp(2.0)},
        {"name": "b-seed0", "test.mean.loss": math.e, "test.skills.loss": math.exp(5.0)}])
    made_up("smollm_runs.csv", [{"name": "a-seed0", "test.mean.loss": 1.0, "test.text.loss": 3.0},
                                {"name": "b-seed0", "test.mean.loss": 1.5, "test.text.loss": 7.0}])
    for setting, task, effect, delta in (("nano", "mean", 1, 0.1), ("nano", "skills", 3, 0.1),
                                         ("e2e", "mean", 0.5, 0.01), ("e2e", "text", 4, 0.01),
                                         ("mixture", "mean", math.log(1.5), 0.1),
                                         ("mixture", "text", 4, 0.01)):
        found = claims.loss(setting, "a", "b", task)
        assert found.effects() == pytest.approx([effect]) and found.delta == delta


# From made-up results ----------------------------------------------------------------------------

@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """A function that puts rows into a results file of this name."""
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    return lambda file, rows: results.write_csv(rows, tmp_path / file)


def test_claims_without_runs_are_not_run_yet(made_up):
    made_up("nano_runs.csv", [{"name": f"instruct-{method}-fresh-seed0", "test.instruct.loss": 1.0}
                              for method in ("lora", "multilora")])
    made_up("nano_forgetting_intruders.csv", [{"checkpoint": "a", "seed": 0, "real": 1, "null": 0}])
    found = claims.tests()
    assert len(found) > 60 and {test.verdict for test in found} == {"not run yet"}


def test_the_best_rate_is_the_minimum_of_a_parabola(made_up):
    rows = []
    for exponent in (-9, -8, -7.5, -6):                                 # the lowest at 2 ** -7.25
        lr = 2 ** exponent
        for seed, loss in enumerate((math.exp((exponent + 7.25) ** 2), lr, 1 / lr)):
            rows.append({"name": f"pilot-r8-lr{lr:.9f}-seed10{seed}", "mean.loss.after": loss})
    rows.append({"name": "pilot-r8-arith-lr1e-2-seed100", "mean.loss.after": 1e-9})
    made_up("nano_runs.csv", rows)
    found = claims.best_rates("pilot-r8")
    expected = {100: 2 ** -7.25, 101: 2 ** -9, 102: 2 ** -6}            # or the end of the sweep
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_gain_on_a_mixture_and_on_single_tasks(made_up):
    rows = []
    for task, loss in zip(claims.TASKS, (1.0, 1.3, 0.8, 2.0, 3.0)):
        rows.append({"name": f"{task}-lora-fresh-seed3", f"test.{task}.loss": loss})
        rows.append({"name": f"{task}-multilora-fresh-seed3", f"test.{task}.loss": 1.0})
    rows.append({"name": "lora-fresh-seed3", "test.mean.loss": math.exp(0.8)})
    rows.append({"name": "multilora-fresh-seed3", "test.mean.loss": 1.0})
    made_up("nano_runs.csv", rows)
    found = claims.gain_on_mixture("nano", "lora-fresh", "multilora-fresh", "*-lora-fresh",
                                   "*-multilora-fresh")
    assert found.ours == pytest.approx({3: 0.8})
    assert found.control == pytest.approx({3: math.log(8.1 / 5)})


def test_agreement_is_the_jackknife_over_all_pairs_of_seeds(made_up):
    ranks = ["1 2 3", "2 4 6", "1 2 3", "3 2 1", "1 1 2"]
    made_up("nano_runs.csv", [{"name": f"a-seed{i}", "ranks": r} for i, r in enumerate(ranks)])
    numbers = [list(map(int, r.split())) for r in ranks]

    def mean_correlation(some):
        return mean(claims.correlation_or_zero(a, b) for a, b in combinations(some, 2))

    whole = mean_correlation(numbers)
    expected = {}
    for i in range(5):
        expected[i] = 5 * whole - 4 * mean_correlation(numbers[:i] + numbers[i + 1:])
    assert claims.agreement("nano", "a").ours == pytest.approx(expected)


def test_the_error_of_planted_ranks(made_up):
    rows = []
    for search, step, ranks in (("none", 300, (1, 1, 2, 4, 6)), ("none", 100, (8, 8, 8, 8, 8)),
                                ("default", 1000, (1, 2, 3, 4, 5))):
        found = {f"rank of {p}": rank for p, rank in zip(claims.PLANTED_RANKS, ranks)}
        rows.append({"search": search, "seed": 100, "step": step, **found})
    made_up("planted.csv", rows)
    found = claims.planted("nano", "default", "none")
    assert found.ours == pytest.approx({100: 3 / 5}) and found.control == {100: 0}
    assert claims.planted("nano", "default", "single").control == {100: 0.8}    # rank 2 or 3: 1.6


def test_intruders_that_go_with_forgetting(made_up):
    runs, counts = [], []
    for i, name in enumerate("abcd"):
        for seed in range(3):
            runs.append({"name": f"{name}-seed{seed}", "test.skills.loss": math.exp(i + seed)})
            counts.append({"checkpoint": name, "seed": seed, "real": 2 * i + seed, "null": 0})
    runs[0]["test.skills.loss"] = ""                        # seed 0 is not in all of them
    made_up("nano_runs.csv", runs)
    made_up("nano_forgetting_intruders.csv", counts)
    found = claims.intruders_and_forgetting("nano")
    assert found.ours == pytest.approx(dict.fromkeys("abcd", 1.0))


def test_one_shared_direction_is_no_sign_of_others(made_up):
    """φ(8, 64) of one shared direction and seven random ones; the targets differ a little."""
    rows = []
    for seed in (0, 2):
        for target, more in (("q", 0.01), ("v", -0.01)):
            rows.append({"checkpoint": "a-r8 and a-r64", "seed": seed, "target": target,
                         "input.all": (1 + 7 * 0.5) / 8 + 0.001 * seed + more, "random.all": 0.5,
                         "input.first": 0.9, "random.first": 0.1})
            rows.append(rows[-1] | {"checkpoint": "a-r8 and a-r8"})
    made_up("nano_subspaces_pairs.csv", rows)
    further = claims.further_shared("nano", "a-r8", "a-r64")
    assert further.effects() == pytest.approx([0, -0.002])
    assert claims.first_shared("nano", "a-r8", "a-r64", "0.5").effects() == pytest.approx([0.4] * 2)
    assert claims.q_and_v("nano", "a-r8", "q", "v").effects() == pytest.approx([0.02] * 2)


def test_blocks_are_compared_with_gaussians_and_with_equal_shares(made_up):
    rows = []
    for seed, smallest in ((0, 0.1), (0, 0.2), (1, 0.25)):
        rows.append({"checkpoint": "a", "seed": seed, "n": 4, "smallest": smallest, "input": 0.3,
                     "null.input": 0.1, "output": 0.2, "null.output": 0.1})
    made_up("nano_mixture_blocks.csv", rows)
    assert claims.block_overlap("nano", "a", "input").effects() == pytest.approx([0.2] * 2)
    assert claims.block_overlap("nano", "a", "output").effects() == pytest.approx([0.1] * 2)
    assert claims.smallest_block("nano", "a").effects() == pytest.approx([0.1, 0.5])


def test_overlap_is_compared_with_half_of_the_top(made_up):
    rows = [{"checkpoint": "a", "seed": 0, "target": "q", "projection": 2.0, "null.projection": 0.5,
             "top_W": 6.0, "amplification": 3.0}]
    made_up("nano_subspaces.csv", rows + [rows[0] | {"target": "v", "projection": 100.0}])
    assert claims.overlap("nano", "a", "q", "top").effects() == [1.0]
    assert claims.overlap("nano", "a", "q", "Gaussian").effects() == [1.5]
    assert claims.amplification("nano", "a", "q").effects() == [2.0]
