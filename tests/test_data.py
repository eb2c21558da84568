"""support/data.py and support/tasks.py: tokenisers, built-in tasks, files and errors, batches."""
import json
import lzma
import re

import numpy as np
import pytest

from support import data, tasks
from support.data import Row, Task, encode, load, stream
from support.tasks import MIXTURE, SKILLS

TOK = data.tokenizer(257)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
GOOD = b'{"prompt": "p", "completion": "c"}\n\n'
PRICES = {"low": "cheap", "mid": "fair", "top": "fine"}


# Tokenisers ---------------------------------------------------------------------------------------
def test_tokenisers(monkeypatch):
    text = "naïve\n\t 日本 <|endoftext|> \x00"
    assert TOK.encode_ordinary(text) == [*text.encode()] and TOK.decode([*text.encode()]) == text
    assert TOK.eot_token == 256 and TOK.n_vocab == 257
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: open("/no/such/file"))
    with pytest.raises(ConnectionError, match="set TIKTOKEN_CACHE_DIR"):
        data.tokenizer(50257)
    with pytest.raises(ValueError, match="no tokeniser has 99 tokens"):
        data.tokenizer(99)


# Built-in tasks -----------------------------------------------------------------------------------
ANSWERS = {  # of prompts of this pattern, from its groups: written again, another way
    r"\.*copy (\w+)": str, r"(?:\.*length|how long is) (\w+)": lambda s: f"{len(s)}",
    r"(?:\.*double|say it twice) (\w+)": lambda s: s * 2, r"(?:\.*upper|shout) (\w+)": str.swapcase,
    r"(?:\.*reverse|backwards, please) (\w+)": lambda s: "".join(reversed(s)),
    r"(?:\.*first|what begins) (\w)\w*": str, r"(?:\.*last|what ends) \w*(\w)": str,
    r"\.*sort (\w+)": lambda s: "".join(c * s.count(c) for c in LETTERS),
    r"\.*next (\w+)": lambda s: "".join(LETTERS[LETTERS.index(c) - 25] for c in s),
    r"\.*add (\d+) (\d+)": lambda a, b: f"{int(a) + int(b)}",
    r"\.*max ([\d ]+)": lambda s: sorted(s.split(), key=int)[-1],
    r"\.*mark (\w) (\w+)": lambda a, s: "".join(c.upper() if c == a else c for c in s),
    r"\.*contains (\w) (\w+)": lambda a, s: "no" if s.find(a) < 0 else "yes",
    r"\w+ had (\d+) and got (\d+)": lambda a, b: f"{int(a) + int(b)}",
    r"\w+ takes more: (\d+) or (\d+)": lambda a, b: max(a, b, key=int),
    r"\w+ (\w+) (\w+)\. (\w+) \2\?": lambda v, food, w: "yes" if v == w else "no",
    r"\w+ has (\d+)\. more than (\d+)\?": lambda a, b: "yes" if int(a) > int(b) else "no",
    r"(\w+)\|(\w{4})\|(\w+)": lambda name, food, price: f"{name} sells {PRICES[price]} {food}",
    r"(\w+)\|(\w{4})": lambda name, food: f"{name} sells {food}",
    r"(\w+)\|(\w{3})": lambda name, price: f"{name} is {PRICES[price]}",
}


@pytest.mark.parametrize("name", [*SKILLS, *MIXTURE])
def test_builtin_rows_are_right_and_distinct_and_held_out_ones_apart(name):
    train, valid = tasks.builtin(name)
    prompts, held_out = ({p.lstrip(".") for p, _ in rows} for rows in (train, valid))
    assert len(prompts) == len(train) and len(held_out) == len(valid)
    if name == "facts":                     # the exception: nobody can infer a fact
        assert prompts == held_out and len(prompts) == 64
        assert train[0] == ("capital of devaland?", "nutos")            # on every machine
        return
    assert len(prompts) >= 4000 and len(held_out) == 200 and not prompts & held_out
    for prompt, completion in train[:500]:
        found = [(re.fullmatch(pattern, prompt), answer) for pattern, answer in ANSWERS.items()]
        answers = [answer(*groups.groups()) for groups, answer in found if groups]
        assert answers == [completion], prompt


