"""support/data.py and support/tasks.py: tokenizers, built-in tasks, files, batches."""
import hashlib
import json
import lzma
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from conftest import ROOT
from support import data, tasks
from support.data import Row, Task, encode, load, stream
from support.tasks import MIXTURE, SKILLS

TOK = data.tokenizer(257)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
GOOD = b'{"prompt": "p", "completion": "c"}\n\n'
PRICES = {"low": "cheap", "mid": "fair", "top": "fine"}


# Tokenizers ---------------------------------------------------------------------------------------
def test_tokenizers(monkeypatch):
    text = "naïve\n\t 日本 <|endoftext|> \x00"
    assert TOK.encode_ordinary(text) == [*text.encode()]
    assert TOK.decode([*text.encode()]) == text
    assert TOK.eot_token == 256 and TOK.n_vocab == 257
    with monkeypatch.context() as m:
        m.setattr("tiktoken.get_encoding", lambda name: open("/no/such/file"))
        with pytest.raises(ConnectionError, match="vocab.bpe as .* set TIKTOKEN_CACHE_DIR") as e:
            data.tokenizer(50257)
    named = dict(re.findall(r"(\w+\.\w+) as (\w+)", str(e.value)))
    url = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    assert named == {f: hashlib.sha1(f"{url}{f}".encode()).hexdigest()      # as in tiktoken
                     for f in ("vocab.bpe", "encoder.json")}
    with pytest.raises(ValueError, match="no tokenizer .*99 tokens"):
        data.tokenizer(99)


def test_a_prompt_ends_with_eot_except_for_a_run_on_plain_text():
    """Plain text has <eot> between documents only, so a model would start a new one after it."""
    for names in (["mixture"], ["rows.jsonl"], ["a.txt", "upper"]):
        assert data.encode_prompt(TOK, "ab", names) == [97, 98, 256]
    for names in (["a.txt"], ["a.txt", "folder/b.txt.xz"]):
        assert data.encode_prompt(TOK, "ab", names) == [97, 98]


# Built-in tasks -----------------------------------------------------------------------------------
ANSWERS = {     # {pattern of a prompt: function from its groups to the completion}
    r"\.*copy (\w+)": str,
    r"(?:\.*length|how long is) (\w+)": lambda s: f"{len(s)}",
    r"(?:\.*double|say it twice) (\w+)": lambda s: s * 2,
    r"(?:\.*upper|shout) (\w+)": str.swapcase,
    r"(?:\.*reverse|backwards, please) (\w+)": lambda s: "".join(reversed(s)),
    r"(?:\.*first|what begins) (\w)\w*": str,
    r"(?:\.*last|what ends) \w*(\w)": str,
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
def test_builtin_rows_are_correct_and_distinct_and_the_held_out_ones_separate(name):
    train, valid = tasks.builtin(name)
    prompts = {prompt.lstrip(".") for prompt, _ in train}
    held_out = {prompt.lstrip(".") for prompt, _ in valid}
    assert len(prompts) == len(train) and len(held_out) == len(valid)
    if name == "facts":                     # the exception: nobody can infer a fact
        assert prompts == held_out and len(prompts) == 64
        return
    assert len(prompts) >= 4000 and len(held_out) == 200 and not prompts & held_out
    for prompt, completion in train[:500]:
        answers = []
        for pattern, answer in ANSWERS.items():
            match = re.fullmatch(pattern, prompt)
            if match:
                answers.append(answer(*match.groups()))
        assert answers == [completion], prompt


PINNED = {      # the published numbers were measured on these rows
    "copy": 4205782538, "mark": 1444672839, "max": 3684529058, "instruct": 753840065,
    "arith": 154702565, "infer": 3322737252, "facts": 197946597, "data2text": 1312875658,
}


PRINT_CHECKSUMS = """
import sys, zlib
from support import tasks
print({name: zlib.crc32(repr(tasks.builtin(name)).encode()) for name in sys.argv[1:]})"""


@pytest.mark.parametrize("seed", ["0", "1"])
def test_builtin_rows_are_the_same_in_every_process_and_on_every_machine(seed):
    """Python's hash of a string depends on PYTHONHASHSEED."""
    command = [sys.executable, "-c", PRINT_CHECKSUMS, *PINNED]
    run = subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": seed}, cwd=ROOT, text=True,
                         stdout=subprocess.PIPE, check=True)
    assert run.stdout == f"{PINNED}\n"


