"""
What did training do to the weights? The papers' studies of ΔW, on checkpoints of train.py.

    python analyze.py out/lora.pt                                   # its spectra, what it amplifies, ...
    python analyze.py out/full.pt out/lora.pt out/multilora.pt      # side by side, and every two of them
    python analyze.py a.pt b.pt --study subspace --targets q v

Prints a table and leaves figures, and one JSON with every number drawn, in a folder beside the first checkpoint.
The studies:

    spectrum       singular values of ΔW (MultiLoRA, section 3)
    subspace       which directions two ΔW share (LoRA, figures 3 and 4)
    amplification  ΔW against W in the directions of ΔW (LoRA, table 7)
    directions     how far ΔW lies in the top directions of W (LoRA, figure 8)
    ranks          AutoLoRA's ranks, and its selection variables over the search
    intruders      singular vectors of W + ΔW that are none of W's (arXiv 2410.21228)

Each is drawn next to a null, a Gaussian ΔW of the same rank and norm: what is not different from it says nothing.
U, S, V are always those of ΔW = U diag(S) Vᵀ: U (d_out, r) output directions, V (d_in, r) input directions.
"""
import argparse
import itertools
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

import matplotlib
import numpy as np
import torch

import autolora, multilora  # noqa: F401  (lora.load finds their layers)
import lora
from model import GPT, read

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = {"full": "#000000", "lora": "#0072b2", "multilora": "#d55e00", "autolora": "#009e73"}      # Okabe and Ito's
NULL = "#999999"
DIRECTIONS = 64     # of a full ΔW, at most so many are compared


# ---------------------------------------------------------------------------------------------------------------------
# The studies on plain tensors. A ΔW is a pair (B, A), of shapes (d_out, r) and (r, d_in), or one dense tensor.

def svd(delta):
    """
    U (d_out, r), S (r,) falling, V (d_in, r) of ΔW = U diag(S) Vᵀ. Of a pair B A it costs two thin QR and an SVD of
    (r, r), about a thousand times less than a dense SVD at 1024², r = 8: with B = Q₁R₁ and Aᵀ = Q₂R₂, it is
    Q₁ (R₁R₂ᵀ) Q₂ᵀ.
    """
    if torch.is_tensor(delta):
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
        return U, S, Vh.T
    B, A = delta
    Q1, R1 = torch.linalg.qr(B)
    Q2, R2 = torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(R1 @ R2.T)
    return Q1 @ U, S, Q2 @ Vh.T


def spectrum(B, A):
    """The singular values (r,) of B A, largest first."""
    return svd((B, A))[1]


def top_share(S):
    """σ₁ / Σσ: 1 for rank one, 1/r for r equal values."""
    return (S[0] / S.sum()).item()


def effective_rank(S):
    """exp of the entropy of σ / Σσ (Roy and Vetterli 2007): r for r equal values, 1 for one."""
    p = S / S.sum()
    return torch.special.entr(p).sum().exp().item()


def stable_rank(S):
    """‖ΔW‖²_F / σ₁²."""
    return (S.square().sum() / S[0].square()).item()


def n_for_energy(S, share=0.9):
    """The least number of values that hold `share` of Σσ²."""
    energy = S.square().cumsum(0)
    return int((energy < share * energy[-1]).sum()) + 1


def subspace_similarity(U1, U2):
    """
    φ(i, j) = ‖U1ᵢᵀ U2ⱼ‖²_F / min(i, j), for all i and j at once: (r1, r2). U1 (d, r1) and U2 (d, r2) have orthonormal
    columns, and Uᵢ is the first i of them. 1 where one span contains the other, 0 where they are orthogonal, and
    max(i, j) / d on average for random ones. LoRA, equation 4 (whose appendix has 1/p (1 − d²) for 1 − d²/p).
    """
    shared = (U1.T @ U2).square().cumsum(0).cumsum(1)
    i, j = (torch.arange(1, n + 1, device=U1.device) for n in shared.shape)
    return shared / torch.minimum(i[:, None], j[None, :])


