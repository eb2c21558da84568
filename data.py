"""
Tokenisers, tasks and batches.

A task is a set of rows for training and a set held out. A row is a prompt and its completion, laid out
as the LoRA paper's GPT-2 runs do, with the end-of-text token between them and after them:

    prompt <eot> completion <eot>        only what follows the first <eot> counts in the loss

Plain text (for pretraining) is cut into windows as long as the model's block, all of which count.
"""
import json
import lzma
import math
import random
import string
import zlib
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch

EOT = "<|endoftext|>"
HELD_OUT = 200      # rows kept out of training where a task does not come with such rows of its own


def tokenizer(vocab_size):
    """
    The tiktoken encoding of a model with this vocabulary: 257 is `bytes` (the 256 bytes and <eot>, made here),
    50257 is `gpt2`. Raises ValueError for another size, ConnectionError where gpt2's files cannot be had.
    """
    if vocab_size == 257:
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]", mergeable_ranks={bytes([i]): i for i in range(256)},
                                 special_tokens={EOT: 256})
    if vocab_size != 50257:
        raise ValueError(f"no tokeniser has {vocab_size} tokens: bytes has 257, gpt2 50257")
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as e:  # whatever the HTTP library of the day raises
        raise ConnectionError(f"tiktoken could not download the gpt2 vocabulary ({type(e).__name__}). Where there is no "
                              "network, set TIKTOKEN_CACHE_DIR to a folder that holds its two files") from None


class Row(NamedTuple):
    ids: list      # tokens of the whole row
    given: int     # how many of them are given: the prompt and its <eot>


@dataclass
class Task:
    name: str
    train: list             # of Row
    valid: list             # of Row, held out
    note: str = ""          # what a reader of the numbers must know: rows skipped, held-out rows cut off, ...
    text: bool = False      # plain text: there is no prompt, and exact match means nothing

    def checksum(self):
        """Of all the training tokens: a resumed run must find the data it left."""
        ids = self.train.tokens if self.text else np.concatenate([np.array(r.ids, np.uint16) for r in self.train])
        return zlib.crc32(ids.tobytes())


# ---------------------------------------------------------------------------------------------------------------------
# Built-in tasks. Each is a function of a random.Random to (prompt, completion). The thirteen skills are what
# pretrained/nano.pt was trained on. Then five tasks it cannot do, one for each family of MultiLoRA's mixture.

def letters(rng, most=8):
    """Mostly short ones, which are learned faster."""
    return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, rng.choice([5, 5, most]))))


def on_letters(f):
    return lambda rng: ((s := letters(rng)), f(s))


def on_numbers(f, least, most):
    def row(rng):
        numbers = [rng.randrange(100) for _ in range(rng.randint(least, most))]
        return " ".join(map(str, numbers)), str(f(numbers))
    return row


def on_letter_and_letters(f):
    def row(rng):
        s = letters(rng)
        c = rng.choice(s if rng.random() < 0.5 else string.ascii_lowercase)
        return f"{c} {s}", f(c, s)
    return row


def skill(name, f):
    def row(rng):  # dots before half of the prompts, so that what is learned does not depend on where it stands
        question, answer = f(rng)
        return "." * (rng.random() < 0.5 and rng.randint(1, 11)) + f"{name} {question}", answer
    return row


SKILLS = {name: skill(name, f) for name, f in {
    "copy": on_letters(lambda s: s),
    "reverse": on_letters(lambda s: s[::-1]),
    "upper": on_letters(str.upper),
    "sort": on_letters(lambda s: "".join(sorted(s))),
    "next": on_letters(lambda s: "".join(chr((ord(c) - 96) % 26 + 97) for c in s)),  # abz -> bca
    "first": on_letters(lambda s: s[0]),
    "last": on_letters(lambda s: s[-1]),
    "length": on_letters(lambda s: str(len(s))),
    "double": on_letters(lambda s: s + s),
    "add": on_numbers(sum, 2, 2),
    "max": on_numbers(max, 2, 4),
    "mark": on_letter_and_letters(lambda c, s: s.replace(c, c.upper())),             # a banana -> bAnAnA
    "contains": on_letter_and_letters(lambda c, s: "yes" if c in s else "no"),
}.items()}