# Files --------------------------------------------------------------------------------------------
def write_rows(path, rows):
    """Write rows with everything that is allowed: a byte order mark, empty lines, other keys."""
    path.parent.mkdir(exist_ok=True)
    lines = [json.dumps(dict(prompt=p, completion=c, id=3), ensure_ascii=False) for p, c in rows]
    path.write_text("\n\n".join(lines), "utf-8-sig")
    return str(path)


def texts(rows):
    """[(prompt, completion)] of encoded rows."""
    decoded = []
    for row in rows:
        prompt = TOK.decode(row.ids[:row.prompt_len - 1])
        decoded.append((prompt, TOK.decode(row.ids[row.prompt_len:-1])))
    return decoded


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", GOOD + GOOD[:-3], ", line 3 is not a row .*Expecting ',' delimiter"),
    ("a.jsonl", GOOD + b'{"completion": "c"}', ", line 3 is not a row .*KeyError: 'prompt'"),
    ("a.jsonl", GOOD + b'{"prompt": "p", "completion": ""}', ", line 3 .*completion not empty"),
    ("a.jsonl", GOOD + b'{"prompt": "p", "completion": 3}', ", line 3 .*must be strings"),
    ("a.jsonl", GOOD + b'{"prompt": "\xff", "completion": "c"}', ", line 3 .*utf-8"),
    ("a.jsonl", GOOD + b"[" * 100_000, ", line 3 .*[Rr]ecursion"),
    ("a.jsonl", b"\n\n", " has no rows"),
    ("a.jsonl", GOOD * 9, " has only one prompt"),
    ("a.jsonl.xz", lzma.compress(GOOD), " is none of these: a .jsonl file, a folder .* or text"),
    ("a.csv", GOOD, " is none of these: a .jsonl file, a folder with train.jsonl and valid.jsonl"),
    ("a.txt.xz", lzma.compress(b"once upon a time " * 20)[:-20], " cannot be read as text"),
    ("a.txt", b"caf\xe9", " cannot be read as text .*utf-8"),
    ("a.txt", b"short", " has 6 tokens, too few for two windows of 32"),
])
def test_errors_name_the_file_and_the_reason(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=f"/{name}{message}"):
        load([str(tmp_path / name)], TOK, 32)


def test_a_jsonl_holds_out_a_tenth_of_its_prompts_with_all_their_rows(tmp_path):
    rows = [("日" * (i % 20), f"{i // 20 % 2}") for i in range(400)]    # each prompt 20 times
    task, = load([write_rows(tmp_path / "a.jsonl", rows)], TOK, 64)
    train = texts(task.train)
    valid = texts(task.valid)
    assert sorted(train + valid) == sorted(rows)
    trained = {prompt for prompt, _ in train}
    held_out = {prompt for prompt, _ in valid}
    assert len(held_out) == 2 and not trained & held_out and held_out != {"", "日"}
    assert task.name == "a.jsonl" and task.note == "40 of 400 rows held out"


