"""
What did training do to the weights? The papers' studies of ΔW, on checkpoints
of train.py.

    python analyze.py out/lora.pt                # its spectra, what it amplifies
    python analyze.py out/full.pt out/lora.pt    # side by side, and every two
    python analyze.py a.pt b.pt --study subspace --targets q v

Prints tables and leaves figures, and one JSON with every number drawn, in a
folder beside the first checkpoint. Checkpoints that differ by their seed alone
are drawn as one. The studies, beside the curves of the loss:

    spectrum       singular values of ΔW (MultiLoRA, section 3)
    subspace       which directions two ΔW share (LoRA, figures 3 and 4)
    amplification  ΔW against W in ΔW's own directions (LoRA, table 7)
    directions     ΔW in the top directions of W (LoRA, figure 8)
    ranks          AutoLoRA's ranks, and its selection variables over the search
    intruders      singular vectors of W + ΔW that are none of W's (2410.21228)

Each is shown next to a null, a Gaussian ΔW of the same rank and norm: what is
not different from it says nothing. U, S, V are those of ΔW = U diag(S) Vᵀ: U
(d_out, r) output directions, V (d_in, r) input directions. Where the LoRA paper
takes V from A alone, it is here that of the product B A. In the tables:

    top-1, %       σ₁ / Σσ, the share of the largest singular value
    eff. rank      effective rank, exp of the entropy of σ / Σσ
    st. rank       stable rank, ‖ΔW‖² / σ₁²
    amplif.        ‖ΔW‖ / ‖UᵀWV‖, of a ΔW of full rank in its first 16 directions
    first, all     φ of the first direction of each, and of all of them
"""
import argparse
import itertools
import json
import math
import os
import re
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

import matplotlib
import numpy as np
import torch

import autolora
import lora
from model import GPT, read
from train import METHODS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = {"full": "#000000", "lora": "#0072b2", "multilora": "#d55e00", "autolora": "#009e73"}      # Okabe and Ito's
NULL = dict(color="#999999", linestyle=":", linewidth=1)


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
    return torch.special.entr(S / S.sum()).sum().exp().item()


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


def amplification(W, U, S, V):
    """‖ΔW‖_F / ‖Uᵀ W V‖_F: how much larger ΔW = U diag(S) Vᵀ is than W in its own directions. LoRA, section 7.3."""
    return torch.linalg.norm(S).item() / projection(W, U, V)


def intruders(U, changed, epsilons, k=10):
    """For every ε: of the first k left singular vectors of W + ΔW, how many have no cosine of ε or more with W's, U."""
    best = (U.T @ svd(changed)[0][:, :k]).abs().amax(0)
    return [(best < e).sum().item() for e in epsilons]


def gaussian_like(delta, name=""):
    """The null: U, S, V of Gaussian factors, or a Gaussian matrix, of the same shapes and norm; one for every name."""
    g = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    draw = lambda t: torch.randn(t.shape, generator=g).to(t)
    norm = torch.linalg.norm(delta if torch.is_tensor(delta) else svd(delta)[1])
    U, S, V = svd(draw(delta) if torch.is_tensor(delta) else tuple(map(draw, delta)))
    return U, S * (norm / S.norm()), V


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints

class Weights(dict):
    """{name: W (d_out, d_in)} of the base, which all checkpoints share; each is decomposed at most once."""

    def svd(self, name):
        known = self.__dict__.setdefault("known", {})
        if name not in known:
            known[name] = svd(self[name])
        return known[name]


