"""The paper's run on E2E: the download from a local server, and the scores."""
import contextlib
import hashlib
import json
import math
import re
import threading
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch

import analyze
import e2e
import lora
import smollm
import text_scores
import train
from conftest import ROOT, TINY, random_gpt, randomise
from support import data
from test_readme import commands

SHARED = ROOT.parent / "shared"


# The download ------------------------------------------------------------------------------------

ROWS = {"train": 30, "valid": 6, "test": 6}         # few, so that the tests are fast
FILES = {}
for split, count in ROWS.items():
    lines = [f"name : Place {i} | area : river||Place {i} is at the river . \n" for i in range(count)]
    FILES[f"/{split}.txt"] = "".join(lines).encode()
TEST = FILES["/test.txt"]


@pytest.fixture
def few_rows(monkeypatch):
    monkeypatch.setattr(e2e, "ROWS", ROWS)


@contextlib.contextmanager
def server(files, cut=None):
    """A local server of {path: content}; the file called `cut` ends after half of its bytes."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            content = files.get(self.path)
            if content is None:
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.path == cut:
                content = content[:len(content) // 2]
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    httpd = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


def failure(arguments, capsys):
    """The one line that the command prints to stderr before it exits with status 2."""
    with pytest.raises(SystemExit) as e:
        e2e.main([str(argument) for argument in arguments])
    assert e.value.code == 2
    line, = capsys.readouterr().err.splitlines()
    return line


def test_a_complete_download(tmp_path, capsys, few_rows):
    folder = tmp_path / "data" / "e2e"
    with server(FILES) as url:
        e2e.main(["get", str(folder), "--from", url])
    said = capsys.readouterr().out
    assert "train 30, valid 6, test 6 rows" in said and url in said and "CC BY-SA" in said
    assert sorted(path.name for path in folder.iterdir()) == [
        "test.jsonl", "train.jsonl", "valid.jsonl"]
    rows = data.read_jsonl(folder / "valid.jsonl")
    assert len(rows) == 6
    assert rows[3] == ("name : Place 3 | area : river", "Place 3 is at the river .")


@pytest.mark.parametrize("files, cut, message", [
    (FILES, "/test.txt", "could not be downloaded .*IncompleteRead"),
    (FILES | {"/test.txt": TEST[TEST.index(b"\n") + 1:]}, None, "5 rows, but E2E has 6"),
    (FILES | {"/test.txt": TEST.replace(b"||", b"|")}, None, r"test\.txt, line 1: .* no \|\|"),
    (FILES | {"/test.txt": b"a || b\nc || \n"}, None, r"test\.txt, line 2: .* is empty"),
    (FILES | {"/test.txt": b"\xff" * 9}, None, "utf-8"),
    ({}, None, "could not be downloaded .*404"),
], ids=["interrupted", "wrong count", "other form", "empty", "no text", "missing"])
def test_a_failed_download_changes_nothing(tmp_path, capsys, few_rows, files, cut, message):
    with server(files, cut) as url:
        line = failure(["get", tmp_path / "e2e", "--from", url], capsys)
    assert re.search(message, line)
    assert list(tmp_path.iterdir()) == []
    old = tmp_path / "old"
    old.mkdir()
    (old / "train.jsonl").write_text("old")
    with server(files, cut) as url:
        failure(["get", old, "--from", url], capsys)
    assert [path.read_text() for path in old.iterdir()] == ["old"]


def test_no_network(tmp_path, capsys):
    with server({}) as url:
        pass                                                    # nothing listens there any more
    line = failure(["get", tmp_path / "e2e", "--from", url], capsys)
    assert "could not be downloaded" in line and "--from FOLDER" in line
    assert list(tmp_path.iterdir()) == []


def test_files_that_exist_already(tmp_path, capsys, few_rows):
    source = tmp_path / "source"
    source.mkdir()
    assert "train.txt" in failure(["get", tmp_path / "e2e", "--from", source], capsys)
    for name, content in FILES.items():
        (source / name[1:]).write_bytes(content)
    e2e.main(["get", str(tmp_path / "e2e"), "--from", str(source)])
    assert len(data.read_jsonl(tmp_path / "e2e" / "train.jsonl")) == 30


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text("old")
    second = tmp_path / "second.jsonl"
    write_bytes = type(path).write_bytes

    def half(self, content):
        write_bytes(self, content[:1])
        if "second" in self.name:
            raise OSError("no space left on device")

    monkeypatch.setattr(type(path), "write_bytes", half)
    with pytest.raises(OSError):
        e2e.write({path: b"new", second: b"new"})
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"] and path.read_text() == "old"


def test_the_authors_adapter_is_checked(tmp_path, capsys, monkeypatch):
    path = tmp_path / "new" / "adapter.pt"
    with server({"/gpt2_md_lora_e2e.pt": b"other"}) as url:
        assert "sha256" in failure(["get", path, "--from", url], capsys)
        assert list(tmp_path.iterdir()) == []
        monkeypatch.setattr(e2e, "ADAPTER_SHA256", hashlib.sha256(b"other").hexdigest())
        e2e.main(["get", str(path), "--from", url])
    assert path.read_bytes() == b"other" and "--alpha 32" in capsys.readouterr().out
    adapter = SHARED / "adapters" / "gpt2-medium-e2e"
    if adapter.is_dir():
        monkeypatch.undo()
        e2e.main(["get", str(path), "--from", str(adapter)])


@pytest.mark.parametrize("split", ["valid", "test"])
def test_the_official_rows(split):
    file = SHARED / "e2e_official" / f"{split}.txt"
    if not file.is_file():
        pytest.skip("no ../shared/e2e_official")
    with open(SHARED / "data" / "e2e" / f"{split}.jsonl") as f:
        want = [json.loads(line) for line in f]
    assert e2e.parse_rows(file.read_bytes(), file.name) == want
    assert len(want) == e2e.ROWS[split]


# Scores ------------------------------------------------------------------------------------------

def test_slots_that_a_text_mentions():
    prompts = ["name : Aromi | food : Chinese | family friendly : yes", "name : The Mill"]
    texts = ["aromi sells food .", "The Mill is open ."]
    assert text_scores.slots_mentioned(prompts, texts) == 2 / 3


def test_texts_of_one_meaning_are_its_references(tmp_path):
    rows = [{"prompt": p, "completion": c} for p, c in (("a", " x"), ("b", "y"), ("a", "z"))]
    file = tmp_path / "test.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    assert e2e.read_references(file) == {"a": ["x", "z"], "b": ["y"]}


def test_nist_by_hand():
    a, ab, abc = ["a"], ["a", "b"], ["a", "b", "c"]
    one_of_three = math.log2(3)
    assert text_scores.nist([abc], [[abc]]) == pytest.approx(one_of_three)
    assert text_scores.nist([ab], [[abc]]) == pytest.approx(one_of_three / 2)       # too short
    # 5 words, "a" is 2 of them, and the references have 2.5 words on average
    weight_a, weight_c = math.log2(5 / 2), math.log2(5)
    unigrams = (weight_a + weight_c) / 3            # of "a c a"; no reference has "a" twice
    assert text_scores.nist([["a", "c", "a"]], [[ab, abc]]) == pytest.approx(unigrams)
    # "a" is 2 of the 4 words of all texts' references
    assert text_scores.nist([abc, a], [[abc], [a]]) == pytest.approx((1 + 2 + 2 + 1) / 4 + 1 / 2)


def test_bleu_of_texts_with_different_numbers_of_references():
    pytest.importorskip("sacrebleu")
    references = [["The mill , is open .", "Open ."], ["Aromi serves Thai food ."]]
    texts = ["the MILL , is open .", "Aromi serves Thai food ."]
    assert text_scores.bleu_and_nist(texts, references)["bleu"] == pytest.approx(100)
    # 5 of 6 words occur in the references; the closest ones have 2 + 5 words
    want = 100 * (5 / 6) ** (1 / 4) * math.exp(1 - 7 / 6)
    assert text_scores.bleu_and_nist(["x", texts[1]], references)["bleu"] == pytest.approx(want)


def test_invented_rows_have_three_texts_for_each_meaning(tmp_path):
    e2e.main(["invent", str(tmp_path)])
    train_part, valid, test = [e2e.read_references(tmp_path / f"{split}.jsonl") for split in e2e.ROWS]
    assert [len(texts) for texts in test.values()] == [3] * 10
    assert len({**train_part, **valid, **test}) == 30           # no file has another one's prompts


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The folder of a run of two steps on a small data/e2e, in bytes."""
    monkeypatch.chdir(tmp_path)
    e2e.main(["invent", "data/e2e"])
    train.main("--data data/e2e --targets q v --rank 4 --alpha 32 --steps 2 --batch_size 4 "
               "--eval_rows 2 --device cpu --out out/e2e.pt".split())
    return tmp_path


