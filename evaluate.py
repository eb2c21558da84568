"""
Evaluate a checkpoint of train.py, or an adapter of peft or loralib; or let it complete a prompt.

    python evaluate.py out/lora.pt                          # its tasks, before and after
    python evaluate.py out/lora.pt --data skills            # other tasks: what it has forgotten
    python evaluate.py out/lora.pt --prompt "shout hello"   # complete a prompt
    python evaluate.py out/lora.pt --export model.bin       # write W + ΔW for other programs
    python evaluate.py out/lora.pt --export folder          # write the adapter for peft
"""
import math
from pathlib import Path

import torch

import lora
from support import adapter_state, checkpoint, cli, data, distributed, interop


@torch.no_grad()
def evaluate(model, tasks, settings, device):
    """
    {task: {"loss": nats per token of its held-out completions, "exact": share of the completions
    that greedy decoding reproduces exactly}}. Plain text has no "exact". The processes share the
    work. model(idx, targets) must return the logits (B, T, V) and the loss. Nothing is generated:
    greedy decoding reproduces a completion if each of its tokens is the most likely next token.
    """
    was_training = model.training
    model.eval()
    results = {}
    for task in tasks:
        sums = torch.zeros(3, device=device)                    # loss, its tokens, exact matches
        for rows in distributed.share(data.batches(task.valid, settings.batch_size)):
            idx, targets = data.collate(rows, device)
            with distributed.autocast(settings.dtype, device):
                logits, loss = model(idx, targets)
            wrong = (logits.argmax(-1) != targets) & (targets != -100)                  # (B, T)
            matches = len(rows) - wrong.any(1).sum().item()
            tokens = sum(row.n_target_tokens for row in rows)
            sums += torch.tensor([loss.item() * tokens, tokens, matches], device=device)
            del logits              # those of two batches are never in memory together
        distributed.all_reduce_sum([sums])
        loss, tokens, matches = sums.tolist()
        results[task.name] = {"loss": loss / tokens}
        if not task.text:
            results[task.name]["exact"] = matches / len(task.valid)
    model.train(was_training)
    return results


def completions(model, prompts, tok, settings, device):
    """Two lines for each prompt (a list of ids): its text and its greedy completion."""
    lines = []
    for ids in prompts:
        room = max(1, model.config.block_size + 1 - len(ids))
        with distributed.autocast(settings.dtype, device):
            new = model.generate([ids], min(100, room), stop=tok.eot_token)[0]
        lines.append(f"  {tok.decode(ids).removesuffix(data.EOT)}")
        lines.append(f"    -> {tok.decode(new).strip()}")
    return lines


