"""analyze.py: its measures compared with closed forms, its studies with dense matrices."""
import itertools
import json
import math
import re
from argparse import Namespace
from functools import lru_cache
from pathlib import Path
from statistics import mean

import pytest
import torch
from matplotlib.figure import Figure

import analyze
import lora
import train
from analyze import (effective_rank, gaussian_like, intruders, stable_rank, subspace_similarity,
                     svd, top_share)
from conftest import close, random_gpt
from model import GPT, GPTConfig, read
from support import adapter_state
from support.deltas import Deltas
from support.report import pluck, select
from test_train import killed_after, write_rows


# Measures

def orthonormal(d, r, seed):
    torch.manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, r).double())[0]


@pytest.mark.parametrize("S", [[5.0, 3.0, 2.0, 0.5], [7.0], [3.0, 1e-6]])
def test_known_singular_values_and_vectors_are_recovered(S):
    S = torch.tensor(S).double()
    r = len(S)
    U = orthonormal(30, r, 1)
    V = orthonormal(20, r, 2)
    mix = torch.eye(r).double() + 0.3
    for delta in ((U * S @ mix.inverse(), mix @ V.T), U * S @ V.T):     # as a pair, and dense
        got_U, got_S, got_V = svd(delta)
        close(got_U * got_S @ got_V.T, U * S @ V.T)
        close(got_S[:r], S)
        for got, want in ((got_U, U), (got_V, V)):
            cosines = (got[:, :r] * want).sum(0)
            close(cosines.abs(), torch.ones(r).double(), tol=1e-8)


def test_measures_of_a_spectrum():
    for spectrum, top, effective, stable in [
            ([1.0] * 8, 1 / 8, 8, 8),
            ([3.0, 0.0, 0.0], 1, 1, 1),
            ([3.0, 1.0], 3 / 4, 4 / 3 ** 0.75, 10 / 9)]:        # exp(¾ ln 4/3 + ¼ ln 4)
        S = torch.tensor(spectrum)
        assert top_share(S) == pytest.approx(top)
        assert effective_rank(S) == pytest.approx(effective)
        assert stable_rank(S) == pytest.approx(stable)


def test_subspace_similarity_is_the_formula():
    U1 = orthonormal(20, 5, 1)
    U2 = orthonormal(20, 8, 2)
    phi = subspace_similarity(U1, U2)
    for i, j in itertools.product(range(1, 6), range(1, 9)):
        shared = torch.linalg.norm(U1[:, :i].T @ U2[:, :j]) ** 2
        close(phi[i - 1, j - 1], shared / min(i, j))


def test_intruders_are_singular_vectors_unlike_those_of_w():
    U = orthonormal(30, 21, 1)
    first = torch.eye(20)[:1].double()
    W = U[:, :20] * torch.arange(20, 0, -1)         # the last column of U is orthogonal to W's
    for cosine, counts in ((1.0, [0, 0, 0]), (0.7, [0, 0, 1]), (0.0, [1, 1, 1])):
        new = cosine * U[:, :1] + math.sqrt(1 - cosine ** 2) * U[:, 20:]
        assert intruders(U[:, :20], W + 1e3 * new @ first, [0.3, 0.6, 0.9]) == counts


def test_the_null_is_gaussian_with_delta_ws_shape_and_norm_and_depends_on_the_name():
    pair = orthonormal(30, 4, 1), 3 * orthonormal(20, 4, 2).T
    for delta in (pair, pair[0] @ pair[1]):
        U, S, V = svd(delta)
        null = gaussian_like(delta, "a")
        other = gaussian_like(delta, "b")
        assert [t.shape for t in null] == [U.shape, S.shape, V.shape]
        close(null[1].norm(), S.norm())
        assert abs(null[2][:, 0] @ V[:, 0]) < 0.9
        assert abs(null[2][:, 0] @ other[2][:, 0]) < 0.9


# One record per matrix

def by_hand(delta, W=None, **fields):
    """A Deltas with these ΔW and W."""
    identity = {"checkpoint": "a", "seed": None, "method": "lora"}
    c = Deltas(Path("a.pt"), "a", identity, Namespace(seed=None), saved={}, **fields)
    c.delta = delta
    c.W = W or {}
    return c


