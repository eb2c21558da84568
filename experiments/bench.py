"""
What the methods cost, side by side with full fine-tuning and with peft's and loralib's LoRA: same
weights, same batch, one process.

    pip install transformers peft loralib       # the rivals; what is not there is left out
    python experiments/bench.py                 # about ten minutes on two cores
    python experiments/bench.py --n_layer 24 --n_embd 1024 --vocab_size 50257 --batch 8 512

Three tables: a training step, a forward pass (the LoRA paper's table 1), and generation. Every
round times each candidate once, in turn, so that a machine whose speed drifts slows all of them; a
ratio is taken round by round, and its median is reported with the quartiles. Results go to
experiments/results/bench_{cpu,cuda}.json.
"""
import argparse
import copy
import io
import json
import platform
import statistics
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import autolora
import lora
from model import GPT, GPTConfig
from multilora import MultiLoRALinear

SIX = ["q", "k", "v", "o", "up", "down"]


# What is measured: models that start from the same weights ---------------------------------------

class Candidate:
    """A model, and its training step."""

    def __init__(self, model, batch, hypergrad=None):
        self.batch, self.device, self.hypergrad = batch, batch[0].device, hypergrad
        self.model = model.to(self.device).train()
        self.trained = [p for p in model.parameters() if p.requires_grad]
        if self.device.type == "cuda":                          # what is frozen may be bf16
            for p in model.parameters():
                if not p.requires_grad:
                    p.data = p.data.bfloat16()
        self.beta = [m.beta for m in lora.adapters(model).values() if hypergrad]
        self.omega = [p for p in self.trained if not any(p is b for b in self.beta)]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=True)

    def predict(self, x, y):
        """The loss."""
        return self.model(x, y)[1]

    def loss(self):
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return self.predict(*self.batch)

    def losses(self):
        yield self.loss()

    def step(self):
        if self.hypergrad:              # the same batch stands for both parts of the rows
            autolora.search_gradients(self.losses, self.losses, self.omega, self.beta, 0.01,
                                      self.hypergrad)
        else:
            self.loss().backward()
        self.optimizer.step()
        self.after_step()
        self.optimizer.zero_grad(set_to_none=True)

    def after_step(self):
        pass


class Transformers(Candidate):
    def predict(self, x, y):
        labels = torch.cat([x[:, :1], y[:, :-1]], 1)            # labels[t + 1] is wanted at t
        return self.model(input_ids=x, labels=labels).loss


class AdaLoRA(Candidate):
    """peft's sets its budget of ranks after every step, and adds a penalty to the loss."""

    def predict(self, x, y):
        return self.model(x, y).loss

    def after_step(self):
        self.model.update_and_allocate(self.taken)
        self.taken += 1

    taken = 0


class WithLoss(nn.Module):
    """A GPT that returns what peft's AdaLoRA expects."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, y):
        return argparse.Namespace(loss=self.model(x, y)[1])


def candidates(base, rank, batch):
    """{name: Candidate}"""
    def put(layer, **settings):
        return lora.inject(copy.deepcopy(base), rank=rank, layer=layer, **settings)

    found = {"full fine-tuning": Candidate(copy.deepcopy(base), batch),
             "LoRA": Candidate(put(lora.LoRALinear, alpha=rank), batch),
             "MultiLoRA, n = 4": Candidate(put(MultiLoRALinear, n_blocks=4), batch)}
    for how in ("forward", "central"):
        model = put(autolora.AutoLoRALinear, alpha=rank)
        found[f"AutoLoRA's search, {how}"] = Candidate(model, batch, how)
    for name, rival in (("peft's layers in our model", peft_layers),
                        ("loralib's layers in our model", loralib_layers),
                        ("peft's AdaLoRA in our model", peft_adalora),
                        ("peft on transformers' GPT-2", peft_on_transformers)):
        try:
            found[name] = rival(copy.deepcopy(base), rank, batch)
        except ImportError as e:
            print(f"{name} is left out: {e}")
    return found


def peft_layers(model, rank, batch):
    import peft
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=SIX)
    peft.inject_adapter_in_model(config, model)
    return Candidate(model, batch)


def loralib_layers(model, rank, batch):
    import loralib
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name, linear in linears.items():
        new = loralib.Linear(linear.in_features, linear.out_features, r=rank, lora_alpha=rank,
                             merge_weights=False)
        new.load_state_dict(linear.state_dict(), strict=False)
        model.set_submodule(name, new)
    loralib.mark_only_lora_as_trainable(model)
    return Candidate(model, batch)


def peft_adalora(model, rank, batch):
    """Ranks from 1.5 r down to r on average."""
    from peft import AdaLoraConfig
    from peft.tuners.adalora import AdaLoraModel
    config = AdaLoraConfig(target_r=rank, init_r=rank * 3 // 2, lora_alpha=rank,
                           target_modules=SIX, total_step=10_000)
    return AdaLoRA(AdaLoraModel(WithLoss(model), config, "default"), batch)


def peft_on_transformers(model, rank, batch):
    import peft
    config = peft.LoraConfig(r=rank, lora_alpha=rank, fan_in_fan_out=True,
                             target_modules=["c_attn", "c_proj", "c_fc"])
    return Transformers(peft.get_peft_model(in_transformers(model), config), batch)


def in_transformers(model):
    """transformers' GPT-2 with the same weights."""
    from transformers import GPT2Config, GPT2LMHeadModel
    c = model.config
    config = GPT2Config(vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd,
                        n_layer=c.n_layer, n_head=c.n_head, resid_pdrop=0.0, embd_pdrop=0.0,
                        attn_pdrop=0.0, use_cache=False)
    hf = GPT2LMHeadModel(config)
    hf.transformer.load_state_dict(model.hf_state_dict())
    return hf.to(model.wte.weight)


