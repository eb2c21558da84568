"""
Run the experiments. runs.csv is the grid of all runs; GNU make starts those that are missing. Then
the calls of analyze.py in studies.csv follow.

    python experiments/runs.py nano                         # four to five hours on two cores
    python experiments/runs.py nano lora full --seeds 4     # some groups, such as a claim's
    python experiments/runs.py smollm --list                # print the commands and run nothing
    python experiments/runs.py medium --shared . --jobs 1   # GPT-2 medium: see gpt2_medium.sh
    python experiments/runs.py adapters                     # analyse adapters trained by others
    python experiments/runs.py nano --quick                 # rehearse everything on a small scale

Each group of runs.csv is trained with several seeds, and with several learning rates if the table
gives them. Checkpoints and logs are written to out/NAME, the numbers to out/NAME/results, which
claims.py --results reads. With --results experiments/results, the numbers replace those of the same
runs in the published CSV files; printed tables and figures then show only the runs in out/NAME. A
file RUN.done marks what has finished: an interrupted call continues there, and unfinished runs
resume from their checkpoints. RUN.commit contains the commit of the code.
"""
import argparse
import csv
import lzma
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import results
from results import ROOT

FIGURES = ROOT / "experiments" / "figures"
SETTINGS = {"nano": ["nano"], "smollm": ["e2e", "mixture"], "medium": ["medium"], "adapters": []}
# Flags that all runs of a setting share, and those that make a rehearsal short
FLAGS = {
    "nano": "--steps 300 --batch_size 32 --grad_accum 2 --beta2 0.98 --warmup 0.2 --eval_rows 20 "
            "--eval_every 300",
    "e2e": "--data {shared}/data/e2e --batch_size 8 --eval_rows 16 --eval_every 50 --dtype bf16 "
           "--steps 150",
    "mixture": "--data mixture --batch_size 32 --eval_rows 20 --eval_every 100 --dtype bf16 "
               "--steps 100",
    "medium": "--model gpt2-medium --data {shared}/data/e2e --steps 26290 --batch_size 8 "
              "--warmup 0.019 --label_smoothing 0.1 --eval_rows 400 --eval_every 1000",
}
QUICK = {"nano": "--steps 8 --eval_rows 4", "e2e": "--steps 1 --eval_rows 2",
         "mixture": "--steps 1 --eval_rows 2",
         "medium": "--model nano --steps 3 --eval_rows 2 --eval_every 2"}
SCORE = "smollm.py e2e score {out} --greedy --data {shared}/data/e2e"
MEASURES = {                                    # what follows the training of a run
    "test": "measure.py {out}",
    "test+skills": "measure.py {out} --skills",
    "test+novels": "smollm.py measure {out} --text {dir}/novels.txt",
    "loss": f"{SCORE} --prompts 0",
    "texts": f"{SCORE} --text {{dir}}/novels.txt --prompts 200 {{few}}",
    "beam": "e2e.py score {out} --data {shared}/data/e2e {few}",
}


# The grid ----------------------------------------------------------------------------------------

def read_grid(settings):
    """{group: row of runs.csv} for these settings, with a group for each learning rate."""
    groups = {}
    with open(ROOT / "experiments" / "runs.csv", newline="") as f:
        for row in csv.DictReader(f):
            if row["setting"] not in settings:
                continue
            first, _, last = row["seeds"].partition("-")
            row["seeds"] = range(int(first), int(last or first) + 1)
            if not row["learning_rates"]:
                groups[row["group"]] = row
            for lr in row["learning_rates"].split():
                groups[f"{row['group']}-lr{lr}"] = row | {"flags": f"{row['flags']} --lr {lr}"}
    return groups


def choose(groups, patterns):
    """The groups that match a pattern, with or without their learning rate, and what they need."""
    names = set()
    for name, row in groups.items():
        if any(fnmatchcase(n, pattern) for n in (name, row["group"]) for pattern in patterns):
            names |= {name, *choose(groups, row["needs"].split())}
    return {name: groups[name] for name in groups if name in names}


@dataclass(frozen=True)
class Job:
    """A command, and the rule by which make runs it."""
    name: str
    command: str
    needs: list                                 # names of jobs that come before
    resume: str = ""                            # instead of the command, if there is a checkpoint

    def rule(self, folder):
        path = f"{folder}/{self.name}"
        command = self.command
        if self.resume:
            command = f"if [ -s {path}.pt ]; then {self.resume}; else {command}; fi"
        needs = " ".join(f"{name}.done" for name in self.needs)
        return (f"{self.name}.done: {needs}\n\t@echo {self.name}\n"
                f"\t@cd {ROOT} && git rev-parse --short HEAD >>{path}.commit 2>/dev/null || true\n"
                f"\t@cd {ROOT} && ({command}) >>{path}.log 2>&1\n\t@touch $@\n")