NAMES = "amy ann bob cat dan eve fay gus hal ida jon kim lea max ned pat ray sue tom zoe".split()
DISHES = "thai soup fish rice cake pies tofu figs".split()


def syllables(rng):
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(2))


def instruct(rng):
    """Instruction following: skills of the base, asked for in words it has never seen."""
    s = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 5)))
    return rng.choice([(f"backwards, please {s}", s[::-1]), (f"shout {s}", s.upper()), (f"say it twice {s}", s + s),
                       (f"what ends {s}", s[-1]), (f"what begins {s}", s[0]), (f"how long is {s}", str(len(s)))])


def arith(rng):
    """Arithmetic: word problems."""
    who, a, b = rng.choice(NAMES), rng.randrange(30), rng.randrange(30)
    return rng.choice([(f"{who} had {a} and got {b}", str(a + b)), (f"{who} takes more: {a} or {b}", str(max(a, b)))])


def infer(rng):
    """Yes/no inference: does the second sentence follow from the first?"""
    who, dish, verb, asked = syllables(rng), rng.choice(DISHES), rng.choice(["likes", "hates"]), rng.choice(["likes", "hates"])
    a, b = rng.sample(range(100), 2)
    return rng.choice([(f"{who} {verb} {dish}. {asked} {dish}?", "yes" if verb == asked else "no"),
                       (f"{who} has {a}. more than {b}?", "yes" if a > b else "no")])


def invented(seed, n, tail):
    """n made-up names, always the same."""
    rng = random.Random(seed)
    names = set()
    while len(names) < n:
        names.add(syllables(rng) + rng.choice(tail))
    return sorted(names)


LANDS, CITIES = invented("lands", 32, ["nia", "land", "stan"]), invented("cities", 32, ["m", "s", "t"])
random.Random("capitals").shuffle(CITIES)


def facts(rng):
    """Knowledge: made-up facts. Train and held-out rows are the same 64, since no one can infer a fact."""
    i = rng.randrange(len(LANDS))
    return rng.choice([(f"capital of {LANDS[i]}?", CITIES[i]), (f"food of {LANDS[i]}?", DISHES[i * 5 % 8])])


def data2text(rng):
    """Data to text: a sentence from slots, any of which but the name may be missing."""
    name, food, price = syllables(rng), rng.choice(DISHES), rng.choice(["low", "mid", "top"])
    word = {"low": "cheap", "mid": "fair", "top": "fine"}[price]
    return rng.choice([(f"{name}|{food}|{price}", f"{name} sells {word} {food}"), (f"{name}|{food}", f"{name} sells {food}"),
                       (f"{name}|{price}", f"{name} is {word}")])


MIXTURE = {f.__name__: f for f in (instruct, arith, infer, facts, data2text)}
GROUPS = {"skills": list(SKILLS), "mixture": list(MIXTURE)}


def builtin(name):
    """
    (train, valid) lists of (prompt, completion): always the same rows, no question twice, none in both
    (but for `facts`, whose 64 rows are in both).
    """
    make, rng = (SKILLS | MIXTURE)[name], random.Random(name)
    if name == "facts":
        rows = sorted({make(rng) for _ in range(10_000)})
        return rows, rows
    rows, n = {}, HELD_OUT + (20_000 if name in SKILLS else 4_000)
    for _ in range(20 * n):
        prompt, completion = make(rng)
        rows.setdefault(prompt.lstrip("."), (prompt, completion))
        if len(rows) == n:
            break
    rows = list(rows.values())
    return rows[HELD_OUT:], rows[:HELD_OUT]


# ---------------------------------------------------------------------------------------------------------------------
# Files

