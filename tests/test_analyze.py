"""analyze.py: its measures compared with closed forms, its studies with dense matrices."""
import itertools
import json
import math
import re
import shutil
import zlib
from argparse import Namespace
from functools import lru_cache, reduce
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import analyze
import lora
import train
from analyze import (effective_rank, gaussian, gaussian_like, intruders, stable_rank,
                     subspace_similarity, svd, top_share)
from conftest import close, random_gpt
from model import GPT, GPTConfig, read
from support import adapter_state, deltas, report
from support.deltas import Deltas
from support.report import pluck, select
from test_interop import PEFT, SIZES, peft
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
    for r in (4, 19, 20):
        U = orthonormal(30, r, 1)
        S = 3 * torch.arange(r, 0, -1).double()
        V = orthonormal(20, r, 2)
        null = gaussian_like(U, S, V, "a")
        other = gaussian_like(U, S, V, "b")
        assert [t.shape for t in null] == [U.shape, S.shape, V.shape]
        close(null[1].norm(), S.norm())
        assert abs(null[2][:, 0] @ V[:, 0]) < 0.9
        assert abs(null[2][:, 0] @ other[2][:, 0]) < 0.9


def test_a_gaussian_is_the_same_in_every_process():
    torch.manual_seed(zlib.crc32(b"lora-seed0 h.0.attn.q"))         # hash() would differ
    assert torch.equal(gaussian(torch.zeros(2, 3), "lora-seed0 h.0.attn.q"), torch.randn(2, 3))


@pytest.mark.parametrize("r, factors", [(4, [(30, 4), (4, 20)]), (20, [(30, 20)])])
def test_the_spectrum_of_a_null_is_that_of_gaussian_factors_or_of_a_full_gaussian(r, factors):
    U = orthonormal(30, r, 1)
    V = orthonormal(20, r, 2)
    generator = np.random.default_rng(0)
    tops = []
    expected = []
    for i in range(100):
        tops.append(top_share(gaussian_like(U, torch.ones(r).double(), V, str(i))[1]))
        matrices = [generator.standard_normal(shape) for shape in factors]
        S = np.linalg.svd(reduce(np.matmul, matrices))[1]
        expected.append(S[0] / S.sum())
    assert mean(tops) == pytest.approx(mean(expected), rel=0.05)


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
    bad = torch.zeros(4, 4)
    bad[0, 0] = value                                   # one such value is enough
    for delta in (bad, (bad, bad)):
        with pytest.raises(ValueError, match=f"^a.pt: ΔW of v {message}: .*--targets or --layers$"):
            analyze.record(by_hand({"v": delta}), "v")
    with pytest.raises(ValueError, match=f"^a.pt: W of v {message}: .*--targets or --layers$"):
        analyze.record(by_hand({"v": good}, {"v": bad}), "v")


def test_a_delta_of_zero_may_have_factors_that_are_not_zero():
    identity = torch.eye(4)
    c = by_hand({"v": (identity[:, :2], torch.zeros(2, 4))})
    c.delta["v"][1][0] = 1e-30                          # the square of this norm is 0
    with pytest.raises(ValueError, match="^a.pt: ΔW of v is zero: .*--targets or --layers$"):
        analyze.record(c, "v")


def equal_deltas(d, r):
    """One ΔW (d, d) of rank r in several forms, as Deltas of the same name and W."""
    torch.manual_seed(0)
    B = torch.randn(d, r)
    A = torch.randn(r, d)
    state = {"layer": "LoRALinear", "settings": {"alpha": 3.0}, "base": None,
             "tensors": {"v": {"A": A, "B": B}}, "scale": {"v": torch.tensor(3 / r)}}
    W = {"v": torch.randn(d, d)}
    forms = []
    for weights in ([1.0], [0.5, 0.5], [0.25] * 4):
        combined = adapter_state.combine([state] * len(weights), weights)
        own = combined["tensors"]["v"]
        forms.append((own["B"] * combined["scale"]["v"], own["A"]))
    forms.append(3 / r * B @ A)
    mixed = torch.randn(r, r) + 3 * torch.eye(r)
    forms.append((3 / r * B @ mixed, torch.linalg.solve(mixed, A)))
    return [by_hand({"v": delta}, W) for delta in forms]


