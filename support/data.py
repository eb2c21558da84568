"""
Tokenisers, rows from files, the endless stream of rows, batches.

A task is a set of rows for training and a set held out. A row is a prompt and its completion, laid
out as the LoRA paper's GPT-2 runs do, with the end-of-text token between them and after them (and,
but for bytes as tokens, a space before the completion, as before any word):

    prompt <eot> completion <eot>        only what follows the first <eot> counts in the loss

Plain text (for pretraining) is cut into windows as long as the block, all of which count.
"""
import json
import lzma
import math
import random
import zlib
from array import array
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch

from support.tasks import GROUPS, HELD_OUT, MIXTURE, SKILLS, builtin

EOT = "<|endoftext|>"
FORMS = "a .jsonl file, a folder with train.jsonl and valid.jsonl, or text (.txt .txt.xz)"


def tokenizer(vocab_size):
    """The tiktoken encoding of a model with so many tokens: 257 (bytes and <eot>) or 50257."""
    if vocab_size == 257:
        ranks = {bytes([i]): i for i in range(256)}
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]", mergeable_ranks=ranks,
                                 special_tokens={EOT: 256})
    if vocab_size != 50257:
        raise ValueError(f"no tokeniser has {vocab_size} tokens: bytes has 257, gpt2 50257")
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as e:      # whatever the HTTP library of the day raises
        raise ConnectionError(f"no vocabulary ({type(e).__name__}): without a network, set "
                              "TIKTOKEN_CACHE_DIR to a folder with gpt2's two files") from None


class Row(NamedTuple):
    ids: list       # tokens of the whole row
    given: int      # how many of them are given: the prompt and its <eot>

    @property
    def counted(self):              # how many the loss counts
        return len(self.ids) - self.given


@dataclass
class Task:
    name: str
    train: list             # of (prompt, completion), and after `encode_rows` of Row
    valid: list             # the same, held out
    note: str = ""          # what a reader of the numbers must know
    text: bool = False      # plain text: there is no prompt, and exact match means nothing

    def checksum(self):
        """Of all its rows: a resumed run must find the data it left."""
        crc = len(self.train)
        for ids, _ in [*self.train, *self.valid]:
            crc = zlib.crc32(np.asarray(ids, np.uint16).tobytes(), crc)
        return crc


def encode(tok, prompt, completion):
    given = tok.encode_ordinary(prompt) + [tok.eot_token]
    space = "" if tok.n_vocab == 257 else " "
    return Row(given + tok.encode_ordinary(space + completion) + [tok.eot_token], len(given))


def read_jsonl(path):
    """
    [(prompt, completion)] from a file of one {"prompt": str, "completion": str} a line. ValueError,
    with file, line and reason, at the first row that is not like that, and for no rows.
    """
    rows = []
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
                prompt, completion = row["prompt"], row["completion"]
                if not isinstance(prompt, str) or not isinstance(completion, str) or not completion:
                    raise ValueError("prompt and completion are text, the latter not empty")
            except (ValueError, KeyError, TypeError, RecursionError) as e:
                raise ValueError(f'{path}, line {number}: not a row like {{"prompt": "...", '
                                 f'"completion": "..."}} ({type(e).__name__}: {e})') from None
            rows.append((prompt, completion))
    if not rows:
        raise ValueError(f"{path}: no rows")
    return rows


def hold_out(rows, name):
    """(train, valid, note): a tenth of the prompts, 200 at most, held out with all their rows."""
    prompts = list(dict.fromkeys(prompt for prompt, _ in rows))
    if len(prompts) < 2:
        raise ValueError(f"{name}: one prompt is too few to train on one and hold one out")
    random.Random(0).shuffle(prompts)
    held_out = set(prompts[:min(HELD_OUT, math.ceil(len(prompts) / 10))])
    train = [row for row in rows if row[0] not in held_out]
    valid = [row for row in rows if row[0] in held_out]
    return train, valid, f"{len(valid)} of {len(rows)} rows held out"


