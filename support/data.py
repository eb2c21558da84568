"""
Tokenizers, rows from files, the endless stream of training rows, batches.

A task has training rows and held-out rows. A row is a prompt and its completion, joined as in the
LoRA paper's GPT-2 runs, with the end-of-text token after each (and, unless the tokens are bytes, a
space before the completion, as before any word):

    prompt <eot> completion <eot>        the loss ignores the prompt and the first <eot>

Plain text (for pretraining) is cut into windows of the block size, all of whose tokens count.
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
CACHED = ["vocab.bpe as 6d1cbeee0f20b3d9449abfede4726ed8212e3aee",      # tiktoken's names
          "encoder.json as 6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"]
FORMS = "a .jsonl file, a folder with train.jsonl and valid.jsonl, or text (.txt .txt.xz)"


def tokenizer(vocab_size):
    """The tiktoken encoding of a model with this vocabulary: 257 (bytes and <eot>) or 50257."""
    if vocab_size == 257:
        ranks = {bytes([i]): i for i in range(256)}
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]", mergeable_ranks=ranks,
                                 special_tokens={EOT: 256})
    if vocab_size != 50257:
        raise ValueError(f"no tokenizer has {vocab_size} tokens: bytes has 257, gpt2 has 50257")
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as e:      # tiktoken's HTTP library raises many kinds
        raise ConnectionError(f"GPT-2's vocabulary could not be downloaded ({type(e).__name__}). "
                              f"Save its {' and its '.join(CACHED)}, in one folder, and set "
                              "TIKTOKEN_CACHE_DIR to that folder") from None


class Row(NamedTuple):
    ids: list           # the tokens of the prompt and the completion, each followed by <eot>
    prompt_len: int     # the number of tokens up to and including the first <eot>

    @property
    def n_target_tokens(self):
        """The number of tokens that the loss counts."""
        return len(self.ids) - self.prompt_len


@dataclass
class Task:
    name: str
    train: list             # of (prompt, completion), and after `encode_rows` of Row
    valid: list             # the same, held out
    note: str = ""          # anything a reader of the results must know
    text: bool = False      # plain text has no prompts, so exact match is undefined

    def checksum(self):
        """A checksum of all rows, because a run must be resumed with the same data."""
        crc = len(self.train)
        for ids, _ in [*self.train, *self.valid]:
            crc = zlib.crc32(np.asarray(ids, np.uint16).tobytes(), crc)
        return crc


def encode(tok, prompt, completion):
    ids = tok.encode_ordinary(prompt) + [tok.eot_token]
    prompt_len = len(ids)
    space = "" if tok.n_vocab == 257 else " "
    ids += tok.encode_ordinary(space + completion) + [tok.eot_token]
    return Row(ids, prompt_len)


def encode_prompt(tok, prompt, names):
    """The tokens of a prompt for a run on these tasks. After plain text, it has no <eot>."""
    ids = tok.encode_ordinary(prompt)
    return ids if all(map(is_text, names)) else ids + [tok.eot_token]


def is_text(name):
    return name.endswith((".txt", ".txt.xz"))


def read_jsonl(path):
    """
    [(prompt, completion)] from a file with one {"prompt": str, "completion": str} per line. Raises
    ValueError, with the line number and the reason, for the first bad row and for an empty file.
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
                    raise ValueError("both must be strings, and the completion not empty")
            except (ValueError, KeyError, TypeError, RecursionError) as e:
                raise ValueError(f'{path}, line {number} is not a row {{"prompt": "...", '
                                 f'"completion": "..."}} ({type(e).__name__}: {e})') from None
            rows.append((prompt, completion))
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def hold_out(rows, name):
    """(train, valid, note): a tenth of the prompts, at most 200, is held out with all its rows."""
    prompts = list(dict.fromkeys(prompt for prompt, _ in rows))
    if len(prompts) < 2:
        raise ValueError(f"{name} has only one prompt: add rows, or pass a folder with train.jsonl "
                         "and valid.jsonl")
    random.Random(0).shuffle(prompts)
    held_out = set(prompts[:min(HELD_OUT, math.ceil(len(prompts) / 10))])
    train = [row for row in rows if row[0] not in held_out]
    valid = [row for row in rows if row[0] in held_out]
    return train, valid, f"{len(valid)} of {len(rows)} rows held out"


