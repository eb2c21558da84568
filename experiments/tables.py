"""
The README's tables, written from experiments/results into the places that the README marks for them:

    python experiments/tables.py
"""
import json
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
    """The runs of a name, one for each seed."""
    found = [r for n, r in NANO.items() if re.fullmatch(re.escape(name) + r"-seed\d", n)]
    assert len(found) == 3, name
    return found


def over_seeds(name, of=exact, digits=3):
    return pm(map(of, runs(name)), digits)


def rows(head, *lines):
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in (head, ["---"] * len(head), *lines))


def methods():
    names = ("lora", "multilora", "autolora", "full")
    return rows(("task", "before", "LoRA, r = 16", "MultiLoRA, r = 16, n = 4", "AutoLoRA, k = 16", "full fine-tuning"), *(
        (task, f"{exact(NANO['lora-seed0'], task, 'before'):.3f}", *(over_seeds(n, lambda r: exact(r, task)) for n in names))
        for task in ("instruct", "arith", "infer", "facts", "data2text", "mean")))


def learning_rates():
    lines = []
    for method in ("lora", "multilora", "full"):
        tried = sorted((r["lr"], exact(r)) for n, r in NANO.items() if n == f"{method}-seed0" or n.startswith(f"{method}-lr"))
        lines.append((method, ", ".join(f"{lr:g}: {e:.3f}" for lr, e in tried)))
    return rows(("method", "learning rate: mean exact match"), *lines)


def ranks():
    return rows(("rank r", "1", "2", "8", "16", "64"), *(
        (text, *(over_seeds(name) if name else "" for name in names)) for text, names in (
            ("on q and v", ("lora-qv-r1", "", "lora-qv-r8", "", "lora-qv-r64")),
            ("on all six", ("lora-all-r1", "lora-all-r2", "", "lora", "lora-all-r64")))))


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


def single():
    one = lambda method, task: over_seeds(f"{method}-{task}")
    mixed = lambda method, task: over_seeds(method, lambda r: exact(r, task))
    return rows(("task", "LoRA, alone", "MultiLoRA, alone", "LoRA, in the mixture", "MultiLoRA, in the mixture"), *(
        (t, one("lora", t), one("multilora", t), mixed("lora", t), mixed("multilora", t)) for t in ("instruct", "arith", "infer")))


def found_ranks():
    return rows(("ranks", "parameters", "held-out loss", "exact match"), *(
        (label, over_seeds(name, lambda r: r["parameters"], 0), over_seeds(name, loss), over_seeds(name)) for name, label in (
            ("autolora", "found"), ("autolora-first-order", "found, first-order"), ("uniform", "uniform"), ("random", "random"),
            ("lora", "16 everywhere"))))


def planted():
    lines = []
    for name in ("default", "first-order", "beta_lr 0.003", "64 rows", "sigmoid", "none"):
        for step in (30, 100, 300, 1000) if name == "default" else (100, 300):
            at = [next(h for h in s if h["step"] == step)["rank"] for s in PLANTED["runs"][name]["seeds"]]
            lines.append((f"{name}, {step} steps", *(pm(r, 1) for r in zip(*at))))
    return rows(("search", *(f"planted {r}" for r in (0, 1, 2, 4, 6))), *lines)


def real_text():
    table = {"lora-small": ("A: GPT-2 of 4 layers, width 192, after 1.0 M tokens of novels", "LoRA", "300 × 32"),
             "auto-small": ("A", "AutoLoRA, k = 16: 92,928 of 221,184 parameters", "30 (search) and 100 × 16"),
             "lora-read": ("B: A after 0.5 M tokens more, half of them descriptions", "LoRA", "200 × 32"),
             "lora-nano": ("nano (loss per byte, not per token)", "LoRA", "300 × 32"), "full-nano": ("nano", "all", "1500 × 16")}
    first = lambda results: next(iter(results.values()))["loss"]
    return rows(("base", "trained", "steps × rows", "loss before", "after"), *(
        (*text, f"{first(E2E[n]['before']):.3f}", f"{first(E2E[n]['after']):.3f}") for n, text in table.items()))