def first_prompts(tasks):
    """A few held-out prompts; of plain text, the beginnings of windows."""
    prompts = []
    for task in tasks:
        for row in task.valid[:max(1, 3 // len(tasks))]:
            length = 16 if task.text else row.prompt_len
            prompts.append(list(row.ids[:length]))
    return prompts


def results_table(tasks, before, after):
    lines = [f"{'':28} {'held-out':>8} {'loss':>9} {'exact match':>24}",
             f"{'task':28} {'rows':>8} {'before':>9} {'after':>9}  {'before':>9} {'after':>9}"]
    groups = [(task.name, [task]) for task in tasks]
    if len(tasks) > 1:
        groups.append(("mean", tasks))
    for name, group in groups:
        cells = []
        for measure in ("loss", "exact"):
            for results in (before, after):
                mean = sum(results[t.name].get(measure, math.nan) for t in group) / len(group)
                cells.append("-" if math.isnan(mean) else f"{mean:.3f}")
        rows = sum(len(task.valid) for task in group)
        lines.append(f"{name[-28:]:28} {rows:8,} {cells[0]:>9} {cells[1]:>9}  "
                     f"{cells[2]:>9} {cells[3]:>9}")
    return "\n".join(lines)


def merge_into_base(model):
    """Replace every adapted layer by its nn.Linear, whose weight becomes W + ΔW."""
    for m in lora.adapters(model).values():
        m.base.weight.data = m.weight.detach()
    lora.remove(model)


def export(model, settings, path):
    """Write the adapter in peft's format into the folder `path`; if `path` has a suffix, write the
    whole model, W + ΔW, in the Hugging Face layout of GPT-2."""
    if Path(path).exists():
        raise ValueError(f"--export {path}: it exists already; choose another name")
    if not Path(path).suffix:
        if settings.method == "full":
            raise ValueError("full fine-tuning has no adapter: pass a file name such as model.bin")
        interop.write_peft(adapter_state.state_dict(model), settings.model, Path(path))
        print(f"{path} contains the adapter in peft's format: PeftModel.from_pretrained reads it")
        return
    merge_into_base(model)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write(model.hf_state_dict(), path)
    config = model.config
    print(f"{path} contains the model. In transformers: GPT2LMHeadModel(GPT2Config("
          f"vocab_size={config.vocab_size}, n_positions={config.block_size}, "
          f"n_embd={config.n_embd}, n_layer={config.n_layer}, n_head={config.n_head}))"
          f".transformer.load_state_dict(torch.load({path!r}))")


def print_changed(tasks, checksums):
    """Say which tasks have other rows than they had in the run."""
    changed = [t.name for t in tasks if checksums.get(t.name, t.checksum()) != t.checksum()]
    if changed:
        print(f"note: the rows of {', '.join(changed)} have changed since the run, which may have "
              "trained on\nsome that are held out now")


def parse(argv=None):
    p = cli.parser(__doc__, "python evaluate.py CKPT [options]")
    add = p.add_argument
    add("checkpoint", metavar="CKPT", help="a checkpoint of train.py, or an adapter")
    add("--data", nargs="+", metavar="TASK", help="the tasks (default: those of the run)")
    add("--prompt", nargs="+", metavar="TEXT", help="complete these texts instead")
    add("--export", metavar="PATH", help="instead, write W + ΔW in GPT-2's Hugging Face layout "
        "or, for a name without a suffix, the adapter in peft's format")
    add("--base", help="the base model, if the file does not contain its name or it has moved")
    add("--alpha", type=cli.bounded(float, -math.inf), help="α of a loralib adapter, whose file "
        "does not contain it")
    add("--eval_rows", type=cli.bounded(int, 1), help="held-out rows of each task "
        "(default: as trained)")
    add("--device", help="cuda, mps or cpu (default: the first available one)")
    add("--dtype", choices=["fp32", "bf16"], help="of activations and of a frozen W "
        "(default: as trained; --export: fp32)")
    return p.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    with cli.one_line_errors():
        changes = {"model": args.base, "data": args.data, "eval_rows": args.eval_rows,
                   "dtype": "fp32" if args.export else args.dtype}
        changes = {name: value for name, value in changes.items() if value}
        saved, settings = checkpoint.open_run(args.checkpoint, changes, args.alpha)
        device = distributed.pick_device(args.device)
        model = checkpoint.start_model(settings, device)
        tok = data.tokenizer(model.config.vocab_size)
        if args.export:
            checkpoint.restore(saved, model)
            return export(model, settings, args.export)
        if args.prompt:
            checkpoint.restore(saved, model)
            names = settings.data or ["unknown"]
            prompts = [data.encode_prompt(tok, text, names) for text in args.prompt]
            print("\n".join(completions(model, prompts, tok, settings, device)))
            return None
        if settings.data is None:
            raise ValueError(f"{args.checkpoint} does not contain its tasks: pass --data")
        block_size = min(settings.block_size, model.config.block_size)
        tasks = data.load(settings.data, tok, block_size, saved["settings"]["eval_rows"])
        print_changed(tasks, saved.get("checksums") or {})
        if args.eval_rows:
            tasks = data.load(settings.data, tok, block_size, args.eval_rows)
        before = evaluate(model, tasks, settings, device)
        checkpoint.restore(saved, model)
        after = evaluate(model, tasks, settings, device)
        samples = completions(model, first_prompts(tasks), tok, settings, device)
        print(results_table(tasks, before, after), "", *samples, sep="\n")
        return after


if __name__ == "__main__":
    cli.run_main(main)