def jobs_of(name, row, args, folder):
    """Training and measuring, for each seed of a group."""
    found = []
    for seed in row["seeds"][:args.seeds]:
        run = f"{name}-seed{seed}"
        out = folder / f"{run}.pt"
        paths = {"dir": folder, "shared": args.shared, "seed": seed, "out": out,
                 "few": "--prompts 2" if args.quick else ""}
        program = f"python {row['program']}".format(**paths).strip()
        needs = [f"{needed}-seed{seed}" for needed in row["needs"].split()]
        if row["measure"] == "no training":
            found.append(Job(run, program, needs))
            continue
        flags = f"{FLAGS[row['setting']]} {row['flags']}".format(**paths)
        if args.quick:
            flags = re.sub(r"--search_steps \d+", "--search_steps 2", flags)
            flags += f" {QUICK[row['setting']]}"
        training_seed = seed + int(row["seed_offset"] or 0)
        found.append(Job(run, f"{program} {flags} --seed {training_seed} --out {out}", needs,
                         f"{program} --resume {out}"))
        if row["measure"]:
            measure = f"python experiments/{MEASURES[row['measure']]}".format(**paths).strip()
            found.append(Job(f"{run}-measure", measure, [run]))
    return found


def run_all(jobs, folder, at_once):
    """Run what is missing. Exits if a job has been started with another command, or fails."""
    for job in jobs:
        known = folder / f"{job.name}.command"
        if known.exists() and known.read_text() != job.command:
            sys.exit(f"{job.name} was started with another command (see {known}): move {folder} "
                     "away")
        known.write_text(job.command)
    targets = " ".join(f"{job.name}.done" for job in jobs)
    rules = [f"all: {targets}\n", *[job.rule(folder) for job in jobs]]
    (folder / "Makefile").write_text("\n".join(rules))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    make = ["make", "--keep-going", "--no-print-directory", f"--jobs={at_once}", "-C", folder]
    if subprocess.run(make, env=environment).returncode:
        sys.exit(f"some runs have failed: their logs are in {folder}")


# Results -----------------------------------------------------------------------------------------

def publish(args, folder):
    """Analyse the runs, and write all numbers to args.results."""
    args.results.mkdir(parents=True, exist_ok=True)
    with open(ROOT / "experiments" / "studies.csv", newline="") as f:
        studies = results.select(csv.DictReader(f), experiment=args.experiment)
    for study in studies:
        inputs = []
        for name in study["inputs"].split():
            if args.experiment == "adapters":
                inputs.append(args.shared / "adapters" / name)
            inputs += sorted(folder.glob(f"{name}-seed*.pt"))
        if inputs:
            analyse(study, inputs, args, folder)
    if args.experiment != "adapters":
        results.collect(folder, args.results / f"{args.experiment}_runs.csv")
    if args.experiment == "nano" and args.results == results.RESULTS:
        shown = folder / "front-page"           # the last screen of `python train.py`
        shutil.rmtree(shown, ignore_errors=True)
        shown.mkdir()
        printed = run([ROOT / "train.py"], cwd=shown)
        table = printed.index(f"{'':28} held-out")
        (args.results / "last_screen.txt").write_text(printed[table:])


def analyse(study, inputs, args, folder):
    """What analyze.py prints, its numbers, and its published figures."""
    program = ["analyze.py"]
    if args.experiment == "smollm":
        program = ["experiments/smollm.py", "analyze"]
    flags = study["flags"].format(shared=args.shared).split()
    if len(inputs) < 2 and "subspace" in flags:
        flags.remove("subspace")
    out = folder / study["study"]
    printed = run([*program, *inputs, *flags, "--out", out])
    (args.results / f"{out.name}.txt").write_text(printed.split("\nfigures and ")[0] + "\n")
    results.flatten(out, args.results / out.name)
    if args.results == results.RESULTS:
        for name in study["figures"].split():
            shutil.copy(out / f"{name}.png", FIGURES / f"{args.experiment}-{name}.png")


def run(command, **options):
    """What a Python script prints."""
    return subprocess.run([sys.executable, *command], check=True, text=True,
                          stdout=subprocess.PIPE, **options).stdout


def parse(argv):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("experiment", choices=SETTINGS)
    p.add_argument("groups", nargs="*", default=["*"], help="names or patterns (default: all)")
    p.add_argument("--seeds", type=int, help="at most this many seeds of each group (default: all)")
    p.add_argument("--list", action="store_true", help="print the commands and run nothing")
    p.add_argument("--quick", action="store_true", help="two seeds and a few steps")
    p.add_argument("--jobs", type=int, default=2, help="runs at a time (default %(default)s)")
    p.add_argument("--shared", type=Path, default="../shared",
                   help="folder with data/, text/, adapters/ and gpt2/ (default %(default)s)")
    p.add_argument("--results", type=Path, help="output folder (default out/EXPERIMENT/results)")
    args = p.parse_args(argv)
    if args.quick:
        args.seeds = min(args.seeds or 2, 2)
    return args


def main(argv=None):
    args = parse(argv)
    folder = Path("out", f"{args.experiment}-quick" if args.quick else args.experiment)
    args.results = (args.results or ROOT / folder / "results").resolve()
    os.chdir(ROOT)                              # commands have paths that are relative to it
    groups = choose(read_grid(SETTINGS[args.experiment]), args.groups)
    jobs = []
    for name, row in groups.items():
        jobs += jobs_of(name, row, args, folder)
    if args.list:
        for job in jobs:
            print(job.command)
        return
    folder.mkdir(parents=True, exist_ok=True)
    if args.experiment == "smollm" and not (folder / "novels.txt").exists():
        with lzma.open(args.shared / "text" / "novels.txt.xz") as f:
            (folder / "novels.txt").write_bytes(f.read()[-4_000_000:])
    if jobs:
        run_all(jobs, folder, args.jobs)
    publish(args, folder)


if __name__ == "__main__":
    main()