def test_a_rank_above_the_smaller_side_of_a_matrix():
    torch.manual_seed(0)
    B = torch.randn(9, 6)
    A = torch.randn(6, 4)
    c = by_hand({"v": (B, A)}, {"v": torch.randn(9, 4)})
    record = analyze.record(c, "v")
    S = torch.linalg.svdvals(B @ A)
    assert record["S"] == pytest.approx(S.tolist(), rel=1e-5)
    assert record["r"] == 4 == len(record["null"]["S"])


@pytest.mark.parametrize("value, message", [(0.0, "is zero"), (math.nan, "is not finite"),
                                            (math.inf, "is not finite")])
def test_a_matrix_without_a_spectrum_is_refused(value, message):
    good = torch.ones(4, 1), torch.ones(1, 4)
    bad = torch.full((4, 4), value)
    for delta in (bad, (bad, bad)):
        with pytest.raises(ValueError, match=f"^a.pt: ΔW of v {message}$"):
            analyze.record(by_hand({"v": delta}), "v")
    with pytest.raises(ValueError, match=f"^a.pt: W of v {message}$"):
        analyze.record(by_hand({"v": good}, {"v": bad}), "v")


def test_a_delta_of_zero_may_have_factors_that_are_not_zero():
    identity = torch.eye(4)
    c = by_hand({"v": (identity[:, :2], torch.zeros(2, 4))})
    c.delta["v"][1][0] = 1e-30                          # the square of this norm is 0
    with pytest.raises(ValueError, match="^a.pt: ΔW of v is zero$"):
        analyze.record(c, "v")


def test_map_matrices_keeps_the_order_and_restores_the_number_of_threads():
    pairs = [(i, str(i)) for i in range(20)]
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        results = analyze.map_matrices(lambda i, name: (i, name, torch.get_num_threads()), pairs)
        after_success = torch.get_num_threads()
        with pytest.raises(ZeroDivisionError):
            analyze.map_matrices(lambda i, name: 1 / i, pairs)
        after_error = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    assert results == [(i, str(i), 1) for i in range(20)]
    assert (after_success, after_error) == (3, 3)


# The studies, on checkpoints of train.py

