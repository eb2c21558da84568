"""
What the methods cost, side by side with full fine-tuning and with peft's and loralib's LoRA: same weights, same batch,
one process.

    pip install transformers peft loralib        # the rivals; what is not there is left out
    python experiments/bench.py                  # about ten minutes on two cores
    python experiments/bench.py --n_layer 24 --n_embd 1024 --vocab_size 50257 --batch 8 512     # GPT-2 medium, for a GPU

Three tables: a training step, a forward pass (the LoRA paper's table 1), and generation. Every round times each candidate
once, in turn, so that a machine whose speed drifts slows all of them; a ratio is taken round by round, and its median
reported with the quartiles. Results go to experiments/results/bench_{cpu,cuda}.json.
"""
import argparse
import copy
import io
import json
import platform
import statistics
import sys
import time
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import autolora
import lora
from model import GPT, GPTConfig
from multilora import MultiLoRALinear

SIX = ["q", "k", "v", "o", "up", "down"]


# ---------------------------------------------------------------------------------------------------------------------
# The candidates: {name: (model, function from the batch to its loss)}, each from the same weights

def candidates(base, rank):
    ours = lambda model: lambda x, y: model(x, y)[1]
    put = lambda layer, **settings: lora.inject(copy.deepcopy(base), "all", rank, layer, **settings)
    models = {"full fine-tuning": copy.deepcopy(base), "LoRA": put(lora.LoRALinear, alpha=rank),
              "MultiLoRA, n = 4": put(MultiLoRALinear, n_blocks=4)}
    models |= {f"AutoLoRA's search, {how}": put(autolora.AutoLoRALinear, alpha=rank) for how in ("forward", "central")}
    out = {name: (model, ours(model)) for name, model in models.items()}
    for rival in (peft_layers, loralib_layers, peft_adalora, peft_on_transformers):
        try:
            out |= rival(copy.deepcopy(base), rank, ours)
        except ImportError as e:
            print(f"{rival.__name__} is left out: {e}")
    return out


def peft_layers(model, rank, ours):
    import peft
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=SIX), model)
    return {"peft's layers in our model": (model, ours(model))}


def loralib_layers(model, rank, ours):
    import loralib
    for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]:
        new = loralib.Linear(linear.in_features, linear.out_features, r=rank, lora_alpha=rank, merge_weights=False)
        new.load_state_dict(linear.state_dict(), strict=False)
        model.set_submodule(name, new)
    loralib.mark_only_lora_as_trainable(model)
    return {"loralib's layers in our model": (model, ours(model))}


def peft_adalora(model, rank, ours):
    """Ranks from 1.5 r down to r on average; its budget is set after every step."""
    from peft import AdaLoraConfig
    from peft.tuners.adalora import AdaLoraModel

    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x, y):
            return SimpleNamespace(loss=self.model(x, y)[1])

    config = AdaLoraConfig(target_r=rank, init_r=rank * 3 // 2, lora_alpha=rank, target_modules=SIX, total_step=10_000)
    tuned = AdaLoraModel(WithLoss(), config, "default")
    tuned.after_step, tuned.taken = lambda: tuned.update_and_allocate(tuned.taken), 0
    return {"peft's AdaLoRA in our model": (tuned, lambda x, y: tuned(x, y).loss)}


def peft_on_transformers(model, rank, ours):
    import peft
    hf = peft.get_peft_model(transformers_model(model), peft.LoraConfig(
        r=rank, lora_alpha=rank, fan_in_fan_out=True, target_modules=["c_attn", "c_proj", "c_fc"]))
    # transformers predicts labels[t + 1] at t
    return {"peft on transformers' GPT-2": (hf, lambda x, y: hf(input_ids=x, labels=torch.cat([x[:, :1], y[:, :-1]], 1)).loss)}


def transformers_model(model):
    from test_model import hf_layout
    from transformers import GPT2Config, GPT2LMHeadModel
    c = model.config
    hf = GPT2LMHeadModel(GPT2Config(vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
                                    n_head=c.n_head, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False))
    hf.transformer.load_state_dict({k: v for k, v in hf_layout(model).items() if not k.endswith(".attn.bias")})
    return hf


class Adapter(nn.Module):
    """Houlsby et al.'s adapter layer (arXiv 1902.00751) behind a linear layer; the LoRA paper's Adapter^H."""

    def __init__(self, base, m):
        super().__init__()
        d = base.weight.size(0)
        self.base, self.down, self.up = base, nn.Linear(d, m), nn.Linear(m, d)

    def forward(self, x):
        h = self.base(x)
        return h + self.up(F.gelu(self.down(h)))


# ---------------------------------------------------------------------------------------------------------------------
# Measuring

def alternate(functions, rounds, device, against, warmup=3):
    """{name: {"ms", "ratio", "quartiles"}}: median time, and that ratio to `against` of the same round."""
    times = {name: [] for name in functions}
    for i in range(rounds + warmup):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            if i >= warmup:
                times[name].append(time.perf_counter() - began)
        if sys.stderr.isatty():
            print(f"\rround {i + 1}/{rounds + warmup}", end="\r" * (i + 1 == rounds + warmup), file=sys.stderr, flush=True)
    rows = {}
    for name, t in times.items():
        q = statistics.quantiles([b / a for a, b in zip(times[against], t)], n=4)
        rows[name] = {"ms": 1e3 * statistics.median(t), "ratio": q[1], "quartiles": [q[0], q[2]]}
    return rows


def held(model, loss):
    """(loss, bytes that the forward pass keeps for the backward pass, parameters aside, but not autocast's copies of them)."""
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t            # alive, so that no address comes twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        value = loss()
    return value, sum(t.untyped_storage().nbytes() for t in kept.values())


def peak_flops(device, dtype):
    """Of a large matrix product, per second: the best of ten."""
    n = 8192 if device == "cuda" else 1024
    a, best = torch.randn(n, n, device=device, dtype=dtype), 0.0
    for _ in range(10):
        began = time.perf_counter()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * n ** 3 / (time.perf_counter() - began))
    return best


