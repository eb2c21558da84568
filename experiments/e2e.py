"""
The LoRA paper's run on E2E: download its data, and score a checkpoint as the paper does.

    python experiments/e2e.py get data/e2e                  # the LoRA repository's own files
    python experiments/e2e.py get gpt2_md_lora_e2e.pt       # the adapter that its authors trained
    python experiments/e2e.py score out/e2e.pt --data data/e2e
    python experiments/e2e.py score out/e2e.pt --data data/e2e --greedy --prompts 200

`score` generates one text for each meaning representation of test.jsonl and compares it with all
references: BLEU (by sacrebleu), NIST, the share of slot values that the text mentions and, if
pycocoevalcap and Java are installed, METEOR, ROUGE-L and CIDEr. It also measures the loss on 400
held-out rows and, with --text, on held-out windows of a plain text. It prints a table with the
paper's row, and writes the numbers and the texts to out/e2e-beam.json, with --greedy to
out/e2e-score.json.
"""
import hashlib
import http.client
import json
import math
import sys
import urllib.request
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import text_scores
from beam import beam_search
from evaluate import evaluate
from support import checkpoint, cli, data, distributed

ROWS_AT = "https://raw.githubusercontent.com/microsoft/LoRA/main/examples/NLG/data/e2e"
ROWS = {"train": 42_061, "valid": 4_672, "test": 4_693}
LICENCE = "the E2E NLG challenge's data, CC BY-SA 4.0"
ADAPTER_AT = "https://github.com/microsoft/LoRA/releases/download/GPT-2"
ADAPTER_SHA256 = "efa9bcb92427058c8fe547be0d7373937ae031197986ecda0b54d520a32001cd"

BEAM_TOKENS = 64        # the longest text, as in the paper's decoding
GREEDY_TOKENS = 80      # the longest text of greedy decoding
WINDOW = 512            # tokens of a window of --text
# the LoRA paper, table 3: GPT-2 medium with LoRA
PAPER = {"bleu": 70.4, "nist": 8.85, "meteor": 46.8, "rouge_l": 71.8, "cider": 2.53}
COLUMNS = {"bleu": "BLEU", "nist": "NIST", "meteor": "METEOR", "rouge_l": "ROUGE-L",
           "cider": "CIDEr", "slots": "slots, %"}


# Data and the authors' adapter -------------------------------------------------------------------

def get(path, source=None):
    """Download the adapter to `path` if it is a .pt file, otherwise the data to this folder."""
    if path.suffix == ".pt":
        get_adapter(path, source or ADAPTER_AT)
    else:
        get_rows(path, source or ROWS_AT)


def get_rows(folder, source):
    files = {}
    for split, count in ROWS.items():
        name = f"{split}.txt"
        rows = parse_rows(fetch(source, name), name)
        if len(rows) != count:
            raise ValueError(f"{source}/{name} has {len(rows):,} rows, but E2E has {count:,}")
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        files[folder / f"{split}.jsonl"] = "".join(lines).encode()
    folder.mkdir(parents=True, exist_ok=True)
    write(files)                                    # only after all three are complete
    counts = ", ".join(f"{split} {count:,}" for split, count in ROWS.items())
    print(f"{folder}: {counts} rows from {source} ({LICENCE})")


def parse_rows(content, name):
    """The rows of a file with one `prompt||completion` per line."""
    rows = []
    lines = content.decode("utf-8-sig").removesuffix("\n").split("\n")
    for number, line in enumerate(lines, 1):
        prompt, separator, completion = line.partition("||")
        if not separator:
            raise ValueError(f"{name}, line {number}: there is no || between prompt and completion")
        if not prompt.strip() or not completion.strip():
            raise ValueError(f"{name}, line {number}: the prompt or the completion is empty")
        rows.append({"prompt": prompt.strip(), "completion": completion.strip()})
    return rows


