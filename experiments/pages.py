"""
Write all tables and figures from experiments/results:

    python experiments/pages.py

A page contains <!-- NAME --> ... <!-- end --> wherever the table NAME belongs.
"""
import re
import textwrap
from fnmatch import fnmatchcase
from functools import cache
from statistics import mean

import claims
import figures
import results
import runs
from claims import PLANTED_RANKS, SETTINGS, TASKS
from figures import effect, units
from results import ROOT, column, deviation, read_csv, read_json, select

PAGES = [ROOT / "README.md", ROOT / "experiments" / "README.md",
         *sorted((ROOT / "experiments" / "results").glob("*.md"))]
NANO, SMOLLM = "nano_runs.csv", "smollm_runs.csv"
VERDICTS = ("supported", "negligible", "contradicted", "inconclusive", "not run yet")
OTHERS = "learning-rates-forgetting-and-intruder-dimensions"
SECTIONS = {"LoRA": "lora", "MultiLoRA": "multilora", "AutoLoRA": "autolora"}
METHODS = {"lora": "LoRA", "multilora": "MultiLoRA, n = 4", "autolora": "AutoLoRA",
           "full": "full fine-tuning"}


def table(head, rows):
    """A Markdown table."""
    lines = []
    for row in (head, ["---"] * len(head), *rows):
        lines.append(f"| {' | '.join(map(str, row))} |")
    return "\n".join(lines)


def spread(values, digits=3, unit=1):
    """Mean ± standard deviation; the mean alone if the values are equal."""
    values = [unit * value for value in values]
    if not values:
        return "not run yet"
    text = f"{mean(values):,.{digits}f}" if digits is not None else f"{mean(values):g}"
    if len(set(values)) > 1:
        text += f" ± {deviation(values):,.{digits}f}"
    return text


def runs_table(head, groups, columns, file, common=None):
    """
    A row for each group of runs, {name: labels}, and a column for each of {head: (column of the
    file, digits)}. With `common`, a column of the file, only the seeds count for which all groups
    have a value there; the head then says which ones.
    """
    seeds = None
    if common:
        seeds = set.intersection(*(set(column(name, common, file)) for name, *_ in groups))
        head = (f"{head[0]} (seeds {min(seeds)} to {max(seeds)})", *head[1:])
    rows = []
    for name, *labels in groups:
        for wanted, *format in columns.values():
            found = column(name, wanted, file)
            labels.append(spread([v for seed, v in found.items() if not seeds or seed in seeds],
                                 *format))
        rows.append(labels)
    return table((*head, *columns), rows)


# Claims ------------------------------------------------------------------------------------------

@cache
def tests():
    return claims.tests()


def means(test):
    """The two groups' means; learning rates need more digits."""
    cells = []
    for value in test.comparison.means():
        cells.append(f"{value:.4f}" if value < 0.02 else f"{value:.3f}")
    return cells


def findings():
    """The main findings, a line each."""
    rows = {}
    for test in tests():
        if test.claim["finding"]:
            rows.setdefault(test.claim["finding"], {})[test.setting] = test
    lines = []
    for finding, own in rows.items():
        smollm = []
        for setting in ("e2e", "mixture"):
            if setting in own:
                task = SETTINGS[setting].partition(", ")[2]
                smollm.append(f"{task}: {outcome(own[setting])}")
        test = own["nano"]
        link = f"[{finding}](#{SECTIONS.get(test.claim['paper'], OTHERS)})"
        lines.append((f"{link} ({test.claim['measure']})", outcome(test),
                      "<br>".join(smollm) or "not tested"))
    return table(("claim (measure)", "nano", "SmolLM2-135M"), lines)


def outcome(test):
    if test.n == 0:
        return "not run yet"
    labels = test.claim["groups"].split("|")
    named = [f"{m} ({label})" for m, label in zip(means(test), labels, strict=True)]
    return (f"**{test.verdict}**: {' and '.join(named)}; {effect(test)}, {units(test)}, "
            f"δ = {test.comparison.delta:g}")


