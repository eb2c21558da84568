# Sourced by the other scripts: `run NAME flags ...` makes $DIR/NAME.pt with train.py, unless an earlier call
# did, and goes on where an interrupted one stopped. `collect FILE` writes what all of $DIR's runs came to.
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
    python - "$DIR" > "$1" <<'PYTHON'
import json, pathlib, sys, torch
runs = {}
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
            kept = (a * a.size(-1) >= 1 - 1e-6).sum(-1).float().mean(-1).tolist()
            run |= {k: held["args"][k] for k in ("max_rank", "beta_lr", "eta", "hypergrad", "search_steps", "split")}
            run |= {"search": {"steps": held["search"]["steps"], "kept": kept, "top": a.amax(-1).mean(-1).tolist()}}
        run |= {"file_MB": path.stat().st_size / 1e6, "seconds": last["seconds"], "samples": last["samples"]}
        runs[path.stem] = run | {k: {pathlib.Path(t).name: r for t, r in last[k].items()} for k in ("before", "after")}
print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), "runs": runs}, indent=1))
PYTHON
}