RUNS = {
    "lora-seed0": "--rank 4", "lora-seed1": "--rank 4 --seed 1", "v": "--rank 2 --targets v",
    "wide": "--rank 24 --targets q v", "full": "--method full --lr 0.03",
    "multi": "--method multilora --rank 4 --n_blocks 2 --lr 0.3",
    "auto": "--method autolora --rank 4 --search_steps 4 --beta_lr 0.5 --gate sigmoid",
    "same": "--method autolora --rank 4 --search_steps 4 --beta_lr 0 --targets q",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a checkpoint of each of RUNS, one of an interrupted search, and others."""
    folder = tmp_path_factory.mktemp("made")
    config = GPTConfig(257, 64, n_layer=2, n_head=2, n_embd=72)
    base = random_gpt(config, dtype=torch.float32)
    torch.save({"model": base.state_dict(), "config": vars(config)}, folder / "base.pt")
    write_rows(folder / "rows.jsonl", ["a", "bb", "ccc", "d" * 5] * 15)
    common = ["--model", str(folder / "base.pt"), "--data", str(folder / "rows.jsonl"),
              *"--device cpu --batch_size 8 --eval_rows 4 --steps 4 --eval_every 2".split()]
    for name, flags in RUNS.items():
        train.main([*common, *flags.split(), "--out", str(folder / f"{name}.pt")])
    interrupted = [*common, *RUNS["auto"].split(), "--out", str(folder / "search.pt")]
    with pytest.MonkeyPatch.context() as m:
        killed_after(2, interrupted, m)
    moved = read(folder / "wide.pt")
    moved["settings"]["model"] = "away.pt"
    torch.save(moved, folder / "moved.pt")
    torch.save(moved["adapter"], folder / "by_hand.pt")
    zero = read(folder / "v.pt")
    zero["adapter"]["tensors"]["h.1.attn.v"]["B"].zero_()
    torch.save(zero, folder / "zero.pt")
    save_loralib(base, folder)
    return folder


def save_loralib(base, folder):
    """An adapter of loralib for q and v, and a file with the W of q alone."""
    q = {}
    theirs = {"classifier.weight": torch.ones(2, 2)}
    for name, W in base.state_dict().items():
        if name.endswith("attn.q.weight"):
            q[name] = W.half()
        if name.endswith(("attn.q.weight", "attn.v.weight")):
            layer = name.removesuffix(".weight")
            theirs[f"{layer}.lora_A"] = torch.randn(3, 72)
            theirs[f"{layer}.lora_B"] = torch.randn(72, 3)
    torch.save(q, folder / "q.pt")
    torch.save(theirs, folder / "loralib.pt")


def run(folder, argv, draw=False):
    """What analyze.main returns, and {name: figure}. The figures' files are empty unless `draw`,
    because drawing takes most of the time."""
    figures = {}
    savefig = Figure.savefig

    def keep(figure, path, **options):
        figures[path.stem] = figure
        if draw:
            savefig(figure, path, dpi=50)
        else:
            path.touch()

    words = [str(folder / word) if ".pt" in word else word for word in argv.split()]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Figure, "savefig", keep)
        found = analyze.main([*words, "--device", "cpu"])
    return found, figures


@pytest.fixture(scope="module")
def studied(made):
    files = "lora-seed0.pt lora-seed1.pt wide.pt multi.pt auto.pt full.pt"
    return run(made, f"{files} --study directions intruders", draw=True)[0]


@lru_cache(None)
def dense_deltas(folder, label):
    """{module name: (W, ΔW, the rank of ΔW)} of a checkpoint, as dense matrices in float64."""
    saved = read(folder / f"{label}.pt")
    base = GPT.from_pretrained(folder / "base.pt")
    deltas = {}
    if "model" in saved:
        for name, m in base.named_modules():
            if type(m) is torch.nn.Linear:
                W = m.weight.detach().double()
                deltas[name] = W, saved["model"][f"{name}.weight"] - W, min(W.shape)
        return deltas
    for name, m in lora.adapters(adapter_state.load_state_dict(base, saved["adapter"])).items():
        W = m.base.weight.detach().double()
        deltas[name] = W, m.delta_weight().detach().double(), m.rank
    return deltas


def dense(folder, record, label=None):
    """W, and the U, S and V of the dense ΔW of a record, in all its directions."""
    if label is None:
        label = record["checkpoint"]
        if record["seed"]:
            label += f"-seed{record['seed']}"
    W, delta, r = dense_deltas(folder, label)[record["name"]]
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return W, U[:, :r], S[:r], Vh[:r].T


def test_records_are_those_of_the_dense_matrices_and_nulls_have_their_norm(made, studied):
    tops = set()
    shares = []
    for record in studied["records"]:
        W, U, S, V = dense(made, record)
        r = record["r"]
        null = record["null"]
        assert r == (16 if record["method"] == "full" else len(S))
        tiny = 1e-5 * S[0].item()
        assert record["S"] == pytest.approx(S.tolist(), rel=1e-3, abs=tiny)
        share = S / S.sum()
        projection = torch.linalg.norm(U[:, :r].T @ W @ V[:, :r])
        want = {
            "top1": share[0],
            "effective_rank": share.pow(-share).prod(),
            "stable_rank": (S @ S) / S[0] ** 2,
            "delta": S.norm(),
            "W": W.norm(),
            "top_W": torch.linalg.svdvals(W)[:r].norm(),
            "projection": projection,
            "amplification": S[:r].norm() / projection,
        }
        for key, value in want.items():
            assert record[key] == pytest.approx(value.item(), rel=1e-3), key
        assert len(null["S"]) == len(S)
        assert math.hypot(*null["S"]) == pytest.approx(S.norm().item(), rel=1e-3)
        size = math.hypot(*null["S"][:r]) / null["projection"]
        assert null["amplification"] == pytest.approx(size, rel=1e-4)
        tops.add(null["top1"])
        expected = W.norm() * r / math.sqrt(W.numel())          # of ‖UᵀWV‖ for random U and V
        shares.append(null["projection"] / expected.item())
    assert len(tops) == len(studied["records"]) > 50            # every Gaussian is a different one
    assert mean(shares) == pytest.approx(1, abs=0.1)


def test_subspaces_are_compared_in_all_directions_of_inputs_and_outputs(made):
    found, figures = run(made, "lora-seed0.pt lora-seed1.pt moved.pt full.pt --base base.pt "
                         "--study subspace --targets q")
    assert set(pluck(found["records"], "target")) == {"q"}
    sizes = set()
    compared = {}
    for record in found["subspace"]:
        _, U1, _, V1 = dense(made, record, record["a"])
        _, U2, _, V2 = dense(made, record, record["b"])
        for side, shared in (("output", U1.T @ U2), ("input", V1.T @ V2)):
            last = shared.square().sum().item() / min(shared.shape)
            want = [shared[0, 0].item() ** 2, last]
            assert record[side] == pytest.approx(want, rel=1e-2, abs=1e-4)
        sizes.add(tuple(shared.shape))
        compared[record["pair"]] = record["a"], record["b"]
    assert sizes == {(4, 4), (4, 24), (4, 72), (24, 72)}
    random = [record["random"][0] for record in found["subspace"]]
    assert len(set(random)) == len(random)
    assert mean(random) == pytest.approx(1 / 72, abs=0.02)
    assert compared == {        # seeds differ if possible: one seed gives related initial A
        "lora and lora": ("lora-seed0", "lora-seed1"),
        "lora and moved": ("lora-seed1", "moved"),
        "lora and full": ("lora-seed1", "full"),
        "moved and full": ("moved", "full"),
    }
    assert {f"subspace-{a}-{b}" for a, b in compared.values()} == figures.keys() - {"curves"}


def test_random_outputs_have_the_dimension_of_the_outputs(made):
    found, _ = run(made, "lora-seed0.pt lora-seed1.pt --study subspace --targets up")
    for record in found["subspace"]:        # φ of random directions is r/d: 4/72 and 4/288
        assert record["random"][1] > 2 * record["random output"][1] > 0


def test_directions_and_intruders_are_those_of_the_dense_matrices(made, studied):
    shares = [i / 20 for i in range(1, 21)]
    differ = set()
    for along, line in zip(studied["directions"], studied["intruders"], strict=True):
        W, U, S, V = dense(made, line)
        of_W, _, Vh = torch.linalg.svd(W, full_matrices=False)
        assert along["name"] == line["name"]
        assert (along["x"], line["x"]) == (shares, shares[:-1])
        for share, phi in zip(shares, along["real"]):
            shared = (Vh[:round(share * len(Vh))] @ V[:, :64]).square()
            assert phi == pytest.approx(shared.sum().item() / min(shared.shape), abs=2e-3)
        new = torch.linalg.svd(W + U * S @ V.T)[0][:, :10]
        best = (of_W.T @ new).abs().amax(0)
        for epsilon, count in zip(line["x"], line["real"]):     # a cosine may be almost equal to ε
            assert (best < epsilon - 1e-3).sum() <= count <= (best < epsilon + 1e-3).sum()
        if line["real"] != line["null"] and along["real"] != along["null"]:
            differ.add(line["method"])
    assert differ == set(train.METHODS)


def test_ranks_follow_the_gate_in_finished_and_interrupted_searches(made):
    found, figures = run(made, "auto.pt search.pt same.pt --study ranks")
    for record, n in zip(found["ranks"], (4, 2, 4), strict=True):
        name = record["checkpoint"]
        steps, beta = zip(*read(made / f"{name}.pt")["history"]["beta"])
        beta = torch.stack(beta)
        a = beta.softmax(-1) if name == "same" else beta.sigmoid()
        counts = (a[-1] >= 1 / 4).sum(-1)
        assert record["steps"] == steps and len(steps) == n
        assert list(record["ranks"].values()) == counts.tolist()
        close(torch.tensor(record["largest"]), a.amax(-1), tol=1e-6)
        assert f"ranks-{name}" in figures
    saved = read(made / "auto.pt")
    line = figures["curves"].axes[1].get_lines()[0]             # 4 steps of search, 4 of training
    evaluations = [(0, saved["before"]), *saved["history"]["valid"], (8, saved["after"])]
    steps, results = zip(*evaluations)
    assert line.get_xdata().tolist() == list(steps) == [0, 2, 6, 8]
    losses = [tasks["rows.jsonl"]["loss"] for tasks in results]
    assert line.get_ydata().tolist() == losses


def test_the_amplification_study_prints_the_norms_of_table_7(made, capsys):
    found, _ = run(made, "lora-seed0.pt lora-seed1.pt --study amplification --layers 1")
    lines = capsys.readouterr().out.splitlines()[:-1]           # the last one contains a path
    assert max(map(len, lines)) <= 80
    assert set(pluck(found["records"], "layer")) == {1}
    norms = [line for line in lines if line.startswith("lora")][-1]
    keys = "projection top_W null.projection delta W r".split()
    for text, key in zip(norms.split()[1:], keys, strict=True):
        assert text == f"{mean(pluck(found['records'], key)):.2f}"
    for i, c in enumerate(found["checkpoints"]):
        assert c["results"] == read(made / f"lora-seed{i}.pt")["after"]


def test_the_amplification_of_a_layer_is_the_mean_of_its_matrices():
    records = []
    for layer, value in ((0, 2), (0, 4), (1, 5)):               # encoder.0.v, decoder.0.v, ...
        null = {"amplification": value / 2}
        records.append({"layer": layer, "amplification": value, "null": null})
    line = analyze.by_layer(records)
    assert line == {"x": [0, 1], "real": [3.0, 5.0], "null": [1.5, 2.5]}


def test_a_histogram_counts_all_values_at_the_centres_of_its_bins(made):
    found, figures = run(made, "full.pt --study spectrum")
    line = figures["histogram"].axes[1].get_lines()[0]
    width = 4 / 30                                              # 30 bins from 10⁻⁴ to 1
    centres = [-4 + width * (i + 0.5) for i in range(30)]
    shares = []
    for record in found["records"]:
        shares += [s / sum(record["S"]) for s in record["S"]]
    small = mean(s < 10 ** (-4 + width) for s in shares)        # includes those below 10⁻⁴
    assert min(shares) < 1e-4
    assert line.get_ydata()[0] * width == pytest.approx(small)
    assert line.get_xdata() == pytest.approx(centres)


def test_without_flags_all_available_studies_are_made_in_place_of_earlier_figures(made):
    found, figures = run(made, "same.pt v.pt")                  # without a matrix in common
    names = "curves spectrum histogram amplification directions intruders ranks-same"
    assert set(figures) == set(names.split()) and "subspace" not in found
    folder = made / "same-analysis"
    text = (folder / "analysis.json").read_text()
    assert json.loads(text) == json.loads(json.dumps(found))
    (folder / "mine.png").touch()
    run(made, "same.pt v.pt --study amplification")
    assert {f.stem for f in folder.glob("*.png")} == {"curves", "amplification", "mine"}


def test_pairs_have_different_seeds_if_any_have():
    made = []
    for name, seed in (("a", 0), ("b", 0), ("a", 1), ("c", 0), ("other", 0)):
        c = by_hand({"v" if name == "other" else "q": 0})
        c.identity = {"checkpoint": name}
        c.label = f"{name}{seed}"
        c.settings.seed = seed
        made.append(c)
    pairs = {}
    for title, members in analyze.checkpoint_pairs(made).items():
        pairs[title] = " ".join(f"{a.label}-{b.label}" for a, b in members)
    assert pairs == {"a and a": "a0-a1", "a and b": "a1-b0", "a and c": "a1-c0",
                     "b and c": "b0-c0"}            # both have seed 0, and there is no other pair


@pytest.mark.parametrize("selected, n", [(False, 4), (True, 9)])
def test_in_a_large_model_only_some_w_are_decomposed_unless_selected(selected, n):
    names = [f"h.{i}.attn.{target}" for i in range(3) for target in "qkv"]
    delta = {name: (torch.ones(300, 1), torch.ones(1, 300)) for name in names}
    W = dict.fromkeys(names, torch.eye(300))
    c = by_hand(delta, W, selected=selected, svd=dict.fromkeys(names))
    lines = analyze.compare_with_W(lambda *_: [0.0], [1], [c])
    assert len(lines) == n
    if not selected:
        measured = " ".join(pluck(lines, "name"))
        assert measured == "h.0.attn.q h.0.attn.v h.2.attn.q h.2.attn.v"


# Adapters without W or without α

SIZED = {"amplification", "intruders"}          # these studies need W and the size of ΔW


def test_a_state_saved_by_hand_is_analysed_without_its_base(made, capsys):
    found, _ = run(made, "by_hand.pt")
    out = capsys.readouterr().out
    assert re.search("left out +amplification, directions, intruders: .*--base", out)
    assert not {*SIZED, "directions"} & found.keys()
    whole, _ = run(made, "wide.pt --study spectrum")
    for record, want in zip(found["records"], whole["records"], strict=True):
        assert (record["S"], record["delta"]) == (want["S"], want["delta"])
        assert "projection" in want and "projection" not in record
    found, _ = run(made, "by_hand.pt --base base.pt")
    assert {*SIZED, "directions"} <= found.keys()


@pytest.mark.parametrize("flags, with_W, studies, messages", [
    ("", [], {"spectrum"}, ["intruders: .*--alpha", "directions: .*--base"]),
    ("--base base.pt", ["q", "v"], {"spectrum", "directions"}, ["cation, intruders: .*--alpha"]),
    ("--base base.pt --alpha 12", ["q", "v"], {"spectrum", "directions", *SIZED}, []),
    ("--base q.pt --alpha 12", ["q"], {"spectrum", "directions", *SIZED}, ["needed: v, which"]),
])
def test_what_needs_w_or_alpha_is_left_out(made, flags, with_W, studies, messages, capsys):
    found, _ = run(made, f"loralib.pt {flags}")
    out = capsys.readouterr().out
    for message in [*messages, "1 tensors of loralib, such as classifier.weight"]:
        assert re.search(f"^left out .*{message}", out, re.MULTILINE), out
    assert found.keys() - {"records", "checkpoints"} == studies
    sized = "--alpha" in flags
    for record in found["records"]:
        has_W = record["target"] in with_W
        for part in (record, record["null"]):
            assert ("delta" in part) == sized
            assert ("projection" in part) == has_W
            assert ("amplification" in part) == (sized and has_W)


def test_alpha_is_unknown_for_one_of_two_adapters(made, capsys):
    found, _ = run(made, "v.pt loralib.pt --targets v")
    for record in found["records"]:
        for part in (record, record["null"]):
            known = record["checkpoint"] == "v"
            assert ("amplification" in part) == ("delta" in part) == known
    assert set(pluck(found["intruders"], "checkpoint")) == {"v"}
    assert set(pluck(found["directions"], "checkpoint")) == {"v", "loralib"}
    assert "nan" not in capsys.readouterr().out


def test_alpha_of_one_adapter_and_w_of_another_are_not_enough(made, capsys):
    found, _ = run(made, "v.pt loralib.pt --base q.pt")
    assert "directions" in found and not SIZED & found.keys()
    assert "--alpha" in capsys.readouterr().out


@pytest.mark.parametrize("argv, message", [
    ("gone.pt", "gone.pt"),
    ("v.pt --base gone.pt", "gone.pt is neither"),
    ("base.pt", "base.pt is neither a checkpoint of train.py nor an adapter"),
    ("by_hand.pt --base full.pt", "by_hand.pt .*(different base models|same base model)"),
    ("zero.pt", "zero.pt: ΔW of h.1.attn.v is zero"),
    ("v.pt v.pt", "v.pt and .*v.pt have the same name"),
    ("v.pt --layers 2", "--layers 2: .*v.pt has no such ΔW; choose from 0 1"),
    ("v.pt --targets q", "--targets q: .*v.pt has no such ΔW; choose from v"),
    ("v.pt --study ranks", "--study ranks needs a checkpoint of --method autolora"),
    ("same.pt v.pt --study subspace", "--study subspace needs two .* in common"),
    ("by_hand.pt --study directions", "--study directions needs their W .*--base"),
    ("loralib.pt --study intruders --base base.pt", "--study intruders needs .*--alpha"),
])
def test_errors_are_one_line_before_anything_is_written(made, argv, message, capsys):
    before = {f: f.stat().st_mtime_ns for f in made.rglob("*")}
    with pytest.raises(SystemExit, match="2"):
        run(made, argv)
    err = capsys.readouterr().err
    assert re.search(message, err) and err.count("\n") == 1, err
    assert {f: f.stat().st_mtime_ns for f in made.rglob("*")} == before
