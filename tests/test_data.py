"""data.py: tokenisers, built-in tasks, files and their errors, batches."""
import lzma
import re

import numpy as np
import pytest
import tiktoken

import data
from data import GROUPS, MIXTURE, SKILLS, builtin, collate, encode, load, read_jsonl, stream, tokenizer

TOK = tokenizer(257)


# tokenisers

def test_bytes():
    text = "naïve\n\t 日本 <|endoftext|> \x00"
    assert TOK.encode_ordinary(text) == list(text.encode()) and TOK.decode(list(text.encode())) == text
    assert TOK.eot_token == 256 and TOK.n_vocab == 257


def test_gpt2_files_that_cannot_be_had(monkeypatch):
    def offline(name):
        raise OSError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(ConnectionError, match="set TIKTOKEN_CACHE_DIR to a folder"):
        tokenizer(50257)
    with pytest.raises(ValueError, match="no tokeniser has 99 tokens"):
        tokenizer(99)


# built-in tasks

ANSWERS = {  # written again, another way
    "copy": lambda a: a[0], "reverse": lambda a: "".join(reversed(a[0])), "upper": lambda a: a[0].swapcase(),
    "next": lambda a: a[0].translate(str.maketrans("abcdefghijklmnopqrstuvwxyz", "bcdefghijklmnopqrstuvwxyza")),
    "first": lambda a: a[0][:1], "last": lambda a: a[0][-1:], "length": lambda a: f"{len(a[0])}",
    "sort": lambda a: "".join(c * a[0].count(c) for c in "abcdefghijklmnopqrstuvwxyz"), "double": lambda a: a[0] * 2,
    "add": lambda a: str(sum(map(int, a))), "max": lambda a: sorted(a, key=int)[-1],
    "mark": lambda a: "".join(c.upper() if c == a[0] else c for c in a[1]),
    "contains": lambda a: "no" if a[1].find(a[0]) < 0 else "yes",
}


@pytest.mark.parametrize("name", SKILLS)
def test_skills_are_right(name):
    for prompt, completion in builtin(name)[0][:300]:
        verb, *rest = prompt.lstrip(".").split(" ")
        assert verb == name and ANSWERS[name](rest) == completion


@pytest.mark.parametrize("name", [*SKILLS, *MIXTURE])
def test_builtin_rows(name):
    train, valid = builtin(name)
    assert (train, valid) == builtin(name)
    prompts, held = ({p.lstrip(".") for p, _ in rows} for rows in (train, valid))
    if name == "facts":                     # the exception: nobody can infer a fact
        assert prompts == held and len(prompts) == 64
    else:
        assert len(prompts) == len(train) >= 4000 and len(held) == 200 and not prompts & held


def test_yes_and_no_are_equally_frequent():
    share = np.mean([c == "yes" for _, c in builtin("infer")[0]])
    assert abs(share - 0.5) < 5 * 0.5 / 4000**0.5       # five standard deviations


MIXTURE_ANSWERS = [  # (task, pattern of the prompt, answer from its groups)
    ("instruct", r"backwards, please (\w+)", lambda s: s[::-1]), ("instruct", r"shout (\w+)", str.upper),
    ("instruct", r"say it twice (\w+)", lambda s: s + s), ("instruct", r"what ends \w*(\w)", str),
    ("instruct", r"what begins (\w)\w*", str), ("instruct", r"how long is (\w+)", lambda s: str(len(s))),
    ("arith", r"\w+ had (\d+) and got (\d+)", lambda a, b: str(int(a) + int(b))),
    ("arith", r"\w+ takes more: (\d+) or (\d+)", lambda a, b: max(a, b, key=int)),
    ("infer", r"\w+ (\w+) (\w+)\. (\w+) \2\?", lambda v, d, w: "yes" if v == w else "no"),
    ("infer", r"\w+ has (\d+)\. more than (\d+)\?", lambda a, b: "yes" if int(a) > int(b) else "no"),
    ("data2text", r"(\w+)\|([a-z]+)", lambda n, x: f"{n} is {WORDS[x]}" if x in WORDS else f"{n} sells {x}"),
    ("data2text", r"(\w+)\|([a-z]+)\|([a-z]+)", lambda n, x, p: f"{n} sells {WORDS[p]} {x}"),
]
WORDS = {"low": "cheap", "mid": "fair", "top": "fine"}