def projection(W, U, V):
    """‖Uᵀ W V‖_F: how much of W (d_out, d_in) is in the directions U (d_out, r) and V (d_in, r). LoRA, table 7."""
    return torch.linalg.norm(U.T @ W @ V).item()


def amplification(W, B, A):
    """‖ΔW‖_F / ‖Uᵀ W V‖_F for ΔW = B A: how much larger ΔW is than W in the directions of ΔW. LoRA, section 7.3."""
    U, S, V = svd((B, A))
    return torch.linalg.norm(S).item() / projection(W, U, V)


def intruders(W, delta, epsilons, k=10, U=None):
    """
    For every ε: of the first k left singular vectors of W + ΔW, how many have a cosine below ε with each of W's, `U`
    where they are known already.
    """
    U = svd(W)[0] if U is None else U
    changed = W + (delta if torch.is_tensor(delta) else delta[0] @ delta[1])
    best = (U.T @ svd(changed)[0][:, :k]).abs().amax(0)
    return [(best < e).sum().item() for e in epsilons]


def gaussian_like(delta, seed=0):
    """The null: Gaussian factors, or a Gaussian matrix, of the same shapes and Frobenius norm."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda t: torch.randn(t.shape, generator=g).to(t)
    if torch.is_tensor(delta):
        new = draw(delta)
        return new * (delta.norm() / new.norm())
    B, A = draw(delta[0]), draw(delta[1])
    return B * (spectrum(*delta).norm() / spectrum(B, A).norm()), A


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints

@dataclass
class Checkpoint:
    path: Path
    args: dict                                      # train.py's settings
    W: dict                                         # {name: base weight (d_out, d_in)}
    delta: dict                                     # {name: (B, A) or a dense ΔW}
    ranks: dict
    parameters: int
    results: dict                                   # {task: {"loss": ..., "exact": ...}}, where the run has ended
    search: dict
    log: list                                       # of dicts, a line of the log each
    W_factors: dict                                 # {name: (U, S, V) of W}, one dict for all, filled by `svd_of_W`
    factors: dict = field(default_factory=dict)     # {name: (U, S, V) of ΔW}, filled by `decompose`

    @property
    def method(self):
        return self.args["method"]

    @property
    def label(self):
        return self.path.stem


def load(paths, device="cpu", base=None):
    """
    Checkpoints of train.py, all of one base: `base`, or the model their settings name. Raises ValueError or
    FileNotFoundError for a file that is none, and where the base is another or cannot be found.
    """
    model, name, found, W_factors = None, None, [], {}
    for path in map(Path, paths):
        held = read(path)
        if not {"args", "base", "step"} <= held.keys():
            raise ValueError(f"{path}: not a checkpoint of train.py")
        args = held["args"]
        if args["method"] == "full" and args["scratch"]:
            raise ValueError(f"{path}: was pretrained from scratch, so there is no base to compare it with")
        if model is None:
            name = base or args["model"]
            try:
                model = GPT.from_pretrained(name, args["n_head"]).to(device)
            except (FileNotFoundError, ConnectionError) as e:
                raise ValueError(f"{path}: its base {name} cannot be read; say where it is with --base ({e})") from None
        if held["base"] != (mark := lora.fingerprint(model)):
            raise ValueError(f"{path}: was trained on another base than {name}: on one with fingerprint {held['base']}, "
                             f"not {mark}; all checkpoints must have one base")
        W = {n: m.weight.detach() for n, m in lora.linear_layers(model).items()}
        if args["method"] == "full":
            delta = {n: held["model"][f"{n}.weight"].to(device).float() - w for n, w in W.items()}
            parameters = sum(t.numel() for t in held["model"].values())
            ranks = {}
        else:
            layers = lora.adapters(lora.load(model, held["adapter"]))
            delta = {n: tuple(t.detach() for t in m.factors()) for n, m in layers.items()}
            parameters, ranks = sum(t.numel() for t in held["adapter"]["tensors"].values()), held["adapter"]["ranks"]
            lora.remove(model)
        log = Path(str(path).removesuffix(".pt") + ".jsonl")
        lines = [json.loads(x) for x in log.read_text().splitlines() if x.endswith("}")] if log.is_file() else []
        found.append(Checkpoint(path, args, W, delta, ranks, parameters, held.get("after") or {}, held.get("search") or {}, lines, W_factors))
    return found


def choose(checkpoints, targets, layers):
    """Keep the matrices of these targets ("q v") and layers ([0, 3]); None keeps all. Raises ValueError for others."""
    for c in checkpoints:
        kinds, numbers = ({part(n) for n in c.delta} for part in (target_of, layer_of))
        for flag, wanted, there in (("targets", targets, kinds), ("layers", layers, numbers)):
            for t in wanted or []:
                if t not in there:
                    raise ValueError(f"--{flag} {t}: {c.path} has no such ΔW; choose from {' '.join(map(str, sorted(there)))}")
        c.delta = {n: d for n, d in c.delta.items() if (not targets or target_of(n) in targets)
                   and (not layers or layer_of(n) in layers)}


def target_of(name):
    return name.split(".")[-1]


def layer_of(name):
    return int(name.split(".")[1])


def decompose(checkpoints):
    """Fill in U, S, V of every ΔW, saying how far it is."""
    total, done = sum(len(c.delta) for c in checkpoints), 0
    for c in checkpoints:
        for name, delta in c.delta.items():
            c.factors[name] = svd(delta)
            done += 1
            progress(f"decomposing ΔW {done}/{total}", done == total)


def svd_of_W(checkpoint, name):
    if name not in checkpoint.W_factors:
        checkpoint.W_factors[name] = svd(checkpoint.W[name])
    return checkpoint.W_factors[name]


def progress(text, last):
    if sys.stderr.isatty():
        print(f"\r{text:<60}" if not last else "\r" + " " * 60 + "\r", end="", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# The studies on checkpoints: each returns its numbers, for the JSON, and draws them

def style(checkpoints):
    """{label: how its lines look}: the method's colour, and a dash for every further checkpoint of that method."""
    seen, out = {}, {}
    for c in checkpoints:
        n = seen[c.method] = seen.get(c.method, -1) + 1
        out[c.label] = dict(color=COLORS[c.method], linestyle=["-", "--", "-.", ":"][n % 4], label=c.label)
    return out


