"""
One training step of LoRA, MultiLoRA, AutoLoRA's search and full fine-tuning, and of peft's and loralib's LoRA: same
weights, same batch, one process.

    pip install transformers peft loralib        # the rivals; what is not there is left out
    python experiments/bench.py                  # about three minutes on two cores

Every round times one step of every candidate in turn, so that a machine whose speed drifts slows all of them;
the ratio to our LoRA is taken round by round, and its median reported with the quartiles. Results go to
experiments/results/bench_{cpu,cuda}.json.
"""
import argparse
import copy
import json
import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch

import autolora
import lora
from model import GPT, GPTConfig
from multilora import MultiLoRALinear


def candidates(base, rank):
    """{name: (model, function from the batch to its loss)}, each from the same weights; absent rivals are left out."""
    ours = lambda model: lambda x, y: model(x, y)[1]
    full, adapted = copy.deepcopy(base), lora.inject(copy.deepcopy(base), "all", rank, alpha=rank)
    multi = lora.inject(copy.deepcopy(base), "all", rank, MultiLoRALinear, n_blocks=4)
    out = {"full fine-tuning": (full, ours(full)), "LoRA": (adapted, ours(adapted)), "MultiLoRA, n = 4": (multi, ours(multi))}
    for how in ("forward", "central"):
        m = lora.inject(copy.deepcopy(base), "all", rank, autolora.AutoLoRALinear, alpha=rank)
        out[f"AutoLoRA's search, {how}"] = m, ours(m)
    try:
        import peft
        m = copy.deepcopy(base)
        six = ["q", "k", "v", "o", "up", "down"]
        peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=six), m)
        out["peft's layers in our model"] = m, ours(m)
    except ImportError:
        print("peft is not installed: left out")
    try:
        import loralib
        m = copy.deepcopy(base)
        for name, linear in [(n, x) for n, x in m.named_modules() if isinstance(x, torch.nn.Linear)]:
            new = loralib.Linear(linear.in_features, linear.out_features, r=rank, lora_alpha=rank, merge_weights=False)
            new.load_state_dict(linear.state_dict(), strict=False)
            m.set_submodule(name, new)
        loralib.mark_only_lora_as_trainable(m)
        out["loralib's layers in our model"] = m, ours(m)
    except ImportError:
        print("loralib is not installed: left out")
    try:
        import peft
        from test_model import hf_layout
        from transformers import GPT2Config, GPT2LMHeadModel
        c = base.config
        hf = GPT2LMHeadModel(GPT2Config(
            vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False))
        hf.transformer.load_state_dict({k: v for k, v in hf_layout(base).items() if not k.endswith(".attn.bias")})
        hf = peft.get_peft_model(hf, peft.LoraConfig(r=rank, lora_alpha=rank, fan_in_fan_out=True,
                                                     target_modules=["c_attn", "c_proj", "c_fc"]))

        def loss(x, y):  # transformers predicts labels[t + 1] at t
            return hf(input_ids=x, labels=torch.cat([x[:, :1], y[:, :-1]], 1)).loss

        out["peft on transformers' GPT-2"] = hf, loss
    except ImportError:
        print("transformers is not installed: left out")
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=40)
    p.add_argument("--n_layer", type=int, default=4)
    p.add_argument("--n_embd", type=int, default=768)
    p.add_argument("--vocab_size", type=int, default=5000)
    p.add_argument("--batch", type=int, nargs=2, default=(4, 128), metavar=("B", "T"))
    p.add_argument("--rank", type=int, default=8)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--out", help="default experiments/results/bench_DEVICE.json")
    args = p.parse_args()
    B, T = args.batch
    torch.manual_seed(0)
    base = GPT(GPTConfig(args.vocab_size, T, args.n_layer, max(1, args.n_embd // 64), args.n_embd)).to(args.device)
    x, y = torch.randint(args.vocab_size, (2, B, T), device=args.device)
    y[:, -1] = -100                                                     # which transformers would not predict
    want, steps = base(x, y)[1].item(), {}
    for name, (model, loss) in candidates(base, args.rank).items():
        model.to(args.device).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        assert abs(loss(x, y).item() - want) < 1e-4 * want, name        # they all compute the same thing

        beta = [m.beta for m in lora.adapters(model).values() if isinstance(m, autolora.AutoLoRALinear)]
        omega = [p for p in trained if all(p is not b for b in beta)]

        def step(loss=loss, optimizer=optimizer, omega=omega, beta=beta, how=name.split()[-1]):
            if beta:                                                    # the same batch stands for both parts of the rows
                losses = lambda: [loss(x, y)]
                _, g, h = autolora.hypergradient(losses, losses, omega, beta, 0.01, how)
                for p, grad in zip([*omega, *beta], [*g, *h]):
                    p.grad = grad
            else:
                loss(x, y).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if args.device == "cuda":
                torch.cuda.synchronize()

        steps[name] = step, sum(p.numel() for p in trained)
    times = {name: [] for name in steps}
    for i in range(args.rounds + 3):
        for name, (step, _) in steps.items():
            began = time.perf_counter()
            step()
            if i >= 3:                                                  # the first rounds warm up
                times[name].append(time.perf_counter() - began)
    rows = {}
    for name, (_, n) in steps.items():
        q = statistics.quantiles([b / a for a, b in zip(times["LoRA"], times[name])], n=4)
        rows[name] = {"parameters": n, "ms": 1e3 * statistics.median(times[name]), "over_lora": q[1], "quartiles": [q[0], q[2]]}
    cpu = f"cpu, {torch.get_num_threads()} threads, {platform.machine()}"
    about = {"shape": f"{args.n_layer} layers, width {args.n_embd}, vocabulary {args.vocab_size}, batch {B} x {T}, "
                      f"rank {args.rank} on all six linears, fused AdamW",
             "rounds": args.rounds, "device": torch.cuda.get_device_name() if args.device == "cuda" else cpu,
             "versions": {k: version(k) for k in ("torch", "peft", "transformers", "loralib") if k in sys.modules}}
    print(f"{about['shape']}\n{about['device']}\n")
    print(f"{'':32}{'trained':>12}{'ms a step':>12}{'/ LoRA':>12}   quartiles")
    for name, r in rows.items():
        low, high = r["quartiles"]
        print(f"{name:32}{r['parameters']:12,}{r['ms']:12.1f}{r['over_lora']:12.3f}   {low:.3f} {high:.3f}")
    out = Path(args.out or ROOT / "experiments" / "results" / f"bench_{args.device}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
