"""
What e2e.sh starts from: the rows of E2E in two halves, and a small GPT-2 with random weights.

    python experiments/prepare.py ../shared/data/e2e out/e2e/start

writes, into the second folder, random.pt: GPT-2's vocabulary, but 4 layers of width 192;
descriptions.txt: the first half's completions alone; and e2e, a task of the other half.
"""
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from model import GPT, GPTConfig
from support import checkpoint
from support.data import EOT


def main(e2e, out):
    e2e, out = Path(e2e), Path(out)
    half = out / "e2e"
    half.mkdir(parents=True)
    lines = (e2e / "train.jsonl").read_text().splitlines(keepends=True)
    middle = len(lines) // 2
    descriptions = [json.loads(line)["completion"] for line in lines[:middle]]
    (out / "descriptions.txt").write_text(EOT.join(descriptions))
    (half / "train.jsonl").write_text("".join(lines[middle:]))
    shutil.copyfile(e2e / "valid.jsonl", half / "valid.jsonl")

    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=128, n_layer=4, n_head=4, n_embd=192))
    saved = {"model": model.state_dict(), "config": asdict(model.config)}
    checkpoint.write(saved, out / "random.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
