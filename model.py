"""
GPT-2 and nothing else: sizes, forward pass, cached generation, released weights in and out.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners". The released code keeps
query, key and value in one matrix and stores every matrix transposed. Here `attn.q`, `attn.k`,
`attn.v`, `attn.o`, `mlp.up` and `mlp.down` are six plain `nn.Linear` with weights (d_out, d_in), so
that ΔW_q, ΔW_v, ... are separate matrices, as the papers on low-rank adaptation need.

Letters in the shape comments: B rows, T tokens, C width, V vocabulary, S cached tokens, nh heads,
hs = C / nh.
"""
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    vocab_size: int = 50257
    block_size: int = 1024          # the longest row in tokens
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768


PRESETS = {
    "nano": GPTConfig(257, 512, n_layer=4, n_head=4, n_embd=128),    # 0.9 M, bundled
    "tiny": GPTConfig(n_layer=2, n_head=1, n_embd=64),               # 3 M, for rehearsals
    "gpt2": GPTConfig(),                                             # 124 M
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),    # 355 M
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),     # 774 M
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),        # 1.6 B
}
NANO = Path(__file__).parent / "pretrained" / "nano.pt"
RELEASED = "https://huggingface.co/openai-community/{}/resolve/main/pytorch_model.bin"


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.q, self.k = nn.Linear(C, C), nn.Linear(C, C)
        self.v, self.o = nn.Linear(C, C), nn.Linear(C, C)

    def forward(self, x, cache=None, start=0, mask=None):
        B, T, C = x.shape
        q = self.q(x).view(B, T, self.n_head, -1)                       # (B, T, nh, hs)
        k = self.k(x).view(B, T, self.n_head, -1)
        v = self.v(x).view(B, T, self.n_head, -1)
        if cache is not None:                                           # (2, B, S, nh, hs)
            cache[0, :, start:start + T] = k
            cache[1, :, start:start + T] = v
            k, v = cache[:, :, :start + T].to(q.dtype)                  # with all earlier tokens
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        causal = mask is None and T > 1             # a single token sees all earlier ones
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
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

    def forward(self, x, cache=None, start=0, mask=None):
        x = x + self.attn(self.ln_1(x), cache, start, mask)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        """Random weights, distributed as in GPT-2's initialisation."""
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)       # also the output head
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif name.endswith(("attn.o.weight", "mlp.down.weight")):   # residual branches
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
            elif "ln_" not in name:
                nn.init.normal_(p, std=0.02)

    def hidden_states(self, idx, cache=None, start=0, pad=None):
        """
        The final hidden states (B, T, C) of the tokens idx (B, T) at positions `start` to
        `start` + T - 1. The first pad (B,) positions of each row are padding.
        """
        T = idx.size(1)
        limit = self.config.block_size
        if start + T > limit:
            raise ValueError(f"a row of {start + T} tokens exceeds the block size, {limit}")
        position = torch.arange(start, start + T, device=idx.device)                    # (T,)
        mask = None
        if pad is not None:
            query = position[:, None]
            key = torch.arange(start + T, device=idx.device)
            mask = (key <= query) & (key >= pad[:, None, None])                     # (B, T, S)
            mask = (mask | (key == query))[:, None]     # padding sees itself: no empty softmax
            position = (position - pad[:, None]).clamp(min=0)                           # (B, T)
        x = self.wte(idx) + self.wpe(position)
        for i, block in enumerate(self.h):
            x = block(x, None if cache is None else cache[i], start, mask)
        return self.ln_f(x)

    def forward(self, idx, targets=None, label_smoothing=0.0):
        """
        idx (B, T) are token ids; targets (B, T) are the ids that should follow them, with -100 for
        positions that the loss ignores. Returns the logits (B, T, V) and the mean cross-entropy in
        nats, which is None without targets.
        """
        logits = F.linear(self.hidden_states(idx), self.wte.weight)                     # (B, T, V)
        if targets is None:
            return logits, None
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))      # never in bfloat16
        loss = F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=-100,
                               label_smoothing=label_smoothing)
        return logits, loss

    @torch.inference_mode()
    def generate(self, prompts, max_new_tokens, stop=None):
        """
        Greedy decoding with a key/value cache. prompts are B lists of ids, which may differ in
        length. Returns B lists of new ids, each cut before its first `stop`. Raises ValueError for
        an empty prompt, and if the new tokens do not fit the model's block.
        """
        config = self.config
        device = self.wte.weight.device
        longest = max(map(len, prompts), default=0)
        room = max(0, config.block_size + 1 - longest)      # the last new token is never read
        if not prompts or not all(prompts):
            raise ValueError("every prompt must have at least one token")
        if not 1 <= max_new_tokens <= room:
            raise ValueError(f"a prompt of {longest} tokens leaves room for {room} new tokens, not "
                             f"for {max_new_tokens}")
        # shorter prompts are padded on the left, so that all rows end at the same position
        idx = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
        pad = torch.tensor([longest - len(p) for p in prompts], device=device)
        pad = pad if pad.any() else None
        S = longest + max_new_tokens - 1
        cache = self.wte.weight.new_zeros(config.n_layer, 2, len(idx), S, config.n_head,
                                          config.n_embd // config.n_head)
        ended = torch.zeros(len(idx), dtype=torch.bool, device=device)
        new = []
        was_training = self.training
        self.eval()
        x = self.hidden_states(idx, cache, 0, pad)[:, -1]                               # (B, C)
        for t in range(longest, S + 1):
            token = F.linear(x, self.wte.weight).argmax(-1)                             # (B,)
            new.append(token)
            ended |= token == stop
            if t == S or ended.all():
                break
            x = self.hidden_states(token[:, None], cache, t, pad)[:, 0]
        self.train(was_training)
        rows = torch.stack(new, 1).tolist()
        return [row[:row.index(stop)] if stop in row else row for row in rows]

    @classmethod
    def from_pretrained(cls, name, n_head=None):
        """
        A pretrained model in float32. `name` is nano, a released size such as gpt2-medium (which is
        downloaded once), or a file: a checkpoint of train.py --method full, or a state dict in the
        Hugging Face layout, whose heads have size 64 unless `n_head` is given. Raises OSError if
        there is nothing to read, ValueError if the weights are not a complete GPT-2.
        """
        name = str(name)
        if name in PRESETS and name.startswith("gpt2"):
            saved = download(name)
        elif name == "nano" or Path(name).is_file():
            saved = read(NANO if name == "nano" else name)
        else:
            raise FileNotFoundError(f"{name} is neither a file nor one of nano, gpt2, gpt2-medium, "
                                    "gpt2-large and gpt2-xl")
        if "adapter" in saved or "tensors" in saved:
            raise ValueError(f"{name} contains an adapter, not a model: pass its base model")
        try:
            if "config" in saved:
                config, state = GPTConfig(**saved["config"]), saved["model"]
            else:
                config, state = from_hf_layout(saved, n_head)
            with torch.device("meta"):      # no memory and no random numbers: all is replaced
                model = cls(config)
            model.load_state_dict({k: t.float() for k, t in state.items()}, assign=True)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as e:
            raise ValueError(f"{name} cannot be read as a complete GPT-2 ({type(e).__name__}: {e})"
                             ) from None
        return model

    @torch.no_grad()
    def hf_state_dict(self):
        """The weights in the Hugging Face layout. Raises ValueError if a layer was replaced."""
        out = {}
        for name, p in self.named_parameters():
            if "ln_" in name or name in ("wte.weight", "wpe.weight"):
                out[name] = p.clone()
        for i, block in enumerate(self.h):
            for theirs, ours in HF_NAMES.items():
                linears = [block.get_submodule(name) for name in ours]
                if not all(type(m) is nn.Linear for m in linears):
                    raise ValueError(f"h.{i} {' '.join(ours)} must be plain nn.Linear layers")
                W = torch.cat([m.weight for m in linears])      # one or three, each (d_out, d_in)
                out[f"h.{i}.{theirs}.weight"] = W.T.contiguous()
                out[f"h.{i}.{theirs}.bias"] = torch.cat([m.bias for m in linears])
        return out


# the matrices of the released files, each (d_in, d_out), and their names here
HF_NAMES = {"attn.c_attn": ("attn.q", "attn.k", "attn.v"), "attn.c_proj": ("attn.o",),
            "mlp.c_fc": ("mlp.up",), "mlp.c_proj": ("mlp.down",)}


def from_hf_layout(saved, n_head):
    """(config, state dict) of a state dict in the Hugging Face layout. Raises KeyError or
    ValueError."""
    masks = (".attn.bias", ".attn.masked_bias")             # buffers that old versions stored
    state = {k.removeprefix("transformer."): v for k, v in saved.items() if not k.endswith(masks)}
    wte = state["wte.weight"]
    V, C = wte.shape
    T = len(state["wpe.weight"])
    if not torch.equal(state.pop("lm_head.weight", wte), wte):
        raise ValueError("lm_head.weight differs from wte.weight, but GPT-2's head is tied")
    size = C / n_head if n_head else 64
    if C % size or size % 1 or (not n_head and C < 768):
        raise ValueError(f"the number of heads is unknown for width {C}: pass a divisor of it as "
                         "GPT.from_pretrained's n_head")
    n_layer = len([k for k in state if k.endswith("attn.c_attn.weight")])
    for i in range(n_layer):
        for theirs, ours in HF_NAMES.items():
            W = state.pop(f"h.{i}.{theirs}.weight").T           # (d_in, d_out) -> (d_out, d_in)
            b = state.pop(f"h.{i}.{theirs}.bias")
            for name, W_part, b_part in zip(ours, W.chunk(len(ours)), b.chunk(len(ours))):
                state[f"h.{i}.{name}.weight"] = W_part.contiguous()
                state[f"h.{i}.{name}.bias"] = b_part.contiguous()
    return GPTConfig(V, T, n_layer, int(C / size), C), state


def download(name):
    """A released state dict, from torch's cache or the network. Raises ConnectionError."""
    url, file = RELEASED.format(name), f"{name}.bin"
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", file_name=file,
                                                  weights_only=True)
    except Exception as e:      # no network, or a damaged file, in many kinds
        raise ConnectionError(f"{name} could not be downloaded ({e}). Save {url} as {file} in "
                              f"{torch.hub.get_dir()}/checkpoints, or delete it there if damaged")


def read(path):
    """The dict in a file that torch.save wrote. Raises OSError, or ValueError if it is invalid."""
    with open(path, "rb") as f:
        try:
            return dict(torch.load(f, map_location="cpu", weights_only=True))
        except Exception as e:      # torch raises many kinds: zip, unpickling, end of file
            why = type(e).__name__
            raise ValueError(f"{path} is not a complete file of torch.save ({why})") from None