# Files --------------------------------------------------------------------------------------------
def write_rows(path, rows):
    """With all that is allowed: a byte order mark, empty lines, other keys."""
    path.parent.mkdir(exist_ok=True)
    lines = [json.dumps(dict(prompt=p, completion=c, id=3), ensure_ascii=False) for p, c in rows]
    path.write_text("\n\n".join(lines), "utf-8-sig")
    return str(path)


def texts(rows):
    """[(prompt, completion)] of encoded rows."""
    return [(TOK.decode(r.ids[:r.given - 1]), TOK.decode(r.ids[r.given:-1])) for r in rows]


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", GOOD + GOOD[:-3], "line 3: .*Expecting ',' delimiter"),
    ("a.jsonl", GOOD + b'{"completion": "c"}', "line 3: .*prompt"),
    ("a.jsonl", GOOD + b'{"prompt": "p", "completion": ""}', "line 3: .*completion.* empty"),
    ("a.jsonl", GOOD + b'{"prompt": "\xff", "completion": "c"}', "line 3: .*utf-8"),
    ("a.jsonl", GOOD + b"[" * 100_000, "line 3: .*[Rr]ecursion"),
    ("a.jsonl", GOOD * 9, "one prompt"),
    ("a.jsonl.xz", lzma.compress(GOOD), "no such task"),
    ("a.txt.xz", lzma.compress(b"once upon a time " * 20)[:-20], "not readable"),
    ("a.txt", b"caf\xe9", "not readable.*utf-8"),
    ("a.txt", b"short", "6 tokens are too few"),
])
def test_what_cannot_be_read_is_named_with_the_reason(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=f"{name}(:|,) {message}"):
        load([str(tmp_path / name)], TOK, 32)


def test_a_jsonl_holds_out_a_tenth_of_its_prompts_with_all_their_rows(tmp_path):
    rows = [("日" * (i % 20), f"{i // 20 % 2}") for i in range(400)]    # each prompt 20 times
    task, = load([write_rows(tmp_path / "a.jsonl", rows)], TOK, 64)
    train, valid = texts(task.train), texts(task.valid)
    assert sorted(train + valid) == sorted(rows)
    trained, held_out = {p for p, _ in train}, {p for p, _ in valid}
    assert len(held_out) == 2 and not trained & held_out and held_out != {"", "日"}
    assert task.name == "a.jsonl" and "40 of 400 rows" in task.note


def test_a_folder_says_what_it_leaks_and_what_does_not_fit_the_block(tmp_path, monkeypatch):
    d, folder = tmp_path / "d", str(tmp_path / "d")
    write_rows(d / "train.jsonl", [("a", "1"), ("b" * 29, "2"), ("b", "2"), ("b", "3")])
    with pytest.raises(FileNotFoundError, match="d.*test.jsonl"):
        load([folder], TOK, 64)
    write_rows(d / "test.jsonl", [("t", "1")])
    whole, = load([folder], TOK, 31)                       # the last is never read
    task, = load([folder], TOK, 30)
    assert (whole.name, whole.note, texts(whole.valid)) == ("d", "", [("t", "1")])
    assert len(whole.train) == 4 and texts(task.train) == [("a", "1"), ("b", "2"), ("b", "3")]
    assert "1 rows longer than 30 tokens skipped" in task.note
    with pytest.raises(ValueError, match="d: no train row fits the block of 2 tokens"):
        load([folder], TOK, 2)
    write_rows(d / "valid.jsonl", [("v", "1"), ("b", "9"), ("b", "2"), ("a", "1")])
    task, = load([folder + "/"], TOK, 64)
    assert task.name == "d" and len(task.valid) == 4                    # valid goes before test
    assert re.search("^3 of .* held-out rows have a training row", task.note)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="--data ./d: .* called d"):
        load(["d", "./d"], TOK, 64)


def test_names_of_tasks():
    given = load(["mixture", "upper"], TOK, 64, eval_rows=20)
    assert [t.name for t in given] == [*MIXTURE, "upper"]
    arith, = load(["arith"], TOK, 64)
    assert given[1].train == arith.train and given[1].valid == arith.valid[::10]