@dataclass
class Checkpoint:
    path: Path
    args: dict                                      # train.py's settings
    W: Weights
    delta: dict                                     # {name: (B, A) or a dense ΔW}
    ranks: dict                                     # {name: r}, of an adapter
    parameters: int
    step: int                                       # that it was written after
    results: dict                                   # {task: {"loss": ..., "exact": ...}}, where the run has ended
    search: dict
    log: list                                       # of dicts, a line of the log each
    factors: dict = field(default_factory=dict)     # {name: (U, S, V) of ΔW}, filled by `measure`

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
    model, found = None, []
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
            W = Weights({n: m.weight.detach() for n, m in lora.linear_layers(model).items()})
        if args["method"] == "full":
            if held["base"] != (mark := lora.fingerprint(model)):
                raise ValueError(f"{path}: was trained on another base than {name}: on one with fingerprint "
                                 f"{held['base']}, not {mark}")
            trained, ranks = held["model"], {}
            delta = {n: trained[f"{n}.weight"].to(device).float() - w for n, w in W.items()}
        else:
            try:
                layers = lora.adapters(lora.load(model, held["adapter"]))
            except ValueError as e:
                raise ValueError(f"{path}, on {name}: {e}") from None
            trained, ranks = held["adapter"]["tensors"], held["adapter"]["ranks"]
            delta = {n: tuple(t.detach() for t in m.factors()) for n, m in layers.items()}
            lora.remove(model)
        log = path.with_name(path.name.removesuffix(".pt") + ".jsonl")
        lines = [json.loads(x) for x in log.read_text().splitlines() if x.endswith("}")] if log.is_file() else []
        found.append(Checkpoint(path, args, W, delta, ranks, sum(t.numel() for t in trained.values()),
                                held["step"], held.get("after") or {}, held.get("search") or {}, lines))
    return found


def choose(checkpoints, targets, layers):
    """Keep the matrices of these targets (["q", "v"]) and layers ([0, 3]); None: all. Raises ValueError for others."""
    for c in checkpoints:
        for flag, wanted, part in (("targets", targets, target_of), ("layers", layers, layer_of)):
            there = list(dict.fromkeys(part(n) for n in c.delta))
            for t in wanted or []:
                if t not in there:
                    raise ValueError(f"--{flag} {t}: {c.path} has no such ΔW; "
                                     f"choose from {' '.join(map(str, there))}")
    for c in checkpoints:
        c.delta = {n: d for n, d in c.delta.items() if (not targets or target_of(n) in targets)
                   and (not layers or layer_of(n) in layers)}


def target_of(name):
    return name.split(".")[-1]


def layer_of(name):
    return int(name.split(".")[1])


def seeds(checkpoints):
    """{label: the checkpoints that differ by their seed alone}, in the order they came."""
    found, own, out = {}, {method: set(f"{a} {b}".split()) for method, (_, a, b, *_) in METHODS.items()}, {}
    for c in checkpoints:
        ignored = set.union(*own.values()) - own[c.method] | {"seed", "out", "resume", "eval", "prompt", "device"}
        key = json.dumps([c.step, {k: v for k, v in c.args.items() if k not in ignored}], sort_keys=True)
        while any(c.args["seed"] == other.args["seed"] for other in found.get(key, [])):
            key += "'"
        found.setdefault(key, []).append(c)
    for members in found.values():
        label = re.sub(r"[-_.]*(seed\d*)?$", "", os.path.commonprefix([c.label for c in members]))
        label = members[0].label if len(members) == 1 else f"{label}, {len(members)} seeds"
        out[f"{members[0].label}, {len(members)} seeds" if label in out else label] = members
    return out


