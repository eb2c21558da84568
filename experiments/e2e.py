"""
The LoRA paper's run on E2E: download its data, and score a checkpoint as the paper does.

    python experiments/e2e.py get data/e2e                  # the LoRA repository's own files
    python experiments/e2e.py get gpt2_md_lora_e2e.pt       # the adapter that its authors trained
    python experiments/e2e.py invent data/invented          # made-up rows, to rehearse offline
    python experiments/e2e.py score out/e2e.pt --data data/e2e
    python experiments/e2e.py score out/e2e.pt --data data/e2e --greedy --prompts 200

`score` writes one text for each meaning representation of test.jsonl and compares it with all
references: BLEU (by sacrebleu), NIST, the share of slot values that the text mentions and, if
pycocoevalcap and Java are installed, METEOR, ROUGE-L and CIDEr. It also measures the loss on 400
held-out rows and, with --text, on held-out windows of a plain text. It prints a table with the
paper's row, and writes the numbers and the texts to out/e2e-test.json, or with --untrained, which
scores the base model, to out/e2e-untrained.json.
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

import torch

import text_scores
from evaluate import merge_into_base
from measure import WINDOW, Measured, every_nth
from support import checkpoint, cli, data, distributed

ROWS_AT = "https://raw.githubusercontent.com/microsoft/LoRA/main/examples/NLG/data/e2e"
ROWS = {"train": 42_061, "valid": 4_672, "test": 4_693}
LICENCE = "the E2E NLG challenge's data, CC BY-SA 4.0"
ADAPTER_AT = "https://github.com/microsoft/LoRA/releases/download/GPT-2"
ADAPTER_SHA256 = "efa9bcb92427058c8fe547be0d7373937ae031197986ecda0b54d520a32001cd"

BEAM_TOKENS = 64        # the longest text of beam search, as in the paper
GREEDY_TOKENS = 80      # and of greedy decoding
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
        files[folder / f"{split}.jsonl"] = as_jsonl(rows)
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


def as_jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


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
    print(f"downloading {url} ...", flush=True)
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            return response.read()
    except (OSError, http.client.HTTPException) as e:       # IncompleteRead is one of these
        raise ConnectionError(f"{url} could not be downloaded ({e}). Run the command again, or "
                              "download the file elsewhere and pass its folder: --from FOLDER"
                              ) from None


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


def invent(folder, count=30):
    """Write `count` made-up rows per file, three for each meaning representation."""
    files = {}
    for i, split in enumerate(ROWS):
        rows = []
        for j in range(count):
            place = f"Place {i * count + j // 3}"   # no file has a prompt of another one
            food = ("Thai", "Italian", "Indian")[j // 3 % 3]
            texts = (f"{place} serves {food} food .", f"{place} has {food} dishes .",
                     f"{place} is a restaurant , {food} .")
            rows.append({"prompt": f"name : {place} | food : {food}", "completion": texts[j % 3]})
        files[folder / f"{split}.jsonl"] = as_jsonl(rows)
    folder.mkdir(parents=True, exist_ok=True)
    write(files)


# Texts -------------------------------------------------------------------------------------------

def generate(run, prompts, args):
    """One text per prompt, by beam search or greedily."""
    stop = run.tok.eot_token
    if args.greedy:
        search = partial(run.model.generate, max_new_tokens=GREEDY_TOKENS, stop=stop)
    else:                                           # SmolLM2 is a model of transformers already
        model = getattr(run.model, "lm", None) or in_transformers(run.model)
        search = partial(beam_search, model, max_new_tokens=BEAM_TOKENS, stop=stop,
                         n_beams=args.beams, length_penalty=args.length_penalty)
    texts = []
    for i in range(0, len(prompts), args.batch_size):
        rows = [data.encode(run.tok, prompt, "") for prompt in prompts[i:i + args.batch_size]]
        with distributed.autocast(run.settings.dtype, run.device):
            new = search([row.ids[:row.prompt_len] for row in rows])
        texts += [run.tok.decode(text).strip() for text in new]
        print(f"{len(texts)} of {len(prompts)} texts", flush=True)
    return texts


def in_transformers(gpt):
    """The same weights as transformers' GPT-2, which has beam search. Adapters are merged in
    float32."""
    import transformers
    merge_into_base(gpt.float())
    c = gpt.config
    config = transformers.GPT2Config(vocab_size=c.vocab_size, n_positions=c.block_size,
                                     n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
                                     bos_token_id=None, eos_token_id=None)
    model = transformers.GPT2LMHeadModel(config).to(gpt.wte.weight)
    model.transformer.load_state_dict(gpt.hf_state_dict())
    return model


def beam_search(model, prompts, max_new_tokens, stop, n_beams=10, length_penalty=0.9):
    """
    The best text for each prompt, by a model of transformers. As in the script of the LoRA authors,
    no text contains the same 4-gram twice, but it may repeat those of its prompt: otherwise it
    could not mention a name of four tokens.
    """
    import transformers
    longest = max(map(len, prompts))
    no_repetition = transformers.NoRepeatNGramLogitsProcessor(4)
    return by_transformers(model, prompts, max_new_tokens, stop, num_beams=n_beams,
                           length_penalty=length_penalty,
                           logits_processor=[lambda ids, p: no_repetition(ids[:, longest:], p)])


@torch.inference_mode()
def by_transformers(model, prompts, max_new_tokens, stop=None, **options):
    """What a transformers model adds to each prompt (a list of ids), up to `stop`, as lists of ids.
    Raises ValueError if a prompt and the new tokens exceed the model's context."""
    longest = max(map(len, prompts))
    block_size = model.config.max_position_embeddings
    if longest + max_new_tokens > block_size + 1:           # the last new token is never read
        raise ValueError(f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the "
                         f"model's context of {block_size} tokens: shorten the prompt")
    idx = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    rows = model.eval().generate(idx.to(model.device), attention_mask=mask.to(model.device),
                                 max_new_tokens=max_new_tokens, do_sample=False,
                                 eos_token_id=stop, pad_token_id=stop or 0, **options)
    return [row[:row.index(stop)] if stop in row else row for row in rows[:, longest:].tolist()]