def read_jsonl(path):
    """
    [(prompt, completion)] from a file of one {"prompt": str, "completion": str} a line; other keys are ignored.
    Raises ValueError with file, line and reason at the first row that is not like that, and for an empty file.
    """
    rows = []
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as e:  # not UTF-8, not JSON, or nested too deep
                raise ValueError(f"{path}, line {number}: not JSON ({e})") from None
            if not isinstance(row, dict):
                raise ValueError(f'{path}, line {number}: not an object like {{"prompt": ..., "completion": ...}}')
            for key in ("prompt", "completion"):
                if not isinstance(row.get(key), str):
                    what = f"is {json.dumps(row[key])[:40]}, not a string" if key in row else "is missing"
                    raise ValueError(f'{path}, line {number}: "{key}" {what}')
            if not row["completion"]:
                raise ValueError(f'{path}, line {number}: "completion" is empty, so there is nothing to learn')
            rows.append((row["prompt"], row["completion"]))
    if not rows:
        raise ValueError(f"{path}: no rows")
    return rows


class Windows:
    """Plain text as rows: row i is tokens[i T : (i+1) T + 1], so that T of its tokens are predicted."""

    def __init__(self, tokens, T):
        self.tokens, self.T = tokens, T

    def __len__(self):
        return (len(self.tokens) - 1) // self.T

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        return Row(self.tokens[i * self.T:(i + 1) * self.T + 1], 1)


def read_text(path, tok, T):
    """The tokens of a .txt, .txt.xz or .npy file. Raises ValueError where it cannot be read or has no two windows of T."""
    try:
        if path.suffix == ".npy":
            tokens = np.load(path)
            if tokens.ndim != 1 or tokens.dtype != np.uint16 or tokens.max(initial=0) >= tok.n_vocab:
                raise ValueError(f"it should be one row of uint16 below {tok.n_vocab}")
        else:
            with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as f:
                parts = [tok.encode_ordinary(part) + [tok.eot_token] for part in f.read().split(EOT)]
            tokens = np.concatenate([np.array(ids, np.uint16) for ids in parts])
    except (lzma.LZMAError, EOFError, ValueError) as e:
        raise ValueError(f"{path}: not readable as {'tokens' if path.suffix == '.npy' else 'text'} ({e})") from None
    if len(Windows(tokens, T)) < 2:
        raise ValueError(f"{path}: {len(tokens)} tokens are too few for a window to train on and one held out, "
                         f"of {T} each; choose a smaller block")
    return tokens