@pytest.mark.parametrize("r, compared", [(1, 1), (5, 5), (32, 32), (33, 16), (64, 16)])
def test_equal_deltas_have_equal_records_and_nulls_however_they_are_factored(r, compared):
    """Up to half of the full rank, here 32, all directions are compared with W."""
    records = [analyze.record(c, "v") for c in equal_deltas(64, r)]
    for record in records:
        for part, want in ((record, records[0]), (record["null"], records[0]["null"])):
            for key in ("S", "top1", "effective_rank", "stable_rank", "delta", "projection",
                        "amplification"):
                assert part[key] == pytest.approx(want[key], rel=2e-3), key
        assert (len(record["S"]), record["r"]) == (r, compared)
        assert record["top_W"] == pytest.approx(records[0]["top_W"])


def test_the_amplification_is_undefined_if_w_is_zero_in_the_directions_of_delta_w(capsys):
    W = torch.diag(torch.tensor([0.0, 0.0, 1.0, 2.0, 3.0, 4.0]))
    delta = torch.eye(6)[:, :2], torch.eye(6)[:2]
    c = by_hand({"h.0.v": delta, "h.1.v": delta}, {"h.0.v": W, "h.1.v": W + torch.eye(6)})
    records = [analyze.record(c, name) for name in c.delta]
    assert records[0]["projection"] == 0 and "amplification" not in records[0]
    assert records[1]["amplification"] == pytest.approx(1)
    assert "amplification" in records[0]["null"]
    analyze.amplification_study([c], records[:1], Path("unused"))
    assert "left out  amplification of h.0.v in a: UᵀWV is zero" in capsys.readouterr().out


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
    for name, value in (("inf", math.inf), ("zero", 0)):
        bad = read(folder / "v.pt")
        for layer, own in bad["adapter"]["tensors"].items():
            if name == "zero" or layer == "h.1.attn.v":
                own["B"].fill_(value)
        torch.save(bad, folder / f"{name}.pt")
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
    """{module name: (W, ΔW)} of a checkpoint, as dense matrices in float64."""
    saved = read(folder / f"{label}.pt")
    base = GPT.from_pretrained(folder / "base.pt")
    deltas = {}
    if "model" in saved:
        for name, m in base.named_modules():
            if type(m) is torch.nn.Linear:
                W = m.weight.detach().double()
                deltas[name] = W, saved["model"][f"{name}.weight"] - W
        return deltas
    for name, m in lora.adapters(adapter_state.load_state_dict(base, saved["adapter"])).items():
        W = m.base.weight.detach().double()
        deltas[name] = W, m.delta_weight().detach().double()
    return deltas


def dense(folder, record, label=None):
    """W, and the U, S and V of the dense ΔW of a record, in all its directions."""
    if label is None:
        label = record["checkpoint"]
        if record["seed"]:
            label += f"-seed{record['seed']}"
    W, delta = dense_deltas(folder, label)[record["name"]]
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    r = (S > S[0] * max(W.shape) * 2 ** -23).sum()              # the rank in float32
    return W, U[:, :r], S[:r], Vh[:r].T


