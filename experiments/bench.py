"""
Compare the cost of the methods with that of full fine-tuning, of the LoRA layers of peft and
loralib, and of peft on transformers' GPT-2: a training step and a forward pass, with the same
weights and batch in one process.

    python experiments/bench.py                     # ten minutes on two cores
    python experiments/bench.py --n_layer 24 --n_embd 1024 --vocab_size 50257 --batch 8 512

Each round times every candidate once, so that drift in the machine's speed affects all of them.
Ratios are taken within a round; their median and quartiles are reported. The numbers are written to
experiments/results/bench_{cpu,cuda}.json.
"""
import argparse
import copy
import json
import platform
import statistics
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import results          # puts the repository's root on sys.path

import torch
import torch.nn as nn
import torch.nn.functional as F

import autolora
import lora
from model import GPT, GPTConfig
from multilora import MultiLoRALinear


class Candidate:
    """A model and its training step; with `hypergrad`, a step of AutoLoRA's search."""

    def __init__(self, model, batch, hypergrad=None):
        self.model = model.train()
        self.batch = batch
        self.hypergrad = hypergrad
        self.trained = []
        for p in model.parameters():
            if p.requires_grad:
                self.trained.append(p)
            elif p.is_cuda:
                p.data = p.data.bfloat16()
        self.beta = [m.beta for m in lora.adapters(model).values() if hypergrad]
        self.omega = [p for p in self.trained if not any(p is b for b in self.beta)]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=True)

    def losses(self):
        with torch.autocast("cuda", torch.bfloat16, enabled=self.batch[0].is_cuda):
            return [self.model(*self.batch)[1]]

    def step(self):
        if self.hypergrad:              # the same batch serves as training and validation rows
            autolora.search_gradients(self.losses, self.losses, self.omega, self.beta, 0.01,
                                      self.hypergrad)
        else:
            self.losses()[0].backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def candidates(base, rank, batch):
    """{name: Candidate}; a library that is not installed is left out."""
    def adapted(layer, **settings):
        return lora.inject(copy.deepcopy(base), rank=rank, layer=layer, **settings)

    found = {
        "full fine-tuning": Candidate(copy.deepcopy(base), batch),
        "LoRA": Candidate(adapted(lora.LoRALinear, alpha=rank), batch),
        "MultiLoRA, n = 4": Candidate(adapted(MultiLoRALinear, n_blocks=4), batch),
    }
    for hypergrad in ("forward", "central"):
        model = adapted(autolora.AutoLoRALinear, alpha=rank)
        found[f"AutoLoRA's search, {hypergrad}"] = Candidate(model, batch, hypergrad)
    for name, use_library in (("peft's layers in our model", use_peft),
                              ("loralib's layers in our model", use_loralib),
                              ("peft on transformers' GPT-2", TransformersGPT2)):
        try:
            found[name] = Candidate(use_library(copy.deepcopy(base), rank), batch)
        except ImportError as e:
            print(f"{name} is left out: {e}")
    return found


def use_peft(model, rank):
    import peft
    config = peft.LoraConfig(r=rank, lora_alpha=rank,
                             target_modules=["q", "k", "v", "o", "up", "down"])
    peft.inject_adapter_in_model(config, model)
    return model


def use_loralib(model, rank):
    import loralib
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear):
            new = loralib.Linear(linear.in_features, linear.out_features, r=rank, lora_alpha=rank,
                                 merge_weights=False)
            new.load_state_dict(linear.state_dict(), strict=False)
            model.set_submodule(name, new)
    loralib.mark_only_lora_as_trainable(model)
    return model


class TransformersGPT2(nn.Module):
    """transformers' GPT-2 with our weights, adapted by peft."""

    def __init__(self, gpt, rank):
        super().__init__()
        import peft
        import transformers
        c = gpt.config
        config = transformers.GPT2Config(
            vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
            n_head=c.n_head, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0, use_cache=False,
            bos_token_id=0, eos_token_id=0)
        model = transformers.GPT2LMHeadModel(config).to(gpt.wte.weight.device)
        model.transformer.load_state_dict(gpt.hf_state_dict())
        lora_config = peft.LoraConfig(r=rank, lora_alpha=rank, fan_in_fan_out=True,
                                      target_modules=["c_attn", "c_proj", "c_fc"])
        self.model = peft.get_peft_model(model, lora_config)

    def forward(self, idx, targets):
        logits = self.model(idx).logits
        return logits, F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class AdapterLayer(nn.Module):
    """Houlsby et al. (arXiv 1902.00751), after a linear layer: the LoRA paper's Adapter^H."""

    def __init__(self, base, width):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.out_features, width)
        self.up = nn.Linear(width, base.out_features)
        self.to(base.weight)

    def forward(self, x):
        h = self.base(x)
        return h + self.up(F.gelu(self.down(h)))


