"""
The README's tables, written from experiments/results into the places that the README marks for them:

    python experiments/tables.py
"""
import json
import random
import re
from itertools import combinations
from pathlib import Path
from statistics import correlation, mean, stdev

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"
read = lambda name: json.loads((RESULTS / f"{name}.json").read_text())
NANO, E2E, PLANTED, BENCH = read("nano")["runs"], read("e2e")["runs"], read("planted"), read("bench_cpu")
METHODS, SUBSPACES = read("nano_methods"), read("nano_subspaces")


def exact(run, task="mean", when="after"):
    return mean(r["exact"] for r in run[when].values()) if task == "mean" else run[when][task]["exact"]


def loss(run):
    return mean(r["loss"] for r in run["after"].values())


def pm(values, digits=3):
    values = list(values)
    return f"{mean(values):,.{digits}f} ± {stdev(values):,.{digits}f}".removesuffix(" ± 0")


def runs(name):
    """The runs of a name, in the order of their seeds."""
    found = [r for n, r in sorted(NANO.items()) if re.fullmatch(re.escape(name) + r"-seed\d", n)]
    assert len(found) >= 3 and [r["seed"] for r in found] == list(range(len(found))), name
    return found


def over_seeds(name, of=exact, digits=3):
    return pm(map(of, runs(name)), digits)


def ahead(name, other):
    """By how much the first runs' exact match is above the second's, seed by seed, and on how many seeds it is."""
    gaps = [exact(a) - exact(b) for a, b in zip(runs(name), runs(other))]
    return f"{mean(gaps):+.3f} ± {stdev(gaps):.3f}, on {sum(g > 0 for g in gaps)} of {len(gaps)} seeds"


def rows(head, *lines):
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in (head, ["---"] * len(head), *lines))


def methods():
    names = ("lora", "multilora", "autolora", "full")
    return rows(("task", "before", "LoRA, r = 16", "MultiLoRA, r = 16, n = 4", "AutoLoRA, k = 16", "full fine-tuning"), *(
        (task, f"{exact(NANO['lora-seed0'], task, 'before'):.3f}", *(over_seeds(n, lambda r: exact(r, task)) for n in names))
        for task in ("instruct", "arith", "infer", "facts", "data2text", "mean")))


def tried_rates(method, what="lr"):
    """{learning rate: mean exact match} of seed 0."""
    names = re.compile(rf"{method}(-{what}[\de-]+?)?(-seed0)?")
    return {r[what]: exact(r) for n, r in NANO.items() if names.fullmatch(n)}


def learning_rates():
    lines = []
    for method, what in (("lora", "lr"), ("multilora", "lr"), ("full", "lr"), ("autolora", "lr"), ("autolora", "beta_lr")):
        tried = [f"{lr:g}: {e:.3f}" for lr, e in sorted(tried_rates(method, what).items())]
        lines.append((f"{method}, β" if what == "beta_lr" else method, ", ".join(tried)))
    return rows(("method", "learning rate: mean exact match"), *lines)


def ranks():
    return rows(("rank r", "on q and v", "on all six"), *(
        (r, over_seeds(f"lora-qv-r{r}") if r != 16 else "", over_seeds(f"lora-all-r{r}" if r != 16 else "lora")) for r in (1, 2, 4, 8, 16, 64)))


def targets():
    return rows(("targets", "rank", "parameters", "held-out loss", "exact match"), *(
        (text, r, f"{runs(name)[0]['parameters']:,}", over_seeds(name, loss), over_seeds(name)) for text, r, name in (
            ("q", 16, "lora-q-r16"), ("k", 16, "lora-k-r16"), ("v", 16, "lora-v-r16"), ("o", 16, "lora-o-r16"),
            ("q, v", 8, "lora-qv-r8"), ("q, k, v, o", 4, "lora-qkvo-r4"))))