def test_a_checkpoint_is_scored(run, capsys, monkeypatch):
    pytest.importorskip("sacrebleu")
    (run / "novel.txt").write_text("Call me Ishmael. " * 100)
    command = "score out/e2e.pt --data data/e2e --device cpu --prompts 3".split()
    e2e.main([*command, "--beams", "2", "--text", "novel.txt"])
    said = capsys.readouterr().out
    row = next(line for line in said.splitlines() if line.startswith("LoRA paper"))
    assert row.split()[-6:] == ["70.4", "8.85", "46.8", "71.8", "2.53", "-"]
    assert "3 meaning representations, beam search, 2 beams, length penalty 0.9" in said
    monkeypatch.setattr(e2e, "beam_search", None)               # it must not be called
    e2e.main([*command, "--greedy", "--out", "out/greedy.json"])
    e2e.main([*command, "--greedy", "--untrained"])
    found = {}
    files = {"test": "e2e-test.json", "greedy": "greedy.json", "untrained": "e2e-untrained.json"}
    for name, file in files.items():
        found[name] = json.loads((run / "out" / file).read_text())
        assert found[name].keys() >= {"mean.loss", "bleu", "nist", "slots"}
        assert len(found[name]["texts"]) == 3
    assert "text.loss" in found["test"]
    assert found["greedy"]["mean.loss"] == found["test"]["mean.loss"]
    assert found["greedy"]["mean.loss"] < found["untrained"]["mean.loss"]


