"""analyze.py: its measures against closed forms, its studies on checkpoints of train.py."""
import itertools
import json
import math
import re
from statistics import mean, stdev
from types import SimpleNamespace

import matplotlib.image
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
from support import show
from support.show import column, where
from test_train import killed_after, write_rows


def orthonormal(d, r, seed):
    torch.manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, r).double())[0]


@pytest.mark.parametrize("S", [[5.0, 3.0, 2.0, 0.5], [7.0], [3.0, 1e-6]])
def test_planted_singular_values_and_vectors_are_recovered(S):
    S, r = torch.tensor(S).double(), len(S)
    U, V, mix = orthonormal(30, r, 1), orthonormal(20, r, 2), torch.eye(r).double() + 0.3
    for delta in ((U * S @ mix.inverse(), mix @ V.T), U * S @ V.T):
        got_U, got_S, got_V = svd(delta)
        close(got_U * got_S @ got_V.T, U * S @ V.T)
        close(got_S[:r], S)
        for got, want in ((got_U, U), (got_V, V)):
            close((got[:, :r] * want).sum(0).abs(), torch.ones(r).double(), tol=1e-8)


def test_measures_of_a_spectrum():
    spectra = torch.ones(8), torch.tensor([3.0, 0.0, 0.0]), torch.tensor([3.0, 1.0])
    for measure, want in ((top_share, [1 / 8, 1, 3 / 4]), (stable_rank, [8, 1, 10 / 9]),
                          (effective_rank, [8, 1, 4 / 3 ** 0.75])):     # exp(¾ ln 4/3 + ¼ ln 4)
        assert [measure(S) for S in spectra] == pytest.approx(want)


def test_subspace_similarity_is_the_formula():
    U1, U2 = orthonormal(20, 5, 1), orthonormal(20, 8, 2)
    phi = subspace_similarity(U1, U2)
    for i, j in itertools.product(range(1, 6), range(1, 9)):
        shared = torch.linalg.norm(U1[:, :i].T @ U2[:, :j]) ** 2
        close(phi[i - 1, j - 1], shared / min(i, j))


def test_intruders_are_directions_that_are_none_of_w():
    U, first = orthonormal(30, 21, 1), torch.eye(20)[:1].double()
    W = U[:, :20] * torch.arange(20, 0, -1)                         # the last of U is none of its
    for cosine, counts in ((1.0, [0, 0, 0]), (0.7, [0, 0, 1]), (0.0, [1, 1, 1])):
        new = cosine * U[:, :1] + math.sqrt(1 - cosine ** 2) * U[:, 20:]
        assert intruders(U[:, :20], W + 1e3 * new @ first, [0.3, 0.6, 0.9]) == counts


def test_the_null_is_a_gaussian_of_the_same_shape_and_norm_another_for_every_name():
    pair = orthonormal(30, 4, 1), 3 * orthonormal(20, 4, 2).T
    for delta in (pair, pair[0] @ pair[1]):
        (U, S, V), null, other = svd(delta), gaussian_like(delta, "a"), gaussian_like(delta, "b")
        assert [t.shape for t in null] == [U.shape, S.shape, V.shape]
        close(null[1].norm(), S.norm())
        assert max(abs(null[2][:, 0] @ t[:, 0]) for t in (V, other[2])) < 0.9