def test_records_are_those_of_the_dense_matrices_and_nulls_have_their_norm(made, studied):
    tops = set()
    shares = []
    for record in studied["records"]:
        W, U, S, V = dense(made, record)
        r = record["r"]
        null = record["null"]
        assert r == (len(S) if len(S) <= 36 else 16)
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
        compared.setdefault(record["pair"], (record["a"], record["b"]))
    assert {(4, 4), (4, 24)} < sizes and {min(size) for size in sizes if size[1] > 70} == {4, 24}
    random = [record["random"][0] for record in found["subspace"]]
    assert len(set(random)) == len(random)
    assert mean(random) == pytest.approx(1 / 72, abs=0.02)
    assert compared == {        # seeds differ if possible: one seed gives adapters related A
        "lora and lora": ("lora-seed0", "lora-seed1"),
        "lora and moved": ("lora-seed1", "moved"),
        "lora and full": ("lora-seed0", "full"),
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
        top, directions = (of_W, U) if len(W) <= len(W.T) else (Vh.T, V)    # those that span all
        directions = directions[:, :64]
        for share, value in zip(shares, along["real"]):
            shared = (top[:, :round(share * len(Vh))].T @ directions).square()
            assert value == pytest.approx(shared.sum().item() / directions.size(1), abs=2e-3)
        assert along["real"][-1] == pytest.approx(1, abs=1e-4)
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
    drawn = dict(zip(line.get_xdata().tolist(), line.get_ydata().tolist()))
    evaluations = [(0, saved["before"]), *saved["history"]["valid"], (4, saved["before"]),
                   (8, saved["after"])]
    for step, tasks in evaluations[:-1]:
        assert drawn[step] == tasks["rows.jsonl"]["loss"]
    assert sorted(drawn) == sorted(dict(evaluations)) == [0, 2, 4, 6, 8]


def test_blocks_are_compared_by_their_dense_products_and_pairwise(made, capsys):
    found, figures = run(made, "multi.pt lora-seed0.pt --study blocks")
    adapter = read(made / "multi.pt")["adapter"]
    assert len(found["blocks"]) == len(adapter["tensors"]) == 12
    for record in found["blocks"]:
        own = adapter["tensors"][record["name"]]
        sides = {"output": [], "input": []}
        norms = []
        for i in range(2):                                      # two blocks of rank 2
            columns = slice(2 * i, 2 * i + 2)
            delta = own["s"][i] * own["B"][:, columns].double() @ own["A"][columns].double()
            U, S, Vh = torch.linalg.svd(delta)
            norms.append(S.norm().item())
            sides["output"].append(U[:, :2])
            sides["input"].append(Vh[:2].T)
        assert record["share"] == pytest.approx(sorted(norms, reverse=True) / np.sum(norms), 1e-4)
        for side, (one, other) in sides.items():
            for k in (1, 2):
                phi = (one[:, :k].T @ other[:, :k]).square().sum().item() / k
                assert record[side][k - 1] == pytest.approx(phi, abs=1e-4)
            assert record[side] != record["null"][side]
    lines = capsys.readouterr().out.splitlines()
    cells = [line for line in lines if line.startswith("multi ")][-1].split()[1:]
    for cell, path in zip(cells[3:], ("input", "null.input", "output", "null.output")):
        phi = np.mean(pluck(found["blocks"], path), 0)[1]       # of both directions
        assert cell == f"{phi:.3f}"
    shares = np.mean(pluck(found["blocks"], "share"), 0)
    assert cells[:3] == ["2", f"{shares[0]:.2f}", f"{shares[1]:.2f}"]
    drawn = [axes.get_lines()[0].get_ydata() for axes in figures["blocks"].axes]
    assert drawn[0] == pytest.approx(shares)
    assert drawn[1] == pytest.approx(np.mean(pluck(found["blocks"], "input"), 0))


def test_blocks_may_differ_in_size_between_matrices_and_be_zero(made, tmp_path, capsys):
    saved = read(made / "multi.pt")
    adapter = saved["adapter"]
    names = list(adapter["tensors"])
    small, zero = names[:2]
    own = adapter["tensors"][small]
    adapter["tensors"][small] = {"A": own["A"][1:3], "B": own["B"][:, 1:3], "s": own["s"]}
    adapter["scale"][small] = own["s"]
    adapter["scale"][zero][:2] = 0
    torch.save(saved, tmp_path / "x.pt")
    found, _ = run(tmp_path, f"x.pt --study blocks --base {made / 'base.pt'}")
    assert pluck(found["blocks"], "name") == [name for name in names if name != zero]
    assert f"left out  blocks of {zero} in x: one of them is zero" in capsys.readouterr().out


def test_more_than_two_blocks_are_compared_pairwise():
    """Blocks 1 and 2 share one of two input directions, and 3 shares none."""
    A = torch.eye(8)[[0, 1, 1, 2, 3, 4]]
    B = torch.eye(8)[:, :6] * torch.tensor([3.0, 3, 2, 2, 1, 1])
    found = analyze.block_measures(B, A, 3)
    assert found["share"] == pytest.approx([3 / 6, 2 / 6, 1 / 6])
    assert found["input"][-1] == pytest.approx(0.5 / 3)
    assert found["output"][-1] == pytest.approx(0)


def test_the_amplification_study_prints_the_norms_of_table_7(made, capsys):
    found, figures = run(made, "lora-seed0.pt lora-seed1.pt --study amplification --layers 1")
    lines = capsys.readouterr().out.splitlines()[:-1]           # the last one contains a path
    assert max(map(len, lines)) <= 80
    assert set(pluck(found["records"], "layer")) == {1}
    norms = [line for line in lines if line.startswith("lora")][-1]
    keys = "projection top_W null.projection delta W r".split()
    for text, key in zip(norms.split()[1:], keys, strict=True):
        assert text == f"{mean(pluck(found['records'], key)):.3g}"
    for i, c in enumerate(found["checkpoints"]):
        assert c["results"] == read(made / f"lora-seed{i}.pt")["after"]
    seeds = pluck(select(found["records"], target="q"), "amplification")
    panel, = [ax for ax in figures["amplification"].axes if ax.get_title() == "ΔW of q"]
    band = panel.collections[0].get_paths()[0].vertices[:, 1]
    assert [band.min(), band.max()] == pytest.approx(sorted(seeds)) and band.min() < band.max()


def test_the_amplification_of_a_layer_is_the_mean_of_its_matrices():
    records = []
    for layer, value in ((0, 2), (0, 4), (1, 5)):               # encoder.0.v, decoder.0.v, ...
        null = {"amplification": value / 2}
        records.append({"layer": layer, "amplification": value, "null": null})
    line = analyze.by_layer(records)
    assert line == {"x": [0, 1], "real": [3.0, 5.0], "null": [1.5, 2.5]}


def test_a_histogram_counts_all_values_at_the_centres_of_its_bins():
    lines = []
    shares = [10 ** -0.1, 10 ** -0.2, 10 ** -5, 10 ** -3.9, 10 ** -0.9, 10 ** -1.1]
    for real in (shares[:3], shares[3:]):
        lines.append({"checkpoint": "a", "method": "lora", "real": np.array(real),
                      "null": np.array([0.5, 0.5])})
    largest, every = analyze.histograms(lines)
    width = 4 / 12                                              # 12 bins from 10⁻⁴ to 1
    assert every["x"] == pytest.approx([-4 + width * (i + 0.5) for i in range(12)])
    counts = [2, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 2]               # 10⁻⁵ counts as 10⁻⁴
    assert every["real"] * width * 6 == pytest.approx(counts)
    assert every["null"] * width == pytest.approx([0] * 11 + [1])
    assert largest["real"] * 3.9 / 12 * 2 == pytest.approx([1] + [0] * 10 + [1])


def test_without_flags_all_available_studies_are_made_in_place_of_earlier_figures(made):
    found, figures = run(made, "same.pt v.pt")                  # without a matrix in common
    names = "curves spectrum histogram amplification directions intruders ranks-same"
    assert set(figures) == set(names.split()) and "subspace" not in found
    folder = made / "same-analysis"
    text = (folder / "analysis.json").read_text()
    assert json.loads(text) == json.loads(json.dumps(found))
    mine = {"mine", "ranks-mine", "subspace-theory"}            # not listed in analysis.json
    for name in mine:
        (folder / f"{name}.png").touch()
    found, _ = run(made, "same.pt v.pt --study amplification")
    assert {f.stem for f in folder.glob("*.png")} == {"curves", "amplification", *mine}
    assert sorted(found["figures"]) == ["amplification.png", "curves.png"]


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"figures": 3}', '{"figures": [3, "a.png"]}',
                                  '{"figures": ["../b.png", "", "none.png"]}'])