def blocks():
    return rows(("MultiLoRA, rank 16 in all", "held-out loss", "exact match"), *(
        (text, over_seeds(name, loss), over_seeds(name)) for text, name in (
            ("LoRA", "lora"), ("n = 1", "multilora-n1"), ("n = 2", "multilora-n2"), ("n = 4", "multilora"), ("n = 8", "multilora-n8"),
            ("n = 4, a vector s", "multilora-vector"))))


def alone(method, task):
    """The runs of one task alone; LoRA's at the better of two learning rates."""
    return max((runs(f"{method}-{task}{lr}") for lr in ["", "-lr3e-3"][:1 + (method == "lora")]), key=lambda r: mean(map(exact, r)))


def single():
    mixed = lambda method, task: over_seeds(method, lambda r: exact(r, task))
    return rows(("task", "LoRA, alone, learning rate 0.01", "0.003", "MultiLoRA, alone", "LoRA, in the mixture", "MultiLoRA, in the mixture"), *(
        (t, over_seeds(f"lora-{t}"), over_seeds(f"lora-{t}-lr3e-3"), over_seeds(f"multilora-{t}"), mixed("lora", t), mixed("multilora", t))
        for t in ("instruct", "arith", "infer")))


def found_ranks():
    lines = []
    for rate, end in (("0.01", ""), ("0.03", "-beta_lr3e-2")):
        found = f"autolora{end}"
        for label, name in (("found", found), ("equal", f"uniform{end}"), ("random", f"random{end}"), ("found, shuffled", f"shuffled{end}"),
                            ("found, first-order", "autolora-first-order"), ("16 everywhere", "lora"))[:None if not end else 4]:
            lines.append((rate, label, over_seeds(name, lambda r: r["parameters"], 0), over_seeds(name, loss), over_seeds(name),
                          ahead(found, name) if name != found else ""))
            rate = ""
    return rows(("β's rate", "ranks", "parameters", "held-out loss", "exact match", "found is ahead by"), *lines)


def planted():
    lines = []
    for name in ("default", "first-order", "beta_lr 0.03", "64 rows", "sigmoid", "none"):
        for step in (30, 100, 300, 1000) if name == "default" else (100, 300):
            at = [next(h for h in s if h["step"] == step)["rank"] for s in PLANTED["runs"][name]["seeds"]]
            lines.append((f"{name}, {step} steps", *(pm(r, 1) for r in zip(*at))))
    return rows(("search", *(f"planted {r}" for r in (0, 1, 2, 4, 6))), *lines)


def real_text():
    lines = []
    for name, base in (("lora-A", "A"), *((f"{m}-B", "B") for m in ("lora", "multilora", "autolora", "full")),
                       ("lora-nano", "nano (loss per byte)"), ("full-nano", "nano")):
        r = E2E[name]
        before, after = (next(iter(r[when].values()))["loss"] for when in ("before", "after"))
        search = f"{r['search_steps']} (search), " if "search_steps" in r else ""
        lines.append((base, r["method"], f"{r['parameters']:,}" if "parameters" in r else "all",
                      f"{search}{r['steps']} × {r['batch_size']}", f"{before:.3f}", f"{after:.3f}"))
    return rows(("base", "method", "trained", "steps × rows", "loss before", "after"), *lines)


def four_tasks():
    r = E2E["four-B"]
    return rows(("task", "loss before", "after", "exact match"), *(
        (t, f"{r['before'][t]['loss']:.3f}", f"{x['loss']:.3f}", f"{x['exact']:.3f}") for t, x in r["after"].items()))


def share(method, what, null=False):
    """Of the runs of a method: each seed's mean over its matrices; or the Gaussian's over all."""
    row, = (r for label, r in METHODS["table"].items() if label.startswith(f"{method}, "))
    return mean(row["null"][what]) if null else row[what]


def phi(pair, side, what="phi", i=0):
    """φ over pairs of runs on q and v, mean over the matrices ± over the pairs: of the first direction (i = 0) or of all (1)."""
    by_pair = {}
    for key, x in SUBSPACES["subspace"][pair].items():
        by_pair.setdefault(key.rsplit(", ", 1)[0], []).append(x[f"{side} {what}"][i])
    return pm(map(mean, by_pair.values()), 2)


