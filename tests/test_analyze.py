"""analyze.py: its measures on planted matrices, its figures and numbers on checkpoints of train.py."""
import json
import math
import re
from statistics import mean, stdev

import matplotlib.image
import pytest
import torch

import analyze
import lora
import train
from analyze import amplification, effective_rank, gaussian_like, intruders, n_for_energy, projection, spectrum, stable_rank
from analyze import subspace_similarity, svd, top_share
from model import GPT, read
from test_lora import close


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def orthonormal(d, r, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, r, generator=g, dtype=torch.float64))[0]


def planted(S, d_out=30, d_in=20):
    """(B, A) whose product has singular values S, and its U and V."""
    S = torch.tensor(S, dtype=torch.float64)
    U, V, mix = orthonormal(d_out, len(S), 1), orthonormal(d_in, len(S), 2), torch.randn(len(S), len(S), dtype=torch.float64)
    return (U * S @ torch.linalg.inv(mix), mix @ V.T), U, V


# measures

@pytest.mark.parametrize("S", [[5.0, 3.0, 2.0, 0.5], [7.0], [3.0, 1e-6]])
def test_planted_spectra_are_recovered(S):
    (B, A), U, V = planted(S)
    close(spectrum(B, A), torch.tensor(S, dtype=torch.float64), tol=1e-10)
    got_U, _, got_V = svd((B, A))
    close((got_U * U).sum(0).abs(), torch.ones(len(S)).double(), tol=1e-8)      # the same up to signs
    close((got_V * V).sum(0).abs(), torch.ones(len(S)).double(), tol=1e-8)


@pytest.mark.parametrize("d_out, d_in, r", [(30, 20, 4), (20, 30, 1), (9, 9, 9)])
def test_thin_is_dense(d_out, d_in, r):
    B, A = torch.randn(d_out, r).double(), torch.randn(r, d_in).double()
    U, S, V = svd((B, A))
    close(S, torch.linalg.svdvals(B @ A)[:r], tol=1e-10)
    close(U * S @ V.T, B @ A, tol=1e-10)
    close(U.T @ U, torch.eye(r).double(), tol=1e-10)
    close(V.T @ V, torch.eye(r).double(), tol=1e-10)
    U, S, V = svd(B @ A)
    close(U * S @ V.T, B @ A, tol=1e-10)


def test_measures_of_a_spectrum():
    equal, one, two = torch.ones(8), torch.tensor([3.0, 0.0, 0.0]), torch.tensor([3.0, 1.0])
    assert (top_share(equal), stable_rank(equal), n_for_energy(equal)) == (1 / 8, 8, 8)
    assert effective_rank(equal) == pytest.approx(8)
    assert (top_share(one), effective_rank(one), stable_rank(one), n_for_energy(one)) == (1, 1, 1, 1)
    assert top_share(two) == 0.75 and stable_rank(two) == pytest.approx(10 / 9)
    assert effective_rank(two) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    assert n_for_energy(two) == 1 and n_for_energy(two, 0.95) == 2              # 9 / 10 of the energy in the first


def test_subspace_similarity_is_the_formula():
    U1, U2 = orthonormal(20, 5, 1), orthonormal(20, 8, 2)
    phi = subspace_similarity(U1, U2)
    assert phi.shape == (5, 8)
    for i in range(1, 6):
        for j in range(1, 9):
            close(phi[i - 1, j - 1], torch.linalg.norm(U1[:, :i].T @ U2[:, :j]) ** 2 / min(i, j))
    close(subspace_similarity(U1, U1), torch.ones(5, 5).double())               # one span contains the other
    close(subspace_similarity(U1[:, :2], U1[:, 3:]), torch.zeros(2, 2).double())
    signs = torch.tensor([1.0, -1, -1, 1, -1]).double()
    close(subspace_similarity(U1 * signs, U2), phi)