def test_the_note_of_a_folder_tells_leaked_prompts_and_rows_longer_than_the_block(tmp_path):
    folder = tmp_path / "d"
    write_rows(folder / "train.jsonl", [("a", "1"), ("b" * 29, "2"), ("b", "2"), ("b", "3")])
    with pytest.raises(FileNotFoundError, match="/d has neither valid.jsonl nor test.jsonl"):
        load([str(folder)], TOK, 64)
    write_rows(folder / "test.jsonl", [("t", "1")])
    whole, = load([str(folder)], TOK, 31)                       # the last token is never read
    assert (whole.name, whole.note, texts(whole.valid)) == ("d", "", [("t", "1")])
    assert len(whole.train) == 4
    task, = load([str(folder)], TOK, 30)
    assert texts(task.train) == [("a", "1"), ("b", "2"), ("b", "3")]
    assert task.note == "1 rows longer than 30 tokens skipped"
    with pytest.raises(ValueError, match="d: every train row is longer than 2 tokens"):
        load([str(folder)], TOK, 2)
    write_rows(folder / "valid.jsonl", [("v", "1"), ("b", "9"), ("b", "2"), ("a", "1")])
    task, = load([f"{folder}/"], TOK, 64)
    assert task.name == "d" and len(task.valid) == 4            # valid.jsonl precedes test.jsonl
    assert task.note == "3 of 4 held-out prompts are also training prompts"


def test_two_tasks_must_not_have_the_same_name(tmp_path, monkeypatch):
    for name in ("train", "valid"):
        write_rows(tmp_path / "d" / f"{name}.jsonl", [("a", "1")])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="^./d: there is another task called d; rename one$"):
        load(["d", "./d"], TOK, 64)


@pytest.mark.parametrize("name", ["instruct", "copy", "mixture", "skills"])
def test_a_name_must_not_mean_a_builtin_task_and_a_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for part in ("train", "valid"):
        write_rows(tmp_path / name / f"{part}.jsonl", [("a", "1")])
    message = f"^{name} is built in and also a file or folder here: pass ./{name} for the latter"
    with pytest.raises(ValueError, match=message):
        load([name], TOK, 64)
    task, = load([f"./{name}"], TOK, 64)
    assert task.name == name and texts(task.train) == [("a", "1")]
    os.mkdir("upper")                           # only the names that the user passes matter
    if name == "instruct":
        os.rename("instruct", "renamed")
        assert [t.name for t in load(["mixture"], TOK, 64)] == [*MIXTURE]


@pytest.mark.parametrize("n, eval_rows", [(399, 200), (400, 200), (201, 200), (7, 3), (3, 7)])
def test_the_held_out_rows_are_evenly_spread(n, eval_rows, tmp_path):
    for part, count in (("train", 1), ("valid", n)):
        write_rows(tmp_path / "d" / f"{part}.jsonl", [("p", f"{i}") for i in range(count)])
    task, = load([str(tmp_path / "d")], TOK, 64, eval_rows)
    kept = [int(completion) for _, completion in texts(task.valid)]
    assert len(kept) == min(n, eval_rows) and kept[0] == 0
    gaps = {b - a for a, b in zip(kept, [*kept[1:], n])}
    assert max(gaps) - min(gaps) <= 1           # also from the last row to the end of the file


def test_names_of_groups_and_tasks():
    loaded = load(["mixture", "upper"], TOK, 64, eval_rows=20)
    assert [t.name for t in loaded] == [*MIXTURE, "upper"]
    arith, = load(["arith"], TOK, 64)
    assert loaded[1].train == arith.train and loaded[1].valid == arith.valid[::10]
    with pytest.raises(FileNotFoundError, match="there is no task uper: .*mixture .*upper"):
        load(["uper"], TOK, 64)


def test_every_token_of_a_text_except_the_first_is_predicted_once(tmp_path):
    story = "".join(map(chr, range(32, 127)))
    text = story + "<|endoftext|>" + story[::-1]
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(text.encode()))
    tokens = [*story.encode(), 256, *story[::-1].encode(), 256]
    for task in load([str(tmp_path / "a.txt"), str(tmp_path / "a.txt.xz")], TOK, 19):
        rows = [(list(row.ids), row.prompt_len) for row in [*task.train, *task.valid]]
        assert rows == [(tokens[i:i + 20], 1) for i in range(0, 190, 19)]
        assert task.text and len(task.train) == 9