class AdapterLayer(nn.Module):
    """Houlsby et al.'s (arXiv 1902.00751), behind a linear layer; the LoRA paper's Adapter^H."""

    def __init__(self, base, m):
        super().__init__()
        d = base.weight.size(0)
        self.base, self.down, self.up = base, nn.Linear(d, m), nn.Linear(m, d)
        self.to(base.weight)

    def forward(self, x):
        h = self.base(x)
        return h + self.up(F.gelu(self.down(h)))


# Measuring ---------------------------------------------------------------------------------------

def wait_for(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def alternate(functions, rounds, device, against, warmup=3):
    """{name: {"ms", "ratio", "quartiles"}}: median time, and that over `against`'s, by round."""
    times = {name: [] for name in functions}
    for i in range(rounds + warmup):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            wait_for(device)
            if i >= warmup:
                times[name].append(time.perf_counter() - began)
    rows = {}
    for name, own in times.items():
        ratios = [t / other for other, t in zip(times[against], own)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows[name] = {"ms": 1e3 * statistics.median(own), "ratio": middle, "quartiles": [low, high]}
    return rows


def kept_bytes(model, loss):
    """(loss, bytes that its forward pass keeps for the backward pass, the parameters aside)"""
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t            # alive: no address comes twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        value = loss()
    return value, sum(t.untyped_storage().nbytes() for t in kept.values())


def peak_flops(device):
    """Of a large matrix product, per second: the best of ten."""
    n, dtype, best = 1024, torch.float32, 0.0
    if device == "cuda":
        n, dtype = 8192, torch.bfloat16
    a = torch.randn(n, n, device=device, dtype=dtype)
    for _ in range(10):
        began = time.perf_counter()
        a @ a
        wait_for(device)
        best = max(best, 2 * n ** 3 / (time.perf_counter() - began))
    return best


def size(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def needs(candidate, loss_wanted):
    """What a step needs besides time. Its loss has to be the one that all have."""
    loss, kept = kept_bytes(candidate.model, candidate.loss)
    error = abs(loss.item() - loss_wanted) / loss_wanted
    if not isinstance(candidate, AdaLoRA):
        assert error < (2e-2 if candidate.device.type == "cuda" else 1e-4), error
    del loss
    with FlopCounterMode(display=False) as counter:
        candidate.step()
    file, state = io.BytesIO(), []
    torch.save({str(i): p for i, p in enumerate(candidate.trained)}, file)
    for tensors in candidate.optimizer.state.values():
        state += tensors.values()
    row = {"parameters": sum(p.numel() for p in candidate.trained), "saved_MB": kept / 1e6,
           "flops": counter.get_total_flops(), "optimizer_MB": size(state) / 1e6,
           "file_MB": file.tell() / 1e6}
    if candidate.device.type == "cuda":         # of this candidate alone, with its weights
        wait_for(candidate.device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        candidate.step()
        wait_for(candidate.device)
        peak = torch.cuda.max_memory_allocated() - before
        row["peak_MB"] = (size(candidate.model.parameters()) + size(state) + peak) / 1e6
    return row


def training(base, batch, args):
    """A training step of every candidate: time, and the memory and the file that it needs."""
    with torch.no_grad():
        loss = base(*batch)[1].item()
    found, steps = {}, {}
    for name, candidate in candidates(base, args.rank, batch).items():
        found[name] = needs(candidate, loss)
        steps[name] = candidate.step
    peak = peak_flops(args.device)
    for name, row in alternate(steps, args.rounds, args.device, "LoRA").items():
        seconds = row["ms"] / 1e3
        found[name] = row | found[name]
        found[name]["tokens_per_s"] = batch[0].numel() / seconds
        found[name]["share_of_peak"] = found[name]["flops"] / seconds / peak
    return found


@torch.no_grad()
def latency(base, args):
    """
    A forward pass of the base, with LoRA beside it and merged, and with adapter layers of as many
    parameters, for every shape.
    """
    def adapted(layer=lora.LoRALinear, **settings):
        return lora.inject(copy.deepcopy(base), rank=args.rank, layer=layer, **settings)

    base = in_its_dtype(base)
    models = {"base": base, "LoRA, merged": adapted(), "LoRA": adapted(),
              "MultiLoRA, n = 4": adapted(MultiLoRALinear, n_blocks=4),
              "adapter layers": copy.deepcopy(base)}
    d, L = base.config.n_embd, base.config.n_layer
    parameters = sum(p.numel() for p in models["LoRA"].parameters() if p.requires_grad)
    m = round(parameters / (4 * d * L))
    for block in models["adapter layers"].h:
        block.attn.o = AdapterLayer(block.attn.o, m)
        block.mlp.down = AdapterLayer(block.mlp.down, m)
    lora.merge(models["LoRA, merged"])
    found = {}
    for B, T in args.latency:
        x = torch.randint(args.vocab_size, (B, T), device=args.device)
        passes = {name: partial(model.eval(), x) for name, model in models.items()}
        found[f"{B} x {T}"] = alternate(passes, args.rounds, args.device, "base")
    return found


def in_its_dtype(base):
    """A copy to predict with: bf16 on a GPU."""
    model = copy.deepcopy(base).eval()
    return model.bfloat16() if base.wte.weight.is_cuda else model


@torch.no_grad()
def generation(base, args):
    """
    Greedy text from one prompt: with the cache, by running the whole row again for every token, and
    by transformers.
    """
    model, (given, new) = in_its_dtype(base), args.generate
    prompt = torch.randint(args.vocab_size, (1, given), device=args.device)

    def with_the_cache():
        return model.generate(prompt.tolist(), new)[0]

    def without():
        row = prompt
        for _ in range(new):
            logits = F.linear(model.hidden_states(row)[:, -1:], model.wte.weight)
            row = torch.cat([row, logits.argmax(-1)], 1)
        return row[0, given:].tolist()

    def by_transformers():
        row = hf.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new,
                          min_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=None,
                          use_cache=True)
        return row[0, given:].tolist()

    ways = {"with the cache": with_the_cache, "without": without}
    try:
        hf = in_transformers(model).eval()
        ways["transformers' generate"] = by_transformers
    except ImportError as e:
        print(f"transformers' generate is left out: {e}")
    if args.device == "cpu":
        for name, way in ways.items():
            assert way() == with_the_cache(), name
    return alternate(ways, max(3, args.rounds // 8), args.device, "with the cache", warmup=1)


# The command line --------------------------------------------------------------------------------

def shape(text):
    B, T = text.split("x")
    return int(B), int(T)


def parse(argv):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--rounds", type=int, default=40, help="of one step of each (default %(default)s)")
    add("--n_layer", type=int, default=4)
    add("--n_embd", type=int, default=768)
    add("--vocab_size", type=int, default=5000, help="(default %(default)s; GPT-2's is 50257)")
    add("--batch", type=int, nargs=2, default=(4, 128), metavar=("B", "T"), help="rows and tokens")
    add("--latency", type=shape, nargs="+", default=[(1, 128), (4, 128)], metavar="BxT",
        help="such as 1x128 32x512")
    add("--generate", type=int, nargs=2, default=(32, 64), metavar=("GIVEN", "NEW"), help="tokens")
    add("--rank", type=int, default=8)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, help="default experiments/results/bench_DEVICE.json")
    return p.parse_args(argv)


def show(title, against, rows, columns=()):
    head = "".join(f"{column:>14}" for column in columns)
    print(f"\n{title:30}{'ms':>9}{'/ ' + against:>8}{'quartiles':>15}{head}")
    for name, row in rows.items():
        low, high = row["quartiles"]
        cells = "".join(f"{row[column]:14,.0f}" for column in columns)
        print(f"{name:30}{row['ms']:9.1f}{row['ratio']:8.3f}{low:8.3f}{high:7.3f}{cells}")


def main(argv=None):
    args = parse(argv)
    B, T = args.batch
    given, new = args.generate
    torch.manual_seed(0)
    longest = max(T, given + new, *(t for _, t in args.latency))
    heads = max(1, args.n_embd // 64)
    config = GPTConfig(args.vocab_size, longest, args.n_layer, heads, args.n_embd)
    base = GPT(config).to(args.device)
    x, y = torch.randint(args.vocab_size, (2, B, T), device=args.device)
    y[:, -1] = -100                                             # transformers does not predict it
    device = f"cpu, {torch.get_num_threads()} threads, {platform.machine()}"
    if args.device == "cuda":
        device = torch.cuda.get_device_name()
    found = {"shape": f"{args.n_layer} layers, width {args.n_embd}, vocabulary {args.vocab_size}, "
                      f"batch {B} x {T}, rank {args.rank} on all six linears, fused AdamW",
             "command": " ".join(["python experiments/bench.py", *(argv or sys.argv[1:])]),
             "rounds": args.rounds, "device": device}
    print(f"{found['shape']}\n{device}")
    found["training"] = training(base, (x, y), args)
    show("a training step", "LoRA", found["training"], ("parameters", "saved_MB"))
    found["latency"] = latency(base, args)
    for of_shape, rows in found["latency"].items():
        show(f"a forward pass, {of_shape}", "base", rows)
    found["generation"] = generation(base, args)
    show(f"{new} tokens after {given}", "cache", found["generation"])
    rivals = ("torch", "peft", "transformers", "loralib")
    found["versions"] = {name: version(name) for name in rivals if name in sys.modules}
    out = args.out or ROOT / "experiments" / "results" / f"bench_{args.device}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