def progress(text, done, total):
    if sys.stderr.isatty():
        line = f"{f'{text} {done}/{total}':<60}" if done < total else f"{'':60}\r"
        print(f"\r{line}", end="", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# The table: what can be said of one ΔW alone

MEASURES = {"top1": "top-1, %", "effective_rank": "eff. rank", "stable_rank": "st. rank", "amplification": "amplif."}


def measures(W, U, S, V, r):
    """Of one ΔW, in numbers; against W in its first r directions."""
    return {"S": S.tolist(), "top1": top_share(S), "effective_rank": effective_rank(S), "stable_rank": stable_rank(S),
            "n_for_90": n_for_energy(S), "delta": S.norm().item(), "projection": projection(W, U[:, :r], V[:, :r]),
            "amplification": amplification(W, U[:, :r], S[:r], V[:, :r])}


def measure(checkpoints):
    """
    {label: {name: `measures` of ΔW}}, with "null", those of a Gaussian ΔW. A full ΔW is compared with W in its first
    16 directions, because all of them are all of W. In a large W the norm in W's own directions comes from a randomised
    SVD: some per cent too low where W's values are all alike.
    """
    numbers, tops, total, done = {}, {}, sum(len(c.delta) for c in checkpoints), 0
    for c in checkpoints:
        numbers[c.label] = {}
        for name, delta in c.delta.items():
            W, (U, S, V) = c.W[name], c.factors.setdefault(name, svd(delta))
            if not 0 < S[0] < math.inf:
                raise ValueError(f"{c.path}: ΔW of {name} has norm {S[0].item():g}: there is nothing to study "
                                 f"after step {c.step}")
            r = min(16, len(S)) if torch.is_tensor(delta) else len(S)
            if (name, r) not in tops:
                torch.manual_seed(0)
                q = min(r + 16, *W.shape)
                own = torch.svd_lowrank(W, q, niter=4)[1] if min(W.shape) > 512 else torch.linalg.svdvals(W)
                tops[name, r] = own[:r].norm().item()
            NU, NS, NV = gaussian_like(delta, f"{c.label} {name}")
            numbers[c.label][name] = {
                "r": r, "W": W.norm().item(), "top_W": tops[name, r],
                "expected_random": W.norm().item() * r / math.sqrt(W.numel()),
                **measures(W, U, S, V, r), "null": measures(W, NU, NS * (S[:r].norm() / NS[:r].norm()), NV, r)}
            progress("decomposing ΔW", done := done + 1, total)
    return numbers


def cell(values, digits):
    if not values:
        return "-"
    digits = digits if mean(values) < 100 else 0
    return f"{mean(values):.{digits}f}" + (f"±{stdev(values):.{digits}f}" if len(values) > 1 else "")


def summary(checkpoints, numbers):
    """
    ({label: numbers}, lines of text): of each checkpoint, measures of every matrix, and of those that differ by their
    seed alone, each seed's mean. Printed are the mean ± standard deviation over the matrices, then over the seeds, and
    the Gaussian's.
    """
    head = "".join(f"{text:>10}" for text in MEASURES.values())
    rows, lines = {}, [f"{'mean ± std over matrices':27}{'parameters':>11}{head}"]
    results = ["", f"{'results, mean over tasks':27}{'loss':>13}{'exact match':>13}"]
    cells = lambda r: "".join(f"{cell([100 * v for v in r[k]] if k == 'top1' else r[k], 1):>10}" for k in MEASURES)
    for label, members in seeds(checkpoints).items():
        every = [x for c in members for x in numbers[c.label].values()]
        for c in members:
            row = {"parameters": c.parameters, "matrices": len(c.delta)}
            for k in ("loss", "exact"):
                tasks = [r[k] for r in c.results.values() if k in r]
                row[k] = [mean(tasks)] if tasks else []
            rows[c.label] = row | {k: [x[k] for x in numbers[c.label].values()] for k in MEASURES}
        own = [rows[c.label] for c in members]
        if len(own) > 1:
            rows[label] = {k: round(mean(r[k] for r in own)) for k in ("parameters", "matrices")}
            rows[label] |= {k: [mean(r[k]) for r in own if r[k]] for k in ("loss", "exact", *MEASURES)}
        rows[label]["null"] = {k: [x["null"][k] for x in every] for k in MEASURES}
        over_matrices = {k: [x[k] for x in every] for k in MEASURES}
        lines.append(f"{label[:27]:27}{rows[label]['parameters']:11,}{cells(over_matrices)}")
        lines += [f"{'  over the seeds':38}{cells(rows[label])}"] if len(own) > 1 else []
        lines.append(f"{'  Gaussian':38}{cells(rows[label]['null'])}")
        results.append(f"{label[:27]:27}{cell(rows[label]['loss'], 3):>13}{cell(rows[label]['exact'], 3):>13}")
    lines += results
    return rows, lines


# ---------------------------------------------------------------------------------------------------------------------
# The studies on checkpoints: each draws its figures into the folder `out` and returns what it drew that is not in the
# numbers of `measure` already

def style(checkpoints):
    """{label: how its lines look}: the method's colour, and a dash for every further line of that method."""
    looks, count = {}, {}
    for label, (c, *_) in seeds(checkpoints).items():
        n = count[c.method] = count.get(c.method, -1) + 1
        looks[label] = dict(color=COLORS[c.method], linestyle=["-", "--", "-.", (0, (1, 1))][n % 4], label=label)
    return looks


def panels(n, title, columns=3, size=(3.2, 2.6), **kw):
    rows, columns = math.ceil(n / columns), min(n, columns)
    fig, axes = plt.subplots(rows, columns, figsize=(size[0] * columns, size[1] * rows + 0.6), squeeze=False,
                             layout="constrained", **kw)
    fig.suptitle(title, fontsize=11)
    axes = list(axes.flat)
    for ax in axes[n:]:
        ax.axis("off")
    return fig, axes[:n]


def curve(ax, x, real, null, look, band=True):
    """The mean of some lines, of those that go so far, and their range; dotted, the mean of the null's."""
    ax.plot(x, np.nanmean(real, 0), **look)
    if band:
        ax.fill_between(x, np.nanmin(real, 0), np.nanmax(real, 0), color=look["color"], alpha=0.12, linewidth=0)
    ax.plot(x, np.nanmean(null, 0), color=look["color"], linestyle=":", linewidth=1)


def finish(fig, ax, path, null="a Gaussian ΔW (dotted)"):
    """The legend below, then the file."""
    if null:
        ax.plot([], [], label=null, **NULL)
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2 if fig.get_figwidth() < 6 else 4,
               frameon=False, fontsize=8)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def targets_of(checkpoints):
    return list(dict.fromkeys(target_of(n) for c in checkpoints for n in c.delta))