def test_the_checksum_changes_with_every_change_of_the_rows():
    a, b, v, w, c, x, moved = (encode(TOK, *row) for row in [
        ("a", "1"), ("b", "2"), ("v", "3"), ("w", "4"), ("a", "7"), ("v", "7"), ("", "a1")])
    sums = [Task("t", *parts).checksum() for parts in [
        ([a, b], [v, w]), ([c, b], [v, w]), ([a, b], [x, w]), ([b, a], [v, w]), ([a, b], [w, v]),
        ([moved, b], [v, w]), ([a, b, v], [w]), ([a, b], [v])]]
    assert len(set(sums)) == len(sums)
    text = [Row(np.array(ids, np.uint16), 1) for ids in ([1, 2], [2, 3], [2, 4])]
    assert Task("t", text[:2], text).checksum() != Task("t", text[::2], text).checksum()


# Rows and batches ---------------------------------------------------------------------------------
def test_the_stream_alternates_the_tasks_and_shuffles_each_in_every_epoch():
    sizes = (10, 30, 30)
    numbered = []
    for task, size in enumerate(sizes):
        numbered.append(Task(f"{task}", [Row([task, i], 1) for i in range(size)], []))
    row = stream(numbered, seed=1)
    drawn = [row(i).ids for i in range(90)]
    assert [task for task, _ in drawn] == [0, 1, 2] * 30
    a, b, c = ([i for task, i in drawn if task == wanted] for wanted in range(3))
    assert all(sorted(a[k:k + 10]) == list(range(10)) for k in (0, 10, 20))
    assert sorted(b) == sorted(c) == list(range(30))
    assert a[:10] != a[10:20] and b != c and b != sorted(b)     # every order is different
    again = stream(numbered, seed=1)
    assert [again(i).ids for i in reversed(range(90))] == drawn[::-1]   # depends on i and the seed
    other = stream(numbered, seed=2)
    assert [other(i).ids for i in range(90)] != drawn


def test_the_two_parts_for_a_search_are_disjoint_and_complete():
    loaded = load(["instruct", "facts"], TOK, 512)
    parts = data.split_for_search(loaded, 0.7, seed=0)
    for task, first, second in zip(loaded, *parts):
        rows = texts(task.train)
        a = texts(first.train)
        b = texts(second.train)
        assert len(a) == round(0.7 * len(rows)) and a != rows[:len(a)]
        assert sorted(a + b) == sorted(rows) and not set(a) & set(b)
        assert first.valid is second.valid is task.valid
    other = data.split_for_search(loaded, 0.7, seed=1)
    assert texts(parts[0][0].train) != texts(other[0][0].train)
    for share in (0.001, 0.999):
        with pytest.raises(ValueError, match=f"share of {share} .*facts's .*empty"):
            data.split_for_search(loaded, share, seed=0)


def test_collate_counts_the_completion_and_pads_to_the_longest_row():
    rows = [encode(TOK, "ab", "c"), encode(TOK, "", "xyz")]
    assert [row.n_target_tokens for row in rows] == [2, 4]
    idx, targets = data.collate(rows)
    assert idx.tolist() == [[97, 98, 256, 99], [256, 120, 121, 122]]
    assert targets.tolist() == [[-100, -100, 99, 256], [120, 121, 122, 256]]
    idx, targets = data.collate([encode(TOK, "a", "b"), *rows])
    assert idx[0].tolist() == [97, 256, 98, 0]
    assert targets[0].tolist() == [-100, 98, 256, -100]


def test_batches_have_rows_of_similar_length():
    lengths = [3, 9, 2, 9, 5, 4, 8, 1, 7]
    rows = [Row([i] * n, 1) for i, n in enumerate(lengths)]
    assert data.batches(rows, 4) == [[rows[i] for i in order]
                                     for order in ([7, 2, 0, 5], [4, 8, 6, 1], [3])]
