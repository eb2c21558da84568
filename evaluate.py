"""
How good is a checkpoint of train.py, peft or loralib, or what does it say?

    python evaluate.py out/lora.pt                          # its tasks again, before and after
    python evaluate.py out/lora.pt --data skills            # other tasks: what was forgotten
    python evaluate.py out/lora.pt --prompt "shout hello"   # complete this
    python evaluate.py out/lora.pt --export model.bin       # W + ΔW, as other programs read it
"""
import itertools
import math

import torch

import lora
from support import checkpoint, command, data


@torch.no_grad()
def evaluate(model, tasks, tok, settings, device, generate=False):
    """{task: {"loss": nats a token of its held-out completions, "exact": share of them that the
    model says greedily, to the token}}; of text no "exact". The processes share the work."""
    was_training, results = model.training, {}
    model.eval()
    for task in tasks:
        exact = generate and not task.text
        sums = torch.zeros(3, device=device)                        # loss, its tokens, rows right
        batches = list(data.batches(task.valid, settings.batch_size, model.config.block_size))
        for rows in command.share(batches):
            with command.autocast(settings.dtype, device):
                idx, targets = data.collate(rows, device)
                loss = model(idx, targets)[1].item()
                right = count_right(model, rows, tok) if exact else 0
            counted = sum(r.counted for r in rows)
            sums += torch.tensor([loss * counted, counted, right], device=device)
        loss, counted, right = command.over_processes([sums])[0].tolist()
        results[task.name] = {"loss": loss / counted}
        if exact:
            results[task.name]["exact"] = right / len(task.valid)
    model.train(was_training)
    return results


def count_right(model, rows, tok):
    longest = max(r.counted for r in rows)
    answers, right = model.generate([r.ids[:r.given] for r in rows], longest, tok.eot_token), 0
    for new, (ids, given) in zip(answers, rows):
        right += new == ids[given:-1]
    return right


def complete(model, prompts, tok, settings, device):
    """Two lines for each prompt (a list of ids): its text, and its greedy completion."""
    lines = []
    for ids in prompts:
        room = model.config.block_size + 1 - len(ids)
        with command.autocast(settings.dtype, device):
            new, = model.generate([ids], min(100, room), stop=tok.eot_token)
        text = tok.decode(ids).removesuffix(data.EOT)
        lines += [f"  {text}", f"    -> {tok.decode(new).strip()}"]
    return lines


def first_prompts(tasks):
    prompts = []
    for task in tasks:
        for ids, given in task.valid[:max(1, 3 // len(tasks))]:
            prompts.append(list(ids[:16 if task.text else given]))
    return prompts


def table(tasks, before, after):
    lines = [f"{'':28} {'held-out':>8} {'loss':>9} {'exact match':>24}",
             f"{'task':28} {'rows':>8} {'before':>9} {'after':>9}  {'before':>9} {'after':>9}"]
    rows = [(t.name, [t]) for t in tasks]
    if len(tasks) > 1:
        rows.append(("mean", tasks))
    for name, over in rows:
        cells = [f"{name[-28:]:28} {sum(len(t.valid) for t in over):8,}"]
        for measure, results in itertools.product(("loss", "exact"), (before, after)):
            total = sum(results[t.name].get(measure, math.nan) for t in over)
            cells.append(f"{total / len(over):9.3f}".replace("nan", "  -"))
        lines.append("{} {} {}  {} {}".format(*cells))
    return "\n".join(lines)


def parse(argv=None):
    p = command.parser(__doc__, "python evaluate.py CKPT [options]")
    add = p.add_argument
    add("checkpoint", metavar="CKPT", help="what train.py left")
    add("--data", nargs="+", metavar="TASK", help="tasks (default: the run's own)")
    add("--prompt", nargs="+", metavar="TEXT", help="complete these, instead")
    add("--export", metavar="FILE", help="instead, write W + ΔW in GPT-2's Hugging Face layout")
    add("--base", help="its base model, where the checkpoint does not say, or it has moved")
    add("--alpha", type=float, help="α of an adapter of loralib, which does not say it")
    add("--eval_rows", type=command.number(int, 1), help="of each task (default: as trained)")
    add("--device", help="cuda, mps or cpu (default: the first that is there)")
    add("--dtype", choices=["fp32", "bf16"], help="(default: as trained)")
    return p.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    with command.plain_errors():
        changes = {"model": args.base, "data": args.data, "eval_rows": args.eval_rows,
                   "dtype": "fp32" if args.export else args.dtype}
        changes = {name: value for name, value in changes.items() if value}
        saved, settings = checkpoint.open_run(args.checkpoint, changes, args.alpha)
        device = command.pick_device(args.device)
        model = checkpoint.start_model(settings, device)
        tok = data.tokenizer(model.config.vocab_size)
        if not args.prompt and not args.export:
            block = min(settings.block_size, model.config.block_size)
            tasks = data.load(settings.data, tok, block, settings.eval_rows)
            before = evaluate(model, tasks, tok, settings, device, generate=True)
        checkpoint.restore(saved, model)
        if args.export:
            lora.merge(model)
            checkpoint.write(model.hf_state_dict(), checkpoint.claim(args.export))
            return print(f"{args.export} has the model, of {model.config.n_head} heads a layer")
        if args.prompt:
            prompts = [tok.encode_ordinary(text) + [tok.eot_token] for text in args.prompt]
            return print(*complete(model, prompts, tok, settings, device), sep="\n")
        after = evaluate(model, tasks, tok, settings, device, generate=True)
        samples = complete(model, first_prompts(tasks), tok, settings, device)
        print(table(tasks, before, after), "", *samples, sep="\n")
        return after


if __name__ == "__main__":
    command.run(main)