def panels(n, title, columns=3, size=(3.2, 2.6), **kw):
    rows, columns = math.ceil(n / columns), min(n, columns)
    fig, axes = plt.subplots(rows, columns, figsize=(size[0] * columns, size[1] * rows + 0.5), squeeze=False,
                             layout="constrained", **kw)
    fig.suptitle(title, fontsize=11)
    axes = list(axes.flat)
    for ax in axes[n:]:
        ax.axis("off")
    return fig, axes[:n]


def legend(fig, ax):
    handles, labels = ax.get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False, fontsize=8)


def targets_of(checkpoints):
    return list(dict.fromkeys(target_of(n) for c in checkpoints for n in c.delta))


def spectrum_study(checkpoints, out):
    """Share of each singular value in their sum, for every ΔW and for a Gaussian one."""
    numbers = {}
    for c in checkpoints:
        numbers[c.label] = {}
        for name, (_, S, _) in c.factors.items():
            null = svd(gaussian_like(c.delta[name]))[1]
            numbers[c.label][name] = {"S": S.tolist(), "null": null.tolist(), "top_share": top_share(S),
                                      "effective_rank": effective_rank(S), "stable_rank": stable_rank(S),
                                      "n_for_90": n_for_energy(S)}
    targets, looks = targets_of(checkpoints), style(checkpoints)
    title = "Spectrum of ΔW: mean over the layers, and their range" if len(checkpoints) > 1 else f"Spectrum of ΔW, {checkpoints[0].label}"
    fig, axes = panels(len(targets), title, sharey=True)
    for ax, target in zip(axes, targets):
        for c in checkpoints:
            rows = {n: x for n, x in numbers[c.label].items() if target_of(n) == target}
            length = max((len(x["S"]) for x in rows.values()), default=0)
            if not rows:
                continue
            share = lambda key: np.array([[v / sum(x[key]) for v in x[key]] + [0.0] * (length - len(x[key])) for x in rows.values()])
            real, null, i = share("S"), share("null"), range(1, length + 1)
            if len(checkpoints) == 1:
                for name, line in zip(rows, real):
                    depth = layer_of(name) / max(1, max(map(layer_of, c.delta)))
                    ax.plot(i, line, color=plt.cm.viridis(0.9 * depth), label=f"layer {layer_of(name)}", linewidth=1)
                ax.plot(i, null.mean(0), color=NULL, linestyle=":", label="Gaussian ΔW")
            else:
                ax.plot(i, real.mean(0), **looks[c.label])
                ax.fill_between(i, real.min(0), real.max(0), color=COLORS[c.method], alpha=0.12, linewidth=0)
                ax.plot(i, null.mean(0), color=COLORS[c.method], linestyle=":", linewidth=0.8, label=f"Gaussian, as {c.label}")
        ax.set(title=f"ΔW of {target}", xlabel="i", yscale="log", ylim=(1e-3, 1))
        if length > 100:
            ax.set_xscale("log")
    axes[0].set_ylabel("σᵢ / Σσ")
    legend(fig, axes[0])
    save(fig, out / "spectrum.png")
    return numbers