def alternate(functions, rounds, against, warmup=3):
    """{name: {"ms", "ratio", "quartiles"}}: median time, and ratio to `against` within a round."""
    times = {name: [] for name in functions}
    for i in range(rounds + warmup):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i >= warmup:
                times[name].append(time.perf_counter() - began)
    rows = {}
    for name, own in times.items():
        ratios = [t / other for other, t in zip(times[against], own)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows[name] = {"ms": 1e3 * statistics.median(own), "ratio": middle, "quartiles": [low, high]}
        print(f"{name:32}{rows[name]['ms']:9.1f} ms{middle:8.3f}   {low:.3f} to {high:.3f}")
    return rows


def saved_for_backward(candidate):
    """MB that a forward pass keeps for the backward pass, without the parameters."""
    own = {p.untyped_storage().data_ptr() for p in candidate.model.parameters()}
    saved = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            saved[t.untyped_storage().data_ptr()] = t       # kept alive: addresses stay distinct
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        candidate.losses()
    return sum(t.untyped_storage().nbytes() for t in saved.values()) / 1e6


def training(base, batch, args):
    found = candidates(base, args.rank, batch)
    saved = {name: saved_for_backward(candidate) for name, candidate in found.items()}
    steps = {name: candidate.step for name, candidate in found.items()}
    rows = alternate(steps, args.rounds, "LoRA")
    for name, candidate in found.items():
        rows[name] |= {"parameters": sum(p.numel() for p in candidate.trained),
                       "saved_MB": saved[name]}
    return rows


@torch.no_grad()
def latency(base, args):
    """A forward pass with adapters, merged or not, and with adapter layers of the same size."""
    if base.wte.weight.is_cuda:
        base = copy.deepcopy(base).bfloat16()
    models = {"base": base, "adapter layers": copy.deepcopy(base)}
    for name, layer in (("LoRA, merged", lora.LoRALinear), ("LoRA", lora.LoRALinear),
                        ("MultiLoRA, n = 4", MultiLoRALinear)):
        models[name] = lora.inject(copy.deepcopy(base), rank=args.rank, layer=layer)
    lora.merge(models["LoRA, merged"])
    parameters = sum(p.numel() for p in models["LoRA"].parameters() if p.requires_grad)
    width = round(parameters / (4 * base.config.n_embd * base.config.n_layer))
    for block in models["adapter layers"].h:
        block.attn.o = AdapterLayer(block.attn.o, width)
        block.mlp.down = AdapterLayer(block.mlp.down, width)
    found = {}
    for shape in args.latency:
        B, T = map(int, shape.split("x"))
        print(f"\na forward pass, {B} x {T}, relative to the base's")
        x = torch.randint(args.vocab_size, (B, T), device=args.device)
        passes = {name: partial(model.eval(), x) for name, model in models.items()}
        found[f"{B} x {T}"] = alternate(passes, args.rounds, "base")
    return found


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--rounds", type=int, default=40, help="how often each is timed (default %(default)s)")
    add("--n_layer", type=int, default=4)
    add("--n_embd", type=int, default=768)
    add("--vocab_size", type=int, default=5000, help="(default %(default)s; GPT-2: 50257)")
    add("--batch", type=int, nargs=2, default=(4, 128), metavar=("B", "T"), help="rows and tokens")
    add("--latency", nargs="+", default=["1x128", "4x128"], metavar="BxT", help="rows x tokens")
    add("--rank", type=int, default=8)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, help="(default experiments/results/bench_DEVICE.json)")
    args = p.parse_args(argv)
    B, T = args.batch
    torch.manual_seed(0)
    longest = max(T, *(int(shape.split("x")[1]) for shape in args.latency))
    heads = max(1, args.n_embd // 64)
    config = GPTConfig(args.vocab_size, longest, args.n_layer, heads, args.n_embd)
    base = GPT(config).to(args.device)
    device = f"cpu, {torch.get_num_threads()} threads, {platform.machine()}"
    if base.wte.weight.is_cuda:
        device = torch.cuda.get_device_name()
    found = {"shape": f"{args.n_layer} layers, width {args.n_embd}, vocabulary {args.vocab_size}, "
                      f"batch {B} x {T}, rank {args.rank} on all six linears, fused AdamW",
             "command": " ".join(["python experiments/bench.py", *(argv or sys.argv[1:])]),
             "rounds": args.rounds, "device": device}
    print(f"{found['shape']}\n{device}\n\na training step, relative to LoRA's")
    batch = torch.randint(args.vocab_size, (2, B, T), device=args.device)
    found["training"] = training(base, tuple(batch), args)
    found["latency"] = latency(base, args)
    libraries = ("torch", "peft", "loralib", "transformers")
    found["versions"] = {name: version(name) for name in libraries if name in sys.modules}
    out = args.out or results.RESULTS / f"bench_{args.device}.json"
    out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