def verdict_counts():
    lines = []
    for setting, name in SETTINGS.items():
        own = [test.verdict for test in tests() if test.setting == setting]
        lines.append((name, len(own), *map(own.count, VERDICTS)))
    return table(("setting", "claims", *VERDICTS), lines)


def all_claims():
    papers = {}
    for test, p in zip(tests(), claims.holm([test.p for test in tests()])):
        cells = ("", "", "", "")
        if test.n:
            p = f"{p:.3f}" if p >= 0.001 else "< 0.001"
            cells = (" and ".join(means(test)), effect(test), units(test), p)
        line = (test.claim["claim"], test.claim["kind"], SETTINGS[test.setting], test.label(),
                *cells, f"{test.comparison.delta:g}", f"**{test.verdict}**", command(test))
        papers.setdefault(f"{test.claim['paper']} ({test.claim['source']})", []).append(line)
    head = ("claim", "kind", "setting", "compared", "means", "effect [95 % interval]", "n",
            "p (Holm)", "δ", "verdict", "runs")
    return "\n\n".join(f"## {paper}\n\n{table(head, lines)}" for paper, lines in papers.items())


def command(test):
    """The arguments of runs.py that make the runs of a claim."""
    grid = runs.read_grid(runs.SETTINGS[claims.MODEL[test.setting]])
    named = []
    for name in dict.fromkeys(test.names):
        if runs.choose(grid, [name]):
            named.append(f"'{name}'" if "*" in name else name)
    if not named:
        return "`planted.py` instead"
    limit = f" --seeds {test.n}" if test.n and test.comparison.unit == "seeds" else ""
    return f"`{claims.MODEL[test.setting]} {' '.join(named)}{limit}`"


def missing_runs():
    lines = []
    for setting in SETTINGS:
        for name, row in runs.read_grid([setting]).items():
            found = set(results.runs(name, f"{claims.MODEL[setting]}_runs.csv"))
            missing = set(row["seeds"]) - found
            if missing and row["measure"] != "no training":
                planned = len(row["seeds"])
                lines.append((name, SETTINGS[setting], planned - len(missing), planned))
    if not lines:
        return "None."
    return table(("runs", "setting", "finished", "planned"), lines)


# Methods, ranks and targets ----------------------------------------------------------------------

NANO_COLUMNS = {"trained parameters": ("parameters", 0), "loss": ("test.mean.loss",),
                "exact match": ("test.mean.exact",)}


def methods():
    """The front page's table of the methods."""
    columns = {task: (f"test.{task}.exact",) for task in TASKS}
    columns |= {"mean": ("test.mean.exact",), "loss": ("test.mean.loss",),
                "trained parameters": ("parameters", 0)}
    return runs_table(("exact match on nano",), METHODS.items(), columns, NANO)


def targets():
    """Rank and targets on both models; a model's column has the seeds that all its rows have."""
    rows = (("q, v", 1, "lora-qv-r1", 1, "lora-qv-r1"), ("q, v", 8, "lora-qv-r8", 4, "lora-qv-r4"),
            ("q, v", 64, "lora-qv-r64", 64, "lora-qv-r64"),
            ("all linear layers", 1, "lora-r1", 1, "lora-all-r1"),
            ("all linear layers", 8, "lora", 16, "lora"),
            ("all linear layers", 64, "lora-r64", "", ""),
            ("attention", 10, "lora-attention", 33, "lora-attention"),
            ("MLP", 8, "lora-mlp", 20, "lora-mlp"), ("full fine-tuning", "", "full", "", "full"))
    nano = common_losses("nano", [row[2] for row in rows])
    smollm = common_losses("e2e", [row[4] for row in rows if row[4]])
    lines = []
    for label, rank, name, smollm_rank, smollm_name in rows:
        losses = smollm.get(smollm_name)
        lines.append((label, rank, spread(nano[name].values()), smollm_rank,
                      spread(losses.values()) if losses else ""))
    return table(("LoRA's targets", "nano: rank", f"loss, seeds 0 to {max(nano['full'])}",
                  "SmolLM2 on E2E: rank", f"loss, seeds 0 to {max(smollm['full'])}"), lines)


