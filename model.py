"""
GPT-2 and nothing else: sizes, forward pass, cached generation, released weights.

"Language Models are Unsupervised Multitask Learners", Radford et al. 2019: a decoder-only
transformer with LayerNorm before each sublayer, learned positions and a head tied to the token
embedding. It differs from the released code in one thing. That code holds query, key and value in
one matrix and stores every matrix transposed; here `attn.q`, `attn.k`, `attn.v`, `attn.o`,
`mlp.up`, `mlp.down` are six plain `nn.Linear` with weights (d_out, d_in), so that the update of
each, ΔW_q, ΔW_v, ..., is an object of its own, as the papers on low-rank adaptation need.

Letters in the shape comments: B rows, T tokens, C width, V vocabulary, nh heads, hs = C / nh.
"""
import math
import re
import urllib.error
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    vocab_size: int = 50257
    block_size: int = 1024          # the longest row, in tokens
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    grad_checkpoint: bool = False   # recompute each block in the backward pass: less memory, more time


PRESETS = {
    "nano": GPTConfig(vocab_size=257, block_size=512, n_layer=4, n_head=4, n_embd=128),  # 0.9 M, comes along
    "gpt2": GPTConfig(),                                                                 # 124 M
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),                        # 355 M
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),                         # 774 M
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),                            # 1.6 B
}
NANO = Path(__file__).parent / "pretrained" / "nano.pt"
RELEASED = "https://huggingface.co/openai-community/{}/resolve/main/pytorch_model.bin"


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.q, self.k, self.v, self.o = (nn.Linear(C, C) for _ in range(4))

    def forward(self, x, cache=None, pos=None):
        B, T, C = x.shape
        q, k, v = (f(x).view(B, T, self.n_head, -1) for f in (self.q, self.k, self.v))  # (B, T, nh, hs)
        mask = None
        if cache is not None:  # cache (2, B, S, nh, hs): the key of position p lies at index p
            row = torch.arange(B, device=x.device)[:, None]
            cache[0, row, pos], cache[1, row, pos] = k.to(cache.dtype), v.to(cache.dtype)
            k, v = cache.to(q.dtype)
            mask = torch.arange(k.size(1), device=x.device) <= pos[:, None, :, None]    # (B, 1, T, S)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))                                # (B, nh, T or S, hs)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.o(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, pos=None):
        x = x + self.attn(self.ln_1(x), cache, pos)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        """Random weights, as GPT-2 starts training. Raises ValueError where heads do not divide the width."""
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head}")
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # also the head: never adapted
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif "ln_" not in name:  # the 2 n_layer matrices that write to the residual stream start smaller
                writes = name.endswith(("attn.o.weight", "mlp.down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if writes else 0.02)

    def hidden(self, idx, pos=None, cache=None):
        """Final hidden states (B, T, C) of tokens idx (B, T); `pos` (B, T) and `cache` as in `generate`."""
        if idx.size(1) > self.config.block_size:
            raise ValueError(f"a row of {idx.size(1)} tokens does not fit the model's block of {self.config.block_size}")
        x = self.wte(idx) + self.wpe(torch.arange(idx.size(1), device=idx.device) if pos is None else pos)
        for i, block in enumerate(self.h):
            if self.config.grad_checkpoint and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x, None if cache is None else cache[i], pos)
        return self.ln_f(x)

    def forward(self, idx, targets=None, label_smoothing=0.0):
        """
        idx (B, T) token ids; targets (B, T) the id that should follow each, -100 where it does not matter.
        Returns logits (B, T, V) and, with targets, the mean cross-entropy in nats (else None).
        Raises ValueError where T is more than the block.
        """
        logits = F.linear(self.hidden(idx), self.wte.weight)                            # (B, T, V)
        if targets is None:
            return logits, None
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)  # (B T, V), never bf16
        return logits, F.cross_entropy(wide, targets.flatten(), ignore_index=-100, label_smoothing=label_smoothing)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=0.0, top_k=None, stop=None):
        """
        Continue every prompt; each token costs one forward pass of one position, by a key/value cache.

        idx: a tensor (B, T), or a list of B lists of ids, which may differ in length. temperature 0 takes
        the likeliest token, otherwise one is drawn (from the `top_k` likeliest only, if given). A row ends
        before its first `stop` token. Returns B lists of new ids, without the prompts.
        Raises ValueError for an empty prompt and where prompt and new tokens do not fit the block.
        """
        prompts = idx.tolist() if torch.is_tensor(idx) else [list(p) for p in idx]
        if not prompts or not all(prompts):
            raise ValueError("generate needs at least one token in every prompt")
        if temperature < 0 or top_k is not None and top_k < 1:
            raise ValueError(f"temperature {temperature} must be at least 0 and top_k {top_k} at least 1")
        longest, device = max(map(len, prompts)), self.wte.weight.device
        S = longest + max_new_tokens - 1                            # positions: the last new token needs none
        if max_new_tokens < 1 or S > self.config.block_size:
            raise ValueError(f"a prompt of {longest} tokens leaves the model's block of {self.config.block_size} room for "
                             f"{max(0, self.config.block_size + 1 - longest)} new ones, not {max_new_tokens}")
        # Shorter prompts are padded at the end. A padded key is never seen: the mask of the prompt is
        # causal, and each new token overwrites the key at its own position before it looks.
        padded = torch.tensor([p + [0] * (longest - len(p)) for p in prompts], device=device)  # (B, longest)
        length = torch.tensor([len(p) for p in prompts], device=device)                        # (B,)
        c, B = self.config, len(prompts)
        cache = torch.zeros(c.n_layer, 2, B, S, c.n_head, c.n_embd // c.n_head,
                            dtype=self.wte.weight.dtype, device=device)
        was_training = self.training
        self.eval()
        x = self.hidden(padded, torch.arange(longest, device=device).expand(B, -1), cache)
        x = x[torch.arange(B, device=device), length - 1]                                      # (B, C)
        new, ended = [], torch.zeros(B, dtype=torch.bool, device=device)
        for t in range(max_new_tokens):
            logits = F.linear(x, self.wte.weight)                                              # (B, V)
            if temperature == 0:
                token = logits.argmax(-1)
            else:
                if top_k is not None:
                    least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                    logits = logits.masked_fill(logits < least, -torch.inf)
                token = torch.multinomial(F.softmax(logits.float() / temperature, -1), 1).squeeze(1)
            new.append(token)
            if stop is not None:
                ended |= token == stop
                if ended.all():
                    break
            if t + 1 < max_new_tokens:
                x = self.hidden(token[:, None], (length + t)[:, None], cache)[:, 0]
        self.train(was_training)
        rows = torch.stack(new, 1).tolist()
        return [r[:r.index(stop)] if stop in r else r for r in rows]

    @classmethod
    def from_pretrained(cls, name_or_path, n_head=None):
        """
        `nano`, a released size (downloaded once, then cached by torch), or a file: a checkpoint of ours
        or a GPT-2 state dict in the Hugging Face layout, whose sizes are read from its tensors and whose
        heads are 64 wide unless `n_head` says otherwise. Weights come back in float32.
        Raises FileNotFoundError or ConnectionError where there is nothing to read, and ValueError, with the
        names, for a file that holds no model or whose tensors do not fit one exactly.
        """
        name = str(name_or_path)
        if name in PRESETS and name != "nano":
            try:
                held = torch.hub.load_state_dict_from_url(RELEASED.format(name), map_location="cpu",
                                                          file_name=f"{name}.bin", weights_only=True)
            except (urllib.error.URLError, OSError) as e:
                raise ConnectionError(f"{name}: the weights could not be downloaded ({e}); bring the file "
                                      f"{RELEASED.format(name)} here and give its path instead") from None
            except Exception as e:  # torch raises many kinds where a file is not what it should be
                raise ValueError(f"{name}: the download is broken ({type(e).__name__}); delete "
                                 f"{torch.hub.get_dir()}/checkpoints/{name}.bin and try again") from None
        elif name == "nano" or Path(name).is_file():
            held = read(NANO if name == "nano" else name)
        else:
            raise FileNotFoundError(f"{name}: no such file, and no preset either; presets are {' '.join(PRESETS)}")
        if "config" in held and "model" in held:
            try:
                config, state = GPTConfig(**held["config"]), held["model"]
            except TypeError as e:
                raise ValueError(f"{name}: its sizes are not GPTConfig's ({e})") from None
            if n_head not in (None, config.n_head):
                raise ValueError(f"{name} has {config.n_head} heads, not {n_head}")
        elif "adapter" in held:
            raise ValueError(f"{name} holds an adapter, not a model: load its base, then lora.load(model, path)")
        else:
            config, state = from_hf_layout(held, name, n_head)
        with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
            model = cls(config)
        want = {k: tuple(v.shape) for k, v in model.state_dict().items()}
        have = {k: tuple(v.shape) for k, v in state.items()}
        wrong = [f"missing {k}" for k in want.keys() - have.keys()]
        wrong += [f"unexpected {k}" for k in have.keys() - want.keys()]
        wrong += [f"{k} is {have[k]}, not {want[k]}" for k in want.keys() & have.keys() if have[k] != want[k]]
        if wrong:
            raise ValueError(f"{name} does not fit a GPT-2 of {asdict(config)}: {'; '.join(sorted(wrong))}")
        model.load_state_dict({k: v.float() for k, v in state.items()}, assign=True)
        return model