def test_texts_are_kept_if_a_scorer_fails(run, monkeypatch):
    pytest.importorskip("sacrebleu")

    def failing_scores(prompts, texts, references):
        raise RuntimeError("Java is too old")

    monkeypatch.setattr(text_scores, "text_scores", failing_scores)
    with pytest.raises(RuntimeError):
        e2e.main("score out/e2e.pt --data data/e2e --device cpu --greedy --prompts 2".split())
    found = json.loads((run / "out" / "e2e-test.json").read_text())
    assert len(found["texts"]) == 2


def test_a_result_with_other_texts_is_not_replaced(run, capsys):
    pytest.importorskip("sacrebleu")
    command = "score out/e2e.pt --data data/e2e --device cpu --beams 2".split()
    e2e.main([*command, "--prompts", "2"])
    file = run / "out" / "e2e-test.json"
    before = file.read_text()
    for flags in ("--prompts 1", "--prompts 2 --length_penalty 1", "--prompts 0"):
        assert "already has 2 texts by beam search, 2 beams" in failure(command + flags.split(),
                                                                        capsys)
    assert file.read_text() == before
    e2e.main([*command, "--prompts", "2"])              # the same again
    e2e.main([*command, "--prompts", "0", "--out", "out/losses.json"])
    assert "texts" not in json.loads((run / "out" / "losses.json").read_text())
    assert "not an earlier result" in failure([*command, "--out", "out"], capsys)
    (run / "out" / "test.json").write_text('{"mean.loss": 1, "mean.exact": 0.5}')
    assert "results of measure.py" in failure([*command, "--out", "out/test.json"], capsys)


