"""
What did training do to the weights? The papers' studies of ΔW, on checkpoints
of train.py and on adapters of peft (a file or its folder) and loralib.

    python analyze.py out/lora.pt                # its spectra, what it amplifies
    python analyze.py out/full.pt out/lora.pt    # side by side, and every two
    python analyze.py a.pt b.pt --study subspace --targets q v
    python analyze.py adapter_model.safetensors --base gpt2
    python analyze.py gpt2_md_lora_e2e.pt --alpha 32    # loralib does not say α

Prints tables; leaves figures, and one JSON with every number, in a folder
beside the first checkpoint, and deletes those of a run before. NAME-seed0.pt,
NAME-seed1.pt, ... are drawn as one.

    spectrum       singular values of ΔW (MultiLoRA, section 3)
    amplification  ΔW against W in ΔW's own directions (LoRA, table 7)
    subspace       which directions two ΔW share (LoRA, figures 3 and 4)
    directions     ΔW in the top directions of W (LoRA, figure 8)
    intruders      singular vectors of W + ΔW that are none of W's (2410.21228)
    ranks          AutoLoRA's ranks, and its selection variables over the search

Each is shown next to a null, a Gaussian ΔW of the same rank and norm: what does
not differ from it says nothing. U (d_out, r) and V (d_in, r) are the output and
input directions of ΔW = U diag(S) Vᵀ. In the tables:

    top-1          σ₁ / Σσ, the share of the largest singular value
    eff. rank      effective rank, exp of the entropy of σ / Σσ
    st. rank       stable rank, ‖ΔW‖² / σ₁²
    amplif.        ‖ΔW‖ / ‖UᵀWV‖, of a ΔW of full rank in its first 16 directions
    first, all     φ of the first direction of each, and of all of them
"""
import itertools
import json
import math
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from autolora import above_threshold, selection
from support import changes, command, show
from support.changes import layer_of, target_of
from support.show import column, where


# The measures, of plain tensors. A ΔW is a pair B (d_out, r), A (r, d_in), or one dense tensor

def svd(delta):
    """
    U (d_out, r), S (r,) falling, V (d_in, r) of ΔW = U diag(S) Vᵀ. Of a pair B A by two thin QR:
    with B = Q₁R₁ and Aᵀ = Q₂R₂ it is Q₁ (R₁R₂ᵀ) Q₂ᵀ, and the SVD in the middle is (r, r).
    """
    if torch.is_tensor(delta):
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
        return U, S, Vh.T
    B, A = delta
    Q1, R1 = torch.linalg.qr(B)
    Q2, R2 = torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(R1 @ R2.T, full_matrices=False)
    return Q1 @ U, S, Q2 @ Vh.T


def top_share(S):
    """σ₁ / Σσ: 1 for rank one, 1/r for r equal values."""
    return (S[0] / S.sum()).item()


def effective_rank(S):
    """exp of the entropy of σ / Σσ (Roy and Vetterli 2007): r for r equal values, 1 for one."""
    share = S / S.sum()
    return torch.special.entr(share).sum().exp().item()


def stable_rank(S):
    """‖ΔW‖²_F / σ₁²."""
    return (S.square().sum() / S[0].square()).item()


def subspace_similarity(U1, U2):
    """
    φ(i, j) = ‖U1ᵢᵀ U2ⱼ‖²_F / min(i, j) for all i and j at once, (r1, r2); Uᵢ is the first i columns
    of an orthonormal (d, r). 1 where one span contains the other, 0 where they are orthogonal,
    max(i, j) / d on average for random ones. LoRA, equation 4.
    """
    shared = (U1.T @ U2).square().cumsum(0).cumsum(1)
    i = torch.arange(1, shared.size(0) + 1, device=U1.device)
    j = torch.arange(1, shared.size(1) + 1, device=U1.device)
    return shared / torch.minimum(i[:, None], j[None, :])


def projection(W, U, V):
    """‖UᵀWV‖_F: how much of W (d_out, d_in) is in the directions U and V. LoRA, table 7."""
    return torch.linalg.norm(U.T @ W @ V).item()


def amplification(W, U, S, V):
    """‖ΔW‖_F / ‖UᵀWV‖_F: how much larger ΔW is than W in ΔW's own directions. LoRA, section 7.3."""
    return torch.linalg.norm(S).item() / projection(W, U, V)


svd_of = lru_cache(None)(svd)       # of a W, which several studies need


