# Sourced by the other scripts: `run NAME flags ...` makes $DIR/NAME.pt with train.py, unless an earlier call
# did, and goes on where an interrupted one stopped. `collect FILE` writes what all of $DIR's runs came to; what FILE
# has of runs that are not in $DIR stays.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mkdir -p "$DIR" experiments/results

run() {
    local out="$DIR/$1.pt"
    if [ -f "$out" ] && tail -n 1 "$DIR/$1.jsonl" | grep -q '"after"'; then return; fi
    echo "== $1"
    if [ -f "$out" ]; then python train.py --resume "$out"; else python train.py "${@:2}" --out "$out"; fi
}

collect() {
    python - "$DIR" "$1" <<'PYTHON'
import json, pathlib, sys, torch
out = pathlib.Path(sys.argv[2])
runs = json.loads(out.read_text())["runs"] if out.exists() else {}
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.pt")):
    held = torch.load(path, map_location="cpu", weights_only=True)
    if "after" in held:
        last = json.loads(path.with_suffix(".jsonl").read_text().splitlines()[-1])
        run = {k: held["args"][k] for k in ("method", "model", "lr", "seed", "steps", "batch_size", "dtype")}
        if "adapter" in held:
            ranks = list(held["adapter"]["ranks"].values())
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
        run |= {"file_MB": path.stat().st_size / 1e6, "seconds": last["seconds"], "samples": last["samples"]}
        runs[path.stem] = run | {k: {pathlib.Path(t).name: r for t, r in last[k].items()} for k in ("before", "after")}
text = json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), "runs": runs}, indent=1)
out.write_text(text + "\n")
PYTHON
}