def training(base, x, y, args):
    """A training step of every candidate: time, and the memory and the file that it needs."""
    autocast = lambda: torch.autocast("cuda", torch.bfloat16) if args.device == "cuda" else nullcontext()
    with autocast():
        want = base(x, y)[1].item()
    peak, about, steps = peak_flops(args.device, torch.bfloat16 if args.device == "cuda" else torch.float32), {}, {}
    for name, (model, loss) in candidates(base, args.rank).items():
        model.to(args.device).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        if args.device == "cuda":                                       # what is frozen may be bf16
            for p in model.parameters():
                p.data = p.data if p.requires_grad else p.data.bfloat16()
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        beta = [m.beta for m in lora.adapters(model).values() if isinstance(m, autolora.AutoLoRALinear)]
        omega = [p for p in trained if all(p is not b for b in beta)]

        def value(loss=loss):
            with autocast():
                return loss(x, y)

        def step(model=model, value=value, optimizer=optimizer, omega=omega, beta=beta, how=name.split()[-1]):
            if beta:                                                    # the same batch stands for both parts of the rows
                losses = lambda: [value()]
                _, g, h = autolora.hypergradient(losses, losses, omega, beta, 0.01, how)
                for p, grad in zip([*omega, *beta], [*g, *h]):
                    p.grad = grad
            else:
                value().backward()
            optimizer.step()
            if hasattr(model, "after_step"):
                model.after_step()
                model.taken += 1
            optimizer.zero_grad(set_to_none=True)

        got, kept = held(model, value)
        if "AdaLoRA" not in name:                                       # whose loss has a penalty in it
            assert abs(got.item() - want) < (2e-2 if args.device == "cuda" else 1e-4) * want, name      # all compute the same
        del got
        with FlopCounterMode(display=False) as counter:
            step()
        before = 0
        if args.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            torch.cuda.synchronize()
        file = io.BytesIO()
        torch.save({str(i): p for i, p in enumerate(trained)}, file)
        size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)
        about[name] = {"parameters": sum(p.numel() for p in trained), "saved_MB": kept / 1e6, "flops": counter.get_total_flops(),
                       "optimizer_MB": size(t for s in optimizer.state.values() for t in s.values()) / 1e6,
                       "file_MB": file.tell() / 1e6}
        if args.device == "cuda":                                       # of this candidate alone, with its weights
            own = size(model.parameters()) + 1e6 * about[name]["optimizer_MB"]
            about[name]["peak_MB"] = (own + torch.cuda.max_memory_allocated() - before) / 1e6
        steps[name] = step
    times = alternate(steps, args.rounds, args.device, "LoRA")
    for name, r in times.items():
        r |= about[name] | {"tokens_per_s": x.numel() / r["ms"] * 1e3, "share_of_peak": about[name]["flops"] / r["ms"] * 1e3 / peak}
    return times


@torch.no_grad()
def latency(base, args):
    """A forward pass of the base, with LoRA beside it and merged, and with adapter layers of as many parameters."""
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    models = {"base": copy.deepcopy(base), "LoRA, merged": lora.inject(copy.deepcopy(base), "all", args.rank),
              "LoRA": lora.inject(copy.deepcopy(base), "all", args.rank),
              "MultiLoRA, n = 4": lora.inject(copy.deepcopy(base), "all", args.rank, MultiLoRALinear, n_blocks=4),
              "adapter layers": copy.deepcopy(base)}
    d, L = base.config.n_embd, base.config.n_layer
    m = round(sum(p.numel() for p in models["LoRA"].parameters() if p.requires_grad) / (4 * d * L))
    for block in models["adapter layers"].h:
        block.attn.o, block.mlp.down = Adapter(block.attn.o, m), Adapter(block.mlp.down, m)
    for model in models.values():
        model.to(args.device, dtype).eval()
        for layer in lora.adapters(model).values():                     # A, B and s are float32 over a bf16 W
            for p in layer.parameters(recurse=False):
                p.data = p.data.float()
    lora.merge(models["LoRA, merged"])
    rows = {}
    for B, T in args.latency:
        x = torch.randint(args.vocab_size, (B, T), device=args.device)
        rows[f"{B} x {T}"] = alternate({n: lambda model=model: model(x) for n, model in models.items()}, args.rounds,
                                       args.device, "base")
    return rows