def test_mixture_answers_are_right():
    for name in set(MIXTURE) - {"facts"}:
        for prompt, completion in builtin(name)[0]:
            answers = [f(*m.groups()) for task, p, f in MIXTURE_ANSWERS if task == name and (m := re.fullmatch(p, prompt))]
            assert answers == [completion], prompt


def test_the_mixture_stays_inside_the_positions_that_the_skills_train():
    def longest(group):
        return max(len(encode(TOK, *row).ids) for name in GROUPS[group] for row in builtin(name)[0][:4000])

    assert longest("mixture") <= longest("skills")


# files

def test_jsonl(tmp_path):
    (tmp_path / "a.jsonl").write_text('\ufeff{"prompt": "p", "completion": "c", "id": 3}\n\n{"prompt": "", "completion": "日"}\n')
    assert read_jsonl(tmp_path / "a.jsonl") == [("p", "c"), ("", "日")]


@pytest.mark.parametrize("line, reason", [
    ('{"prompt": "p", "completion": "c"', r"not JSON \(Expecting ',' delimiter"),
    ('["p", "c"]', "not an object like"),
    ('{"completion": "c"}', '"prompt" is missing'),
    ('{"prompt": "p", "completion": 4}', '"completion" is 4, not a string'),
    ('{"prompt": "p", "completion": ""}', '"completion" is empty'),
    (b'{"prompt": "\xff", "completion": "c"}', "not JSON .*utf-8"),
])
def test_a_bad_row_is_named_with_file_line_and_reason(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "p", "completion": "c"}\n\n' + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(ValueError, match=f"a.jsonl, line 3: {reason}"):
        read_jsonl(path)


def write_rows(path, prompts):
    path.write_text("".join(f'{{"prompt": "{p}", "completion": "c"}}\n' for p in prompts))