def subspace_study(checkpoints, out):
    """φ(i, j) of every two checkpoints, for input and output directions; drawn for one layer, two targets."""
    numbers = {}
    for a, b in itertools.combinations(checkpoints, 2):
        common = [n for n in a.factors if n in b.factors]
        if not common:
            raise ValueError(f"--study subspace: {a.path} and {b.path} adapt no matrix in common")
        layers = sorted({layer_of(n) for n in common})
        layer = layers[len(layers) // 2]
        shown = [n for n in common if layer_of(n) == layer]
        shown = [n for n in shown if target_of(n) in "qv"] or shown[:2]
        rows, corners = {}, {}
        for n in common:
            null = [svd(gaussian_like(c.delta[n], seed)) for seed, c in ((1, a), (2, b))]
            phi = {side: {what: subspace_similarity(x[k][:, :DIRECTIONS], y[k][:, :DIRECTIONS])
                          for what, (x, y) in (("phi", (a.factors[n], b.factors[n])), ("null", null))}
                   for side, k in (("V", 2), ("U", 0))}
            corners[n] = {f"{side} {what}": [p[0, 0].item(), p.flatten()[-1].item()] for side in phi for what, p in phi[side].items()}
            if n in shown:
                rows[n] = {side: {what: p.tolist() for what, p in phi[side].items()} for side in phi}
        numbers[f"{a.label} and {b.label}"] = {"drawn": rows, "first and last": corners}
        m = {k: [mean(c[k][i] for c in corners.values()) for i in (0, 1)] for k in next(iter(corners.values()))}
        if len(numbers) == 1:
            print("\nφ of the first direction and of all, mean over the matrices; of two Gaussians")
        print(f"{a.label} and {b.label}")
        for side, text in (("V", "input"), ("U", "output")):
            print(f"  {text:7}" + ";".join(f"{m[f'{side} {what}'][0]:7.2f}{m[f'{side} {what}'][1]:7.2f}" for what in ("phi", "null")))
        fig, axes = panels(3 * 2 * len(shown), f"φ(i, j) of ΔW: {a.label} (i) and {b.label} (j), layer {layer}",
                           columns=2 * len(shown), size=(2.2, 2.2))
        for row, (side, what, text) in enumerate((("V", "phi", "input"), ("U", "phi", "output"), ("V", "null", "two Gaussians"))):
            for col, (n, zoom) in enumerate([(n, z) for z in (False, True) for n in shown]):
                phi = torch.tensor(rows[n][side][what])
                m = min(8, *phi.shape) if zoom else None
                ax = axes[row * 2 * len(shown) + col]
                image = ax.imshow(phi[:m, :m].T.numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower",
                                  extent=[0.5, (m or phi.size(0)) + 0.5, 0.5, (m or phi.size(1)) + 0.5])
                ax.set_title(f"{target_of(n)}, {text}" + f", first {m}" * zoom, fontsize=8)
                ax.tick_params(labelsize=7)
        for ax in axes[-2 * len(shown):]:
            ax.set_xlabel("i")
        for row in range(3):
            axes[row * 2 * len(shown)].set_ylabel("j")
        fig.colorbar(image, ax=axes, shrink=0.6, label="φ")
        save(fig, out / f"subspace-{a.label}-{b.label}.png")
    return numbers


def top_directions(checkpoint, name, r):
    """U, V of W's r largest singular values; by a randomised SVD where W is large and was not decomposed before."""
    W = checkpoint.W[name]
    if name in checkpoint.W_factors or min(W.shape) <= 512:
        U, _, V = svd_of_W(checkpoint, name)
    else:
        torch.manual_seed(0)
        U, _, V = torch.svd_lowrank(W, q=min(r + 16, min(W.shape)), niter=2)
    return U[:, :r], V[:, :r]


def amplification_study(checkpoints, out):
    """‖ΔW‖ and ‖UᵀWV‖ with the directions of ΔW, of W and random ones, and the amplification, for every ΔW."""
    numbers, tops = {}, {}
    for c in checkpoints:
        numbers[c.label] = {}
        for i, (n, (U, S, V)) in enumerate(c.factors.items(), 1):
            r, W = min(len(S), 16 if torch.is_tensor(c.delta[n]) else DIRECTIONS), c.W[n]
            if (n, r) not in tops:
                tops[n, r] = top_directions(c, n, r)
            Ur, _, Vr = svd(gaussian_like((U[:, :r] * S[:r], V[:, :r].T)))
            norm = S[:r].norm().item()
            row = {"r": r, "delta": norm, "W": W.norm().item(), "in_delta": projection(W, U[:, :r], V[:, :r]),
                   "in_W": projection(W, *tops[n, r]), "in_random": projection(W, Ur, Vr),
                   "expected_random": W.norm().item() * r / math.sqrt(W.numel())}
            numbers[c.label][n] = row | {"factor": norm / row["in_delta"], "null": norm / row["in_random"]}
            progress(f"amplification, {c.label} {i}/{len(c.factors)}", i == len(c.factors))
    targets, looks = targets_of(checkpoints), style(checkpoints)
    fig, axes = panels(len(targets), "Amplification ‖ΔW‖ / ‖UᵀWV‖ by layer: U, V of ΔW, and random (dotted)", sharey=True)
    for ax, target in zip(axes, targets):
        for c in checkpoints:
            rows = {layer_of(n): x for n, x in numbers[c.label].items() if target_of(n) == target}
            ax.plot(list(rows), [x["factor"] for x in rows.values()], marker="o", markersize=3, **looks[c.label])
            ax.plot(list(rows), [x["null"] for x in rows.values()], color=COLORS[c.method], linestyle=":", linewidth=1)
        ax.set(title=f"ΔW of {target}", xlabel="layer", yscale="log")
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_ylabel("times")
    legend(fig, axes[0])
    save(fig, out / "amplification.png")
    return numbers


def sample(checkpoint):
    """Names for the studies that need a dense SVD of W: all in a small model, else q and v of three layers."""
    names, layers = list(checkpoint.delta), sorted({layer_of(n) for n in checkpoint.delta})
    if min(checkpoint.W[names[0]].shape) <= 256:
        return names
    few = {layers[0], layers[len(layers) // 2], layers[-1]}
    return [n for n in names if layer_of(n) in few and target_of(n) in "qv"] or names[:6]


def directions_study(checkpoints, out):
    """φ between V of ΔW, all of it, and the top share of W's input directions; mean over the matrices."""
    shares, numbers = [i / 20 for i in range(1, 21)], {}
    fig, axes = panels(1, "Input directions of ΔW in the top ones of W", size=(5, 3.4))
    for c in checkpoints:
        rows, names = {}, sample(c)
        for i, n in enumerate(names, 1):
            top = svd_of_W(c, n)[2]
            at = [max(1, round(s * top.size(1))) - 1 for s in shares]
            rows[n] = {what: subspace_similarity(top, V[:, :DIRECTIONS])[at, -1].tolist() for what, V in
                       (("phi", c.factors[n][2]), ("null", svd(gaussian_like(c.delta[n]))[2]))}
            progress(f"directions, {c.label} {i}/{len(names)}", i == len(names))
        numbers[c.label] = rows
        for what, look in (("phi", style(checkpoints)[c.label]), ("null", dict(color=COLORS[c.method], linestyle=":", linewidth=1))):
            axes[0].plot(shares, np.mean([x[what] for x in rows.values()], 0), **look)
    axes[0].plot([], [], color=NULL, linestyle=":", label="Gaussian ΔW")
    axes[0].set(xlabel="share of W's directions, largest first", ylabel="φ, mean over the matrices")
    legend(fig, axes[0])
    save(fig, out / "directions.png")
    return {"shares": shares, "phi": numbers}


def intruders_study(checkpoints, out):
    """How many of the first ten singular vectors of W + ΔW are none of W's, by ε; mean over the matrices."""
    epsilons, numbers = [i / 20 for i in range(1, 20)], {}
    fig, axes = panels(1, "Singular vectors of W + ΔW that are none of W's", size=(5, 3.4))
    for c in checkpoints:
        names, rows = sample(c), {}
        for i, n in enumerate(names, 1):
            rows[n] = {what: intruders(c.W[n], delta, epsilons, U=svd_of_W(c, n)[0])
                       for what, delta in (("count", c.delta[n]), ("null", gaussian_like(c.delta[n])))}
            progress(f"intruders, {c.label} {i}/{len(names)}", i == len(names))
        numbers[c.label] = rows
        for what, look in (("count", style(checkpoints)[c.label]), ("null", dict(color=COLORS[c.method], linestyle=":", linewidth=1))):
            axes[0].plot(epsilons, np.mean([x[what] for x in rows.values()], 0), **look)
    axes[0].plot([], [], color=NULL, linestyle=":", label="Gaussian ΔW")
    axes[0].set(xlabel="ε: a cosine below it counts as none of W's", ylabel="of the first ten, mean over the matrices", ylim=(-0.3, 10.3))
    legend(fig, axes[0])
    save(fig, out / "intruders.png")
    return {"epsilons": epsilons, "counts": numbers}


def ranks_study(checkpoints, out):
    """Rank by layer and target, and over AutoLoRA's search the largest selection variable of each matrix."""
    numbers = {}
    for c in [c for c in checkpoints if c.ranks]:
        layers, targets = sorted({layer_of(n) for n in c.ranks}), list(dict.fromkeys(map(target_of, c.ranks)))
        grid = torch.full((len(layers), len(targets)), math.nan)
        for n, r in c.ranks.items():
            grid[layers.index(layer_of(n)), targets.index(target_of(n))] = r
        numbers[c.label] = {"ranks": c.ranks}
        steps = c.search.get("steps") or []
        fig, axes = panels(1 + bool(steps), f"Ranks, {c.label}", columns=2, size=(4, 0.22 * len(layers) + 2))
        image = axes[0].imshow(grid.numpy(), cmap="viridis", aspect="auto", vmin=0)
        for (row, column), r in zip(itertools.product(range(len(layers)), range(len(targets))), grid.flatten().tolist()):
            axes[0].text(column, row, "" if math.isnan(r) else f"{r:.0f}", ha="center", va="center", fontsize=7,
                         color="white" if r < 0.6 * max(c.ranks.values()) else "black")
        axes[0].set(xticks=range(len(targets)), xticklabels=targets, yticks=range(len(layers)), yticklabels=layers, ylabel="layer")
        fig.colorbar(image, ax=axes[0], label="rank")
        if steps:
            gate = autolora.GATES[c.args["gate"]][0]
            a = torch.stack([torch.stack([gate(b) for b in at]) for at in c.search["beta"]])        # (steps, matrices, k)
            numbers[c.label] |= {"steps": steps, "selection": a.tolist()}
            for i in range(a.size(1)):
                axes[1].plot(steps, a[:, i].amax(-1).tolist(), color=COLORS["autolora"], linewidth=0.6, alpha=0.6)
            axes[1].axhline(1 / a.size(-1), color=NULL, linestyle=":")
            axes[1].set(xlabel="search step", ylabel="largest selection variable", ylim=(0, 1))
        save(fig, out / f"ranks-{c.label}.png")
    return numbers


def curves(checkpoints, out):
    """Training and held-out loss over the steps, from the logs."""
    logged = [c for c in checkpoints if c.log]
    if not logged:
        return {}
    numbers, looks = {}, style(checkpoints)
    fig, axes = panels(2, "Loss over the steps", size=(4, 3), sharey=True)
    for c in logged:
        train = [[x["step"], x["loss"]] for x in c.log if "loss" in x]
        overall = lambda results: mean(r["loss"] for r in results.values())
        held_out = [[x["step"], mean(x["held_out"].values())] for x in c.log if x.get("held_out")]
        held_out = [[0, overall(x["before"])] for x in c.log if "after" in x] + held_out
        held_out += [[x["step"], overall(x["after"])] for x in c.log if "after" in x]
        numbers[c.label] = {"train": train, "held_out": held_out}
        width = max(1, len(train) // 50)
        smooth = [(train[i][0], mean(v for _, v in train[max(0, i - width + 1):i + 1])) for i in range(len(train))]
        for ax, points in zip(axes, (smooth, held_out)):
            ax.plot(*(zip(*points) if points else ([], [])), **looks[c.label])
    for ax, text in zip(axes, ("training rows, running mean", "held-out rows, mean over tasks")):
        ax.set(title=text, xlabel="step", yscale="log")
    axes[0].set_ylabel("loss, nats a token")
    legend(fig, axes[0])
    save(fig, out / "curves.png")
    return numbers


def save(fig, path):
    fig.savefig(path, dpi=150)
    plt.close(fig)


STUDIES = {"spectrum": spectrum_study, "subspace": subspace_study, "amplification": amplification_study,
           "directions": directions_study, "ranks": ranks_study, "intruders": intruders_study}


# ---------------------------------------------------------------------------------------------------------------------
# The table and the command line

def summary(checkpoints):
    """(rows of numbers, lines of text): one for each checkpoint, one for those that differ by their seed alone."""
    rows = {}
    for c in checkpoints:
        S = [s for _, s, _ in c.factors.values()]
        amp = [s.norm().item() / projection(c.W[n], U, V) for n, (U, s, V) in c.factors.items()]
        row = {"parameters": c.parameters, "matrices": len(S)}
        for key in ("loss", "exact"):
            values = [r[key] for r in c.results.values() if key in r]
            row[key] = [mean(values)] if values else []
        for key, values in (("top1", map(top_share, S)), ("effective_rank", map(effective_rank, S)),
                            ("stable_rank", map(stable_rank, S)), ("amplification", amp)):
            row[key] = list(values)
        rows[c.label] = row
    groups = {}
    for c in checkpoints:
        same = {k: v for k, v in c.args.items() if k not in ("seed", "out", "resume", "eval", "prompt", "device")}
        groups.setdefault(json.dumps(same, sort_keys=True), []).append(c)
    for members in groups.values():
        if len(members) > 1:
            own = [rows[c.label] for c in members]
            rows[f"{len(own)} seeds: {members[0].label}"] = {
                k: [mean(r[k]) for r in own if r[k]] if isinstance(own[0][k], list) else round(mean(r[k] for r in own)) for k in own[0]}

    def cell(values, digits):
        if not values:
            return "-"
        digits = digits if mean(values) < 100 else 0
        return f"{mean(values):.{digits}f}" + (f"±{stdev(values):.{digits}f}" if len(values) > 1 else "")

    lines = [f"{'mean ± std over matrices':25} {'parameters':>11} {'top-1':>10} {'eff. rank':>10} {'st. rank':>9} {'amplif.':>10}"]
    for label, r in rows.items():
        lines.append(f"{label[:25]:25} {r['parameters']:11,} {cell(r['top1'], 2):>10} {cell(r['effective_rank'], 1):>10} "
                     f"{cell(r['stable_rank'], 1):>9} {cell(r['amplification'], 1):>10}")
    lines += ["", f"{'results, mean over tasks':26} {'loss':>13} {'exact match':>13}"]
    lines += [f"{label[:26]:26} {cell(r['loss'], 3):>13} {cell(r['exact'], 3):>13}" for label, r in rows.items()]
    return rows, lines


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, usage="python analyze.py CKPT [CKPT ...] [options]", allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoints", nargs="+", metavar="CKPT", help="what train.py left, all of one base")
    p.add_argument("--study", nargs="+", choices=STUDIES, help="which (default: all that apply)")
    p.add_argument("--targets", nargs="+", help="matrices: q k v o up down (default: all adapted ones)")
    p.add_argument("--layers", nargs="+", type=int, help="layers, from 0 (default: all)")
    p.add_argument("--base", help="the base model, where it is not at the place the checkpoints name")
    p.add_argument("--out", type=Path, help="folder for figures and numbers (default: CKPT-analysis)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default %(default)s)")
    return p.parse_args(argv)


@torch.no_grad()
def main(argv=None):
    args = parse(argv)
    try:
        checkpoints = load(args.checkpoints, args.device, args.base)
        choose(checkpoints, args.targets, args.layers)
        if "subspace" in (args.study or []) and len(checkpoints) < 2:
            raise ValueError("--study subspace compares: give two checkpoints or more")
        if len({c.label for c in checkpoints}) < len(checkpoints):
            raise ValueError("two checkpoints have the same name: figures could not tell them apart; copy one to another name")
        out = args.out or checkpoints[0].path.with_suffix("").with_name(checkpoints[0].label + "-analysis")
        out.mkdir(parents=True, exist_ok=True)
        decompose(checkpoints)
        rows, lines = summary(checkpoints)
        numbers = {"checkpoints": {c.label: {"path": str(c.path), "args": c.args, "results": c.results} for c in checkpoints},
                   "table": rows, "curves": curves(checkpoints, out)}
        print(*lines, sep="\n")
        studies = args.study or [s for s in STUDIES if s != "subspace" or len(checkpoints) > 1]
        for name in studies:
            numbers[name] = STUDIES[name](checkpoints, out)
        (out / "analysis.json").write_text(json.dumps(numbers))
    except (ValueError, OSError) as e:
        print(f"analyze.py: {e}", file=sys.stderr)
        sys.exit(2)
    print(f"\nfigures and analysis.json are in {out}")
    return numbers


if __name__ == "__main__":
    main()
