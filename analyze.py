"""
What did training do to the weights? The papers' studies of ΔW, for checkpoints
of train.py and for adapters of peft (a file or its folder) and loralib.

    python analyze.py out/lora.pt                # spectra, amplification
    python analyze.py out/full.pt out/lora.pt    # a comparison, and φ of each pair
    python analyze.py a.pt b.pt --study subspace --targets q v
    python analyze.py adapter_model.safetensors --base gpt2
    python analyze.py gpt2_md_lora_e2e.pt --alpha 32    # loralib does not store α

Prints tables, and writes figures and a JSON file with every number into a
folder next to the first checkpoint, replacing those of an earlier analysis.
NAME-seed0.pt, NAME-seed1.pt, ... are drawn as one series.

    spectrum       singular values of ΔW (MultiLoRA, section 3)
    amplification  ΔW compared with W in ΔW's own directions (LoRA, table 7)
    subspace       directions that two ΔW share (LoRA, figures 3 and 4)
    directions     ΔW in the top directions of W (LoRA, figure 8)
    intruders      singular vectors of W + ΔW unlike any of W's (2410.21228)
    blocks         how MultiLoRA's blocks share ΔW (MultiLoRA's claim)
    ranks          AutoLoRA's ranks, and its selection variables in the search

Every study but `ranks` shows a null next to it: a Gaussian ΔW of the same rank
and norm. A value that does not differ from its null is no finding. U (d_out, r)
and V (d_in, r) are the output and input directions of ΔW = U diag(S) Vᵀ. The
tables' columns are:

    top-1          σ₁ / Σσ, the share of the largest singular value
    eff. rank      effective rank, exp of the entropy of σ / Σσ
    st. rank       stable rank, ‖ΔW‖² / σ₁²
    amplif.        ‖ΔW‖ / ‖UᵀWV‖ in all directions of ΔW, or in the first 16 if its
                   rank is above half of the full one
    input, output  φ of the first direction of each ΔW; all: φ of all directions
"""
import itertools
import json
import math
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from autolora import above_threshold, selection
from support import cli, deltas, distributed, report
from support.deltas import layer_of, target_of
from support.report import pluck, select


# Measures of plain tensors. A ΔW is a pair B (d_out, r) and A (r, d_in), or one dense tensor.

def svd(delta):
    """
    U (d_out, r), S (r,) in decreasing order and V (d_in, r) of ΔW = U diag(S) Vᵀ. For a pair, two
    thin QR decompositions B = Q₁R₁ and Aᵀ = Q₂R₂ give B A = Q₁ (R₁R₂ᵀ) Q₂ᵀ, so that the SVD in the
    middle is only (r, r).
    """
    if torch.is_tensor(delta):
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
        return U, S, Vh.T
    B, A = delta
    Q1, R1 = torch.linalg.qr(B)
    Q2, R2 = torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(R1 @ R2.T, full_matrices=False)
    return Q1 @ U, S, Q2 @ Vh.T


def significant(U, S, V):
    """U, S, V without singular values that are only rounding errors, so that equal ΔW have equal
    measures however they are factored."""
    tolerance = S[0] * max(len(U), len(V)) * torch.finfo(S.dtype).eps
    rank = int((S > tolerance).sum())
    return U[:, :rank], S[:rank], V[:, :rank]


def top_share(S):
    """σ₁ / Σσ: 1 for rank one, 1/r for r equal values."""
    return (S[0] / S.sum()).item()


def effective_rank(S):
    """exp of the entropy of σ / Σσ (Roy and Vetterli 2007): r for r equal values."""
    share = S / S.sum()
    return torch.special.entr(share).sum().exp().item()


def stable_rank(S):
    """‖ΔW‖²_F / σ₁²."""
    return (S.square().sum() / S[0].square()).item()


def subspace_similarity(U1, U2):
    """
    φ(i, j) = ‖U1ᵢᵀ U2ⱼ‖²_F / min(i, j) for all i and j, as (r1, r2); U1ᵢ is the first i columns of
    the orthonormal U1 (d, r1). It is 1 if one span contains the other, 0 if they are orthogonal,
    and max(i, j) / d on average for random spans. LoRA, equation 4.
    """
    shared = (U1.T @ U2).square().cumsum(0).cumsum(1)
    i = torch.arange(1, shared.size(0) + 1, device=U1.device)
    j = torch.arange(1, shared.size(1) + 1, device=U1.device)
    return shared / torch.minimum(i[:, None], j[None, :])