def test_only_figures_that_an_earlier_analysis_lists_are_deleted(tmp_path, text):
    out = tmp_path / "out"
    out.mkdir()
    (out / "analysis.json").write_text(text)
    for path in (out / "a.png", tmp_path / "b.png"):
        path.touch()
    analyze.delete_earlier_figures(out)
    assert (out / "a.png").exists() and (tmp_path / "b.png").exists()


def test_a_failed_analysis_leaves_no_numbers_of_other_figures(made, monkeypatch):
    run(made, "v.pt --study spectrum")
    monkeypatch.setitem(analyze.STUDIES, "spectrum", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(made, "v.pt --study spectrum")
    assert not (made / "v-analysis" / "analysis.json").exists()


def test_long_names_have_figures(made, tmp_path):
    names = ["a" * 200, "a" * 199 + "b"]
    for name, source in zip(names, ("lora-seed0", "lora-seed1")):
        shutil.copy(made / f"{source}.pt", tmp_path / f"{name}.pt")
    found, figures = run(tmp_path, f"{names[0]}.pt {names[1]}.pt --study subspace --layers 0")
    assert pluck(found["checkpoints"], "checkpoint") == names and len(figures) == 2


def test_the_results_of_different_tasks_have_a_note(made, tmp_path, capsys):
    other = read(made / "v.pt")
    other["after"] = {"other": {"loss": 1.0}}
    torch.save(other, tmp_path / "other.pt")
    for path in (made / "v.pt", made / "full.pt"):
        shutil.copy(path, tmp_path)
    run(tmp_path, "v.pt full.pt --study spectrum")
    assert "different tasks" not in capsys.readouterr().out
    run(tmp_path, "v.pt other.pt --study spectrum")
    assert "different tasks" in capsys.readouterr().out


def test_files_of_one_name_are_different_checkpoints_with_different_nulls(made, tmp_path, capsys):
    for folder, source in (("d1", "lora-seed0"), ("d2", "lora-seed1"), ("d3", "lora-seed0")):
        (tmp_path / folder).mkdir()
        shutil.copy(made / f"{source}.pt", tmp_path / folder / "lora.pt")
    found, figures = run(tmp_path, "d1/lora.pt d2/lora.pt d3/lora.pt --study subspace")
    names = ["d1-lora", "d2-lora", "d3-lora"]
    assert pluck(found["checkpoints"], "checkpoint") == names
    first, second, third = [select(found["records"], checkpoint=name) for name in names]
    for a, b, c in zip(first, second, third, strict=True):
        assert a["name"] == b["name"] == c["name"]
        assert a["S"] == c["S"] != b["S"]                       # d1 and d3 contain the same file
        assert len({part["null"]["top1"] for part in (a, b, c)}) == 3
    assert "seeds" not in capsys.readouterr().out
    drawn = {f"subspace-{a}-{b}" for a, b in itertools.combinations(names, 2)}
    assert figures.keys() == {"curves", *drawn}
    assert (tmp_path / "d1" / "lora-analysis" / "analysis.json").exists()


def test_every_pair_has_a_figure_of_its_own(made, tmp_path):
    names = ["a", "b-c", "a-b", "c"]
    for name in names:
        shutil.copy(made / "v.pt", tmp_path / f"{name}.pt")
    files = " ".join(f"{name}.pt" for name in names)
    found, figures = run(tmp_path, f"{files} --study subspace --layers 0")
    titles = {figure._suptitle.get_text() for figure in figures.values()}
    for a, b in itertools.combinations(names, 2):
        assert f"φ(i, j) of ΔW: {a} (i) and {b} (j), layer 0" in titles
    written = {path.name for path in (tmp_path / "a-analysis").glob("*.png")}
    assert set(found["figures"]) == written and len(written) == 7       # one is of the losses


def test_a_name_may_contain_a_line_break(made, tmp_path, capsys):
    shutil.copy(made / "v.pt", tmp_path / "two\nlines.pt")
    analyze.main([str(tmp_path / "two\nlines.pt"), "--study", "spectrum", "--device", "cpu"])
    assert re.search("^two_lines +[0-9]", capsys.readouterr().out, re.MULTILINE)


# Printed tables and drawn figures

def rows_of_table(out, head):
    """{first cell: [numbers]} of the printed table whose first line begins with `head`."""
    table = out[out.index(head):].split("\n\n")[0]
    rows = {}
    for line in table.splitlines()[1:]:
        name, numbers = re.fullmatch(r"(.+?)((?: +[-0-9.,±e]+)+)", line).groups()
        rows[name] = [float(re.sub("±.*|,", "", text)) for text in numbers.split()]
    return rows


def test_runs_of_the_same_seed_are_marked_in_the_table_the_numbers_and_a_line(made, capsys):
    """Full fine-tuning has no A, and the seeds of one name differ if possible."""
    found, _ = run(made, "lora-seed0.pt same.pt full.pt --study subspace")
    out = capsys.readouterr().out
    rows = rows_of_table(out, "φ, mean over matrices")
    assert list(rows) == ["lora and same *", "lora and full", "same and full"]
    assert re.search(r"^\* Runs of the same seed\..*random", out, re.MULTILINE | re.DOTALL)
    for title, values in rows.items():
        here = select(found["subspace"], pair=title.removesuffix(" *"))
        want = []
        for side in ("input", "random", "output", "random output"):
            want += np.mean(pluck(here, side), 0).tolist()
        assert values == pytest.approx(want, abs=0.006)
        assert len(set(want)) == 8
        assert {entry["same_seed"] for entry in here} == {"*" in title}
    found, _ = run(made, "lora-seed0.pt lora-seed1.pt same.pt --study subspace")
    out = capsys.readouterr().out
    assert "same seed" not in out and "*" not in out
    assert not any(pluck(found["subspace"], "same_seed"))


def test_the_first_table_has_the_measures_and_those_of_the_gaussians(made, capsys):
    found, _ = run(made, "full.pt wide.pt --study spectrum")
    out = capsys.readouterr().out
    table = out[out.index("mean ± std"):].splitlines()[1:5]
    for lines, c in ((table[:2], "full"), (table[2:], "wide")):
        records = select(found["records"], checkpoint=c)
        assert lines[0].split()[0] == c and lines[1].split()[0] == "Gaussian"
        for line, parts in zip(lines, (records, pluck(records, "null"))):
            values = [float(text.split("±")[0]) for text in line.split()[-4:]]
            for value, key in zip(values, report.DIGITS, strict=True):
                assert value == pytest.approx(mean(pluck(parts, key)), abs=0.06)


def lines_in(figure, panel):
    """(values of the solid lines, values of the dotted lines) in the panel with this title."""
    ax, = [ax for ax in figure.axes if ax.get_title() == panel]
    solid = []
    dotted = []
    for line in ax.get_lines():
        if len(line.get_xdata()):
            values = line.get_xdata().tolist(), line.get_ydata().tolist()
            (dotted if line.get_linestyle() == ":" else solid).append(values)
    return solid, dotted


def test_figures_show_the_values_as_lines_and_their_nulls_dotted(made):
    found, figures = run(made, "multi.pt full.pt")
    for i, name in enumerate(("multi", "full")):
        of_name = select(found["records"], checkpoint=name)
        of_q = select(of_name, target="q")
        shortest = min(len(r["S"]) for r in of_q)
        for kind, part in enumerate((lambda r: r, lambda r: r["null"])):
            x, y = lines_in(figures["spectrum"], "ΔW of q")[kind][i]
            shares = [[s / sum(part(r)["S"]) for s in part(r)["S"][:shortest]] for r in of_q]
            assert x == list(range(1, shortest + 1))
            assert y == pytest.approx(np.mean(shares, 0).tolist())
            x, y = lines_in(figures["amplification"], "ΔW of q")[kind][i]
            assert (x, y) == ([0, 1], [part(r)["amplification"] for r in of_q])
        for study in ("directions", "intruders"):
            here = select(found[study], checkpoint=name)
            for kind, key in enumerate(("real", "null")):
                x, y = lines_in(figures[study], "mean over matrices")[kind][i]
                assert x == here[0]["x"]
                assert y == pytest.approx(np.mean(pluck(here, key), 0).tolist())


def test_maps_have_the_directions_of_the_first_checkpoint_to_the_right(made):
    found, figures = run(made, "lora-seed1.pt wide.pt --study subspace")
    axes = {ax.get_title(): ax for ax in figures["subspace-lora-seed1-wide"].axes}
    layer = figures["subspace-lora-seed1-wide"]._suptitle.get_text()[-1]
    assert len(axes) == 3 * 4 + 1                   # input, output, random; q, v; all and the first
    for target, side in itertools.product("qv", ("input", "output", "random")):
        entry, = select(found["subspace"], name=f"h.{layer}.attn.{target}")
        image, = axes[f"{target}, {side}"].get_images()
        phi = image.get_array()
        assert phi.shape == (24, 4) and list(image.get_extent()) == [0.5, 4.5, 0.5, 24.5]
        assert [phi[0, 0], phi[-1, -1]] == pytest.approx(entry[side])
        part, = axes[f"{target}, {side}, first 8"].get_images()
        assert part.get_array().tolist() == phi[:8].tolist()


@pytest.mark.parametrize("argv, n", [("lora-seed0.pt --layers 1", 1), ("v.pt --layers 0 1", 2)])
def test_a_single_point_is_visible(made, argv, n):
    _, figures = run(made, argv)
    for ax in figures["amplification"].axes:
        for line in ax.get_lines():
            assert line.get_marker() not in ("", "None", None) or line.get_color() == report.GREY
            assert len(line.get_xdata()) in (0, n)


def test_pairs_have_different_seeds_if_any_have():
    made = []
    for name, seed in (("a", 0), ("b", 0), ("a", 1), ("c", 0), ("other", 0)):
        c = by_hand({"v" if name == "other" else "q": 0})
        c.identity = {"checkpoint": name}
        c.label = f"{name}{seed}"
        c.settings.seed = seed
        c.saved["adapter"] = {}
        made.append(c)
    pairs = {}
    for names, members in analyze.checkpoint_pairs(made).items():
        pairs[names] = " ".join(f"{a.label}-{b.label}" for a, b in members)
    assert pairs == {("a", "a"): "a0-a1", ("a", "b"): "a1-b0", ("a", "c"): "a1-c0",
                     ("b", "c"): "b0-c0"}           # both have seed 0, and there is no other pair


def test_pairs_whose_titles_are_equal_have_rows_of_their_own(made, tmp_path, capsys):
    names = ("a", "b and c", "a and b", "c")
    for name, source in zip(names, ("lora-seed0", "lora-seed1", "v", "wide")):
        shutil.copy(made / f"{source}.pt", tmp_path / f"{name}.pt".replace(" ", "_"))
    label_of = deltas.label_of
    with pytest.MonkeyPatch.context() as m:
        m.setattr(deltas, "label_of", lambda *_: label_of(*_).replace("_", " "))
        found, _ = run(tmp_path, "a.pt b_and_c.pt a_and_b.pt c.pt --study subspace --targets v")
    lines = capsys.readouterr().out.splitlines()
    same_title = [line for line in lines if line.startswith("a and b and c")]
    for line, first in zip(same_title, ("a", "a and b"), strict=True):
        of_pair = select(found["subspace"], pair="a and b and c", a=first)
        first, last = np.mean(pluck(of_pair, "input"), 0)
        assert re.findall(r"\d\.\d\d", line)[:2] == [f"{first:.2f}", f"{last:.2f}"]


@pytest.mark.parametrize("selected, n", [(False, 4), (True, 9)])
def test_in_a_large_model_only_some_w_are_decomposed_unless_selected(selected, n):
    names = [f"h.{i}.attn.{target}" for i in range(3) for target in "qkv"]
    delta = {name: (torch.ones(300, 1), torch.ones(1, 300)) for name in names}
    W = dict.fromkeys(names, torch.eye(300))
    thin = torch.ones(300, 1), torch.ones(1), torch.ones(300, 1)
    c = by_hand(delta, W, selected=selected, svd=dict.fromkeys(names, thin))
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
    ("--base q.pt --alpha 12", ["q"], {"spectrum", "directions", *SIZED},
     ["of studies that need W: v, which"]),
])
def test_what_needs_w_or_alpha_is_left_out(made, flags, with_W, studies, messages, capsys):
    found, _ = run(made, f"loralib.pt {flags}")
    out = capsys.readouterr().out
    for message in [*messages, "1 tensors of loralib, such as classifier.weight"]:
        assert re.search(f"^left out .*{message}", out, re.MULTILINE), out
    assert found.keys() - {"records", "checkpoints", "figures"} == studies
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