def test_text_must_be_a_text_file(run, capsys):
    command = "score out/e2e.pt --data data/e2e --prompts 0 --text data/e2e".split()
    assert "--text data/e2e is not a .txt" in failure(command, capsys)


def test_a_broken_model_is_reported_before_decoding(run, capsys):
    pytest.importorskip("sacrebleu")
    saved = torch.load(run / "out" / "e2e.pt")
    for own in saved["adapter"]["tensors"].values():
        own["B"].fill_(math.nan)
    torch.save(saved, run / "out" / "bad.pt")
    assert "the loss on data/e2e is nan" in failure(
        "score out/bad.pt --data data/e2e --device cpu --beams 2".split(), capsys)


def test_losses_alone_need_no_package(run, capsys, monkeypatch):
    monkeypatch.setattr(text_scores, "find_spec", lambda name: None)
    monkeypatch.setattr(e2e, "generate", None)                  # it must not be called
    command = ["score", "out/e2e.pt", "--data", "data/e2e", "--device", "cpu"]
    assert "pip install sacrebleu" in failure(command, capsys)
    e2e.main([*command, "--prompts", "0"])
    found = json.loads((run / "out" / "e2e-test.json").read_text())
    assert found.keys() == {"mean.loss"}


def test_missing_packages_are_reported(capsys, monkeypatch):
    monkeypatch.setattr(text_scores, "find_spec", lambda name: name == "sacrebleu")
    text_scores.report_missing_packages(greedy=True)
    assert "METEOR, ROUGE-L and CIDEr are left out" in capsys.readouterr().out
    with pytest.raises(ValueError, match="beam search needs transformers"):
        text_scores.report_missing_packages(greedy=False)


# Beam search by transformers ---------------------------------------------------------------------

def test_transformers_gets_the_adapted_model():
    """The same logits, and the same greedy texts for prompts of different lengths."""
    pytest.importorskip("transformers")
    gpt = random_gpt(dtype=torch.float32)
    model = randomise(lora.inject(gpt, "q v down", rank=4)).eval()
    idx = torch.arange(18).view(2, 9)
    with torch.no_grad():
        logits, _ = model(idx)
        prompts = [[1, 2, 3, 4], [5]]
        greedy = model.generate(prompts, 12)
        theirs = e2e.in_transformers(model).eval()
        torch.testing.assert_close(theirs(idx).logits, logits, rtol=1e-4, atol=1e-4)
    assert e2e.by_transformers(theirs, prompts, 12) == greedy
    stop = greedy[0][5]
    assert e2e.by_transformers(theirs, prompts, 12, stop) == model.generate(prompts, 12, stop)
    searched = e2e.beam_search(theirs, prompts, 4, None)        # 4 tokens cannot repeat a 4-gram
    gains = []
    for prompt, text, other in zip(prompts, searched, greedy):
        gains.append((log_p(model, prompt, text) - log_p(model, prompt, other[:4])).item())
    assert min(gains) >= 0 and max(gains) > 0.01
    short, long = [e2e.beam_search(theirs, prompts, 12, greedy[0][5], length_penalty=penalty)
                   for penalty in (-5, 5)]
    assert sum(map(len, short)) < sum(map(len, long))
    with pytest.raises(ValueError, match="4 tokens and 62 new ones exceed the model's context of 64"):
        e2e.beam_search(theirs, prompts, 62, None)
    assert len(e2e.by_transformers(theirs, prompts, 61)[0]) == 61


def log_p(model, prompt, text):
    logits, _ = model(torch.tensor([prompt + text]))
    steps = logits[0, len(prompt) - 1:-1].log_softmax(-1)
    return steps[range(len(text)), text].sum()