@torch.no_grad()
def generation(base, args):
    """Greedy text from one prompt: by the cache, by running the whole row again for every token, by transformers."""
    model = copy.deepcopy(base).to(args.device, torch.bfloat16 if args.device == "cuda" else torch.float32).eval()
    given, new = args.generate
    prompt = torch.randint(args.vocab_size, (1, given), device=args.device)

    def whole_rows():
        row = prompt
        for _ in range(new):
            logits = F.linear(model.hidden(row)[:, -1:], model.wte.weight)
            row = torch.cat([row, logits.argmax(-1)], 1)
        return row[0, given:].tolist()

    ways = {"with the cache": lambda: model.generate(prompt, new)[0], "without": whole_rows}
    try:
        hf = transformers_model(base).to(args.device, model.wte.weight.dtype).eval()
        ways["transformers' generate"] = lambda: hf.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, min_new_tokens=new, do_sample=False,
            pad_token_id=0, eos_token_id=None, use_cache=True)[0, given:].tolist()
    except ImportError as e:
        print(f"transformers is left out: {e}")
    if args.device == "cpu":
        texts = {name: way() for name, way in ways.items()}
        assert len(set(map(tuple, texts.values()))) == 1, texts
    return alternate(ways, max(3, args.rounds // 8), args.device, "with the cache", warmup=1)


def shape(text):
    B, T = text.split("x")
    return int(B), int(T)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=40, help="of one step of each (default %(default)s)")
    p.add_argument("--n_layer", type=int, default=4)
    p.add_argument("--n_embd", type=int, default=768)
    p.add_argument("--vocab_size", type=int, default=5000, help="(default %(default)s; GPT-2's is 50257)")
    p.add_argument("--batch", type=int, nargs=2, default=(4, 128), metavar=("B", "T"), help="rows and tokens")
    p.add_argument("--latency", type=shape, nargs="+", default=[(1, 128), (4, 128)], metavar="BxT", help="such as 1x128 32x512")
    p.add_argument("--generate", type=int, nargs=2, default=(32, 64), metavar=("GIVEN", "NEW"), help="tokens")
    p.add_argument("--rank", type=int, default=8)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--out", help="default experiments/results/bench_DEVICE.json")
    args = p.parse_args()
    B, T = args.batch
    torch.manual_seed(0)
    longest = max(T, sum(args.generate), *(t for _, t in args.latency))
    base = GPT(GPTConfig(args.vocab_size, longest, args.n_layer, max(1, args.n_embd // 64), args.n_embd)).to(args.device)
    x, y = torch.randint(args.vocab_size, (2, B, T), device=args.device)
    y[:, -1] = -100                                                     # which transformers would not predict
    cpu = f"cpu, {torch.get_num_threads()} threads, {platform.machine()}"
    found = {"shape": f"{args.n_layer} layers, width {args.n_embd}, vocabulary {args.vocab_size}, batch {B} x {T}, "
                      f"rank {args.rank} on all six linears, fused AdamW",
             "command": f"python experiments/bench.py {' '.join(sys.argv[1:])}".strip(), "rounds": args.rounds,
             "device": torch.cuda.get_device_name() if args.device == "cuda" else cpu}
    print(f"{found['shape']}\n{found['device']}\n")
    found["training"] = training(base, x, y, args)
    print(f"{'a training step':28}{'trained':>11}{'ms':>8}{'/ LoRA':>7}{'quartiles':>13}{'saved MB':>9}")
    for name, r in found["training"].items():
        print(f"{name:28}{r['parameters']:11,}{r['ms']:8.0f}{r['ratio']:7.3f}{r['quartiles'][0]:7.3f}{r['quartiles'][1]:6.3f}"
              f"{r['saved_MB']:9.1f}")
    found["latency"] = latency(base, args)
    for size, rows in found["latency"].items():
        print(f"\n{'a forward pass, ' + size:30}{'ms':>9}{'/ base':>8}{'quartiles':>13}")
        for name, r in rows.items():
            print(f"{name:30}{r['ms']:9.1f}{r['ratio']:8.3f}{r['quartiles'][0]:7.3f}{r['quartiles'][1]:6.3f}")
    found["generation"] = generation(base, args)
    print(f"\n{f'{args.generate[1]} tokens after {args.generate[0]}':30}{'ms':>9}{'/ cache':>8}")
    for name, r in found["generation"].items():
        print(f"{name:30}{r['ms']:9.1f}{r['ratio']:8.2f}")
    found["versions"] = {k: version(k) for k in ("torch", "peft", "transformers", "loralib") if k in sys.modules}
    out = Path(args.out or ROOT / "experiments" / "results" / f"bench_{args.device}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