def get_adapter(path, source):
    content = fetch(source, "gpt2_md_lora_e2e.pt")
    if hashlib.sha256(content).hexdigest() != ADAPTER_SHA256:
        raise ValueError(f"{source}/gpt2_md_lora_e2e.pt is not the released file: its sha256 "
                         f"is not {ADAPTER_SHA256}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write({path: content})
    print(f"{path}: the LoRA authors' adapter (MIT licence), r = 4 on q and v; pass --alpha 32")


def fetch(source, name):
    """The content of a file in a folder or below a URL. Raises OSError."""
    if "://" not in source:
        return (Path(source) / name).read_bytes()
    url = f"{source}/{name}"
    content = bytearray()
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            size = int(response.headers.get("Content-Length", 0))
            while piece := response.read(1 << 18):
                content += piece
                if size:
                    show_progress(name, len(content), size)
    except (OSError, http.client.HTTPException) as e:
        raise ConnectionError(f"{url} could not be downloaded ({e}). Download it elsewhere and "
                              "pass its folder: --from FOLDER") from None
    if len(content) < size:
        raise ConnectionError(f"{url}: the connection ended after {len(content):,} of {size:,} "
                              "bytes. Run the command again")
    return bytes(content)


def show_progress(name, done, size):
    """On a terminal one line that is rewritten, elsewhere one line at the end."""
    text = f"{name} {done / 1e6:.1f} of {size / 1e6:.1f} MB"
    ended = done >= size
    if sys.stdout.isatty():
        print(f"\r{text}", end="\n" if ended else "", flush=True)
    elif ended:
        print(text, flush=True)


def write(files):
    """Write {path: content}, so that an error leaves the old files as they are."""
    parts = {path: path.with_name(f"{path.name}.part") for path in files}
    try:
        for path, part in parts.items():
            part.write_bytes(files[path])
        for path, part in parts.items():
            part.replace(path)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


# Scores ------------------------------------------------------------------------------------------

def every_nth(items, count):
    """`count` items at equal distances. Results files contain losses on these rows, so they stay
    the same whatever data.load selects."""
    return items[::max(1, len(items) // max(1, count))][:count]


def score(args):
    references = read_references(args.data / "test.jsonl")
    prompts = sorted(references)
    if args.prompts is not None:
        prompts = every_nth(prompts, args.prompts)
    check_arguments(args, len(prompts))
    if prompts:
        text_scores.report_missing_packages()
    changes = {"model": args.base} if args.base else {}
    saved, settings = checkpoint.open_run(args.checkpoint, changes, args.alpha)
    device = distributed.pick_device(args.device)
    model = checkpoint.start_model(settings, device)
    tok = data.tokenizer(model.config.vocab_size)
    if not args.untrained:
        checkpoint.restore(saved, model)

    def loss(name, block_size):
        task, = data.load([str(name)], tok, block_size, eval_rows=1_000_000)
        task.valid = every_nth(task.valid, 400)
        return evaluate(model, [task], settings, device)[task.name]["loss"]

    found = {"valid_loss": loss(args.data, settings.block_size)}
    if not math.isfinite(found["valid_loss"]):
        raise ValueError(f"{args.checkpoint}: the loss on {args.data} is {found['valid_loss']}")
    if args.text:
        found["text_loss"] = loss(args.text, WINDOW)
    if prompts:
        found["decoding"] = decoding(args)
        texts = generate(model, prompts, tok, settings, device, args)
        found["texts"] = dict(zip(prompts, texts))
        write_result(args, found)                   # not lost if a scorer fails
        wanted = [references[prompt] for prompt in prompts]
        found = text_scores.text_scores(prompts, texts, wanted) | found
    write_result(args, found)
    report(args, found, len(prompts))


def check_arguments(args, n_prompts):
    """Raise ValueError if --text is not a text file, or if more texts, or texts decoded in another
    way, would be overwritten."""
    if args.text and not (data.is_text(args.text) and Path(args.text).is_file()):
        raise ValueError(f"--text {args.text} is not a .txt or .txt.xz file")
    path = result_path(args)
    try:
        earlier = json.loads(path.read_text())
        n_earlier = len(earlier.get("texts", []))
    except FileNotFoundError:
        return
    except (OSError, ValueError, AttributeError) as e:
        raise ValueError(f"{path} is not an earlier result ({e}): pass another --out") from None
    if n_earlier > n_prompts or n_earlier and earlier["decoding"] != decoding(args):
        raise ValueError(f"{path} already has {n_earlier} texts by {earlier['decoding']}: pass "
                         "another --out, or move it away")


def write_result(args, found):
    write({result_path(args): (json.dumps(found, indent=1) + "\n").encode()})


def read_references(path):
    """{meaning representation: all its texts} of a .jsonl file."""
    found = {}
    for prompt, completion in data.read_jsonl(path):
        found.setdefault(prompt, []).append(completion.strip())
    return found


def generate(model, prompts, tok, settings, device, args):
    """One text per prompt, by beam search or greedily."""
    texts = []
    for i in range(0, len(prompts), args.batch_size):
        rows = [data.encode(tok, prompt, "") for prompt in prompts[i:i + args.batch_size]]
        ids = [row.ids[:row.prompt_len] for row in rows]
        with distributed.autocast(settings.dtype, device):
            if args.greedy:
                new = model.generate(ids, GREEDY_TOKENS, stop=tok.eot_token)
            else:       # a model with another cache than GPT's has its own beam search
                search = getattr(model, "beam_search", partial(beam_search, model))
                new = search(ids, BEAM_TOKENS, tok.eot_token, args.beams, args.length_penalty)
        texts += [tok.decode(text).strip() for text in new]
        print(f"{len(texts)} of {len(prompts)} texts", flush=True)
    return texts


def decoding(args):
    if args.greedy:
        return "greedy decoding"
    return f"beam search, {args.beams} beams, length penalty {args.length_penalty:g}"


def result_path(args):
    if args.out:
        return args.out
    end = "score" if args.greedy else "beam"
    if args.untrained:
        end = "untrained" if args.greedy else "untrained-beam"
    return args.checkpoint.with_name(f"{args.checkpoint.stem}-{end}.json")


def report(args, found, n_prompts):
    losses = f"loss {found['valid_loss']:.3f}"
    if args.text:
        losses += f", on {args.text} {found['text_loss']:.3f}"
    print(f"\n{result_path(args)}: {losses}")
    if not n_prompts:
        return
    print(f"one text for each of {n_prompts} meaning representations, {decoding(args)}\n")
    print(f"{'':28}" + "".join(f"{title:>10}" for title in COLUMNS.values()))
    ours = found | {"slots": 100 * found["slots"]}
    for name, scores in ((args.checkpoint.name, ours), ("LoRA paper, 630, beam search", PAPER)):
        cells = []
        for column in COLUMNS:
            digits = 2 if column in ("nist", "cider") else 1
            cells.append(f"{scores[column]:10.{digits}f}" if column in scores else f"{'-':>10}")
        print(f"{name[-28:]:28}" + "".join(cells))


# Command -----------------------------------------------------------------------------------------

def parse(argv=None):
    p = cli.parser(__doc__, "python experiments/e2e.py {get,score} ...")
    commands = p.add_subparsers(dest="command", required=True)
    add = commands.add_parser("get", allow_abbrev=False).add_argument
    add("path", type=Path, help="a folder for the data, or a .pt file for the authors' adapter")
    add("--from", dest="source", metavar="SOURCE", help="a folder that contains the original files "
        "(train.txt, valid.txt, test.txt, or gpt2_md_lora_e2e.pt), or another base URL")
    add = commands.add_parser("score", allow_abbrev=False).add_argument
    add("checkpoint", type=Path, help="a checkpoint of train.py, or an adapter")
    add("--data", type=Path, required=True, help="the folder that `get` wrote")
    add("--prompts", type=cli.bounded(int, 0), help="how many meaning representations (default: "
        "all); 0: the losses alone")
    add("--greedy", action="store_true", help="greedy decoding instead of beam search")
    add("--beams", type=cli.bounded(int, 1), default=10, help="beams (%(default)s)")
    add("--length_penalty", type=cli.bounded(float, -10, 10), default=0.9,
        help="exponent of the length (%(default)s)")
    add("--batch_size", type=cli.bounded(int, 1), default=20, help="prompts at once (%(default)s)")
    add("--text", help="a .txt file: measure the loss on its held-out windows too")
    add("--base", help="the base model, if the file does not contain its name")
    add("--alpha", type=float, help="α of a loralib adapter, whose file does not contain it")
    add("--untrained", action="store_true", help="score the base model alone")
    add("--out", type=Path, metavar="JSON", help="where to write the numbers and the texts")
    add("--device", help="cuda, mps or cpu (default: the first available one)")
    return p.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    with cli.one_line_errors():
        if args.command == "get":
            get(args.path, args.source)
        else:
            score(args)


if __name__ == "__main__":
    cli.run_main(main)