# Adapters that others trained

BASE = "base_model_name_or_path"


def save_base(folder):
    """A base model for the adapters of test_interop.py."""
    base = random_gpt(SIZES, dtype=torch.float32)
    torch.save({"model": base.state_dict(), "config": vars(SIZES)}, folder / "base48.pt")


def test_adapters_of_different_base_models_are_not_compared(tmp_path, capsys):
    for folder, name in (("a", "gpt2"), ("b", "distilgpt2"), ("c", "openai-community/gpt2")):
        (tmp_path / folder).mkdir()
        peft(tmp_path / folder, "gpt-lora", **{BASE: name})
    a, b, c = [str(tmp_path / folder / "gpt-lora") for folder in "abc"]
    save_base(tmp_path)
    found = analyze.main([a, b, "--device", "cpu"])
    out = capsys.readouterr().out
    assert found.keys() == {"records", "checkpoints", "spectrum", "figures"}
    assert set(pluck(found["records"], "checkpoint")) == {"a-gpt-lora", "b-gpt-lora"}
    assert re.search("^left out  amplification, subspace, directions, intruders: needs one base "
                     "model, but the files name gpt2 and distilgpt2: pass --base", out, re.M)
    with pytest.raises(SystemExit, match="2"):
        analyze.main([a, b, "--study", "subspace", "--device", "cpu"])
    assert re.search("--study subspace needs one base .* gpt2 and dist", capsys.readouterr().err)
    found = analyze.main([a, c, "--study", "subspace", "--device", "cpu"])
    assert found["subspace"] and "note" not in capsys.readouterr().out
    found = analyze.main([a, b, "--base", str(tmp_path / "base48.pt"), "--device", "cpu"])
    out = capsys.readouterr().out
    assert found["subspace"] and found["amplification"] is None
    for name in ("gpt2", "distilgpt2"):
        assert re.search(f"^note +W is that of .*base48.pt; .* names the base {name}$", out, re.M)