def rows_of(members, numbers, target):
    """[(layer, numbers)] of one target in checkpoints that differ by their seed."""
    return [(layer_of(n), x) for c in members for n, x in numbers[c.label].items() if target_of(n) == target]


def spectrum_study(checkpoints, numbers, out):
    """Share of each singular value in their sum, by target; of one checkpoint, a line for each layer."""
    targets, looks, alone = targets_of(checkpoints), style(checkpoints), len(checkpoints) == 1
    fig, axes = panels(len(targets), f"Singular values of ΔW: {checkpoints[0].label}, each layer" if alone else
                       "Singular values of ΔW: mean over layers and seeds, and range", sharey=True)
    for ax, target in zip(axes, targets):
        longest = max(len(x["S"]) for c in checkpoints for _, x in rows_of([c], numbers, target))
        share = lambda S, length=0: np.pad(S, (0, max(0, length - len(S))), constant_values=math.nan) / sum(S)
        for label, members in seeds(checkpoints).items():
            rows = rows_of(members, numbers, target)
            length = max((len(x["S"]) for _, x in rows), default=0)
            if alone:
                for i, (layer, x) in enumerate(rows):
                    color = plt.cm.viridis(0.9 * i / len(rows))
                    ax.plot(range(1, len(x["S"]) + 1), share(x["S"]), linewidth=1, color=color,
                            label=f"layer {layer}" if i in (0, len(rows) // 2, len(rows) - 1) else None)
                ax.plot(range(1, len(x["S"]) + 1), share(x["null"]["S"]), **NULL)
            elif rows:
                curve(ax, range(1, length + 1), [share(x["S"], length) for _, x in rows],
                      [share(x["null"]["S"], length) for _, x in rows], looks[label])
        ax.set(title=f"ΔW of {target}", xlabel="i", yscale="log", ylim=(2e-4, 1),
               xscale="log" if longest > 100 else "linear")
    axes[0].set_ylabel("σᵢ / Σσ")
    finish(fig, axes[0], out / "spectrum.png")

    fig, (left, right) = panels(2, "Over all ΔW", size=(4, 2.8))        # MultiLoRA's comparison, as a histogram
    top = max(x["top1"] for c in checkpoints for x in numbers[c.label].values())
    for label, members in seeds(checkpoints).items():
        every = [x for c in members for x in numbers[c.label].values()]
        look = {"histtype": "step", "density": True, **looks[label]}
        left.hist([x["top1"] for x in every], bins=np.linspace(0, top, 16), **look)
        right.hist([math.log10(v / sum(x["S"])) for x in every for v in x["S"] if v > 1e-6 * x["S"][0]],
                   bins=np.linspace(-4, 0, 33), **look)
    left.set(xlabel="share of the largest value, σ₁ / Σσ", ylabel="density")
    right.set(xlabel="log₁₀ σᵢ / Σσ of all values")
    finish(fig, left, out / "histogram.png", null=None)
    return {}


def amplification_study(checkpoints, numbers, out):
    """‖ΔW‖ / ‖UᵀWV‖ by layer; and printed, the norms of LoRA's table 7."""
    targets, looks = targets_of(checkpoints), style(checkpoints)
    fig, axes = panels(len(targets), "Amplification ‖ΔW‖ / ‖UᵀWV‖ in the directions U, V of ΔW", sharey=True)
    for ax, target in zip(axes, targets):
        for label, members in seeds(checkpoints).items():
            rows = rows_of(members, numbers, target)
            layers = sorted({layer for layer, _ in rows})
            of = lambda get: [[get(x) for l, x in rows if l == layer] for layer in layers]
            if rows:
                curve(ax, layers, np.transpose(of(lambda x: x["amplification"])),
                      np.transpose(of(lambda x: x["null"]["amplification"])), looks[label])
        ax.set(title=f"ΔW of {target}", xlabel="layer", yscale="log")
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_ylabel("times")
    finish(fig, axes[0], out / "amplification.png")
    heads = "".join(f"{text:>9}" for text in ("ΔW", "W", "random", "‖ΔW‖", "‖W‖"))
    print(f"\n{'':27}{'‖UᵀWV‖, U and V of':>30}\n{'mean over matrices':27}{heads}{'r':>6}")
    for label, members in seeds(checkpoints).items():
        every = [x for c in members for x in numbers[c.label].values()]
        columns = [(x["projection"], x["top_W"], x["null"]["projection"], x["delta"], x["W"], x["r"]) for x in every]
        *norms, r = map(mean, zip(*columns))
        print(f"{label[:27]:27}" + "".join(f"{v:9.2f}" for v in norms) + f"{r:6.1f}")
    return {}


def pairs(checkpoints):
    """{label: pairs of checkpoints}: every two seeds of a setting, and of two settings all that differ in seed."""
    found = {}
    for (a, one), (b, other) in itertools.combinations_with_replacement(seeds(checkpoints).items(), 2):
        if a == b:
            members = list(itertools.combinations(one, 2))
        else:                                                           # one seed starts both at related A
            every = list(itertools.product(one, other))
            members = [(x, y) for x, y in every if x.args["seed"] != y.args["seed"]] or every
        if members:
            found[f"{a} and {b}" if a != b else f"{a}, among themselves"] = members
    return found


def similarities(a, b, name, most=64):
    """{"V phi", "U phi"}: φ of two ΔW in their first `most` directions; {"V null", "U null"}: of Gaussians."""
    pair = [(U[:, :most], S[:most], V[:, :most]) for U, S, V in (a.factors[name], b.factors[name])]
    nulls = [gaussian_like((U * S, V.T), f"{c.label} {name} {i}") for i, (c, (U, S, V)) in enumerate(zip((a, b), pair))]
    return {f"{side} {what}": subspace_similarity(x[k], y[k])
            for what, (x, y) in (("phi", pair), ("null", nulls)) for side, k in (("V", 2), ("U", 0))}


def subspace_study(checkpoints, numbers, out):
    """
    φ(i, j) of input and output directions. Printed are its first and last value, mean over matrices and pairs; drawn is
    the first pair, for one layer and two targets.
    """
    found = {}
    print(f"\n{'':45}{'two Gaussians':>18}\n{'φ, mean over matrices':27}" + f"{'first':>9}{'all':>9}" * 2)
    for label, members in pairs(checkpoints).items():
        ends = {}
        for a, b in members:
            common = [n for n in a.factors if n in b.factors]
            if not common:
                raise ValueError(f"--study subspace: {a.path} and {b.path} adapt no matrix in common")
            for n in common:
                phi = similarities(a, b, n)
                first_and_last = {what: [p[0, 0].item(), p[-1, -1].item()] for what, p in phi.items()}
                ends[f"{a.label}, {b.label}, {n}"] = first_and_last
        print(f"{label}, {len(members)} pairs" if len(members) > 1 else label)
        for side, text in (("V", "input"), ("U", "output")):
            print(f"  {text:25}" + "".join(f"{mean(e[f'{side} {what}'][i] for e in ends.values()):9.2f}"
                                           for what in ("phi", "null") for i in (0, 1)))
        a, b = members[0]
        layers = sorted({layer_of(n) for n in a.factors if n in b.factors})
        layer = layers[len(layers) // 2]
        shown = [n for n in a.factors if n in b.factors and layer_of(n) == layer]
        shown = [n for n in shown if target_of(n) in "qv"] or shown[:2]
        drawn = {n: {what: p.tolist() for what, p in similarities(a, b, n).items()} for n in shown}
        found[label] = {"drawn": drawn, "first and last": ends}
        fig, axes = panels(6 * len(shown), f"φ(i, j) of ΔW: {a.label} (i) and {b.label} (j), layer {layer}",
                           columns=2 * len(shown), size=(2.2, 2.2))
        kinds = ("V phi", "input"), ("U phi", "output"), ("V null", "two Gaussians")
        for ax, ((what, text), zoom, n) in zip(axes, itertools.product(kinds, (False, True), shown)):
            phi = np.array(drawn[n][what])
            phi = phi[:8, :8] if zoom else phi
            image = ax.imshow(phi.T, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower",
                              extent=[0.5, phi.shape[0] + 0.5, 0.5, phi.shape[1] + 0.5])
            ax.set_title(f"{target_of(n)}, {text}" + ", first 8" * zoom, fontsize=8)
            ax.tick_params(labelsize=7)
        for ax in axes[-2 * len(shown):]:
            ax.set_xlabel("i")
        for ax in axes[::2 * len(shown)]:
            ax.set_ylabel("j")
        fig.colorbar(image, ax=axes, shrink=0.6, label="φ")
        fig.savefig(out / f"subspace-{a.label}-{b.label}.png", dpi=150)
        plt.close(fig)
    return found


def against_all_of_W(checkpoints, out, name, x, real_and_null, title, **labels):
    """One panel over x, for studies that need all of W's SVD: of every W in a small model, else some of q and v."""
    found = {}
    fig, (ax,) = panels(1, title, size=(5, 3.4))
    for label, members in seeds(checkpoints).items():
        for c in members:
            names, layers = list(c.delta), sorted({layer_of(n) for n in c.delta})
            if min(c.W[names[0]].shape) > 256:
                few = {layers[0], layers[-1]}
                names = [n for n in names if layer_of(n) in few and target_of(n) in "qv"] or names[:6]
            found[c.label] = {}
            for i, n in enumerate(names, 1):
                found[c.label][n] = dict(zip(("real", "null"), real_and_null(c, n)))
                progress(f"{name}, {c.label}", i, len(names))
        rows = [row for c in members for row in found[c.label].values()]
        curve(ax, x, [r["real"] for r in rows], [r["null"] for r in rows], style(checkpoints)[label], band=False)
    ax.set(**labels)
    finish(fig, ax, out / f"{name}.png")
    return {"x": list(x), **found}


def directions_study(checkpoints, numbers, out):
    """φ of the first 64 input directions of ΔW and the top share of W's (not all there are where d_in > d_out)."""
    shares = [i / 20 for i in range(1, 21)]

    def phi(c, n):
        top = c.W.svd(n)[2]
        at = [max(1, round(s * top.size(1))) - 1 for s in shares]
        return [subspace_similarity(top, V[:, :64])[at, -1].tolist() for _, _, V in
                (c.factors[n], gaussian_like(c.delta[n], f"{c.label} {n}"))]

    return against_all_of_W(checkpoints, out, "directions", shares, phi, "Input directions of ΔW in the top ones of W",
                            xlabel="share of W's directions, largest first", ylabel="φ, mean over matrices")


def intruders_study(checkpoints, numbers, out):
    """How many of the first ten singular vectors of W + ΔW are none of W's, by ε."""
    epsilons = [i / 20 for i in range(1, 20)]

    def counts(c, n):
        return [intruders(c.W.svd(n)[0], c.W[n] + U * S @ V.T, epsilons) for U, S, V in
                (c.factors[n], gaussian_like(c.delta[n], f"{c.label} {n}"))]

    return against_all_of_W(checkpoints, out, "intruders", epsilons, counts,
                            "Singular vectors of W + ΔW that are none of W's",
                            xlabel="ε: a cosine below it counts as none of W's",
                            ylabel="of the first ten, mean over matrices", ylim=(-0.3, 10.3))


def ranks_study(checkpoints, numbers, out):
    """Rank by layer and target, and over AutoLoRA's search the largest selection variable of each matrix."""
    found = {}
    for c in [c for c in checkpoints if len(set(c.ranks.values())) > 1]:
        layers, targets = sorted({layer_of(n) for n in c.ranks}), list(dict.fromkeys(map(target_of, c.ranks)))
        grid = np.full((len(layers), len(targets)), math.nan)
        for n, r in c.ranks.items():
            grid[layers.index(layer_of(n)), targets.index(target_of(n))] = r
        found[c.label], steps = {"ranks": c.ranks}, c.search.get("steps") or []
        fig, axes = panels(1 + bool(steps), f"Ranks, {c.label}", columns=2, size=(4, 0.22 * len(layers) + 2))
        image = axes[0].imshow(grid, cmap="viridis", aspect="auto", vmin=0)
        for (row, column), r in np.ndenumerate(grid):
            axes[0].text(column, row, "" if math.isnan(r) else f"{r:.0f}", ha="center", va="center", fontsize=7,
                         color="white" if r < 0.6 * np.nanmax(grid) else "black")
        axes[0].set(xticks=range(len(targets)), xticklabels=targets, yticks=range(len(layers)), yticklabels=layers,
                    ylabel="layer")
        fig.colorbar(image, ax=axes[0], label="rank")
        if steps:
            gate = autolora.GATES[c.args["gate"]][0]
            a = torch.stack([torch.stack([gate(b) for b in at]) for at in c.search["beta"]])    # (steps, matrices, k)
            found[c.label] |= {"steps": steps, "selection": a.tolist()}
            axes[1].plot(steps, a.amax(-1).tolist(), color=COLORS["autolora"], linewidth=0.6, alpha=0.6)
            axes[1].axhline(1 / a.size(-1), **NULL)
            axes[1].set(xlabel="search step", ylabel="largest selection variable", ylim=(0, 1))
        fig.savefig(out / f"ranks-{c.label}.png", dpi=150)
        plt.close(fig)
    return found


def curves(checkpoints, out):
    """Training and held-out loss over the steps, from the logs."""
    found, looks = {}, style(checkpoints)
    if not any(c.log for c in checkpoints):
        return found
    fig, axes = panels(2, "Loss over the steps", size=(4, 3), sharey=True)
    overall = lambda results: mean(r["loss"] for r in results.values())
    for label, members in seeds(checkpoints).items():
        for c in members:
            train = [[x["step"], x["loss"]] for x in c.log if "loss" in x]
            held_out = [[0, overall(x["before"])] for x in c.log if "after" in x]
            held_out += [[x["step"], mean(x["held_out"].values())] for x in c.log if x.get("held_out")]
            held_out += [[x["step"], overall(x["after"])] for x in c.log if "after" in x]
            found[c.label] = {"train": train, "held_out": held_out}
            width = max(1, len(train) // 50)
            smooth = [(train[i][0], mean(v for _, v in train[max(0, i - width + 1):i + 1])) for i in range(len(train))]
            for ax, points in zip(axes, (smooth, held_out)):
                look = {**looks[label], "label": label if c is members[0] else None, "linewidth": 1}
                ax.plot(*(zip(*points) if points else ([], [])), **look)
    for ax, text in zip(axes, ("training rows, running mean", "held-out rows, mean over tasks")):
        ax.set(title=text, xlabel="step", yscale="log")
    axes[0].set_ylabel("loss, nats a token")
    finish(fig, axes[0], out / "curves.png", null=None)
    return found


STUDIES = {"spectrum": spectrum_study, "amplification": amplification_study, "subspace": subspace_study,
           "directions": directions_study, "ranks": ranks_study, "intruders": intruders_study}


# ---------------------------------------------------------------------------------------------------------------------
# The command line

def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, usage="python analyze.py CKPT [CKPT ...] [options]",
                                allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoints", nargs="+", metavar="CKPT", help="what train.py left, all of one base")
    p.add_argument("--study", nargs="+", choices=STUDIES, metavar="STUDY", help="which (default: all that apply)")
    p.add_argument("--targets", nargs="+", metavar="T", help="matrices: q k v o up down (default: all adapted ones)")
    p.add_argument("--layers", nargs="+", type=int, metavar="N", help="layers, from 0 (default: all)")
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
        asked = args.study or []
        if "subspace" in asked and len(checkpoints) < 2:
            raise ValueError("--study subspace compares: give two checkpoints or more")
        if "ranks" in asked and all(len(set(c.ranks.values())) < 2 for c in checkpoints):
            raise ValueError("--study ranks: none of these has ranks that differ")
        if len({c.label for c in checkpoints}) < len(checkpoints):
            raise ValueError("two checkpoints have the same name: figures could not tell them apart; "
                             "copy one to another name")
        out = args.out or checkpoints[0].path.with_suffix("").with_name(checkpoints[0].label + "-analysis")
        out.mkdir(parents=True, exist_ok=True)
        numbers = measure(checkpoints)
        rows, lines = summary(checkpoints, numbers)
        print(*lines, sep="\n")
        found = {"checkpoints": {c.label: {"args": c.args, "results": c.results} for c in checkpoints}, "table": rows,
                 "matrices": numbers, "curves": curves(checkpoints, out)}
        for name in asked or [s for s in STUDIES if s != "subspace" or len(checkpoints) > 1]:
            found[name] = STUDIES[name](checkpoints, numbers, out)
        text = json.dumps(json.loads(json.dumps(found), parse_float=lambda digits: float(f"{float(digits):.6g}")))
        (out / "analysis.json").write_text(text)
    except (ValueError, OSError) as e:
        print(f"analyze.py: {e}", file=sys.stderr)
        sys.exit(2)
    print(f"\nfigures and analysis.json are in {out}")
    return json.loads(text)


if __name__ == "__main__":
    main()