def test_random_subspaces_share_what_is_expected():
    phi = sum(subspace_similarity(orthonormal(40, 4, s), orthonormal(40, 10, 1000 + s)) for s in range(400)) / 400
    i, j = torch.arange(1, 5)[:, None], torch.arange(1, 11)[None]
    assert ((phi * 40 / torch.maximum(i, j)) - 1).abs().max() < 0.15


def test_amplification_by_hand():
    W = torch.tensor([[1.0, 4.0], [2.0, 3.0]]).double()
    B, A = torch.tensor([[6.0], [0.0]]).double(), torch.tensor([[0.0, 2.0]]).double()    # ΔW = 12 e₁e₂ᵀ, W₁₂ = 4
    assert amplification(W, *svd((B, A))) == pytest.approx(3)
    assert amplification(W, *svd((-B, A))) == pytest.approx(3)
    U, V = orthonormal(2, 2, 1), orthonormal(2, 2, 2)
    assert projection(W, U, V) == pytest.approx(W.norm().item())                 # all directions: all of W


def test_the_random_column_of_table_7():
    W, r = torch.randn(60, 40).double(), 6
    got = sum(projection(W, orthonormal(60, r, s), orthonormal(40, r, 999 + s)) for s in range(200)) / 200
    assert got == pytest.approx(W.norm().item() * r / math.sqrt(60 * 40), rel=0.03)


def test_intruders():
    W, e = torch.randn(30, 20).double(), [0.3, 0.6, 0.9]
    U, _, V = svd(W)
    other = torch.linalg.svd(W)[0][:, -1:]                                       # an output direction that is none of W's 20
    assert intruders(U, W, e) == [0, 0, 0]
    assert intruders(U, W + 1e3 * other @ V[:, -1:].T, e) == [1, 1, 1]
    assert intruders(U, W + 1e3 * U[:, 3:4] @ V[:, 3:4].T, e) == [0, 0, 0]       # larger, but W's own


@pytest.mark.parametrize("delta", [(torch.randn(30, 4), torch.randn(4, 20)), torch.randn(30, 20)])
def test_the_null_has_the_shape_rank_and_norm(delta):
    U, S, V = svd(delta)
    null = gaussian_like(delta)
    assert [t.shape for t in null] == [U.shape, S.shape, V.shape]
    close(null[1].norm(), S.norm(), tol=1e-5)
    close(null[0].T @ null[0], torch.eye(len(S)), tol=1e-5)
    assert abs(null[2][:, 0] @ V[:, 0]) < 0.9 and not torch.equal(null[0], gaussian_like(delta, 'b')[0])