def table_7(key, null=False):
    """A column of LoRA's table 7 for q at r = 8: mean over the layers ± over the seeds."""
    of = lambda run: [x["null"] if null else x for n, x in SUBSPACES["matrices"][f"lora-qv-r8-seed{run}"].items() if n.endswith("q")]
    return pm((mean(x[key] for x in of(seed)) for seed in range(3)), 1)


def by_chance(found, draws=2000):
    """Mean correlation of every two of these lists of ranks, the standard deviation of that mean where they are shuffled, and its share."""
    rng, of = random.Random(0), lambda lists: mean(correlation(a, b) for a, b in combinations(lists, 2))
    shuffled = [of([rng.sample(r, len(r)) for r in found]) for _ in range(draws)]
    return of(found), stdev(shuffled), mean(x >= of(found) for x in shuffled)


def claims():
    step, search = BENCH["training"], BENCH["training"]["AutoLoRA's search, forward"]
    pair, same = "lora-qv-r8, 3 seeds and lora-qv-r64, 3 seeds", "lora-qv-r64, 3 seeds, among themselves"
    ratio = lambda r: f"{r['ratio']:.2f} ({quartiles(r, 2)})"
    shape = next(iter(BENCH["latency"]))
    late = lambda name: ratio(BENCH["latency"][shape][name])
    of = lambda name, what: f"{step[name][what]:,.1f}"
    size = lambda name: f"{step[name]['parameters']:,} trained, AdamW {of(name, 'optimizer_MB')} MB, file {of(name, 'file_MB')} MB"
    both = lambda pair, what, i: f"{phi(pair, 'V', what, i)} (input), {phi(pair, 'U', what, i)} (output)"
    alike = lambda name: "{:.2f} (by chance 0 ± {:.2f}; p = {:.3f})".format(*by_chance([r["ranks"] for r in runs(name)]))
    found = [r["ranks"] for r in runs("autolora")]
    gain = lambda t: (mean(exact(r, t) for r in runs("multilora")) - mean(exact(r, t) for r in runs("lora")),
                      mean(map(exact, alone("multilora", t))) - mean(map(exact, alone("lora", t))))
    gains = "; ".join("{} {:+.3f}, {:+.3f}".format(t, *gain(t)) for t in ("instruct", "arith", "infer"))
    top = lambda method, null=False: share(method, "top1", null)
    times = lambda method: f"{mean(top(method)) / top(method, True):.1f}"
    at = lambda name: " ".join(f"{mean(next(h for h in s if h['step'] == 300)['rank'][i] for s in PLANTED['runs'][name]['seeds']):.1f}"
                               for i in range(5))
    table = [
        ("LoRA", "on par with full fine-tuning or better (tables 2 to 4)", f"r = 16: {over_seeds('lora')}; r = 64: {over_seeds('lora-all-r64')}",
         f"full: {over_seeds('full')}; ahead of r = 16 by {ahead('full', 'lora')}, of r = 64 by {ahead('full', 'lora-all-r64')}"),
        ("", "fewer trained parameters (1/10,000 of GPT-3's), smaller optimizer state and checkpoint †", f"{size('LoRA')}", f"full: {size('full fine-tuning')}"),
        ("", "faster steps (25 % for GPT-3) †", "1", f"full: {ratio(step['full fine-tuning'])}"),
        ("", f"no latency once merged (table 1); forward pass of {shape}, time / the base's †", f"{late('LoRA, merged')}",
         f"adapter layers: {late('adapter layers')}; LoRA unmerged: {late('LoRA')}"),
        ("", "r = 1 or 2 is enough (table 6: q and v 73.4 at r = 1, 73.5 at 64)",
         f"q and v, r = 1, 2: {over_seeds('lora-qv-r1')}, {over_seeds('lora-qv-r2')}; all six: {over_seeds('lora-all-r1')}, {over_seeds('lora-all-r2')}",
         f"r = 64: q and v {over_seeds('lora-qv-r64')}; all six {over_seeds('lora-all-r64')}"),
        ("", "q and v together beat one matrix at equal parameters (table 5: 73.7; q 70.4, k 70.0, v 73.0, o 73.2; all four 73.7)",
         f"q, v: {over_seeds('lora-qv-r8')}", "; ".join(f"{t}: {over_seeds(f'lora-{t}-r16')}" for t in "qkvo") + f"; all four: {over_seeds('lora-qkvo-r4')}"),
        ("", "r = 8 and r = 64 share their top direction (figure 3: φ(1, 1) > 0.5)", f"φ(1, 1): {both(pair, 'phi', 0)}", f"Gaussians: {both(pair, 'null', 0)}"),
        ("", "and no others", f"φ(8, 64): {both(pair, 'phi', 1)}", f"Gaussians: {both(pair, 'null', 1)}"),
        ("", "two seeds of r = 64 share top directions (figure 4)", f"φ(1, 1): {both(same, 'phi', 0)}", f"Gaussians: {both(same, 'null', 0)}"),
        ("", "ΔW_q amplifies directions that W does not emphasise (table 7, r = 4: ‖ΔW‖ = 6.91 is 21.6 times ‖UᵀWV‖ = 0.32; with W's top "
         "directions for U and V that is 21.67, with random ones 0.02)",
         f"r = 8: {table_7('amplification')} times ‖UᵀWV‖ = {table_7('projection')}; with W's {table_7('top_W')}",
         f"Gaussian ΔW: {table_7('amplification', True)} times ‖UᵀWV‖ = {table_7('projection', True)}"),
        ("MultiLoRA", "LoRA's ΔW is dominated by its top singular vectors, MultiLoRA's and full fine-tuning's less",
         f"σ₁ / Σσ: LoRA {pm(top('lora'))}, MultiLoRA {pm(top('multilora'))}, full {pm(top('full'))}",
         f"Gaussians: {top('lora', True):.3f}, {top('multilora', True):.3f}, {top('full', True):.3f}; so "
         f"{times('lora')}, {times('multilora')} and {times('full')} times"),
        ("", "better than LoRA of as many parameters on a mixture", over_seeds("multilora"), f"LoRA: {over_seeds('lora')}; MultiLoRA is ahead by {ahead('multilora', 'lora')}"),
        ("", "by more than on single tasks", f"gain over LoRA, in the mixture and alone: {gains}", "alone, LoRA at the better of two learning rates; spreads below"),
        ("", "more blocks do better", f"n = 2: {over_seeds('multilora-n2')}; 4: {over_seeds('multilora')}; 8: {over_seeds('multilora-n8')}",
         f"n = 1: {over_seeds('multilora-n1')}; n = 8 is ahead of it by {ahead('multilora-n8', 'multilora-n1')}"),
        ("", "as fast as LoRA, at more memory †", f"step {ratio(step['MultiLoRA, n = 4'])}; saved for backward {of('MultiLoRA, n = 4', 'saved_MB')} MB",
         f"LoRA: 1; {of('LoRA', 'saved_MB')} MB"),
        ("AutoLoRA", "layers need different ranks, and it finds them", f"{min(map(min, found))} to {max(map(max, found))} of 16; correlation of two seeds' "
         f"ranks {alike('autolora')}", f"β's rate 0.03: {alike('autolora-beta_lr3e-2')}"),
        ("", "beats LoRA of equal and of random ranks", f"{over_seeds('autolora')}; β's rate 0.03: {over_seeds('autolora-beta_lr3e-2')}",
         f"equal: {over_seeds('uniform')}; {over_seeds('uniform-beta_lr3e-2')}. random: {over_seeds('random')}; {over_seeds('random-beta_lr3e-2')}"),
        ("", "needs the hypergradient's second term", over_seeds("autolora"),
         f"first-order: {over_seeds('autolora-first-order')}; the second term is ahead by {ahead('autolora', 'autolora-first-order')}"),
        ("", "softmax is better than σ or neither (ablation); here: ranks found in 300 steps where 0, 1, 2, 4, 6 are planted", at("default"), f"σ: {at('sigmoid')}; neither: {at('none')}"),
        ("", "cheaper than trying ranks one by one †", f"a search step is {ratio(search)} of LoRA's, so 200 cost as much as a run of 600",
         f"six ranks: six runs; rank 16 everywhere: {over_seeds('lora')}"),
    ]
    return rows(("method", "claim", "here", "control", "verdict"), *((*row, verdict) for row, verdict in zip(table, VERDICTS, strict=True)))