def common_losses(setting, names):
    """{name: {seed: loss}} for the seeds that all of these runs have."""
    found = {name: claims.losses(setting, name) for name in names}
    seeds = set.intersection(*map(set, found.values()))
    return {name: {seed: losses[seed] for seed in seeds} for name, losses in found.items()}


def blocks():
    groups = (("lora", "LoRA"), ("lora-learned-s", "LoRA with a learned s"),
              ("lora-random-b", "LoRA with a random B"), ("multilora-n1", "MultiLoRA, n = 1"),
              ("multilora", "MultiLoRA, n = 4"), ("multilora-n8", "MultiLoRA, n = 8"))
    return runs_table(("nano, rank 8",), groups, NANO_COLUMNS, NANO, "test.mean.loss")


def block_shares():
    """MultiLoRA's blocks, mean and standard deviation over the matrices and seeds."""
    lines = []
    for setting in ("nano", "mixture"):
        rows = read_csv(f"{claims.MODEL[setting]}_mixture_blocks.csv")
        line = [SETTINGS[setting], len({row["seed"] for row in rows}), rows[0]["n"]]
        for measure in ("largest", "smallest", "input", "null.input", "output", "null.output"):
            line.append(spread(row[measure] for row in rows))
        lines.append(line)
    return table(("setting", "seeds", "n", "largest share", "smallest share", "φ of inputs",
                  "Gaussians", "φ of outputs", "Gaussians"), lines)


def learning_rates():
    """The learning rates of the sweeps; those that the runs use are bold."""
    lines = []
    for name, label in METHODS.items():
        line = [label.partition(",")[0]]
        for _, file, sweeps, suffix in figures.SWEEPS:
            used = set(column(name + suffix, "lr", file).values())
            cells = []
            for rate, loss in figures.sweep(file, sweeps.get(name, "")).items():
                cells.append(f"**{rate:g}** {loss:.3f}" if rate in used else f"{rate:g} {loss:.3f}")
            line.append(", ".join(cells) or "not swept")
        lines.append(line)
    return table(("learning rate, validation loss", *SETTINGS.values()), lines)


def smollm_e2e():
    columns = {"learning rate": ("lr", None), "trained parameters": ("parameters", 0)}
    before = ["before training", "", ""]
    base = results.runs("lora", SMOLLM)[0]
    for head, measure, *format in (("loss", "mean.loss"), ("BLEU", "bleu", 1),
                                   ("slots named, %", "slots", 1, 100),
                                   ("loss on novels", "text.loss")):
        columns[head] = (f"test.{measure}", *format)
        before.append(spread([base[f"untrained.{measure}"]], *format))
    rows = runs_table(("SmolLM2-135M on E2E",), METHODS.items(), columns, SMOLLM,
                      "test.mean.loss")
    return f"{rows}\n| {' | '.join(before)} |"


def smollm_mixture():
    if not column("lora-mixture", "test.mean.loss", SMOLLM):
        return "The mixture was not run yet."
    columns = {"loss": ("test.mean.loss",), "exact match": ("test.mean.exact",)}
    columns |= {task: (f"test.{task}.exact",) for task in TASKS}
    columns["loss on novels"] = ("test.text.loss",)
    groups = []
    for name, label in METHODS.items():
        seeds = column(f"{name}-mixture", "test.mean.loss", SMOLLM)
        groups.append((f"{name}-mixture", label, len(seeds)))
    return runs_table(("SmolLM2-135M on the mixture", "seeds"), groups, columns, SMOLLM)


# AutoLoRA, ΔW ------------------------------------------------------------------------------------