def projected_norm(W, U, V):
    """‖UᵀWV‖_F, the norm of W (d_out, d_in) in the directions U and V. LoRA, table 7."""
    return torch.linalg.norm(U.T @ W @ V).item()


def amplification(W, U, S, V):
    """‖ΔW‖_F / ‖UᵀWV‖_F: how much larger ΔW is than W in ΔW's own directions. LoRA, section 7.3."""
    return torch.linalg.norm(S).item() / projected_norm(W, U, V)


svd_of_W = lru_cache(None)(svd)         # several studies need it


@lru_cache(None)
def top_subspace_norm(W, r):
    """‖UᵀWV‖_F for W's own first r directions: the root of Σσᵢ², where the σᵢ² are the largest
    eigenvalues of the smaller Gram matrix."""
    if W.size(0) > W.size(1):
        W = W.T
    squares = torch.linalg.eigvalsh(W @ W.T)
    return squares[-r:].sum().sqrt().item()


def intruders(U, changed, epsilons):
    """For each ε, the number of the first ten left singular vectors of `changed`, W + ΔW, whose
    cosines with the left singular vectors U of W are all below ε."""
    _, new = torch.linalg.eigh(changed @ changed.T)         # in increasing order
    best = (U.T @ new[:, -10:]).abs().amax(0)
    return [(best < e).sum().item() for e in epsilons]


def gaussian(t, name):
    """A Gaussian tensor of t's shape, which depends on the name."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(t.shape, generator=generator).to(t)


def gaussian_like(U, S, V, name):
    """
    The null of ΔW = U diag(S) Vᵀ: U, S, V of a Gaussian ΔW of the same shape, rank r and norm. It
    is the product of Gaussian factors, or for a rank above half of the full one, the first r
    directions of a Gaussian matrix.
    """
    r = len(S)
    if is_low_rank(U, S, V):
        null = gaussian(U, f"{name} 0"), gaussian(V.T, f"{name} 1")
    else:
        null = gaussian(U @ V.T, name)
    U0, S0, V0 = svd(null)
    return U0[:, :r], S0[:r] * (S.norm() / S0[:r].norm()), V0[:, :r]


def is_low_rank(U, S, V):
    """Whether the rank is at most half of the full one."""
    return len(S) <= min(len(U), len(V)) / 2


# One record per matrix

def measures(W, U, S, V, n, scale_known):
    """The measures of one ΔW, with its size if the scale is known. If W is not None, it is
    compared in the first n directions of ΔW; if it is zero there, the amplification is undefined
    and left out."""
    U = U[:, :n]
    V = V[:, :n]
    values = {"S": S.tolist(), "top1": top_share(S), "effective_rank": effective_rank(S),
              "stable_rank": stable_rank(S)}
    if scale_known:
        values["delta"] = S.norm().item()
    if W is not None:
        values["projection"] = projected_norm(W, U, V)
    if scale_known and W is not None and values["projection"] > 1e-6 * W.norm():
        values["amplification"] = amplification(W, U, S[:n], V)
    return values


def record(c, name):
    """
    The measures of one ΔW and, under "null", of its Gaussian; also fills c.svd. W is compared in
    all directions of ΔW, but if its rank is above half of the full one, only in the first 16,
    because all would contain most of W. (`directions` uses 64, `subspace` all.) Raises ValueError
    if ΔW or W is zero or not finite.
    """
    delta = c.delta[name]
    W = c.W.get(name)
    for t in delta if isinstance(delta, tuple) else [delta]:
        check_matrix(t, f"{c.path}: ΔW of {name}")
    if W is not None:
        check_matrix(W, f"{c.path}: W of {name}")
    U, S, V = significant(*svd(delta))
    check_matrix(S[:1].square(), f"{c.path}: ΔW of {name}")
    c.svd[name] = U, S, V
    n = len(S)
    if not is_low_rank(U, S, V):
        n = min(n, 16)
    values = {**c.identity, "name": name, "r": n, "layer": layer_of(name),
              "target": target_of(name)}
    if W is not None:
        values["W"] = W.norm().item()
        values["top_W"] = top_subspace_norm(W, n)
    values |= measures(W, U, S, V, n, c.scale_known)
    null = gaussian_like(U, S, V, f"{c.label} {name}")
    values["null"] = measures(W, *null, n, c.scale_known)
    return values


def check_matrix(t, what):
    """Raise ValueError for a matrix that is zero, infinite or NaN."""
    if not t.any() or not t.isfinite().all():
        problem = "is not finite" if t.any() else "is zero"
        raise ValueError(f"{what} {problem}: select other matrices by --targets or --layers")


def map_matrices(f, pairs):
    """[f(checkpoint, name) for each pair], with one matrix per thread, because threads within one
    matrix would mostly wait."""
    results = []
    workers = 1 if torch.cuda.is_available() else os.cpu_count()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers) as pool:
            for result in pool.map(f, *zip(*pairs)):
                results.append(result)
                report.progress(f"{len(results)} of {len(pairs)} matrices")
    finally:
        torch.set_num_threads(threads)
    return results


# The studies. Each draws figures into `out`, may print a table, and returns further numbers.

def spectrum_study(checkpoints, records, out):
    """Draw each singular value's share of their sum, by target, and histograms over all ΔW."""
    lines = []
    for r in records:
        line = {**r, "panel": f"ΔW of {r['target']}"}
        line["x"] = np.arange(len(r["S"])) + 1
        line["real"] = np.divide(r["S"], sum(r["S"]))
        line["null"] = np.divide(r["null"]["S"], sum(r["null"]["S"]))
        lines.append(line)
    styles = report.line_styles(checkpoints)
    longest = max(map(len, pluck(lines, "x")))
    lowest = min(map(min, pluck(lines, "real")))
    report.figure(out / "spectrum.png", "Singular values of ΔW: mean and range over layers and "
                  "seeds", lines, styles, xlabel="i", ylabel="σᵢ / Σσ", yscale="log",
                  xscale="log" if longest > 100 else "linear", ylim=(max(lowest / 2, 1e-4), 1.2))
    report.figure(out / "histogram.png", "Distribution of the singular values over all ΔW",
                  histograms(lines), styles, size=(4, 2.8), share=False, ylabel="density",
                  xlabel="log₁₀ σᵢ / Σσ")