# one for each row above, by who read its numbers
VERDICTS = [
    "does not hold here at r = 16; at r = 64 little is missing", "holds", "holds", "holds, by construction; that adapter layers cost more is within the noise",
    "does not hold here: more rank helps", "holds, and all four are within its spread", "weaker here: above chance, below 0.5",
    "does not hold here: more than chance (but 64 of 128 directions hold half of any)", "holds weakly: above chance, far from 1",
    "holds, but weaker: W's are 5 times ΔW's (there 68), ΔW's 3 times random ones (16). A random ΔW amplifies more, as it would there",
    "holds, for MultiLoRA by little; full's share is small because its rank is large: for its rank it is the most concentrated",
    "undecided: within the spread", "undecided: within the spread", "undecided: within the spread", "time holds; no more memory in this form",
    "does not hold here: they differ, but other seeds find others", "undecided: over equal ranks no gain beyond the spread",
    "undecided: within the spread", "does not hold here: without softmax they follow the planted ones better",
    "holds; but rank 16 everywhere is as good"]


def quartiles(r, digits=3):
    return f"{r['quartiles'][0]:.{digits}f} to {r['quartiles'][1]:.{digits}f}"


def steps():
    return rows(("a training step", "trained", "time / LoRA's", "quartiles", "saved for backward, MB", "AdamW's state, MB", "file, MB"), *(
        (name, f"{r['parameters']:,}", f"{r['ratio']:.3f}", quartiles(r), f"{r['saved_MB']:.0f}", f"{r['optimizer_MB']:.1f}", f"{r['file_MB']:.1f}")
        for name, r in BENCH["training"].items()))


