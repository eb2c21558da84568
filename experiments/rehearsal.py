"""
Stand-ins for everything that gpt2_medium.sh downloads, to rehearse it without a network:

    python experiments/rehearsal.py FOLDER

writes train.txt, valid.txt and test.txt in the form and with the number of rows of E2E's own files,
base.pt, a random GPT-2 of two layers whose tokens are bytes, and gpt2_md_lora_e2e.pt, a random
adapter of that model in the layout of the LoRA authors' file.
"""
import sys
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import e2e
from model import GPT, PRESETS
from support import cli

FOODS = ("Thai", "Italian", "Indian", "French")
AREAS = ("riverside", "city centre")


def e2e_file(n_rows, first_place):
    """Invented rows, three for each meaning representation."""
    lines = []
    for i in range(n_rows):
        name = f"Place {first_place + i // 3}"
        food = FOODS[i // 3 % len(FOODS)]
        area = AREAS[i // 3 % len(AREAS)]
        texts = (f"{name} serves {food} food at the {area} .",
                 f"At the {area} , {name} has {food} dishes .",
                 f"{name} is a {food} restaurant , {area} .")
        lines.append(f"name : {name} | food : {food} | area : {area}||{texts[i % 3]} \n")
    return "".join(lines)


def authors_adapter(config, rank):
    """Random A and B of q and v, which loralib keeps in one matrix each for a fused layer."""
    state = {}
    for i in range(config.n_layer):
        layer = f"module.transformer.h.{i}.attn.c_attn"
        state[f"{layer}.lora_A"] = torch.randn(2 * rank, config.n_embd) * 0.02
        state[f"{layer}.lora_B"] = torch.randn(2 * config.n_embd, rank) * 0.02
    return {"model_state_dict": state}


def main(folder):
    folder.mkdir(parents=True, exist_ok=True)
    first_place = 0
    for split, n_rows in e2e.ROWS.items():
        (folder / f"{split}.txt").write_text(e2e_file(n_rows, first_place))
        first_place += n_rows                       # no split has a prompt of another one
    config = replace(PRESETS["tiny"], vocab_size=257)
    torch.manual_seed(0)
    model = GPT(config)
    torch.save({"config": asdict(config), "model": model.state_dict()}, folder / "base.pt")
    torch.save(authors_adapter(config, rank=2), folder / "gpt2_md_lora_e2e.pt")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    cli.run_main(lambda: main(Path(sys.argv[1])))