@lru_cache(None)
def top_norm(W, r):
    """‖UᵀWV‖_F for W's own first r directions: √Σσᵢ², σᵢ² the smaller Gram matrix's eigenvalues."""
    if W.size(0) > W.size(1):
        W = W.T
    squares = torch.linalg.eigvalsh(W @ W.T)
    return squares[-r:].sum().sqrt().item()


def intruders(U, changed, epsilons, k=10):
    """By ε: of the first k left singular vectors of W + ΔW, those with no cosine ≥ ε with W's."""
    _, new = torch.linalg.eigh(changed @ changed.T)         # in rising order
    best = (U.T @ new[:, -k:]).abs().amax(0)
    return [(best < e).sum().item() for e in epsilons]


def gaussian(t, name):
    """A Gaussian tensor of t's shape, another one for every name."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(t.shape, generator=generator).to(t)


def gaussian_like(delta, name=""):
    """The null: U, S, V of Gaussian factors, or a Gaussian matrix, of the same shapes and norm."""
    if torch.is_tensor(delta):
        null = gaussian(delta, name)
    else:
        null = [gaussian(t, f"{name} {i}") for i, t in enumerate(delta)]
    _, size, _ = svd(delta)
    U, S, V = svd(null)
    return U, S * (size.norm() / S.norm()), V


# A record of each matrix

def numbers(W, U, S, V, r, scaled):
    """The measures of one ΔW, if `scaled` its size too; against W, if it is there, in its first r
    directions."""
    U, V = U[:, :r], V[:, :r]
    found = {"S": S.tolist()}
    found["top1"] = top_share(S)
    found["effective_rank"] = effective_rank(S)
    found["stable_rank"] = stable_rank(S)
    if scaled:
        found["delta"] = S.norm().item()
    if W is not None:
        found["projection"] = projection(W, U, V)
    if scaled and W is not None:
        found["amplification"] = amplification(W, U, S[:r], V)
    return found


def record(c, name):
    """The measures of one ΔW (and c.svd), with "null", a Gaussian's. A full ΔW is compared with W
    in its first 16 directions: all are all of W. ValueError for a ΔW of 0 or not finite."""
    delta, W = c.delta[name], c.W.get(name)
    parts = delta if isinstance(delta, tuple) else [delta]
    if not all(0 < t.norm() < math.inf for t in parts):
        raise ValueError(f"{c.path}: ΔW of {name} is 0 or not finite")
    if W is not None and not 0 < W.norm() < math.inf:
        raise ValueError(f"{c.path}: W of {name} is 0 or not finite")
    c.svd[name] = svd(delta)
    S = c.svd[name][1]
    if not S[0].square() > 0:
        raise ValueError(f"{c.path}: ΔW of {name} is 0")
    r = 16 if torch.is_tensor(delta) else len(S)
    null = gaussian_like(delta, f"{c.label} {name}")
    found = {**c.id, "name": name, "r": r}
    found["layer"] = layer_of(name)
    found["target"] = target_of(name)
    if W is not None:
        found["W"] = W.norm().item()
        found["top_W"] = top_norm(W, r)
    found |= numbers(W, *c.svd[name], r, c.scaled)
    found["null"] = numbers(W, *null, r, c.scaled)
    return found


def each(f, pairs):
    """[f(checkpoint, name)], a matrix a thread: threads inside one would mostly wait."""
    torch.set_num_threads(1)
    found = []
    workers = 1 if torch.cuda.is_available() else os.cpu_count()
    with ThreadPoolExecutor(workers) as pool:
        for result in pool.map(f, *zip(*pairs)):
            found.append(result)
            show.progress(f"{len(found)} of {len(pairs)} matrices")
    return found


# The studies: each draws figures into `out`, may print a table, returns what is not in the records

def spectrum_study(checkpoints, records, out):
    """Share of each singular value in their sum, by target; and histograms over all ΔW."""
    lines, bars = [], []
    for r in records:
        line = {**r, "panel": f"ΔW of {r['target']}"}
        line["x"] = np.arange(len(r["S"])) + 1
        for side, S in (("real", r["S"]), ("null", r["null"]["S"])):
            line[side] = np.divide(S, sum(S))
        lines.append(line)
    longest = max(map(len, column(lines, "x")))
    show.figure(out / "spectrum.png", "Singular values of ΔW: mean over layers and seeds, range",
                lines, xlabel="i", ylabel="σᵢ / Σσ", yscale="log", ylim=(2e-4, 1),
                xscale="log" if longest > 100 else "linear")
    for name in dict.fromkeys(column(lines, "checkpoint")):         # MultiLoRA's comparison
        own = where(lines, checkpoint=name)
        for panel, most in (("log₁₀ σ₁ / Σσ", 1), ("log₁₀ σᵢ / Σσ of all values", None)):
            bar = {**own[0], "panel": panel}
            for side in ("real", "null"):
                values = np.concatenate([line[side][:most] for line in own])
                values = np.log10(values.clip(1e-4, 1))
                bar[side], edges = np.histogram(values, 30, (-4, 0), density=True)
                bar["x"] = (edges[1:] + edges[:-1]) / 2
            bars.append(bar)
    show.figure(out / "histogram.png", "Over all ΔW", bars, size=(4, 2.8), ylabel="density")


def amplification_study(checkpoints, records, out):
    """‖ΔW‖ / ‖UᵀWV‖ by layer; and printed, the norms of LoRA's table 7."""
    lines, rows = [], []
    records = [r for r in records if "amplification" in r]
    for target in dict.fromkeys(column(records, "target")):
        for c in checkpoints:
            own = where(records, target=target, **c.id)
            if own:
                line = {**c.id, "panel": f"ΔW of {target}", "x": sorted(set(column(own, "layer")))}
                line |= {"real": [], "null": []}
                for layer in line["x"]:                 # which may have two of one target
                    here = where(own, layer=layer)
                    line["real"].append(np.mean(column(here, "amplification")))
                    line["null"].append(np.mean(column(here, "null.amplification")))
                lines.append(line)
    layers = sorted(set(column(records, "layer")))
    show.figure(out / "amplification.png", "Amplification ‖ΔW‖ / ‖UᵀWV‖ in the directions of ΔW",
                lines, xlabel="layer", ylabel="times", yscale="log",
                xticks=layers[::1 + len(layers) // 8])
    for name in dict.fromkeys(column(records, "checkpoint")):
        own, row = where(records, checkpoint=name), [name]
        for key in ("projection", "top_W", "null.projection", "delta", "W", "r"):
            row.append(f"{np.mean(column(own, key)):.2f}")
        rows.append(row)
    show.table(["‖UᵀWV‖, U and V of", "ΔW", "W", "Gaussian", "‖ΔW‖", "‖W‖", "r"], rows, 8)


def common(a, b):
    return [name for name in a.delta if name in b.delta]


def pairs(checkpoints):
    """{title: pairs with a matrix in common}; of other seeds if any, as one starts at related A."""
    found, apart = {}, {}
    names = [c.id["checkpoint"] for c in checkpoints]
    checkpoints = sorted(checkpoints, key=lambda c: names.index(c.id["checkpoint"]))
    for a, b in itertools.combinations(checkpoints, 2):
        if common(a, b):
            title = f"{a.id['checkpoint']} and {b.id['checkpoint']}"
            found.setdefault(title, []).append((a, b))
            if a.settings.seed != b.settings.seed:
                apart.setdefault(title, []).append((a, b))
    return found | apart


def similarities(a, b, name):
    """{"input": φ of two ΔW, "output": ..., "random": of random input directions, and output}"""
    U1, _, V1 = a.svd[name]
    U2, _, V2 = b.svd[name]
    phi = {"input": subspace_similarity(V1, V2), "output": subspace_similarity(U1, U2)}
    for key, (first, other) in (("random", (V1, V2)), ("random output", (U1, U2))):
        R1, _ = torch.linalg.qr(gaussian(first, f"{a.label} {name} {key} 1"))
        R2, _ = torch.linalg.qr(gaussian(other, f"{b.label} {name} {key} 2"))
        phi[key] = subspace_similarity(R1, R2)
    return phi


def subspace_study(checkpoints, records, out):
    """φ(i, j) of two ΔW; printed are its first and last value, mean over matrices and pairs."""
    found, rows = [], []
    for title, members in pairs(checkpoints).items():
        for a, b in members:
            for name in common(a, b):
                ends = {"pair": title, "a": a.label, "b": b.label, "name": name}
                for side, phi in similarities(a, b, name).items():
                    ends[side] = [phi[0, 0].item(), phi[-1, -1].item()]
                found.append(ends)
        rows.append([title])
        for side in ("input", "random", "output", "random output"):
            first, last = np.mean(column(where(found, pair=title), side), 0)
            rows[-1] += [f"{first:.2f}", f"{last:.2f}"]
        draw_pair(*members[0], out)
    heads = "input all random all output all random all".split()
    show.table(["φ, mean over matrices", *heads], rows, 6)
    return found


def draw_pair(a, b, out):
    """φ(i, j) in the middle layer, of q and v or two others, of 64 directions and the first 8."""
    names = common(a, b)
    layer = layer_of(names[len(names) // 2])
    here = [name for name in names if layer_of(name) == layer]
    shown = some(here) or here[:2]
    panels, sizes = [], [64, 8]
    if max(len(c.svd[shown[0]][1]) for c in (a, b)) <= 8:
        sizes = [8]
    for side in ("input", "output", "random"):
        for most, name in itertools.product(sizes, shown):
            phi = similarities(a, b, name)[side]
            few = ", first 8" if most == 8 < len(sizes) * 8 else ""
            panels.append((f"{target_of(name)}, {side}{few}", phi[:most, :most]))
    title = f"φ(i, j) of ΔW: {a.label} (i) and {b.label} (j), layer {layer}"
    show.maps(out / f"subspace-{a.label}-{b.label}.png", title, panels,
              columns=len(sizes) * len(shown))


def some(names):
    """Queries and values, the LoRA paper's, also as q_proj or value."""
    return [name for name in names if target_of(name).startswith(("q", "v"))]


def against_W(of_one, x, checkpoints):
    """Lines that need W's SVD: of every W in a small model or if --targets or --layers choose, of
    some q and v in a large one."""
    matrices, panel = [], "mean over matrices"
    for c in checkpoints:
        names = [name for name in c.delta if name in c.W]
        if names and not c.chosen and min(c.W[names[0]].shape) > 256:
            ends = layer_of(names[0]), layer_of(names[-1])
            names = [name for name in some(names) if layer_of(name) in ends] or names[:4]
            panel = "mean over some matrices"
        matrices += [(c, name) for name in names]

    def line(c, name):
        W = c.W[name]
        null = gaussian_like(c.delta[name], f"{c.label} {name}")
        found = {**c.id, "panel": panel, "name": name, "x": x}
        found["real"] = of_one(W, svd_of(W), c.svd[name])
        return {**found, "null": of_one(W, svd_of(W), null)}

    return each(line, matrices)


def directions_study(checkpoints, records, out):
    """φ of ΔW's input directions, the first 64 where there are more, and the top share of W's."""
    shares = np.arange(1, 21) / 20

    def phi(W, of_W, of_delta):
        V_of_W, V = of_W[2], of_delta[2][:, :64]
        first = (shares * V_of_W.size(1)).round().clip(1)
        return subspace_similarity(V_of_W, V)[first.astype(int) - 1, -1].tolist()

    lines = against_W(phi, shares.tolist(), checkpoints)
    show.figure(out / "directions.png", "ΔW's input directions in the top ones of W", lines,
                size=(5, 3.4), band=False, ylabel="φ",
                xlabel="share of W's directions, largest first")
    return lines


def intruders_study(checkpoints, records, out):
    """How many of the first ten singular vectors of W + ΔW are none of W's, by ε."""
    epsilons = (np.arange(1, 20) / 20).tolist()

    def counts(W, of_W, of_delta):
        U, S, V = of_delta
        return intruders(of_W[0], W + U * S @ V.T, epsilons)

    lines = against_W(counts, epsilons, [c for c in checkpoints if c.scaled])
    show.figure(out / "intruders.png", "Singular vectors of W + ΔW that are none of W's", lines,
                size=(5, 3.4), band=False, ylabel="of the first ten",
                xlabel="ε: a cosine below it counts as none of W's")
    return lines


def ranks_study(checkpoints, records, out):
    """Rank by layer and target, and over the search the largest selection variable of each ΔW."""
    found = []
    for c in checkpoints:
        if c.history["beta"]:
            steps, beta = zip(*c.history["beta"])
            a = selection(torch.stack(beta), c.settings.gate)           # (steps, matrices, k)
            kept = above_threshold(a[-1]).sum(-1)                       # (matrices,)
            ranks = dict(zip(c.adapter["tensors"], kept.tolist()))
            show.search(out / f"ranks-{c.label}.png", f"Ranks, {c.label}", ranks, steps, a)
            search = {"ranks": ranks, "steps": steps, "largest": a.amax(-1).tolist()}
            found.append(c.id | search)
    return found


STUDIES = {"spectrum": spectrum_study, "amplification": amplification_study,
           "subspace": subspace_study, "directions": directions_study,
           "intruders": intruders_study, "ranks": ranks_study}


def missing(checkpoints):
    """{study: what it needs and these do not have}"""
    lacks = {}
    if not pairs(checkpoints):
        lacks["subspace"] = "two checkpoints with a matrix in common"
    if not any(c.history["beta"] for c in checkpoints):
        lacks["ranks"] = "a checkpoint of --method autolora"
    if not any(c.delta.keys() & c.W.keys() for c in checkpoints):
        lacks |= dict.fromkeys(["amplification", "directions", "intruders"], "their W (--base)")
    whole = [c for c in checkpoints if c.scaled and c.delta.keys() & c.W.keys()]
    if not whole and not all(c.scaled for c in checkpoints):
        lacks |= dict.fromkeys(["amplification", "intruders"], "the size of ΔW, so α (--alpha)")
    return lacks


def say_left_out(checkpoints, lacks):
    """Of other people's adapters, what is not studied, and why."""
    for flag in ("--alpha", "--base"):
        studies = [study for study, what in lacks.items() if flag in what]
        if studies:
            print(f"left out  {', '.join(studies)}: needs {lacks[studies[0]]}")
    unknown = {}
    for c in checkpoints:
        unknown |= dict.fromkeys(target_of(name) for name in c.delta if name not in c.W)
        for name in vars(c).get("others", [])[:1]:
            print(f"left out  {len(c.others)} tensors of {c.label}, such as {name}")
    if checkpoints[0].W and unknown:
        print(f"left out  where W is needed: {' '.join(unknown)}, of which the base has no W")


def parse(argv=None):
    p = command.parser(__doc__, "python analyze.py CKPT ... [options]")
    add = p.add_argument
    add("checkpoints", nargs="+", metavar="CKPT", help="of train.py, peft, loralib; of one base")
    add("--study", nargs="+", choices=STUDIES, metavar="STUDY", help="(default: all that apply)")
    add("--targets", nargs="+", metavar="T", help="matrices: q k v o up down (default: all)")
    add("--layers", nargs="+", type=int, metavar="N", help="layers, from 0 (default: all)")
    add("--base", help="the base model, where the checkpoints do not say or it has moved, or a "
        "file with some of its matrices")
    add("--alpha", type=float, help="α of an adapter of loralib, which does not say it")
    add("--out", type=Path, help="folder of figures and numbers (default: CKPT-analysis)")
    add("--device", help="cuda, mps or cpu (default: the first that is there)")
    return p.parse_args(argv)


@torch.no_grad()
def main(argv=None):
    args = parse(argv)
    with command.plain_errors():
        device = command.pick_device(args.device)
        checkpoints = changes.load(args.checkpoints, device, args.base, args.alpha)
        torch.set_float32_matmul_precision("highest")           # no tf32
        for c in checkpoints:
            changes.choose(c, "targets", args.targets, target_of)
            changes.choose(c, "layers", args.layers, layer_of)
        lacks = missing(checkpoints)
        for study in args.study or []:
            if study in lacks:
                raise ValueError(f"--study {study} needs {lacks[study]}")
        say_left_out(checkpoints, {} if args.study else lacks)
        records = each(record, [(c, name) for c in checkpoints for name in c.delta])
        out = args.out or checkpoints[0].path.parent / f"{checkpoints[0].label}-analysis"
        out.mkdir(parents=True, exist_ok=True)
        for name in ("curves", "histogram", *STUDIES, "subspace-*", "ranks-*"):
            for figure in out.glob(f"{name}.png"):
                figure.unlink()                                 # of a run before
        show.summary(checkpoints, records)
        show.curves(checkpoints, out / "curves.png")
        found = {"records": records, "checkpoints": []}
        for c in checkpoints:
            about = {"parameters": c.parameters, "results": c.after, "settings": vars(c.settings)}
            found["checkpoints"].append(c.id | about)
        for study in args.study or [study for study in STUDIES if study not in lacks]:
            found[study] = STUDIES[study](checkpoints, records, out)
        (out / "analysis.json").write_text(json.dumps(found))
    print(f"figures and analysis.json are in {out}")
    return found


if __name__ == "__main__":
    command.run(main)