def latency():
    shapes = list(BENCH["latency"])
    return rows(("a forward pass, time / the base's", *shapes), *(
        (name, *(f"{BENCH['latency'][s][name]['ratio']:.3f} ({quartiles(BENCH['latency'][s][name])})" for s in shapes))
        for name in BENCH["latency"][shapes[0]]))


def generation():
    return rows(("generation", "time / ours with the cache", "quartiles"), *(
        (name, f"{r['ratio']:.2f}", quartiles(r, 2)) for name, r in BENCH["generation"].items()))


def printed(name):
    return f"    {(RESULTS / f'{name}.txt').read_text().rstrip()}".replace("\n", "\n    ").replace("    \n", "\n")


BLOCKS = {f.__name__: f for f in (claims, methods, learning_rates, ranks, targets, blocks, single, found_ranks, planted, real_text,
                                  four_tasks, steps, latency, generation)}
BLOCKS |= {name: lambda name=name: printed(name) for name in ("nano_methods", "nano_subspaces")}


def fill(text):
    """`text` with every <!-- name --> ... <!-- end --> holding its table. Raises ValueError for a name that is none."""
    def table(match):
        if match[1] not in BLOCKS:
            raise ValueError(f"no table {match[1]}: choose from {' '.join(BLOCKS)}")
        return f"<!-- {match[1]} -->\n{BLOCKS[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- (?!end )(\w+) -->\n.*?<!-- end -->", table, text, flags=re.S)


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(fill(path.read_text()))