def histograms(lines):
    """For each checkpoint, the densities of log₁₀ σᵢ / Σσ over all ΔW, as in the MultiLoRA paper:
    of the largest and of all singular values. Those below 10⁻⁴ count as 10⁻⁴."""
    found = []
    for panel, end in (("largest singular value", 1), ("all singular values", None)):
        low = min(np.min(line[side][:end]) for line in lines for side in ("real", "null"))
        limits = max(-4, np.log10(low)), 0
        for name in dict.fromkeys(pluck(lines, "checkpoint")):
            of_name = select(lines, checkpoint=name)
            histogram = {**of_name[0], "panel": panel}
            for side in ("real", "null"):
                logs = np.log10(np.concatenate([line[side][:end] for line in of_name]))
                histogram[side], edges = np.histogram(logs.clip(*limits), 12, limits, density=True)
            histogram["x"] = (edges[1:] + edges[:-1]) / 2
            found.append(histogram)
    return found


def amplification_study(checkpoints, records, out):
    """Draw ‖ΔW‖ / ‖UᵀWV‖ by layer, and print the norms of the LoRA paper's table 7."""
    for r in records:
        if "projection" in r and "delta" in r and "amplification" not in r:
            print(f"left out  amplification of {r['name']} in {r['checkpoint']}: UᵀWV is zero")
    records = [r for r in records if "amplification" in r]
    lines = []
    for target in dict.fromkeys(pluck(records, "target")):
        for c in checkpoints:
            here = select(records, target=target, **c.identity)
            if here:
                lines.append({**c.identity, "panel": f"ΔW of {target}", **by_layer(here)})
    layers = sorted(set(pluck(records, "layer")))
    report.figure(out / "amplification.png", "Amplification ‖ΔW‖ / ‖UᵀWV‖ in the directions of ΔW",
                  lines, report.line_styles(checkpoints), xlabel="layer", yscale="log",
                  ylabel="amplification", xticks=layers[::1 + len(layers) // 8])
    rows = []
    for name in dict.fromkeys(pluck(records, "checkpoint")):
        row = [name]
        for key in ("projection", "top_W", "null.projection", "delta", "W", "r"):
            row.append(f"{np.mean(pluck(select(records, checkpoint=name), key)):.3g}")
        rows.append(row)
    report.table(["‖UᵀWV‖, U and V of", "ΔW", "W", "Gaussian", "‖ΔW‖", "‖W‖", "r"], rows, 8)


def by_layer(records):
    """The amplification over the layers; a layer may have two matrices of one target."""
    line = {"x": sorted(set(pluck(records, "layer"))), "real": [], "null": []}
    for layer in line["x"]:
        here = select(records, layer=layer)
        line["real"].append(np.mean(pluck(here, "amplification")))
        line["null"].append(np.mean(pluck(here, "null.amplification")))
    return line


def shared_names(a, b):
    return [name for name in a.delta if name in b.delta]


def checkpoint_pairs(checkpoints):
    """{names: pairs with a matrix in common}. If some pairs of two names have different seeds, only
    these count: see `same_seed`."""
    names = [c.identity["checkpoint"] for c in checkpoints]
    in_order = sorted(checkpoints, key=lambda c: names.index(c.identity["checkpoint"]))
    pairs = {}
    for a, b in itertools.combinations(in_order, 2):
        if shared_names(a, b):
            both = a.identity["checkpoint"], b.identity["checkpoint"]
            pairs.setdefault(both, []).append((a, b))
    for both, members in pairs.items():
        different = [(a, b) for a, b in members if not same_seed(a, b)]
        pairs[both] = different or members
    return pairs


def same_seed(a, b):
    """Whether two adapters may begin with the same A, so that their φ cannot be compared with
    that of random directions."""
    adapters = "adapter" in a.saved and "adapter" in b.saved
    return adapters and a.settings.seed is not None and a.settings.seed == b.settings.seed


def similarities(a, b, name):
    """{"input": φ of two ΔW's input directions, "output": of their output directions, "random" and
    "random output": of random directions of the same shapes}"""
    U1, _, V1 = a.svd[name]
    U2, _, V2 = b.svd[name]
    phi = {"input": subspace_similarity(V1, V2), "output": subspace_similarity(U1, U2)}
    for key, (first, other) in (("random", (V1, V2)), ("random output", (U1, U2))):
        R1, _ = torch.linalg.qr(gaussian(first, f"{a.label} {name} {key} 1"))
        R2, _ = torch.linalg.qr(gaussian(other, f"{b.label} {name} {key} 2"))
        phi[key] = subspace_similarity(R1, R2)
    return phi


def subspace_study(checkpoints, records, out):
    """Print φ of the first and of all directions, mean over matrices and pairs; draw φ(i, j)."""
    found = []
    rows = []
    for both, members in checkpoint_pairs(checkpoints).items():
        title = " and ".join(both)
        here = []
        related = same_seed(*members[0])
        for a, b in members:
            for name in shared_names(a, b):
                ends = {"pair": title, "a": a.label, "b": b.label, "name": name,
                        "same_seed": related}
                for side, phi in similarities(a, b, name).items():
                    ends[side] = [phi[0, 0].item(), phi[-1, -1].item()]
                here.append(ends)
        row = [f"{title} *" if related else title]
        for side in ("input", "random", "output", "random output"):
            first, last = np.mean(pluck(here, side), 0)
            row += [f"{first:.2f}", f"{last:.2f}"]
        rows.append(row)
        found += here
        draw_pair(*members[0], out)
    heads = "input all random all output all random all".split()
    report.table(["φ, mean over matrices", *heads], rows, 6)
    if any(entry["same_seed"] for entry in found):
        print("* Runs of the same seed. Their A may have had the same initial values, which makes\n"
              "  φ larger than that of random directions: train one with another --seed.\n")
    return found


def draw_pair(a, b, out):
    """Draw φ(i, j) in the middle layer for q and v, or for two other matrices: up to 64 directions,
    and the first 8."""
    names = shared_names(a, b)
    layer = layer_of(names[len(names) // 2])
    in_layer = [name for name in names if layer_of(name) == layer]
    shown = (query_and_value(in_layer) or in_layer)[:2]
    widest = max(len(c.svd[shown[0]][1]) for c in (a, b))
    sizes = [(8, "")] if widest <= 8 else [(64, ""), (8, ", first 8")]
    panels = []
    for side in ("input", "output", "random"):
        for (size, suffix), name in itertools.product(sizes, shown):
            phi = similarities(a, b, name)[side]
            panels.append((f"{target_of(name)}, {side}{suffix}", phi[:size, :size]))
    title = f"φ(i, j) of ΔW: {a.label} (i) and {b.label} (j), layer {layer}"
    path = out / f"subspace-{a.label[:60]}-{b.label[:60]}.png"
    while path in report.FIGURES:       # "a" and "b-c" after "a-b" and "c", or shortened labels
        path = path.with_name(f"{path.stem}-2.png")
    report.maps(path, title, panels, columns=len(sizes) * len(shown))


def query_and_value(names):
    """The names of queries and values (q, v_proj, query, ...), which the LoRA paper studies."""
    return [name for name in names if target_of(name).startswith(("q", "v"))]


def compare_with_W(measure, x, checkpoints):
    """
    Lines of `measure(W, W's SVD, ΔW's SVD)` and of its null, for studies that need the SVD of W.
    For a large model, unless the user selected matrices, only queries and values of the first and
    last layer are measured, to save time.
    """
    matrices = []
    panel = "mean over matrices"
    for c in checkpoints:
        names = [name for name in c.delta if name in c.W]
        if names and not c.selected and min(c.W[names[0]].shape) > 256:
            layers = list(map(layer_of, names))
            ends = min(layers), max(layers)
            in_ends = [name for name in query_and_value(names) if layer_of(name) in ends]
            names = in_ends or names[:4]
            panel = "mean over some matrices"
        matrices += [(c, name) for name in names]

    def line(c, name):
        W = c.W[name]
        null = gaussian_like(*c.svd[name], f"{c.label} {name}")
        return {**c.identity, "panel": panel, "name": name, "x": x,
                "real": measure(W, svd_of_W(W), c.svd[name]),
                "null": measure(W, svd_of_W(W), null)}

    return map_matrices(line, matrices)


def directions_study(checkpoints, records, out):
    """
    Draw how much of ΔW's directions (at most 64) lies in growing shares of W's top directions:
    ‖U_WᵢᵀU‖² / r, which is φ(i, r) for i ≥ r, rises from 0 to 1 and is a straight line for random
    directions. It uses U or V, whichever side the singular vectors of W span completely.
    """
    shares = np.arange(1, 21) / 20

    def contained(W, svd_W, svd_delta):
        side = 0 if len(W) <= W.size(1) else 2                          # U or V
        D = svd_delta[side][:, :64]
        counts = (shares * svd_W[1].numel()).round().clip(1).astype(int)
        total = (svd_W[side].T @ D).square().sum(1).cumsum(0) / D.size(1)
        return total[counts - 1].tolist()

    lines = compare_with_W(contained, shares.tolist(), checkpoints)
    report.figure(out / "directions.png", "ΔW's directions within the top directions of W", lines,
                  report.line_styles(checkpoints), size=(4.5, 3.2), band=False,
                  ylabel="share of ΔW's directions", xlabel="share of W's directions")
    return lines


def intruders_study(checkpoints, records, out):
    """Draw how many of the first ten singular vectors of W + ΔW are unlike any of W's, by ε."""
    epsilons = (np.arange(1, 20) / 20).tolist()

    def counts(W, svd_W, svd_delta):
        U, S, V = svd_delta
        return intruders(svd_W[0], W + U * S @ V.T, epsilons)

    lines = compare_with_W(counts, epsilons, [c for c in checkpoints if c.scale_known])
    report.figure(out / "intruders.png", "Singular vectors of W + ΔW that are unlike any of W's",
                  lines, report.line_styles(checkpoints), size=(4.5, 3.2), band=False,
                  ylabel="of the first ten", xlabel="ε, the largest cosine of an intruder")
    return lines


def n_blocks(c):
    """MultiLoRA's n; 1 for other methods."""
    return c.saved.get("adapter", {}).get("settings", {}).get("n_blocks", 1)


def block_measures(B, A, n):
    """
    Of the n blocks of ΔW = Σᵢ BᵢAᵢ, B (d_out, r) and A (r, d_in): each ‖BᵢAᵢ‖ as a share of their
    sum, in decreasing order, and φ(1, 1), φ(2, 2), ... of two blocks' directions, mean over the
    pairs.
    """
    blocks = [svd(factors) for factors in zip(B.chunk(n, 1), A.chunk(n))]
    norms = torch.stack([S.norm() for _, S, _ in blocks])
    values = {"share": (norms / norms.sum()).sort(descending=True).values.tolist()}
    for side, directions in (("output", 0), ("input", 2)):              # U or V
        phi = []
        for one, other in itertools.combinations(blocks, 2):
            phi.append(subspace_similarity(one[directions], other[directions]).diagonal())
        values[side] = torch.stack(phi).mean(0).tolist()                # (r / n,)
    return values


def blocks_study(checkpoints, records, out):
    """Print and draw the blocks' shares of ΔW, and the directions that two of them share."""
    found = []
    for c in checkpoints:
        n = n_blocks(c)
        if n == 1:
            continue
        for name, (B, A) in c.delta.items():
            if not all(block.any() for block in (B.chunk(n, 1) + A.chunk(n))):
                print(f"left out  blocks of {name} in {c.label}: one of them is zero")
                continue
            null = gaussian(B, f"{c.label} {name} 0"), gaussian(A, f"{c.label} {name} 1")
            found.append({**c.identity, "name": name, "n": n, **block_measures(B, A, n),
                          "null": block_measures(*null, n)})
    lines = []
    panels = {"share": "share of the i-th largest block", "input": "φ(i, i) of two blocks, input",
              "output": "φ(i, i) of two blocks, output"}
    for entry in found:
        for key, panel in panels.items():
            ticks = [str(i + 1) for i in range(len(entry[key]))]
            lines.append({**entry, "panel": panel, "x": ticks, "real": entry[key],
                          "null": entry["null"][key]})
    report.figure(out / "blocks.png", "MultiLoRA's blocks: mean and range over layers and seeds",
                  lines, report.line_styles(checkpoints), share=False, xlabel="i", ylim=(0, 1))
    rows = []
    for name in dict.fromkeys(pluck(found, "checkpoint")):
        here = select(found, checkpoint=name)
        shares = np.mean(pluck(here, "share"), 0)
        row = [name, f"{len(shares)}", f"{shares[0]:.2f}", f"{shares[-1]:.2f}"]
        for key in ("input", "null.input", "output", "null.output"):
            of_all = [phi[-1] for phi in pluck(here, key)]              # of all directions
            row.append(f"{np.mean(of_all):.3f}")
        rows.append(row)
    report.table(["blocks, mean over matrices", "n", "largest", "smallest", "input φ", "random",
                  "output φ", "random"], rows, 8)
    return found


def ranks_study(checkpoints, records, out):
    """Draw AutoLoRA's ranks, and over the search the largest selection variable of each ΔW."""
    found = []
    for c in checkpoints:
        history = c.saved["history"]
        if history["beta"]:
            steps, beta = zip(*history["beta"])
            a = selection(torch.stack(beta), c.settings.gate)           # (steps, matrices, k)
            counts = above_threshold(a[-1]).sum(-1)                     # (matrices,)
            ranks = dict(zip(c.saved["adapter"]["tensors"], counts.tolist()))
            path = out / f"ranks-{c.label[:60]}.png"
            report.search_figure(path, f"Ranks, {c.label}", ranks, steps, a)
            found.append({**c.identity, "ranks": ranks, "steps": steps,
                          "largest": a.amax(-1).tolist()})
    return found


STUDIES = {"spectrum": spectrum_study, "amplification": amplification_study,
           "subspace": subspace_study, "directions": directions_study,
           "intruders": intruders_study, "blocks": blocks_study, "ranks": ranks_study}


def unavailable_studies(checkpoints):
    """{study: what it needs and these checkpoints do not have}"""
    needs = {}
    if not checkpoint_pairs(checkpoints):
        needs["subspace"] = "two checkpoints with a matrix in common"
    if max(map(n_blocks, checkpoints)) == 1:
        needs["blocks"] = "a checkpoint of --method multilora"
    if not any(c.saved["history"]["beta"] for c in checkpoints):
        needs["ranks"] = "a checkpoint of --method autolora"
    with_W = [c for c in checkpoints if c.delta.keys() & c.W.keys()]
    if not with_W:
        needs |= dict.fromkeys(["amplification", "directions", "intruders"],
                               "the base model's W: pass --base")
    if not any(c.scale_known for c in with_W or checkpoints):
        needs |= dict.fromkeys(["amplification", "intruders"],
                               "α, which sets the size of ΔW: pass --alpha")
    bases = deltas.base_names(checkpoints)
    if len(bases) > 1 and not with_W:
        need = (f"one base model, but the files name {' and '.join(bases)}: pass --base if they "
                "are the same")
        needs |= dict.fromkeys(["subspace", "amplification", "directions", "intruders"], need)
    return needs


def print_left_out(checkpoints, needs, base):
    """Say which studies and matrices of other libraries' adapters are left out, and why."""
    for need in dict.fromkeys(needs.values()):
        studies = [study for study in STUDIES if needs.get(study) == need]
        if "checkpoint" not in need:            # the user knows which checkpoints were passed
            print(f"left out  {', '.join(studies)}: needs {need}")
    without_W = {}
    for c in checkpoints:
        without_W |= dict.fromkeys(target_of(name) for name in c.delta if name not in c.W)
        ignored = c.saved.get("ignored")
        if c.zero:
            print(f"left out  {', '.join(c.zero)} of {c.label}: ΔW is zero (never trained)")
        if ignored:
            print(f"left out  {len(ignored)} tensors of {c.label}, such as {ignored[0]}")
        if base and not c.saved["base"] and c.settings.model not in (None, base):
            print(f"note      W is that of {base}; {c.label} names the base {c.settings.model}")
    if checkpoints[0].W and without_W:
        print(f"left out  of studies that need W: {' '.join(without_W)}, which the base model "
              "lacks")


def delete_earlier_figures(out):
    """Delete an earlier analysis in this folder: its numbers and the figures that they list."""
    with suppress(OSError, ValueError, KeyError, TypeError):    # none, or of an earlier version
        for name in json.loads((out / "analysis.json").read_text())["figures"]:
            (out / Path(name).name).unlink(missing_ok=True)
        (out / "analysis.json").unlink()


def parse(argv=None):
    p = cli.parser(__doc__, "python analyze.py CKPT ... [options]")
    add = p.add_argument
    add("checkpoints", nargs="+", metavar="CKPT", help="of train.py, peft or loralib, of one base "
        "model")
    add("--study", nargs="+", choices=STUDIES, metavar="STUDY", help="(default: all that apply)")
    add("--targets", nargs="+", metavar="T", help="matrices: q k v o up down (default: all)")
    add("--layers", nargs="+", type=int, metavar="N", help="layers, from 0 (default: all)")
    add("--base", help="the base model, if the checkpoints do not contain its name or it has "
        "moved, or a file with some of its matrices")
    add("--alpha", type=cli.bounded(float, -math.inf), help="α of a loralib adapter, whose file "
        "does not contain it")
    add("--out", type=Path, help="folder for figures and numbers (default: CKPT-analysis)")
    add("--device", help="cuda, mps or cpu (default: the first available one)")
    return p.parse_args(argv)


@torch.no_grad()
def main(argv=None):
    args = parse(argv)
    with cli.one_line_errors():
        device = distributed.pick_device(args.device)
        checkpoints = deltas.load(args.checkpoints, device, args.base, args.alpha)
        torch.set_float32_matmul_precision("highest")           # no TF32
        for c in checkpoints:
            deltas.keep_only(c, "targets", args.targets, target_of)
            deltas.keep_only(c, "layers", args.layers, layer_of)
        needs = unavailable_studies(checkpoints)
        for study in args.study or []:
            if study in needs:
                raise ValueError(f"--study {study} needs {needs[study]}")
        print_left_out(checkpoints, {} if args.study else needs, args.base)
        records = map_matrices(record, [(c, name) for c in checkpoints for name in c.delta])
        first = checkpoints[0].path
        out = args.out or first.parent / f"{deltas.label_of(first)[:60]}-analysis"
        out.mkdir(parents=True, exist_ok=True)
        delete_earlier_figures(out)
        report.FIGURES.clear()
        report.summary(checkpoints, records)
        report.curves(checkpoints, out / "curves.png")
        found = {"records": records, "checkpoints": []}
        for c in checkpoints:
            found["checkpoints"].append({
                **c.identity, "parameters": c.saved["parameters"], "results": c.saved["after"],
                "settings": vars(c.settings)})
        for study in args.study or [study for study in STUDIES if study not in needs]:
            found[study] = STUDIES[study](checkpoints, records, out)
        found["figures"] = [path.name for path in report.FIGURES]
        (out / "analysis.json").write_text(json.dumps(found))
    print(f"figures and analysis.json are in {out}")
    return found


if __name__ == "__main__":
    cli.run_main(main)