def four_tasks():
    r = E2E["multi-small"]
    return rows(("task", "loss before", "after", "exact match"), *(
        (t, f"{r['before'][t]['loss']:.3f}", f"{x['loss']:.3f}", f"{x['exact']:.3f}") for t, x in r["after"].items()))


def share(method, what, null=False):
    """Of the runs of a method: each seed's mean over its matrices; or the Gaussian's over all."""
    row = METHODS["table"][f"{method}, 3 seeds"]
    return mean(row["null"][what]) if null else row[what]


def phi(a, b, side, what="phi", i=0):
    """φ of two runs on q and v, mean over the matrices: of the first direction (i = 0) or of all (1)."""
    return mean(x[f"{side} {what}"][i] for x in SUBSPACES["subspace"][f"lora-qv-{a} and lora-qv-{b}"].values())


def amplified(name, target):
    """Of one run's ΔW of a target, mean over the layers: amplification, and a Gaussian's."""
    of = [x for n, x in SUBSPACES["matrices"][name].items() if n.endswith(target)]
    return mean(x["amplification"] for x in of), mean(x["null"]["amplification"] for x in of)


def claims():
    step, two = BENCH["training"], ("r8-seed0", "r64-seed0")
    ratio = lambda name: f"{step[name]['ratio']:.2f} ({quartiles(step[name], 2)})"
    shape = next(iter(BENCH["latency"]))
    late = lambda name: f"{BENCH['latency'][shape][name]['ratio']:.2f}"
    mega = lambda name, what: f"{step[name][what]:.1f}"
    ranks_found = [r["ranks"] for r in runs("autolora")]
    alike = pm((correlation(a, b) for a, b in combinations(ranks_found, 2)), 2)
    gain = lambda task: (mean(exact(r, task) for r in runs("multilora")) - mean(exact(r, task) for r in runs("lora")),
                         mean(map(exact, runs(f"multilora-{task}"))) - mean(map(exact, runs(f"lora-{task}"))))
    gains = "; ".join(f"{t} {gain(t)[0]:+.3f} and {gain(t)[1]:+.3f}" for t in ("instruct", "arith", "infer"))
    amp, null = amplified("lora-qv-r8-seed0", "q")
    table = [
        ("LoRA", "is on par with full fine-tuning or better (tables 2 to 4)", f"{over_seeds('lora')}", f"full: {over_seeds('full')}", "LORA"),
        ("", "has fewer trainable parameters, a smaller optimizer state and checkpoint: 1/10,000 and 1/3 of the memory for GPT-3",
         f"AdamW {mega('LoRA', 'optimizer_MB')} MB, file {mega('LoRA', 'file_MB')} MB",
         f"full: {mega('full fine-tuning', 'optimizer_MB')} and {mega('full fine-tuning', 'file_MB')} MB", "holds"),
        ("", "trains 25 % faster (GPT-3)", "1", f"full: {ratio('full fine-tuning')}", "holds"),
        ("", f"adds no latency once merged (table 1), forward pass of {shape}", late("LoRA, merged"),
         f"adapter layers: {late('adapter layers')}; unmerged: {late('LoRA')}", "holds"),
        ("", "r = 1 or 2 is enough on q and v (table 6: 73.4 for r = 1, 73.5 for 64)",
         f"r = 1: {over_seeds('lora-qv-r1')}; r = 64: {over_seeds('lora-qv-r64')}", f"all six, r = 1: {over_seeds('lora-all-r1')}", "R12"),
        ("", "q and v together beat one matrix at equal parameters (table 5: 73.7; q 70.4, k 70.0, v 73.0, o 73.2)",
         f"q, v: {over_seeds('lora-qv-r8')}", "; ".join(f"{t}: {over_seeds(f'lora-{t}-r16')}" for t in "qkvo"), "QV"),
        ("", "runs of r = 8 and 64 share their top directions, the others not (figure 3: φ(1, 1) > 0.5)",
         f"φ(1, 1) {phi(*two, 'V'):.2f} (input), {phi(*two, 'U'):.2f} (output); φ(8, 64) {phi(*two, 'V', i=1):.2f}, {phi(*two, 'U', i=1):.2f}",
         f"two Gaussians: {phi(*two, 'V', 'null'):.2f}, {phi(*two, 'U', 'null'):.2f}; {phi(*two, 'V', 'null', 1):.2f}, {phi(*two, 'U', 'null', 1):.2f}",
         "R8"),
        ("", "two seeds too (figure 4)", *(f"φ(1, 1) {phi('r64-seed0', 'r64-seed1', 'V', w):.2f} (input), {phi('r64-seed0', 'r64-seed1', 'U', w):.2f} (output); "
                                         f"φ(64, 64) {phi('r64-seed0', 'r64-seed1', 'V', w, 1):.2f}, {phi('r64-seed0', 'r64-seed1', 'U', w, 1):.2f}"
                                         for w in ("phi", "null")), "SEEDS"),
        ("", "ΔW_q amplifies directions that W does not emphasise (table 7: 21.6 times for r = 4)", f"{amp:.1f} times, r = 8",
         f"a Gaussian ΔW of that norm: {null:.1f}", "AMP"),
        ("MultiLoRA", "LoRA's ΔW is dominated by its top singular vectors, MultiLoRA's and full fine-tuning's less",
         f"σ₁ / Σσ: LoRA {pm(share('lora', 'top1'))}, MultiLoRA {pm(share('multilora', 'top1'))}, full {pm(share('full', 'top1'))}",
         f"Gaussians: {share('lora', 'top1', True):.3f}, {share('multilora', 'top1', True):.3f}, {share('full', 'top1', True):.3f}", "TOP"),
        ("", "does better than LoRA of as many parameters on a mixture", over_seeds("multilora"), f"LoRA: {over_seeds('lora')}", "MIX"),
        ("", "and more so than on single tasks", f"its gain, in the mixture and alone: {gains}", "three seeds each, spreads in the table below", "SINGLE"),
        ("", "more blocks do better", f"n = 1: {over_seeds('multilora-n1')}; n = 8: {over_seeds('multilora-n8')}", f"LoRA: {over_seeds('lora')}", "BLOCKS"),
        ("", "is as fast as LoRA; takes more memory", f"step {ratio('MultiLoRA, n = 4')}; saved for backward {mega('MultiLoRA, n = 4', 'saved_MB')} MB",
         f"LoRA: 1; {mega('LoRA', 'saved_MB')} MB", "COST"),
        ("AutoLoRA", "finds ranks that differ by layer", f"{min(map(min, ranks_found))} to {max(map(max, ranks_found))} of 16; correlation "
         f"of two seeds' ranks {alike}", "0 for ranks by chance", "RANKS"),
        ("", "beats LoRA of equal ranks and of random ones", over_seeds("autolora"),
         f"equal: {over_seeds('uniform')}; random: {over_seeds('random')}", "BEATS"),
        ("", "needs the hypergradient's second term", f"with it {over_seeds('autolora')}", f"first-order: {over_seeds('autolora-first-order')}", "SECOND"),
    ]
    return rows(("method", "claim", "here", "control", "verdict"), *table)


def quartiles(r, digits=3):
    return f"{r['quartiles'][0]:.{digits}f} to {r['quartiles'][1]:.{digits}f}"


def steps():
    return rows(("a training step", "time / LoRA's", "quartiles", "saved for backward, MB", "AdamW's state, MB", "file, MB"), *(
        (name, f"{r['ratio']:.3f}", quartiles(r), f"{r['saved_MB']:.0f}", f"{r['optimizer_MB']:.1f}", f"{r['file_MB']:.1f}")
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