def found_ranks():
    """Each control, and the ranks found on the same seeds."""
    controls = (("uniform", "equal ranks"), ("random", "random ranks"),
                ("shuffled", "found ranks, shuffled"), ("chance", "ranks from an untrained β"),
                ("null", "ranks from a search with permuted labels"),
                ("first-order", "ranks found without the second term"),
                ("fixed-uniform", "equal ranks, with α/k for both"), ("lora", "8 everywhere"))
    lines = []
    for name, label in controls:
        ours = "fixed-found" if name == "fixed-uniform" else "autolora"
        both = common_losses("nano", (ours, name))
        lines.append((label, spread(column(name, "parameters", NANO).values(), 0), len(both[name]),
                      spread(both[name].values()), spread(both[ours].values())))
    return table(("control on nano", "trained parameters", "seeds", "control's loss",
                  "loss of the ranks found"),
                 lines)


def planted():
    lines = []
    for search, step in dict.fromkeys((r["search"], r["step"]) for r in read_csv("planted.csv")):
        found = zip(*claims.planted_ranks(search, step).values())
        lines.append((search, step, *(spread(ranks, 1) for ranks in found)))
    return table(("search", "steps", *(f"planted {rank}" for rank in PLANTED_RANKS)), lines)


SHARED = {                              # label: file, and pattern of the names of pairs
    "nano, q and v: r8 and r64, two seeds": ("nano_subspaces", "lora-qv-r8 and lora-qv-r64"),
    "nano, q and v: r64 and r64, two seeds": ("nano_subspaces", "lora-qv-r64 and *"),
    "SmolLM2, q and v: r4 and r64, two seeds": ("smollm_subspaces", "lora-qv-r4 and lora-qv-r64"),
    "SmolLM2, q and v: r64 and r64, two seeds": ("smollm_subspaces", "lora-qv-r64 and *"),
    "released GPT-2: r8, different tasks": ("adapters_gpt2", "gpt2-[!s]* and *"),
    "released GPT-2: r8, two runs on Shakespeare": ("adapters_gpt2", "gpt2-s* and *"),
}


def shared_directions():
    lines = []
    for label, (file, pairs) in SHARED.items():
        rows = [r for r in read_csv(f"{file}_pairs.csv") if fnmatchcase(r["checkpoint"], pairs)]
        line = [label, len({(row["a"], row["b"]) for row in rows})]
        for which in ("first", "all"):
            for side in ("input", "output", "random"):
                line.append(f"{mean(row[f'{side}.{which}'] for row in rows):.3f}")
        lines.append(line)
    return table(("ΔW of LoRA", "run pairs", "φ(1, 1): input", "output", "Gaussians",
                  "φ of all: input", "output", "Gaussians"), lines)


def forgetting():
    lines = []
    for name in claims.forgetting_kinds():
        run = results.runs(name, NANO)[0]
        values = (claims.losses("nano", name, "instruct"), claims.losses("nano", name, "skills"),
                  results.study(claims.INTRUDERS_OF, name, "real"),
                  results.study(claims.INTRUDERS_OF, name, "null"))
        lines.append((run["method"], f"{run['lr']:g}", run.get("rank", ""), len(values[0]),
                      *(spread(found.values()) for found in values)))
    return table(("method", "learning rate", "rank", "seeds", "loss on instruct", "loss on skills",
                  "intruders", "intruders, Gaussian ΔW"), lines)


# Adapters trained by others, sweeps, time --------------------------------------------------------