RUNS = {
    "lora-seed0": "--rank 4", "lora-seed1": "--rank 4 --seed 1", "v": "--rank 2 --targets v",
    "wide": "--rank 24 --targets q v", "full": "--method full --lr 0.03",
    "multi": "--method multilora --rank 4 --n_blocks 2 --lr 0.3",
    "auto": "--method autolora --rank 4 --search_steps 4 --beta_lr 0.5 --gate sigmoid",
    "same": "--method autolora --rank 4 --search_steps 4 --beta_lr 0 --targets q",
}
SPOILT = {
    "scratch": ("full", lambda saved: saved["settings"].update(scratch=True)),
    "moved": ("wide", lambda saved: saved["settings"].update(model="away.pt")),
    "lora-seed2": ("wide", lambda saved: saved["settings"].update(seed=2)),
    "lora-seed3": ("lora-seed1", lambda saved: (saved["settings"].update(seed=3),
                                                saved.update(step=3))),
    "zero": ("v", lambda saved: saved["adapter"]["tensors"]["h.1.attn.v"]["B"].zero_()),
    "nan": ("v", lambda saved: saved["adapter"]["tensors"]["h.1.attn.v"]["B"].fill_(math.nan)),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with checkpoints of all methods, one of a search that was stopped, and bad ones."""
    folder = tmp_path_factory.mktemp("made")
    base = random_gpt(GPTConfig(257, 64, n_layer=2, n_head=2, n_embd=72), dtype=torch.float32)
    torch.save({"model": base.state_dict(), "config": vars(base.config)}, folder / "base.pt")
    write_rows(folder / "rows.jsonl", [chr(97 + i % 7) * (1 + i % 5) for i in range(60)])
    common = ["--model", str(folder / "base.pt"), "--data", str(folder / "rows.jsonl"),
              *"--device cpu --batch_size 8 --eval_rows 4 --steps 4 --eval_every 2".split()]
    for name, flags in RUNS.items():
        train.main([*common, *flags.split(), "--out", str(folder / f"{name}.pt")])
    with pytest.MonkeyPatch.context() as m:
        killed_after(2, [*common, *RUNS["auto"].split(), "--out", str(folder / "search.pt")], m)
    for name, (old, spoil) in SPOILT.items():
        saved = read(folder / f"{old}.pt")
        spoil(saved)
        torch.save(saved, folder / f"{name}.pt")
    (folder / "cut.pt").write_bytes((folder / "wide.pt").read_bytes()[:5000])
    return folder


def run(folder, names, *flags):
    """What analyze.main returns, and its figures (stored small, to save time)."""
    figures, savefig = {}, Figure.savefig

    def keep(figure, path, **options):
        figures[path.stem] = figure
        savefig(figure, path, dpi=50)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(Figure, "savefig", keep)
        return analyze.main([*[str(folder / f"{name}.pt") for name in names], *flags]), figures


@pytest.fixture(scope="module")
def report(made):
    names = "lora-seed0 lora-seed1 wide multi auto full".split()
    return run(made, names, *"--study directions intruders".split())[0]


def dense(made, name, checkpoint, seed=None):
    """W, U, S, V in float64, the SVD of what a checkpoint has as ΔW, in all its directions."""
    saved = read(made / (f"{checkpoint}-seed{seed}.pt" if seed else f"{checkpoint}.pt"))
    model = GPT.from_pretrained(made / "base.pt")
    W = model.get_submodule(name).weight.detach().double()
    if "model" in saved:
        delta, r = saved["model"][f"{name}.weight"] - W, min(W.shape)
    else:
        layer = lora.adapters(lora.load_state_dict(model, saved["adapter"]))[name]
        delta, r = layer.delta_weight().detach().double(), layer.rank
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return W, U[:, :r], S[:r], Vh[:r].T


def test_every_number_is_that_of_the_dense_matrix_and_every_null_as_large(made, report):
    tops, shares = [], []
    for record in report["records"]:
        W, U, S, V = dense(made, record["name"], record["checkpoint"], record["seed"])
        r, null = record["r"], record["null"]
        assert r == (16 if record["method"] == "full" else len(S))
        assert record["S"] == pytest.approx(S.tolist(), rel=1e-3, abs=1e-5 * S[0].item())
        want = {"top1": S[0] / S.sum(), "effective_rank": (S / S.sum()).pow(-S / S.sum()).prod(),
                "stable_rank": (S @ S) / S[0] ** 2, "delta": S.norm(), "W": W.norm(),
                "top_W": torch.linalg.svdvals(W)[:r].norm(),
                "projection": torch.linalg.norm(U[:, :r].T @ W @ V[:, :r])}
        want["amplification"] = S[:r].norm() / want["projection"]
        for key, value in want.items():
            assert record[key] == pytest.approx(value.item(), rel=1e-3), key
        assert math.hypot(*null["S"]) == pytest.approx(S.norm().item(), rel=1e-3)
        size = math.hypot(*null["S"][:r]) / null["projection"]
        assert len(null["S"]) == len(S) and null["amplification"] == pytest.approx(size, rel=1e-4)
        tops.append(null["top1"])
        shares.append(null["projection"] / W.norm().item() * math.sqrt(W.numel()) / r)
    assert len(set(tops)) == len(tops) > 50                         # no Gaussian comes twice
    assert mean(shares) == pytest.approx(1, abs=0.1)                # nor knows it of W


def test_subspaces_are_compared_in_all_directions_of_inputs_and_of_outputs(made):
    names, base = "lora-seed0 lora-seed1 moved full".split(), str(made / "base.pt")
    found, figures = run(made, names, *"--study subspace --targets q --base".split(), base)
    assert {record["target"] for record in found["records"]} == {"q"}
    sizes, compared, random = set(), {}, []
    for record in found["subspace"]:
        a, b = [dense(made, record["name"], record[end]) for end in "ab"]
        for side, i in (("output", 1), ("input", 3)):
            shared = (a[i].T @ b[i]).square()
            want = [shared[0, 0].item(), shared.sum().item() / min(shared.shape)]
            assert record[side] == pytest.approx(want, rel=1e-2, abs=1e-4)
            sizes.add(tuple(shared.shape))
        random.append(record["random"][0])
        compared[record["pair"]] = record["a"], record["b"]
    assert sizes == {(4, 4), (4, 24), (4, 72), (24, 72)}
    assert len(set(random)) == len(random) and mean(random) == pytest.approx(1 / 72, abs=0.02)
    assert compared == {        # and not two runs that one seed has started at related A
        "lora and lora": ("lora-seed0", "lora-seed1"), "lora and moved": ("lora-seed1", "moved"),
        "lora and full": ("lora-seed1", "full"), "moved and full": ("moved", "full")}
    assert {f"subspace-{a}-{b}" for a, b in compared.values()} == figures.keys() - {"curves"}


def test_directions_and_intruders_are_those_of_the_dense_matrices(made, report):
    shares, differ = [i / 20 for i in range(1, 21)], set()
    for along, line in zip(report["directions"], report["intruders"], strict=True):
        W, U, S, V = dense(made, line["name"], line["checkpoint"], line["seed"])
        of_W, _, Vh = torch.linalg.svd(W, full_matrices=False)
        assert (along["name"], along["x"], line["x"]) == (line["name"], shares, shares[:-1])
        for share, phi in zip(shares, along["real"]):
            shared = (Vh[:round(share * len(Vh))] @ V[:, :64]).square()
            assert phi == pytest.approx(shared.sum().item() / min(shared.shape), abs=2e-3)
        best = (of_W.T @ torch.linalg.svd(W + U * S @ V.T)[0][:, :10]).abs().amax(0)
        for epsilon, count in zip(line["x"], line["real"]):         # a cosine may be as near to ε
            assert (best < epsilon - 1e-3).sum() <= count <= (best < epsilon + 1e-3).sum()
        differ |= {(line["method"], line["real"] != line["null"], along["real"] != along["null"])}
    assert {(method, True, True) for method in train.METHODS} <= differ


def test_a_search_is_shown_as_its_gate_has_it_unfinished_or_with_equal_ranks_too(made):
    found, figures = run(made, ["auto", "search", "same"], "--study", "ranks")
    for own, n in zip(found["ranks"], (4, 2, 4), strict=True):
        saved = read(made / f"{own['checkpoint']}.pt")
        steps, beta = zip(*saved["history"]["beta"])
        beta = torch.stack(beta)
        a = beta.softmax(-1) if own["checkpoint"] == "same" else beta.sigmoid()
        assert own["steps"] == steps and len(steps) == n
        assert list(own["ranks"].values()) == (a[-1] >= 1 / 4).sum(-1).tolist()
        assert own["largest"] == [pytest.approx(row) for row in a.amax(-1).tolist()]
        lines = figures[f"ranks-{own['checkpoint']}"].axes[1].get_lines()[:len(own["ranks"])]
        assert [line.get_ydata()[-1] for line in lines] == own["largest"][-1]
    # and the loss goes from the start, over 4 steps of the search and 4 after it, to the end
    saved, line = read(made / "auto.pt"), figures["curves"].axes[1].get_lines()[0]
    measured = [saved["before"], *[tasks for _, tasks in saved["history"]["valid"]], saved["after"]]
    assert line.get_xdata().tolist() == [0, 2, 6, 8]
    assert line.get_ydata().tolist() == [tasks["rows.jsonl"]["loss"] for tasks in measured]


def test_what_is_printed_is_what_is_there(made, capsys):
    found, _ = run(made, ["lora-seed0", "lora-seed1"], "--study", "amplification", "--layers", "1")
    lines = capsys.readouterr().out.splitlines()[:-1]               # the last has a path
    assert max(map(len, lines)) <= 80 and set(column(found["records"], "layer")) == {1}
    values, results, norms = [line.split()[1:] for line in lines if line.startswith("lora")]
    over_seeds, null = [line.split()[1:] for line in lines if line.startswith("  ")]
    seeds = [where(found["records"], seed=seed) for seed in "01"]
    for i, key in enumerate(["top1", "effective_rank", "stable_rank", "amplification"]):
        every, nulls = column(sum(seeds, []), key), column(sum(seeds, []), f"null.{key}")
        means, digits = [mean(column(own, key)) for own in seeds], 1 if i else 2
        for text, numbers in zip((values[i + 1], over_seeds[i], null[i]), (every, means, nulls)):
            assert text == f"{mean(numbers):.{digits}f}±{stdev(numbers):.{digits}f}"
    for text, key in zip(norms, "projection top_W null.projection delta W r".split(), strict=True):
        assert text == f"{mean(column(sum(seeds, []), key)):.2f}"
    losses = [c["results"]["rows.jsonl"]["loss"] for c in found["checkpoints"]]
    assert losses == [read(made / f"lora-seed{i}.pt")["after"]["rows.jsonl"]["loss"] for i in "01"]
    assert values[0] == "10,368" and results[0] == f"{mean(losses):.3f}±{stdev(losses):.3f}"


def test_without_flags_all_is_done_that_applies_and_no_figure_of_a_run_before_stays(made):
    (found, _), folder = run(made, ["same", "v"]), made / "same-analysis"   # no matrix in common
    figures = "curves spectrum histogram amplification directions intruders ranks-same".split()
    assert {f.stem for f in folder.glob("*.png")} == set(figures) and "subspace" not in found
    assert json.loads((folder / "analysis.json").read_text()) == json.loads(json.dumps(found))
    for f in folder.glob("*.png"):
        assert matplotlib.image.imread(f).std() > 0.03, f
    (folder / "mine.png").write_bytes(b"")
    run(made, ["same", "v"], "--study", "amplification")
    assert {f.stem for f in folder.glob("*.png")} == {"curves", "amplification", "mine"}


def test_a_histogram_counts_all_values_in_the_middle_of_its_bins(made):
    found, figures = run(made, ["full"], "--study", "spectrum")
    line, width = figures["histogram"].axes[1].get_lines()[0], 4 / 30
    shares = [s / sum(record["S"]) for record in found["records"] for s in record["S"]]
    small = mean(s < 10 ** (-4 + width) for s in shares)                # those below 10⁻⁴, too
    assert min(shares) < 1e-4 and line.get_ydata()[0] * width == pytest.approx(small)
    assert line.get_xdata() == pytest.approx([-4 + width * (i + 0.5) for i in range(30)])


def test_the_null_of_outputs_has_as_many_dimensions_as_they(made):
    found, _ = run(made, ["lora-seed0", "lora-seed1"], "--study", "subspace", "--targets", "up")
    for record in found["subspace"]:            # r / d of random directions: 4 / 72 and 4 / 288
        assert record["random"][1] > 2 * record["random output"][1] > 0


def test_runs_are_paired_by_name_in_any_order_and_text_has_no_exact_match(capsys):
    def fake(name, after):
        own = {"checkpoint": name, "seed": None, "method": "lora"}
        return SimpleNamespace(id=own, delta={"h.0.q": 0}, settings=SimpleNamespace(seed=len(made)),
                               parameters=1, after=after)

    made = []
    for name in "abab":
        made.append(fake(name, {"text": {"loss": 3.0}, "rows": {"loss": 1.0, "exact": 0.25}}))
    assert {title: len(two) for title, two in analyze.pairs(made).items()} == {
        "a and a": 1, "a and b": 4, "b and b": 1}
    show.summary(made[:1], [{**made[0].id, "top1": 1.0}])
    assert capsys.readouterr().out.splitlines()[-2].split() == ["a", "2.000", "0.250"]


@pytest.mark.parametrize("chosen, n", [(False, 4), (True, 9)])
def test_in_a_large_model_some_w_are_decomposed_or_all_that_were_chosen(chosen, n):
    names = [f"h.{i}.attn.{t}" for i in range(3) for t in "qkv"]
    delta = {name: (torch.ones(300, 1), torch.ones(1, 300)) for name in names}
    c = SimpleNamespace(delta=delta, W={name: torch.eye(300) for name in names}, id={}, label="a",
                        svd=dict.fromkeys(names), chosen=chosen)
    assert len(analyze.against_W(lambda *_: [0.0], [1], [c])) == n


def test_every_name_has_a_row_and_is_in_the_legend(made, capsys):
    names = {"_x": "same", "$^$": "same", 7 * "alike " + "a": "v", 7 * "alike " + "b": "v"}
    for name, old in names.items():                                 # and $^$ is no formula
        (made / f"{name}.pt").write_bytes((made / f"{old}.pt").read_bytes())
    _, figures = run(made, names, *"--study spectrum subspace ranks".split())
    legend = figures["spectrum"].legends[0].get_texts()
    assert {t.get_text().replace("\\", "").strip() for t in legend} == {*names, "dotted: Gaussian ΔW"}
    rows = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert min(map(rows.count, names)) >= 2                         # of measures, and of results


@pytest.mark.parametrize("argv, message", [
    ("gone.pt", "gone.pt"), ("wide.pt --base gone.pt", "gone.pt"), ("moved.pt", "away.pt"),
    ("cut.pt", "cut.pt: not a whole checkpoint"), ("base.pt", "base.pt: not a checkpoint"),
    ("scratch.pt", "scratch.pt: pretrained"), ("v.pt --base full.pt", "v.pt: .* another base"),
    ("wide.pt --layers 2", "choose from 0 1"), ("wide.pt --targets up", "choose from q v"),
    ("same.pt v.pt --study subspace", "in common"), ("v.pt --study ranks", "needs a .*autolora"),
    ("zero.pt", "zero.pt: ΔW of h.1.attn.v is 0"), ("same.pt nan.pt", "nan.pt: .* not finite"),
    ("v.pt v.pt", "v.pt and .*v.pt have one name"), ("v.pt --device nonsense", "--device nonsense"),
    ("lora-seed0.pt lora-seed2.pt", "lora-seed0.pt and .*lora-seed2.pt have one name"),
    ("lora-seed0.pt lora-seed3.pt", "lora-seed0.pt and .*lora-seed3.pt have one name"),
])
def test_errors_are_one_line_before_anything_is_written(made, argv, message, capsys):
    before = {f: f.stat().st_mtime_ns for f in made.rglob("*")}
    with pytest.raises(SystemExit, match="2"):
        analyze.main([str(made / word) if ".pt" in word else word for word in argv.split()])
    err = capsys.readouterr().err
    assert re.search(message, err) and err.count("\n") == 1, err
    assert {f: f.stat().st_mtime_ns for f in made.rglob("*")} == before