# checkpoints

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Checkpoints of the four methods, and one more seed of LoRA."""
    out = tmp_path_factory.mktemp("made")
    common = "--data instruct facts --batch_size 8 --eval_rows 4 --device cpu --steps 4 --eval_every 2 --warmup 0".split()
    for name, flags in {"lora": "--rank 4", "lora1": "--rank 4 --seed 1", "lora8": "--rank 8 --targets q v",
                        "multilora": "--method multilora --rank 4 --n_blocks 2", "full": "--method full --lr 1e-2",
                        "autolora": "--method autolora --max_rank 4 --search_steps 4 --beta_lr 0.5"}.items():
        train.main([*common, *flags.split(), "--out", str(out / f"{name}.pt")])
    return out


def test_the_whole_report(made, tmp_path, capsys):
    paths = [str(made / f"{n}.pt") for n in ("lora", "lora1", "multilora", "autolora", "full")]
    got = analyze.main([*paths, "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert got == json.loads((tmp_path / "analysis.json").read_text())
    figures = {f.stem for f in tmp_path.glob("*.png")}
    assert {"spectrum", "histogram", "amplification", "directions", "intruders", "curves", "ranks-autolora", "subspace-lora-lora1"} <= figures
    for f in tmp_path.glob("*.png"):
        image = matplotlib.image.imread(f)
        assert image.std() > 0.03 and min(image.shape[:2]) > 200, f
    assert not [line for line in printed.splitlines() if len(line) > 80 and str(tmp_path) not in line]
    assert got["table"]["lora, 2 seeds"]["matrices"] == 24
    null = got["table"]["multilora"]["null"]["top1"]
    assert null == [x["null"]["top1"] for x in got["matrices"]["multilora"].values()]
    assert f"\n  Gaussian{f'{100 * mean(null):.1f}±{100 * stdev(null):.1f}':>38}" in printed
    # the numbers are the checkpoints'
    base = GPT.from_pretrained("nano")
    for name in ("lora", "multilora", "autolora"):
        lora.load(base, made / f"{name}.pt")
        for n, m in lora.adapters(base).items():
            S = torch.linalg.svdvals(m.delta_weight().double())[:m.rank]
            mine = torch.tensor(got["matrices"][name][n]["S"]).double()
            assert len(mine) == m.rank and (mine - S).abs().max() < 1e-5 * S[0]
    lora.remove(base)
    full, n = read(made / "full.pt")["model"], "h.2.mlp.up"
    S = torch.linalg.svdvals(full[f"{n}.weight"] - base.get_submodule(n).weight)
    assert (torch.tensor(got["matrices"]["full"][n]["S"]) - S).abs().max() < 1e-4 * S[0]
    assert got["ranks"]["autolora"]["ranks"] == read(made / "autolora.pt")["adapter"]["ranks"]
    assert got["ranks"]["autolora"]["steps"] == [1, 2, 3, 4]
    assert got["table"]["lora"]["parameters"] == sum(t.numel() for t in read(made / "lora.pt")["adapter"]["tensors"].values())
    own = read(made / "lora.pt")["after"]
    assert got["table"]["lora"]["loss"] == [pytest.approx(sum(r["loss"] for r in own.values()) / 2)]
    assert [s for s, _ in got["curves"]["lora"]["train"]] == [1, 2, 3, 4]
    row, full = got["matrices"]["lora"]["h.1.attn.q"], got["matrices"]["full"]["h.1.attn.q"]
    W = base.h[1].attn.q.weight.detach()
    assert row["top_W"] == pytest.approx(torch.linalg.svdvals(W)[:4].norm().item(), rel=1e-4)
    assert row["amplification"] == pytest.approx(row["delta"] / row["projection"], rel=1e-4)
    assert full["amplification"] == pytest.approx(torch.tensor(full["S"])[:16].norm().item() / full["projection"], rel=1e-4)
    assert full["null"]["amplification"] == pytest.approx(torch.tensor(full["S"])[:16].norm().item() / full["null"]["projection"], rel=1e-4)
    assert row["W"] == pytest.approx(W.norm().item(), rel=1e-4) and row["expected_random"] == pytest.approx(row["W"] * 4 / 128, rel=1e-4)
    assert (row["r"], full["r"]) == (4, 16) and full["delta"] == pytest.approx(torch.tensor(full["S"]).norm().item(), rel=1e-4)
    assert row["null"]["delta"] == pytest.approx(row["delta"], rel=1e-4)
    # nulls: another Gaussian for every matrix, of its own spectrum, in directions that have nothing to do with W
    every = list(got["matrices"]["lora"].items())
    assert len({x["null"]["top1"] for _, x in every}) == len(every)
    own, = analyze.load([made / "lora.pt"])
    U, S, V = gaussian_like(own.delta["h.1.attn.q"], "lora h.1.attn.q")
    assert row["null"]["S"] == pytest.approx(S.tolist(), rel=1e-4)
    assert row["null"]["projection"] == pytest.approx(projection(own.W["h.1.attn.q"], U, V), rel=1e-4)
    assert mean(x["null"]["projection"] / x["expected_random"] for _, x in every) == pytest.approx(1, abs=0.2)
    # the studies that need all of W
    n, (UW, _, VW) = "h.1.attn.q", svd(own.W["h.1.attn.q"])
    B, A = own.delta[n]
    where = got["directions"]["lora"][n]
    for share, phi in zip(got["directions"]["x"], where["real"]):
        i = max(1, round(128 * share))
        assert phi == pytest.approx((VW[:, :i].T @ svd((B, A))[2]).square().sum().item() / min(i, 4), rel=1e-3)
    assert where["real"] != where["null"] and where["null"][-1] == pytest.approx(1, abs=1e-3)
    counts = got["intruders"]["lora"][n]
    assert counts["real"] == intruders(UW, own.W[n] + B @ A, got["intruders"]["x"])
    assert counts["null"] == intruders(UW, own.W[n] + U * S @ V.T, got["intruders"]["x"]) != counts["real"]
    # what is printed is what is there
    both = got["table"]["lora"]["top1"] + got["table"]["lora1"]["top1"]
    text = [f"{100 * mean(v):.1f}±{100 * stdev(v):.1f}" for v in (both, [mean(both[:24]), mean(both[24:])])]
    assert f"\nlora, 2 seeds {36_864:24,}{text[0]:>10}" in printed and f"\n  over the seeds{text[1]:>32}" in printed
    both = [x for c in ("lora", "lora1") for x in got["matrices"][c].values()]
    columns = [mean(f(x) for x in both) for f in (lambda x: x["projection"], lambda x: x["top_W"], lambda x: x["null"]["projection"],
                                                  lambda x: x["delta"], lambda x: x["W"])]
    assert f"\n{'lora, 2 seeds':27}" + "".join(f"{v:9.2f}" for v in columns) + "   4.0\n" in printed


def test_one_checkpoint_and_its_default_folder(made):
    got = analyze.main([str(made / "lora8.pt")])
    assert "subspace" not in got and got["ranks"] == {} and (made / "lora8-analysis" / "spectrum.png").is_file()
    assert all((made / "lora8-analysis" / f"{n}.png").is_file() for n in ("histogram", "amplification", "directions", "intruders", "curves"))


def test_two_ranks_and_a_choice_of_targets_layers_and_studies(made, tmp_path):
    got = analyze.main([str(made / "lora8.pt"), str(made / "lora.pt"), "--study", "subspace", "--targets", "q", "v",
                        "--layers", "1", "3", "--out", str(tmp_path)])
    rows = {n.removeprefix("lora8, lora, "): x for n, x in got["subspace"]["lora8 and lora"]["first and last"].items()}
    assert set(rows) == {f"h.{i}.attn.{t}" for i in (1, 3) for t in "qv"} and "directions" not in got
    drawn, (a, b) = got["subspace"]["lora8 and lora"]["drawn"], analyze.load([made / "lora8.pt", made / "lora.pt"])
    for n in ("h.3.attn.q", "h.3.attn.v"):
        for side, k in (("V", 2), ("U", 0)):
            phi = subspace_similarity(svd(a.delta[n])[k], svd(b.delta[n])[k])
            assert phi.shape == (8, 4) and torch.allclose(torch.tensor(drawn[n][f"{side} phi"]), phi, atol=1e-5)
            assert rows[n][f"{side} phi"] == pytest.approx([phi[0, 0].item(), phi[7, 3].item()], rel=1e-4)
            assert torch.tensor(drawn[n][f"{side} null"]).max() < 0.7
    assert len({x["V null"][0] for x in rows.values()}) == 4                    # Gaussians of their own


def test_checkpoints_that_differ_by_their_seed_are_one(made, tmp_path):
    for name, (old, seed) in {"r8": ("lora8", 0), "r8-2": ("lora8", 1), "r4": ("lora", 0), "r4-2": ("lora1", 1), "r4-copy": ("lora", 0),
                              "x-seed1": ("lora8", 2), "x-seed10": ("lora8", 3)}.items():
        held = read(made / f"{old}.pt")
        others = {"eta": seed, "n_blocks": seed}                        # settings of other methods
        torch.save(held | {"args": held["args"] | {"seed": seed} | others}, tmp_path / f"{name}.pt")
    got = lambda *names: {k: [c.label for c in v] for k, v in analyze.seeds(analyze.load([tmp_path / f"{n}.pt" for n in names])).items()}
    assert got("r8", "r8-2", "r4", "r4-2") == {"r8, 2 seeds": ["r8", "r8-2"], "r4, 2 seeds": ["r4", "r4-2"]}
    assert got("r4", "r4-copy", "r8") == {"r4": ["r4"], "r4-copy": ["r4-copy"], "r8": ["r8"]}
    assert got("x-seed1", "x-seed10") == {"x, 2 seeds": ["x-seed1", "x-seed10"]}
    pairs = analyze.pairs(analyze.load([tmp_path / f"{n}.pt" for n in ("r8", "r8-2", "r4", "r4-2")]))
    assert {k: [(a.label, b.label) for a, b in v] for k, v in pairs.items()} == {
        "r8, 2 seeds, among themselves": [("r8", "r8-2")], "r8, 2 seeds and r4, 2 seeds": [("r8", "r4-2"), ("r8-2", "r4")],
        "r4, 2 seeds, among themselves": [("r4", "r4-2")]}


def test_a_stopped_run(made, tmp_path):
    held = read(made / "lora.pt")
    torch.save({**{k: v for k, v in held.items() if k != "after"}, "step": 2, "optimizer": {}}, tmp_path / "half.pt")
    got = analyze.main([str(tmp_path / "half.pt"), "--study", "spectrum"])
    assert got["table"]["half"]["exact"] == []


def zeroed(path):
    held = read(path)
    held["adapter"]["tensors"] = {n: t * (not n.endswith(".B")) for n, t in held["adapter"]["tensors"].items()}
    return held


@pytest.mark.parametrize("make, message", [
    (lambda made, d: [d / "none.pt"], "none.pt: no such file"),
    (lambda made, d: (d / "cut.pt").write_bytes((made / "lora.pt").read_bytes()[:5000]) and [d / "cut.pt"], "cut.pt: not a complete file"),
    (lambda made, d: torch.save({"a": 1}, d / "b.pt") or [d / "b.pt"], "b.pt: not a checkpoint of train.py"),
    (lambda made, d: [made / "lora8.pt", "--targets", "up"], "has no such ΔW; choose from q v"),
    (lambda made, d: [made / "lora.pt", "--layers", "9"], "--layers 9: .* has no such ΔW; choose from 0 1 2 3"),
    (lambda made, d: torch.save(read(made / "full.pt") | {"base": "0" * 16}, d / "o.pt") or [made / "lora.pt", d / "o.pt"],
     "o.pt: was trained on another base than nano"),
    (lambda made, d: [made / "lora.pt", "--base", made / "full.pt"], "lora.pt, on .*full.pt: the adapter was trained on another base"),
    (lambda made, d: [made / "lora.pt", "--base", d / "gone.pt"], "its base .*gone.pt cannot be read; say where it is with --base"),
    (lambda made, d: [analyze.lora.__file__.replace("lora.py", "pretrained/nano.pt")], "was pretrained from scratch"),
    (lambda made, d: [made / "lora.pt", "--study", "subspace"], "--study subspace compares: give two checkpoints or more"),
    (lambda made, d: [made / "lora.pt", made / "full.pt", "--study", "ranks"], "--study ranks: none of these has ranks that differ"),
    (lambda made, d: torch.save(zeroed(made / "lora.pt"), d / "z.pt") or [d / "z.pt"], "z.pt: ΔW of h.0.attn.q has norm 0: .* step 4"),
    (lambda made, d: [made / "lora.pt", made / "lora.pt"], "two checkpoints have the same name"),
])
def test_errors_are_one_line_and_status_2(make, message, made, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        analyze.main([str(x) for x in make(made, tmp_path)])
    text = capsys.readouterr().err
    assert e.value.code == 2 and text.count("\n") == 1
    assert re.search(message, text), text