ADAPTERS = (                            # file, checkpoint, what it is
    ("medium", "gpt2_md_lora_e2e", "GPT-2 medium on E2E, by the LoRA authors"),
    ("roberta", "roberta_base_lora_mnli", "RoBERTa base on MNLI, by the LoRA authors"),
    ("therapy", "gpt2-medium-therapy", "GPT-2 medium, a chat assistant's texts"),
    ("gpt2", "gpt2-great", "GPT-2, table rows as text"),
    ("gpt2", "gpt2-tigrinya", "GPT-2, Tigrinya"),
    ("gpt2", "gpt2-chat", "GPT-2, a demonstration"),
    ("gpt2", "gpt2-shakespeare-run1", "GPT-2, Shakespeare, run 1"),
    ("gpt2", "gpt2-shakespeare-run2", "GPT-2, Shakespeare, run 2"))
MEASURES = {"top1": ("σ₁ / Σσ", 2), "effective_rank": ("effective rank", 1),
            "projection": ("‖UᵀWV‖", 2), "amplification": ("‖ΔW‖ / ‖UᵀWV‖", 1)}


def adapters():
    """Each measure and that of a Gaussian, by target and over all of them."""
    lines = []
    for file, checkpoint, label in ADAPTERS:
        rows = select(read_csv(f"adapters_{file}.csv"), checkpoint=checkpoint)
        groups = {"all": rows}
        for row in rows:
            groups.setdefault(row["target"], []).append(row)
        for target, own in groups.items():
            line = [label, target, own[0]["r"]]
            for measure, (_, digits) in MEASURES.items():
                for key in (measure, f"null.{measure}"):
                    values = [row[key] for row in own if key in row]
                    line.append(spread(values, digits) if values else "")
            lines.append(line)
    head = ["adapter", "ΔW of", "r"]
    for label, _ in MEASURES.values():
        head += [label, "Gaussian"]
    return table(head, lines)


def all_learning_rates():
    lines = []
    for setting, title in SETTINGS.items():
        for name, row in runs.read_grid([setting]).items():
            losses = column(name, "mean.loss.after", f"{claims.MODEL[setting]}_runs.csv")
            if row["learning_rates"] and losses:
                sweep, _, rate = name.rpartition("-lr")
                lines.append((title, sweep, rate, len(losses), spread(losses.values())))
    return table(("setting", "sweep", "learning rate", "seeds", "validation loss"), lines)


def training_steps():
    lines = []
    for name, row in read_json("bench_cpu.json")["training"].items():
        lines.append((name, f"{row['parameters']:,}", *ratio(row), f"{row['saved_MB']:.0f}"))
    return table(("a training step", "trained parameters", "time / LoRA's", "quartiles",
                  "saved for backward, MB"), lines)


def forward_passes():
    lines = []
    for shape, rows in read_json("bench_cpu.json")["latency"].items():
        for name, row in rows.items():
            lines.append((name, shape, *ratio(row)))
    return table(("a forward pass", "rows x tokens", "time / the base's", "quartiles"), lines)


def ratio(row):
    low, high = row["quartiles"]
    return f"{row['ratio']:.3f}", f"{low:.3f} to {high:.3f}"


# Into the pages ----------------------------------------------------------------------------------

def last_screen():
    """For the front page: the end of what train.py prints."""
    return textwrap.indent((results.RESULTS / "last_screen.txt").read_text().rstrip(), "    ")


BLOCKS = {f.__name__: f for f in (
    findings, verdict_counts, all_claims, missing_runs, methods, targets, blocks, block_shares,
    learning_rates, all_learning_rates, smollm_e2e, smollm_mixture, found_ranks, planted,
    shared_directions, forgetting, adapters, training_steps, forward_passes, last_screen)}


def fill(text):
    """`text` with a fresh table in every <!-- NAME --> ... <!-- end -->."""
    def block(match):
        if match[1] not in BLOCKS:
            raise ValueError(f"unknown table {match[1]}: choose from {' '.join(BLOCKS)}")
        return f"<!-- {match[1]} -->\n{BLOCKS[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- (?!end )([\w-]+) -->\n.*?<!-- end -->", block, text, flags=re.S)


def main():
    figures.draw_all(tests())
    for path in PAGES:
        path.write_text(fill(path.read_text()))


if __name__ == "__main__":
    main()
