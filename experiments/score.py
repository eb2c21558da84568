"""
What a run's texts for E2E's meaning representations are worth, and what the run has forgotten:

    python experiments/score.py out/a.pt --data data/e2e [--text novels.txt]

The loss on 400 held-out rows; BLEU (sacrebleu), of one text for each of 200 distinct meaning
representations of test.jsonl against all its references; the share of the slots' values that the
text names, word for word; and the loss on held-out windows of a plain text. Texts are greedy; the
LoRA paper's are by beam search. Into out/a-score.json; --untrained scores the base alone, into
out/a-untrained.json.
"""
import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluate import evaluate
from support import checkpoint, cli, data, distributed

AT_ONCE, LONGEST, WINDOW = 20, 80, 512      # prompts, tokens of a text, tokens of a window


def references(path):
    """{meaning representation: all its texts} of a .jsonl file."""
    found = {}
    for prompt, completion in data.read_jsonl(path):
        found.setdefault(prompt, []).append(completion.strip())
    return found


def answers(model, prompts, tok, settings, device):
    texts = []
    for i in range(0, len(prompts), AT_ONCE):
        rows = [data.encode(tok, prompt, "") for prompt in prompts[i:i + AT_ONCE]]
        with distributed.autocast(settings.dtype, device):
            new = model.generate([r.ids[:r.prompt_len] for r in rows], LONGEST, stop=tok.eot_token)
        texts += [tok.decode(ids).strip() for ids in new]
        print(f"{len(texts)} of {len(prompts)} texts", flush=True)
    return texts


def bleu(texts, references):
    import sacrebleu                                        # pip install sacrebleu
    columns = []
    for i in range(max(map(len, references))):              # all first references, all second ...
        columns.append([texts[i] if i < len(texts) else None for texts in references])
    metric = sacrebleu.BLEU(lowercase=True)
    return metric.corpus_score(texts, columns).score, str(metric.get_signature())


def slots_named(prompts, texts):
    """Share of values, as in "name : Aromi | food : Chinese", in the texts; but for yes and no."""
    hits = []
    for prompt, text in zip(prompts, texts):
        for slot in prompt.split(" | "):
            value = slot.split(" : ", 1)[1].strip().lower()
            if value not in ("yes", "no"):
                hits.append(value in text.lower())
    return sum(hits) / len(hits)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint", type=Path)
    p.add_argument("--data", type=Path, required=True, help="the folder with test.jsonl")
    p.add_argument("--prompts", type=int, default=200,
                   help="meaning representations (200); 0: the losses alone")
    p.add_argument("--text", help="a .txt whose held-out windows are read too")
    p.add_argument("--base", help="the base model, where the checkpoint does not say")
    p.add_argument("--alpha", type=float, help="α of an adapter of loralib")
    p.add_argument("--untrained", action="store_true", help="score the base alone")
    args = p.parse_args(argv)
    with cli.one_line_errors():
        measure(args)


def measure(args):
    refs = references(args.data / "test.jsonl")
    prompts = sorted(refs)[::max(1, len(refs) // max(1, args.prompts))][:args.prompts]
    changes = {"model": args.base} if args.base else {}
    saved, settings = checkpoint.open_run(args.checkpoint, changes, args.alpha)
    device = distributed.pick_device()
    model = checkpoint.start_model(settings, device)
    tok = data.tokenizer(model.config.vocab_size)
    if not args.untrained:
        checkpoint.restore(saved, model)
    task, = data.load([str(args.data)], tok, settings.block_size, 400)
    found = {"valid_loss": evaluate(model, [task], tok, settings, device)[task.name]["loss"]}
    if args.text:
        task, = data.load([args.text], tok, WINDOW)
        found["text_loss"] = evaluate(model, [task], tok, settings, device)[task.name]["loss"]
    if prompts:
        texts = answers(model, prompts, tok, settings, device)
        found["bleu"], found["signature"] = bleu(texts, [refs[prompt] for prompt in prompts])
        found["slots"] = slots_named(prompts, texts)
        found["texts"] = dict(zip(prompts, texts))
    end = "untrained" if args.untrained else "score"
    out = args.checkpoint.with_name(f"{args.checkpoint.stem}-{end}.json")
    out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    print(f"{out}: loss {found['valid_loss']:.3f}")
    if prompts:
        print(f"BLEU {found['bleu']:.1f}, {100 * found['slots']:.1f} % of values named")


if __name__ == "__main__":
    cli.run_main(main)