def windows(path, tok, T):
    """(train, valid, note) of a .txt or .txt.xz file in windows of T tokens. Raises ValueError."""
    reader = lzma.open if path.suffix == ".xz" else open
    tokens = array("H")
    try:
        with reader(path, "rt", encoding="utf-8") as f:
            for book in f.read().split(EOT):
                tokens.extend([*tok.encode_ordinary(book), tok.eot_token])
    except (lzma.LZMAError, EOFError, ValueError) as e:
        raise ValueError(f"{path} cannot be read as text ({e})") from None
    # row i predicts T tokens; its last token is the first one, the "prompt", of row i + 1
    rows = [Row(tokens[i:i + T + 1], 1) for i in range(0, len(tokens) - T, T)]
    n = max(1, len(rows) // 100)
    if len(rows) < 2:
        raise ValueError(f"{path} has {len(tokens)} tokens, too few for two windows of {T}")
    return rows[:-n], rows[-n:], f"the last {n} of {len(rows)} windows held out"


def load(names, tok, block_size, eval_rows=200):
    """
    A Task for every name: a built-in task, a group of them, or one of FORMS. Rows longer than the
    block are left out, which the task's note says; `eval_rows` of the held-out rows are kept,
    evenly spread. Raises ValueError or OSError.
    """
    tasks = {}
    for group in names:
        if group in {*GROUPS, *SKILLS, *MIXTURE} and Path(group).exists():
            raise ValueError(f"{group} is built in and also a file or folder here: pass ./{group} "
                             "for the latter, or rename it")
        for name in GROUPS.get(group, [group]):
            task = read_task(name, tok, block_size)
            if task.name in tasks:
                raise ValueError(f"{name}: there is another task called {task.name}; rename one")
            n = len(task.valid)
            if n > eval_rows:
                task.valid = [task.valid[i * n // eval_rows] for i in range(eval_rows)]
            tasks[task.name] = task
    return list(tasks.values())


def read_task(name, tok, block_size):
    path = Path(name)
    if name in SKILLS or name in MIXTURE:
        task = Task(name, *builtin(name))
    elif path.is_dir():
        held_out = path / "valid.jsonl"
        if not held_out.is_file():
            held_out = path / "test.jsonl"
        if not held_out.is_file():
            raise FileNotFoundError(f"{path} has neither valid.jsonl nor test.jsonl")
        task = Task(path.absolute().name, read_jsonl(path / "train.jsonl"), read_jsonl(held_out))
    elif path.is_file() and path.suffix == ".jsonl":
        task = Task(path.name, *hold_out(read_jsonl(path), name))
    elif path.is_file() and is_text(name):
        return Task(path.name, *windows(path, tok, block_size), text=True)
    elif path.exists():
        raise ValueError(f"{name} is none of these: {FORMS}")
    else:
        raise FileNotFoundError(f"there is no task {name}: pass {FORMS}, or a built-in task, "
                                f"{' '.join([*GROUPS, *MIXTURE, *SKILLS])}")
    known = {prompt for prompt, _ in task.train}
    n = sum(prompt in known for prompt, _ in task.valid)
    if n:
        task.note = f"{n} of {len(task.valid)} held-out prompts are also training prompts"
    encode_rows(task, tok, block_size)
    return task


def encode_rows(task, tok, block_size):
    """Replace a task's rows by tokens, without the rows that are longer than the block."""
    n = 0
    for part in ("train", "valid"):
        rows = [encode(tok, *row) for row in getattr(task, part)]
        fitting = [row for row in rows if len(row.ids) <= block_size + 1]   # the last is not read
        if not fitting:
            raise ValueError(f"{task.name}: every {part} row is longer than {block_size} tokens")
        n += len(rows) - len(fitting)
        setattr(task, part, fitting)
    if n:
        skipped = f"{n} rows longer than {block_size} tokens skipped"
        task.note = "; ".join(filter(None, [task.note, skipped]))


def split_for_search(tasks, share, seed):
    """The tasks twice: with a random `share` of their training rows, and with the other rows."""
    parts = [], []
    for t in tasks:
        order = np.random.default_rng([seed, len(t.train)]).permutation(len(t.train))
        n = round(share * len(t.train))
        if not 0 < n < len(t.train):
            raise ValueError(f"a share of {share:g} of {t.name}'s rows leaves one part empty")
        for part, rows in zip(parts, (order[:n], order[n:])):
            part.append(replace(t, train=[t.train[i] for i in rows]))
    return parts


def stream(tasks, seed):
    """
    A function that maps i to the i-th training row of an endless stream. The tasks alternate row
    by row, and each task's rows are shuffled in every epoch. Row i depends on i and the seed only.
    """
    @lru_cache(2 * len(tasks))
    def order(task, epoch):
        return np.random.default_rng([seed, task, epoch]).permutation(len(tasks[task].train))

    def row(i):
        i, task = divmod(i, len(tasks))
        epoch, i = divmod(i, len(tasks[task].train))
        return tasks[task].train[order(task, epoch)[i]]

    return row


def collate(rows, device="cpu"):
    """idx and targets (B, T) for GPT.forward; targets are -100 in prompts and padding."""
    T = max(len(row.ids) for row in rows) - 1
    idx = np.zeros((len(rows), T), np.int64)
    targets = np.full((len(rows), T), -100)
    for b, (ids, prompt_len) in enumerate(rows):
        idx[b, :len(ids) - 1] = ids[:-1]
        targets[b, prompt_len - 1:len(ids) - 1] = ids[prompt_len:]
    return torch.from_numpy(idx).to(device), torch.from_numpy(targets).to(device)


def batches(rows, size):
    """The rows in batches of rows of similar length, which saves padding."""
    rows = sorted(rows, key=lambda row: len(row.ids))
    return [rows[i:i + size] for i in range(0, len(rows), size)]