def read(path):
    """The dict in a torch file. Raises FileNotFoundError, or ValueError where the file is not such a one."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises many kinds here: unpickling, zip, end of file, key, ...
        raise ValueError(f"{path}: not a complete file of tensors ({type(e).__name__})") from None
    if not isinstance(held, dict):
        raise ValueError(f"{path}: holds a {type(held).__name__}, not a checkpoint")
    return held


def from_hf_layout(held, name, n_head=None):
    """(config, state dict) from the Hugging Face layout: c_attn split in three, its matrices transposed once."""
    held = {k.removeprefix("transformer."): v for k, v in held.items()
            if not re.search(r"\.attn\.(masked_)?bias$", k)}    # causal masks, stored as buffers by old versions
    lacking = [k for k in ("wte.weight", "wpe.weight", "h.0.attn.c_attn.weight") if k not in held]
    if lacking or not all(torch.is_tensor(v) for v in held.values()):
        raise ValueError(f"{name} is no GPT-2 state dict: it has no {lacking or 'plain tensors'}")
    if not torch.equal(held.pop("lm_head.weight", held["wte.weight"]), held["wte.weight"]):
        raise ValueError(f"{name}: lm_head.weight differs from wte.weight, but GPT-2's head is tied")
    (V, C), T = held["wte.weight"].shape, held["wpe.weight"].size(0)
    if n_head is None and C % 64:
        raise ValueError(f"{name}: width {C} is no multiple of 64; say how many heads (n_head)")
    layers = {int(n) for n in (k.split(".")[1] for k in held if k.startswith("h.")) if n.isdigit()}
    config = GPTConfig(V, T, max(layers) + 1, n_head or C // 64, C)
    state = {}
    for key, value in held.items():
        if ".c_" in key and key.endswith("weight"):
            value = value.t()                                                  # (d_in, d_out) -> (d_out, d_in)
        if ".attn.c_attn." in key:
            for new, part in zip("qkv", value.chunk(3), strict=True):          # (3 C, C) -> three (C, C)
                state[key.replace("c_attn", new)] = part.contiguous()
        else:
            for old, new in (("attn.c_proj", "attn.o"), ("mlp.c_fc", "mlp.up"), ("mlp.c_proj", "mlp.down")):
                key = key.replace(old, new)
            state[key] = value.contiguous()
    return config, state