def source(name, tok, T):
    """(train, valid, note) of one task. Rows are (prompt, completion), or Windows where it is text."""
    path = Path(name)
    if name in SKILLS | MIXTURE:
        return *builtin(name), "held-out rows are the training rows" * (name == "facts")
    if path.is_dir():
        held_out = next((path / f for f in ("valid.jsonl", "test.jsonl") if (path / f).is_file()), None)
        if held_out is None or not (path / "train.jsonl").is_file():
            raise FileNotFoundError(f"{name}: a task's folder needs train.jsonl and valid.jsonl or test.jsonl")
        return read_jsonl(path / "train.jsonl"), read_jsonl(held_out), ""
    if path.suffix == ".jsonl" and path.is_file():
        rows = read_jsonl(path)
        n = min(HELD_OUT, math.ceil(len(rows) / 10))
        if len(rows) < 2:
            raise ValueError(f"{name}: one row is too few to train on one and hold one out")
        random.Random(0).shuffle(rows)
        return rows[n:], rows[:n], f"{n} of {len(rows)} rows held out"
    if path.suffix in (".txt", ".xz", ".npy") and path.is_file():
        tokens = read_text(path, tok, T)
        windows = (len(tokens) - 1) // T
        n = max(1, windows // 100)
        cut = (windows - n) * T
        return Windows(tokens[:cut + 1], T), Windows(tokens[cut:], T), f"the last {n} of {windows} windows held out"
    raise FileNotFoundError(f"--data {name}: no such .jsonl or .txt file, folder or built-in task; "
                            f"built-in are {' '.join([*GROUPS, *MIXTURE, *SKILLS])}")


def load(names, tok, block_size, eval_rows=200):
    """
    A Task for every name: a built-in task, `skills` or `mixture` (all of them), a .jsonl file, a folder that
    holds train.jsonl and valid.jsonl or test.jsonl, or plain text (.txt, .txt.xz, or its tokens as .npy). Rows that do not fit the
    block are left out, and the task's note says how many. Of the held-out rows, `eval_rows` are kept, evenly
    spread; which rows are held out does not depend on that. Raises ValueError or FileNotFoundError.
    """
    tasks = []
    for name in [n for name in names for n in GROUPS.get(name, [name])]:
        if name in (t.name for t in tasks):
            raise ValueError(f"--data {name}: given twice")
        train, valid, note = source(name, tok, block_size)
        text = isinstance(train, Windows)
        if not text:
            train, valid = ([encode(tok, *row) for row in rows] for rows in (train, valid))
            longest = max(len(r.ids) for r in train + valid) - 1        # the last token is predicted, never read
            kept = [[r for r in rows if len(r.ids) <= block_size + 1] for rows in (train, valid)]
            skipped = len(train) + len(valid) - len(kept[0]) - len(kept[1])
            if not all(kept):
                raise ValueError(f"{name}: no row to train on or none to hold out fits the block of {block_size} tokens")
            if skipped:
                note += "; " * bool(note) + f"{skipped} rows longer than {block_size} tokens skipped (up to {longest})"
            train, valid = kept
        every = max(1, len(valid) // eval_rows)
        tasks.append(Task(name, train, [valid[i] for i in range(0, len(valid), every)][:eval_rows], note, text))
    return tasks


def halves(tasks, share, seed):
    """The tasks twice: with a random `share` of their training rows, and with the others. Raises ValueError."""
    parts = [], []
    for t in tasks:
        order, n = np.random.default_rng([seed, len(t.train)]).permutation(len(t.train)), round(share * len(t.train))
        if not 0 < n < len(t.train):
            raise ValueError(f"--split {share:g}: of the {len(t.train)} rows of {t.name}, both parts need one at least")
        for part, rows in zip(parts, (order[:n], order[n:])):
            part.append(replace(t, train=torch.utils.data.Subset(t.train, rows)))
    return parts


# ---------------------------------------------------------------------------------------------------------------------
# Batches

def encode(tok, prompt, completion):
    given = tok.encode_ordinary(prompt) + [tok.eot_token]
    return Row(given + tok.encode_ordinary(completion) + [tok.eot_token], len(given))


def stream(tasks, seed, mix="equal"):
    """
    A function from i to the i-th training row of an endless stream: the tasks in turn (`equal`), or all their
    rows in one pool (`proportional`). Every row of a pool comes once, in an order of its own each time, before
    any comes again. Row i depends on nothing but i and the seed, so a resumed run sees what it would have seen.
    """
    pools = [t.train for t in tasks]
    if mix == "proportional":
        pools = [torch.utils.data.ConcatDataset(pools)]

    @lru_cache(2 * len(pools))
    def order(pool, turn):
        return np.random.default_rng([seed, pool, turn]).permutation(len(pools[pool]))

    def row(i):
        i, pool = divmod(i, len(pools))
        turn, i = divmod(i, len(pools[pool]))
        return pools[pool][order(pool, turn)[i]]

    return row


def collate(rows, device="cpu"):
    """
    idx (B, T) and targets (B, T) as GPT.forward takes them: T is the longest of these rows less one, targets
    are -100 on the prompts and behind the ends.
    """
    T = max(len(r.ids) for r in rows) - 1
    idx = np.zeros((len(rows), T), np.int64)
    targets = np.full((len(rows), T), -100, np.int64)
    for b, (ids, given) in enumerate(rows):
        idx[b, :len(ids) - 1] = ids[:-1]
        targets[b, given - 1:len(ids) - 1] = ids[given:]
    return torch.from_numpy(idx).to(device), torch.from_numpy(targets).to(device)