def test_untrained_matrices_are_left_out_with_a_message(tmp_path, capsys):
    B = "base_model.model.transformer.{}.lora_B.weight".format
    one = PEFT | {B("h.1.attn.c_proj"): torch.zeros_like(PEFT[B("h.1.attn.c_proj")])}
    none = {key: torch.zeros_like(t) if "lora_B" in key else t for key, t in PEFT.items()}
    peft(tmp_path, "one", one)
    peft(tmp_path, "none", none)
    found = analyze.main([str(tmp_path / "one"), "--device", "cpu"])
    out = capsys.readouterr().out
    assert "left out  h.1.attn.o of one: ΔW is zero (never trained)" in out
    assert len(found["records"]) == 5 and "h.1.attn.o" not in pluck(found["records"], "name")
    with pytest.raises(SystemExit, match="2"):
        analyze.main([str(tmp_path / "none"), "--device", "cpu"])
    assert re.search("none: all 6 ΔW are zero, so it was never trained", capsys.readouterr().err)


def test_a_tiny_update_is_not_printed_as_zero(tmp_path, capsys):
    tiny = {key: t * 1e-3 for key, t in PEFT.items()}
    peft(tmp_path, "tiny", tiny)
    save_base(tmp_path)
    found = analyze.main([str(tmp_path / "tiny"), "--base", str(tmp_path / "base48.pt"),
                          "--study", "amplification", "--device", "cpu"])
    out = capsys.readouterr().out
    printed = rows_of_table(out, "‖UᵀWV‖")["tiny"][3]
    assert printed == pytest.approx(mean(pluck(found["records"], "delta")), rel=0.01)
    assert printed < 0.005
    assert re.search(r"^tiny .* [1-9]e-0\d±", out, re.MULTILINE)           # the amplification