# Scores ------------------------------------------------------------------------------------------

def score(args):
    references = read_references(args.data / "test.jsonl")
    prompts = sorted(references)
    if args.prompts is not None:
        prompts = every_nth(prompts, args.prompts)
    check_arguments(args, len(prompts))
    if prompts:
        text_scores.report_missing_packages(args.greedy)
    run = Measured(args.checkpoint, args.base, args.alpha, args.device)
    if not args.untrained:
        checkpoint.restore(run.saved, run.model)
    found = {"mean.loss": run.loss(run.load([str(args.data)], 400))}
    if not math.isfinite(found["mean.loss"]):
        raise ValueError(f"{args.checkpoint}: the loss on {args.data} is {found['mean.loss']}")
    if args.text:
        found["text.loss"] = run.loss(run.load([args.text], 400, WINDOW))
    if prompts:
        found["decoding"] = decoding(args)
        texts = generate(run, prompts, args)
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
        texts = earlier.get("texts", [])
    except FileNotFoundError:
        return
    except (OSError, ValueError, AttributeError) as e:
        raise ValueError(f"{path} is not an earlier result ({e}): pass another --out") from None
    if "mean.exact" in earlier:
        raise ValueError(f"{path} contains results of measure.py: pass another --out")
    if len(texts) > n_prompts or texts and earlier.get("decoding") != decoding(args):
        raise ValueError(f"{path} already has {len(texts)} texts by {earlier.get('decoding')}: "
                         "pass another --out, or move it away")


def write_result(args, found):
    write({result_path(args): (json.dumps(found, indent=1) + "\n").encode()})


def read_references(path):
    """{meaning representation: all its texts} of a .jsonl file."""
    found = {}
    for prompt, completion in data.read_jsonl(path):
        found.setdefault(prompt, []).append(completion.strip())
    return found


def decoding(args):
    if args.greedy:
        return "greedy decoding"
    return f"beam search, {args.beams} beams, length penalty {args.length_penalty:g}"


def result_path(args):
    if args.out:
        return args.out
    end = "untrained" if args.untrained else "test"
    return args.checkpoint.with_name(f"{args.checkpoint.stem}-{end}.json")


def report(args, found, n_prompts):
    losses = f"loss {found['mean.loss']:.3f}"
    if args.text:
        losses += f", on {args.text} {found['text.loss']:.3f}"
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
    p = cli.parser(__doc__, "python experiments/e2e.py {get,invent,score} ...")
    commands = p.add_subparsers(dest="command", required=True)
    add = commands.add_parser("get", allow_abbrev=False).add_argument
    add("path", type=Path, help="a folder for the data, or a .pt file for the authors' adapter")
    add("--from", dest="source", metavar="SOURCE", help="a folder that contains the original files "
        "(train.txt, valid.txt, test.txt, or gpt2_md_lora_e2e.pt), or another base URL")
    commands.add_parser("invent", allow_abbrev=False).add_argument("path", type=Path)
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
        if args.command == "score":
            score(args)
        elif args.command == "get":
            get(args.path, args.source)
        else:
            invent(args.path)


if __name__ == "__main__":
    cli.run_main(main)