def test_a_text_repeats_no_4_gram_of_its_own_but_those_of_its_prompt(monkeypatch):
    """A random model of SmolLM2's kind in which the next token depends on the last one only."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=101, hidden_size=32, num_hidden_layers=2,
                                      num_attention_heads=2, intermediate_size=48)
    llama = transformers.LlamaForCausalLM(config)
    for name, p in llama.named_parameters():
        p.data *= 0 if "o_proj" in name or "down_proj" in name else 20
    text, = e2e.beam_search(llama, [[5]], 20, None, 4)
    ngrams = {tuple(text[i:i + 4]) for i in range(17)}
    assert len(text) == 20 and len(ngrams) == 17
    repetitive = [5, *text, 5]
    assert e2e.beam_search(llama, [repetitive, [5]], 20, None, 4) == [text, text]
    stopped, = e2e.beam_search(llama, [[5]], 20, text[6], 4)
    assert text[6] not in stopped
    monkeypatch.setattr(smollm, "from_file", lambda kind: llama)
    model = smollm.SmolLM().train()
    logits, _ = model(torch.arange(101)[:, None])
    likeliest = logits[:, 0].argmax(-1).tolist()
    greedy = [likeliest[5], likeliest[likeliest[5]]]
    assert model.generate([[5], [1, 5]], 2) == [greedy, greedy]
    assert model.training and model.lm.training


def test_every_command_has_valid_arguments():
    """Those in the docstring and on the pages."""
    found = re.findall(r"^    python experiments/e2e.py ([^#\n]*)", e2e.__doc__, re.M)
    assert len(found) == 5
    for arguments in [*map(str.split, found), *commands("experiments/e2e.py")]:
        assert e2e.parse(arguments).command == arguments[0]


def test_side_by_side_with_an_adapter_of_loralib(tmp_path):
    """With another rank, from another library: only q and v are compared."""
    torch.manual_seed(0)
    base = str(tmp_path / "base.pt")
    state = random_gpt(dtype=torch.float32).state_dict()
    torch.save({"config": asdict(TINY), "model": state}, base)
    ours, theirs = str(tmp_path / "ours.pt"), str(tmp_path / "theirs.pt")
    train.main(["--model", base, "--out", ours, *"--data facts --targets q v up --rank 4 --steps 2 "
                "--batch_size 4 --eval_rows 2 --device cpu".split()])
    adapter = {}
    for i in range(TINY.n_layer):               # q and v, rank 2, in one matrix A and one matrix B
        layer = f"module.transformer.h.{i}.attn.c_attn"
        adapter[f"{layer}.lora_A"] = torch.randn(2 * 2, TINY.n_embd)
        adapter[f"{layer}.lora_B"] = torch.randn(2 * TINY.n_embd, 2)
    torch.save({"model_state_dict": adapter}, theirs)
    out = tmp_path / "out"
    analyze.main([ours, theirs, "--alpha", "32", "--base", base, "--out", str(out)])
    found = json.loads((out / "analysis.json").read_text())
    ranks = {(r["checkpoint"], r["target"], len(r["S"])) for r in found["records"]}
    assert ranks == {("ours", "q", 4), ("ours", "v", 4), ("ours", "up", 4),
                     ("theirs", "q", 2), ("theirs", "v", 2)}
    assert all("amplification" in r for r in found["records"])
    compared = {(p["a"], p["b"], p["name"].split(".")[-1]) for p in found["subspace"]}
    assert compared == {("ours", "theirs", "q"), ("ours", "theirs", "v")}


def test_the_rows_of_published_losses():
    """400 of E2E's 4,672 held-out rows are every eleventh one, as in the results files."""
    rows = e2e.every_nth(list(range(4672)), 400)
    assert rows == list(range(0, 4400, 11))
    assert e2e.every_nth([1, 2, 3], 400) == [1, 2, 3]
    assert e2e.every_nth([1, 2, 3], 0) == []


def test_a_byte_order_mark_is_no_part_of_the_first_prompt():
    content = "\ufeffname : Aromi || Aromi is a pub .\n".encode()
    assert e2e.parse_rows(content, "train.txt")[0]["prompt"] == "name : Aromi"


def test_prompts_without_slots_have_no_values_to_mention():
    assert text_scores.slots_mentioned(["no slot", "family friendly : yes"], ["a", "b"]) == 0
