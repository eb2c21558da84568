# Sourced by the other scripts. `run NAME flags ...` makes $DIR/NAME.pt with train.py $FLAGS, unless an earlier call
# did, and goes on where an interrupted one stopped; $JOBS runs at a time, each with its share of the cores and its
# output in $DIR/NAME.log. `finish` waits for them. `collect FILE` writes what all of $DIR's finished runs came to;
# `report NAME flags ...` what analyze.py prints of some to $RESULTS/NAME.txt, and its numbers, but for what is only
# drawn, to NAME.json.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${JOBS:=$(python -c 'import os; print(os.cpu_count())')}"
export OMP_NUM_THREADS=$(python -c "import os; print(max(1, os.cpu_count() // $JOBS))")
RESULTS=${RESULTS:-experiments/results}
mkdir -p "$DIR" "$RESULTS" experiments/figures
trap 'kill $(jobs -rp) 2>/dev/null || true; wait' EXIT  # train.py then leaves a checkpoint, and the next call resumes

started=()
finished() { [ -f "$DIR/$1.pt" ] && tail -n 1 "$DIR/$1.jsonl" | grep -q '"after"'; }

run() {
    local out="$DIR/$1.pt" log="$DIR/$1.log"
    if finished "$1"; then return; fi
    while [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; do wait -n || true; done
    echo "$(date +%T) $1"
    if [ -f "$out" ]; then set -- "$1" --resume "$out"; else set -- "$1" ${FLAGS:-} "${@:2}" --out "$out"; fi
    python train.py "${@:2}" >>"$log" 2>&1 &
    started+=("$1")
}

finish() {
    wait
    for name in "${started[@]}"; do
        if ! finished "$name"; then echo "$name has failed: see $DIR/$name.log" >&2; exit 1; fi
    done
}

collect() {
    python - "$DIR" "$1" <<'PYTHON'
import json, pathlib, sys, torch
runs = {}
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.pt")):
    held = torch.load(path, map_location="cpu", weights_only=True)
    if "after" in held:
        last = json.loads(path.with_suffix(".jsonl").read_text().splitlines()[-1])
        run = {k: held["args"][k] for k in ("method", "model", "data", "lr", "seed", "steps", "batch_size", "dtype")}
        run["data"] = [pathlib.Path(t).name for t in run["data"]]
        if "adapter" in held:
            ranks = list(held["adapter"]["ranks"].values())
            run |= {"targets": held["args"]["targets"]}
            run |= {"parameters": sum(t.numel() for t in held["adapter"]["tensors"].values())}
            run |= {"rank": ranks[0]} if len(set(ranks)) == 1 else {"ranks": ranks}
        if run["method"] == "autolora":
            a = held["search"]["beta"].softmax(-1)      # (T, layers, k); the scripts leave --gate as it is
            steps = held["search"]["steps"]
            some = list(range(len(steps)))[::-max(1, len(steps) // 10)][::-1]           # ten of them, with the last
            a, steps = a[some], [steps[i] for i in some]
            kept = (a >= 1 / a.size(-1)).sum(-1).float().mean(-1).tolist()
            run |= {k: held["args"][k] for k in ("max_rank", "beta_lr", "eta", "hypergrad", "search_steps", "split")}
            run |= {"search": {"steps": steps, "kept": kept, "top": a.amax(-1).mean(-1).tolist()}}
        run |= {"file_MB": path.stat().st_size / 1e6, "samples": last["samples"]}
        runs[path.stem] = run | {k: {pathlib.Path(t).name: r for t, r in last[k].items()} for k in ("before", "after")}
text = json.dumps({"torch": torch.__version__, "runs": runs}, indent=1)
pathlib.Path(sys.argv[2]).write_text(text + "\n")
PYTHON
}

report() {
    python analyze.py "${@:2}" --out "$DIR/$1" | grep -v "^figures and" | tee "$RESULTS/$1.txt"
    python - "$DIR/$1/analysis.json" > "$RESULTS/$1.json" <<'PYTHON'
import json, sys
found = json.load(open(sys.argv[1]))
slim = lambda row: {k: slim(v) if k == "null" else v for k, v in row.items() if k != "S"}
matrices = {c: {n: slim(row) for n, row in rows.items()} for c, rows in found["matrices"].items()}
ends = {pair: x["first and last"] for pair, x in found.get("subspace", {}).items()}
counts = found.get("intruders", {"x": [0.6]})
at = counts.pop("x").index(0.6)                         # at this ε, mean over the matrices
counts = {c: {k: sum(x[k][at] for x in rows.values()) / len(rows) for k in ("real", "null")} for c, rows in counts.items()}
print(json.dumps({"table": found["table"], "matrices": matrices, "subspace": ends, "intruders": counts}))
PYTHON
}