@pytest.mark.parametrize("argv, message", [
    ("gone.pt", "gone.pt"),
    ("v.pt --base gone.pt", "gone.pt is neither"),
    ("base.pt", "base.pt is neither a checkpoint of train.py nor an adapter"),
    ("by_hand.pt --base full.pt", "by_hand.pt .*(different base models|same base model)"),
    ("zero.pt", "zero.pt: all 2 ΔW are zero, so it was never trained"),
    ("inf.pt", "inf.pt: ΔW of h.1.attn.v is not finite: select other matrices by"),
    ("by_hand.pt moved.pt", "/moved.pt: .*away.pt is neither a file nor .*--base"),
    ("v.pt v.pt", "v.pt, .*v.pt have the same name"),
    ("v.pt --layers 2", "--layers 2: .*v.pt has no such ΔW; choose from 0 1"),
    ("v.pt --targets q", "--targets q: .*v.pt has no such ΔW; choose from v"),
    ("v.pt --study ranks", "--study ranks needs a checkpoint of --method autolora"),
    ("same.pt v.pt --study subspace", "--study subspace needs two .* in common"),
    ("by_hand.pt --study directions", "--study directions needs the base model's W: pass --base"),
    ("loralib.pt --study intruders --base base.pt", "--study intruders needs .*--alpha"),
    ("v.pt --study blocks", "--study blocks needs a checkpoint of --method multilora"),
])
def test_errors_are_one_line_before_anything_is_written(made, argv, message, capsys):
    before = {f: f.stat().st_mtime_ns for f in made.rglob("*")}
    with pytest.raises(SystemExit, match="2"):
        run(made, argv)
    err = capsys.readouterr().err
    assert re.search(message, err) and err.count("\n") == 1, err
    assert {f: f.stat().st_mtime_ns for f in made.rglob("*")} == before


@pytest.mark.parametrize("alpha", ["nan", "inf", "-inf"])
def test_alpha_must_be_a_finite_number(alpha, capsys):
    with pytest.raises(SystemExit, match="2"):
        analyze.parse(["loralib.pt", f"--alpha={alpha}"])
    assert re.search("--alpha: .* not a finite number", capsys.readouterr().err)
    assert analyze.parse(["loralib.pt", "--alpha", "-2"]).alpha == -2