def windows(path, tok, T):
    """(train, valid, note) of a text, .txt or .txt.xz, in windows of T tokens. ValueError."""
    reader, tokens = lzma.open if path.suffix == ".xz" else open, array("H")
    try:
        with reader(path, "rt", encoding="utf-8") as f:
            for book in f.read().split(EOT):
                tokens.extend([*tok.encode_ordinary(book), tok.eot_token])
    except (lzma.LZMAError, EOFError, ValueError) as e:
        raise ValueError(f"{path}: not readable as text ({e})") from None
    # row i predicts T tokens: the last of row i is the first, given, of row i + 1
    rows = [Row(tokens[i:i + T + 1], 1) for i in range(0, len(tokens) - T, T)]
    n = max(1, len(rows) // 100)
    if len(rows) < 2:
        raise ValueError(f"{path}: {len(tokens)} tokens are too few for two windows of {T}")
    return rows[:-n], rows[-n:], f"the last {n} of {len(rows)} windows held out"


def load(names, tok, block_size, eval_rows=200):
    """A Task for every name, built-in or as in FORMS, without rows too long for the block (its note
    says so), with `eval_rows` of the held-out rows, evenly spread. ValueError or OSError."""
    tasks = {}
    for name in [n for given in names for n in GROUPS.get(given, [given])]:
        path = Path(name)
        if name in SKILLS or name in MIXTURE:
            task = Task(name, *builtin(name))
        elif path.is_dir():
            held_out = path / "valid.jsonl"
            if not held_out.is_file():
                held_out = path / "test.jsonl"
            train = read_jsonl(path / "train.jsonl")
            task = Task(path.absolute().name, train, read_jsonl(held_out))
        elif path.is_file() and path.suffix == ".jsonl":
            task = Task(path.name, *hold_out(read_jsonl(path), name))
        elif path.is_file() and name.endswith((".txt", ".txt.xz")):
            task = Task(path.name, *windows(path, tok, block_size), text=True)
        else:
            raise FileNotFoundError(f"--data {name}: no such task; choose from {FORMS}, or the "
                                    f"built-in {' '.join([*GROUPS, *MIXTURE, *SKILLS])}")
        if task.name in tasks:
            raise ValueError(f"--data {name}: a task is called {task.name} already, rename one")
        if not task.text:
            known = {prompt for prompt, _ in task.train}
            n = sum(prompt in known for prompt, _ in task.valid)
            if n:
                task.note = f"{n} of {len(task.valid)} held-out rows have a training row's prompt"
            encode_rows(task, tok, block_size)
        every = max(1, len(task.valid) // eval_rows)
        task.valid = [task.valid[i] for i in range(0, len(task.valid), every)][:eval_rows]
        tasks[task.name] = task
    return list(tasks.values())


def encode_rows(task, tok, block_size):
    n = 0
    for part in ("train", "valid"):
        encoded = [encode(tok, *row) for row in getattr(task, part)]
        kept = [r for r in encoded if len(r.ids) <= block_size + 1]     # the last id is never read
        if not kept:
            raise ValueError(f"{task.name}: no {part} row fits the block of {block_size} tokens")
        n += len(encoded) - len(kept)
        setattr(task, part, kept)
    if n:
        skipped = f"{n} rows longer than {block_size} tokens skipped"
        task.note = "; ".join(filter(None, [task.note, skipped]))


def halves(tasks, share, seed):
    """The tasks twice: with a random `share` of their training rows, and with the others."""
    parts = [], []
    for t in tasks:
        order = np.random.default_rng([seed, len(t.train)]).permutation(len(t.train))
        n = round(share * len(t.train))
        if not 0 < n < len(t.train):
            raise ValueError(f"--split {share:g}: both parts of {t.name}'s rows need one at least")
        for part, rows in zip(parts, (order[:n], order[n:])):
            part.append(replace(t, train=[t.train[i] for i in rows]))
    return parts


def stream(tasks, seed):
    """
    A function from i to the i-th training row of an endless stream: the tasks in turn, of each all
    rows once, in a new order each time, before any comes again. It depends on i and the seed alone.
    """
    @lru_cache(2 * len(tasks))
    def order(task, turn):
        return np.random.default_rng([seed, task, turn]).permutation(len(tasks[task].train))

    def row(i):
        i, task = divmod(i, len(tasks))
        turn, i = divmod(i, len(tasks[task].train))
        return tasks[task].train[order(task, turn)[i]]

    return row


def collate(rows, device="cpu"):
    """idx, targets (B, T) for GPT.forward: targets are -100 on the prompts and behind the ends."""
    T = max(len(r.ids) for r in rows) - 1
    idx, targets = np.zeros((len(rows), T), np.int64), np.full((len(rows), T), -100)
    for b, (ids, given) in enumerate(rows):
        idx[b, :len(ids) - 1] = ids[:-1]
        targets[b, given - 1:len(ids) - 1] = ids[given:]
    return torch.from_numpy(idx).to(device), torch.from_numpy(targets).to(device)


def batches(rows, size, block_size):
    """Rows of similar length together, whose longest prompt and completion fit a block."""
    batch, given, counted = [], 0, 0
    for r in sorted(rows, key=lambda r: len(r.ids)):
        given, counted = max(given, r.given), max(counted, r.counted)
        if batch and (len(batch) == size or given + counted > block_size + 1):
            yield batch
            batch, given, counted = [], r.given, r.counted
        batch.append(r)
    yield batch