def test_every_token_of_a_text_but_the_first_is_predicted_once(tmp_path):
    story = "".join(map(chr, range(32, 127)))
    text = story + "<|endoftext|>" + story[::-1]
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(text.encode()))
    tokens = [*story.encode(), 256, *story[::-1].encode(), 256]
    for task in load([str(tmp_path / "a.txt"), str(tmp_path / "a.txt.xz")], TOK, 19):
        rows = [(list(r.ids), r.given) for r in [*task.train, *task.valid]]
        assert rows == [(tokens[i:i + 20], 1) for i in range(0, 190, 19)]
        assert task.text and len(task.train) == 9


def test_the_checksum_notices_every_change_of_the_rows():
    a, b, v, w, c, x, moved = (encode(TOK, *row) for row in [
        ("a", "1"), ("b", "2"), ("v", "3"), ("w", "4"), ("a", "7"), ("v", "7"), ("", "a1")])
    sums = [Task("t", *parts).checksum() for parts in [
        ([a, b], [v, w]), ([c, b], [v, w]), ([a, b], [x, w]), ([b, a], [v, w]), ([a, b], [w, v]),
        ([moved, b], [v, w]), ([a, b, v], [w]), ([a, b], [v])]]
    assert len(set(sums)) == len(sums)
    text = [Row(np.array(ids, np.uint16), 1) for ids in ([1, 2], [2, 3], [2, 4])]
    assert Task("t", text[:2], text).checksum() != Task("t", text[::2], text).checksum()


# Rows and batches ---------------------------------------------------------------------------------
def test_the_stream_gives_tasks_in_turn_and_each_row_once_before_any_again():
    numbered = [Task(f"{t}", [Row([t, i], 1) for i in range(n)], [])
                for t, n in enumerate((10, 30, 30))]
    row, again, other = (stream(numbered, seed) for seed in (1, 1, 2))
    drawn = [row(i).ids for i in range(90)]
    assert [t for t, _ in drawn] == [0, 1, 2] * 30
    a, b, c = ([i for t, i in drawn if t == task] for task in range(3))
    assert all(sorted(a[k:k + 10]) == list(range(10)) for k in (0, 10, 20))
    assert sorted(b) == sorted(c) == list(range(30))
    assert a[:10] != a[10:20] and b != c and b != sorted(b)             # orders of their own
    assert [again(i).ids for i in reversed(range(90))] == drawn[::-1]   # of i and the seed alone
    assert [other(i).ids for i in range(90)] != drawn


def test_halves_are_disjoint_and_all_there_is():
    given = load(["instruct", "facts"], TOK, 512)
    halves, other = (data.halves(given, 0.7, seed) for seed in (0, 1))
    for task, first, second in zip(given, *halves):
        rows, a, b = texts(task.train), texts(first.train), texts(second.train)
        assert len(a) == round(0.7 * len(rows)) and a != rows[:len(a)]
        assert sorted(a + b) == sorted(rows) and not set(a) & set(b)
        assert first.valid is second.valid is task.valid
    assert texts(halves[0][0].train) != texts(other[0][0].train)
    with pytest.raises(ValueError, match="--split 0.001: .*facts"):
        data.halves(given, 0.001, 0)


def test_collate_counts_the_completion_and_pads_to_the_longest_row():
    rows = [encode(TOK, "ab", "c"), encode(TOK, "", "xyz")]
    assert [r.counted for r in rows] == [2, 4]
    idx, targets = data.collate(rows)
    assert idx.tolist() == [[97, 98, 256, 99], [256, 120, 121, 122]]
    assert targets.tolist() == [[-100, -100, 99, 256], [120, 121, 122, 256]]
    idx, targets = data.collate([encode(TOK, "a", "b"), *rows])
    assert idx[0].tolist() == [97, 256, 98, 0] and targets[0].tolist() == [-100, 98, 256, -100]


def test_the_longest_prompt_and_completion_of_a_batch_fit_the_block_together():
    rng, block = np.random.default_rng(0), 40
    rows = [Row([i] * n, int(rng.integers(1, n))) for i, n in enumerate(rng.integers(2, 42, 300))]
    found = list(data.batches(rows, 8, block))
    assert sorted(r.ids[0] for batch in found for r in batch) == list(range(300))  # every row once
    for batch in found:
        prompts, completions = [r.given for r in batch], [len(r.ids) - r.given for r in batch]
        assert max(prompts) + max(completions) <= block + 1
    assert len(found) < 150                                             # and not one by one
    assert [len(batch) for batch in data.batches(rows[:1] * 20, 8, block)] == [8, 8, 4]