def test_load(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    write_rows(folder / "train.jsonl", ["a", "b" * 30, "c"])
    with pytest.raises(FileNotFoundError, match="needs train.jsonl and valid.jsonl or test.jsonl"):
        load([str(folder)], TOK, 20)
    write_rows(folder / "test.jsonl", ["t"])
    write_rows(tmp_path / "one.jsonl", range(50))
    story = "".join(map(chr, range(32, 127)))
    (tmp_path / "n.txt").write_text(story + "<|endoftext|>" + story[::-1])
    two, one, text = load([str(folder), str(tmp_path / "one.jsonl"), str(tmp_path / "n.txt")], TOK, 19, eval_rows=10)
    assert len(two.train) == 2 and len(two.valid) == 1
    assert two.note == "1 rows longer than 19 tokens skipped (up to 32)"
    assert len(load([str(folder)], TOK, 32)[0].train) == 3 and "skipped" in load([str(folder)], TOK, 31)[0].note
    assert len(one.train) == 45 and len(one.valid) == 5 and one.note == "5 of 50 rows held out"
    assert not {tuple(r.ids) for r in one.train} & {tuple(r.ids) for r in one.valid}
    write_rows(folder / "valid.jsonl", ["v"])
    assert load([str(folder)], TOK, 20)[0].valid[0].ids[0] == ord("v")  # valid before test
    # text: every token but the first is predicted once
    assert text.text and len(text.train) == 9 and len(text.valid) == 1
    rows = [*text.train, *text.valid]
    assert [i for r in rows for i in r.ids[1:]] == [*story.encode()[1:], 256, *story.encode()[::-1], 256][:190]
    assert all(a.ids[-1] == b.ids[0] for a, b in zip(rows, rows[1:]))
    assert load(["add"], TOK, 64, eval_rows=20)[0].train == load(["add"], TOK, 64)[0].train
    assert [t.name for t in load(["mixture", "add"], TOK, 64)] == [*MIXTURE, "add"]
    with pytest.raises(ValueError, match="add: given twice"):
        load(["skills", "add"], TOK, 64)
    with pytest.raises(FileNotFoundError, match="--data ad: no such .jsonl or .txt file, folder or built-in task; built-in are"):
        load(["ad"], TOK, 64)
    with pytest.raises(ValueError, match="no row to train on or none to hold out fits the block of 3 tokens"):
        load(["add"], TOK, 3)


def test_xz_text_and_its_tokens_are_the_same_text(tmp_path):
    text = "once upon a time " * 20
    (tmp_path / "a.txt").write_text(text)
    with lzma.open(tmp_path / "b.txt.xz", "wt") as f:
        f.write(text)
    a, b = load([str(tmp_path / "a.txt"), str(tmp_path / "b.txt.xz")], TOK, 32)
    np.save(tmp_path / "c.npy", np.array(TOK.encode_ordinary(text) + [TOK.eot_token], np.uint16))
    c, = load([str(tmp_path / "c.npy")], TOK, 32)
    assert np.array_equal(a.train[2].ids, b.train[2].ids) and np.array_equal(a.train[2].ids, c.train[2].ids)
    for bad in (np.arange(300, dtype=np.uint16), np.zeros(300), np.zeros((2, 300), np.uint16)):
        np.save(tmp_path / "bad.npy", bad)
        with pytest.raises(ValueError, match="bad.npy: not readable as tokens .it should be one row of uint16 below 257"):
            load([str(tmp_path / "bad.npy")], TOK, 32)
    (tmp_path / "c.txt").write_text("short")
    with pytest.raises(ValueError, match="6 tokens are too few"):
        load([str(tmp_path / "c.txt")], TOK, 32)
    (tmp_path / "d.txt.xz").write_bytes((tmp_path / "b.txt.xz").read_bytes()[:-20])
    (tmp_path / "e.txt").write_bytes(b"caf\xe9")
    for name in ("d.txt.xz", "e.txt"):
        with pytest.raises(ValueError, match=f"{name}: not readable as text"):
            load([str(tmp_path / name)], TOK, 32)


# batches

def tasks():
    return [data.Task(name, [data.Row([t, i], 1) for i in range(n)], []) for t, (name, n) in enumerate([("a", 10), ("b", 30)])]


def test_equal_shares():
    row = stream(tasks(), seed=1)
    drawn = [row(i).ids for i in range(60)]
    assert [t for t, _ in drawn] == [0, 1] * 30
    a, b = ([i for t, i in drawn if t == task] for task in (0, 1))
    assert sorted(b) == list(range(30))                                 # each row once ...
    assert all(sorted(a[k:k + 10]) == list(range(10)) for k in (0, 10, 20)) and a[:10] != a[10:20]


def test_proportional_shares():
    row = stream(tasks(), seed=1, mix="proportional")
    assert sorted(tuple(row(i).ids) for i in range(40)) == sorted([(0, i) for i in range(10)] + [(1, i) for i in range(30)])


def test_every_pool_has_an_order_of_its_own():
    row = stream([data.Task(t, [data.Row([t, i], 1) for i in range(30)], []) for t in "ab"], seed=1)
    assert [row(i).ids[1] for i in range(0, 60, 2)] != [row(i).ids[1] for i in range(1, 60, 2)]


def test_row_i_depends_on_nothing_but_i_and_the_seed():
    a, b, c = (stream(tasks(), seed) for seed in (1, 1, 2))
    want = [a(i) for i in range(80)]
    assert [b(i) for i in reversed(range(80))][::-1] == want != [c(i) for i in range(80)]


def test_collate_counts_the_completion_and_pads_to_the_longest_row():
    rows = [encode(TOK, "ab", "c"), encode(TOK, "", "xyz")]
    idx, targets = collate(rows)
    assert idx.tolist() == [[97, 98, 256, 99], [256, 120, 121, 122]]
    assert targets.tolist() == [[-100, -100, 99, 256], [120, 121, 122, 256]]
    idx, targets = collate([encode(TOK, "a", "b"), *rows])
    assert idx[0].tolist() == [97, 256, 98, 0] and targets[0].tolist() == [-100, 98, 256, -100]
