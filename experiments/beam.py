"""
Beam search for several prompts at once, with the key-value cache of model.GPT.

The search extends the n likeliest unfinished texts of every prompt by one token at a time. A text
of t tokens (its end-of-text token is one of them) has the score log p / t^length_penalty. Scores
and the end of the search are those of transformers' `generate` with early_stopping=False.

One thing differs from transformers: no text contains the same n-gram twice, but it may repeat
n-grams of its prompt, as in the decoding script of the LoRA authors. Otherwise a text could not
mention a name of four tokens that its prompt contains.

Letters in the shape comments: B prompts, n beams, N = B n rows of the model, V vocabulary.
"""
import math

import torch
import torch.nn.functional as F


@torch.inference_mode()
def beam_search(model, prompts, max_new_tokens, stop, n_beams=10, length_penalty=0.9, ngram=4):
    """
    Return the best continuation of each of B prompts (lists of token ids): B lists of new ids
    without `stop`. With stop=None every continuation has `max_new_tokens` tokens. Raise ValueError
    without a prompt or a new token, and if the longest prompt and the new tokens exceed the
    model's block.
    """
    if not prompts or max_new_tokens < 1:
        raise ValueError("beam_search needs at least one prompt and one new token")
    was_training = model.training
    model.eval()
    try:
        return search(model, prompts, max_new_tokens, stop, n_beams, length_penalty, ngram)
    finally:
        model.train(was_training)


def search(model, prompts, max_new_tokens, stop, n_beams, length_penalty, ngram):
    B = len(prompts)
    reader = Reader(model, prompts, n_beams, max_new_tokens)
    finished = Finished(B, n_beams, length_penalty, reader.device)
    texts = torch.zeros(B, n_beams, 0, dtype=torch.long, device=reader.device)
    # all beams are equal before the first token, so the first step extends one of them
    log_p = torch.full((B, n_beams), -math.inf, device=reader.device)                   # of texts
    log_p[:, 0] = 0
    logits = reader.read_prompts()                                                      # (N, V)
    for t in range(1, max_new_tokens + 1):
        step = logits.float().log_softmax(-1)
        forbid_repetition(step, texts.flatten(0, 1), ngram)
        extended = log_p[:, :, None] + step.view(B, n_beams, -1)                        # (B, n, V)
        # of twice as many candidates as beams, at least n do not end with this token
        candidates, index = extended.flatten(1).topk(2 * n_beams)                       # (B, 2n)
        beam = index // step.size(-1)
        token = index % step.size(-1)
        longer = torch.cat([select(texts, beam), token[:, :, None]], 2)                 # (B, 2n, t)
        ended = torch.full_like(token, t == max_new_tokens, dtype=torch.bool)
        if stop is not None:
            ended |= token == stop
        finished.add(longer, candidates, ended)
        log_p, kept = candidates.masked_fill(ended, -math.inf).topk(n_beams)            # (B, n)
        if t == max_new_tokens or not finished.can_improve(log_p, t):
            break
        texts = select(longer, kept)
        logits = reader.read_tokens(beam.gather(1, kept), token.gather(1, kept))
    return [text[:-1] if text[-1] == stop else text for text in finished.best]


def select(texts, index):
    """texts (B, n, t) and index (B, m) of texts of the same prompt -> (B, m, t)"""
    length = texts.size(2)
    index = index.unsqueeze(2).expand(-1, -1, length)
    return texts.gather(1, index)


def forbid_repetition(log_p, texts, ngram):
    """Set log_p (N, V) to -inf for every token that would repeat an n-gram of its text (N, t)."""
    t = texts.size(1)
    if t < ngram:
        return
    windows = texts.unfold(1, ngram, 1)                         # (N, t - ngram + 1, ngram)
    ending = texts[:, None, t - ngram + 1:]                     # (N, 1, ngram - 1)
    begins_alike = (windows[:, :, :-1] == ending).all(-1)
    row, position = begins_alike.nonzero(as_tuple=True)
    token = windows[row, position, -1]
    log_p[row, token] = -math.inf


class Finished:
    """For each prompt the scores of its n best finished texts, and the best text itself."""

    def __init__(self, B, n_beams, length_penalty, device):
        self.length_penalty = length_penalty
        self.scores = torch.full((B, n_beams), -math.inf, device=device)    # the best one first
        self.searching = torch.ones(B, dtype=torch.bool, device=device)
        self.best = [None] * B

    def add(self, texts, log_p, ended):
        """Of the n most probable texts (B, 2n, t), add those that have ended. Prompts whose search
        has ended take no more texts."""
        n_beams = self.scores.size(1)
        t = texts.size(2)
        scores = log_p / t ** self.length_penalty
        counted = ended & self.searching[:, None]
        scores = scores.masked_fill(~counted, -math.inf)[:, :n_beams]       # (B, n)
        highest, index = scores.max(1)
        improved = highest > self.scores[:, 0]
        for b in improved.nonzero().flatten().tolist():
            self.best[b] = texts[b, index[b]].tolist()
        both = torch.cat([self.scores, scores], 1)
        self.scores, _ = both.topk(n_beams)

    def can_improve(self, log_p, t):
        """Whether, for some prompt, the best of the running texts (log_p is sorted) is better than
        the worst of the n finished ones."""
        best = log_p[:, 0] / t ** self.length_penalty
        self.searching &= best > self.scores[:, -1]
        return self.searching.any().item()


class Reader:
    """A GPT that reads n texts for each of B prompts; one cache holds all of them."""

    def __init__(self, model, prompts, n_beams, max_new_tokens):
        config = model.config
        self.model = model
        self.n_beams = n_beams
        self.device = model.wte.weight.device
        self.prompt_len = max(map(len, prompts))
        self.length = self.prompt_len               # tokens in the cache
        # shorter prompts are padded in front, so that all rows write at the same position
        padding = [self.prompt_len - len(prompt) for prompt in prompts]
        padded = []
        for n, prompt in zip(padding, prompts):
            padded.append([0] * n + prompt)
        self.idx = torch.tensor(padded, device=self.device)                 # (B, prompt_len)
        self.pad = torch.tensor(padding, device=self.device)                # (B,)
        S = self.prompt_len + max_new_tokens - 1    # the last token is never read
        if S > config.block_size:
            raise ValueError(f"a prompt of {self.prompt_len} tokens and {max_new_tokens} new ones "
                             f"exceed the block of {config.block_size}")
        head_size = config.n_embd // config.n_head
        size = (config.n_layer, 2, len(prompts), S, config.n_head, head_size)
        self.cache = model.wte.weight.new_zeros(size)

    def read_prompts(self):
        """Read every prompt once, and copy its cache for its n texts. Return logits (N, V)."""
        logits = self.read(self.idx)
        self.cache = self.cache.repeat_interleave(self.n_beams, 2)
        self.pad = self.pad.repeat_interleave(self.n_beams)
        return logits.repeat_interleave(self.n_beams, 0)

    def read_tokens(self, beam, token):
        """Text i of prompt b becomes text beam[b, i] and token[b, i]. Return logits (N, V)."""
        first = torch.arange(0, beam.numel(), self.n_beams, device=self.device)
        source = (first[:, None] + beam).flatten()                          # (N,)
        new = slice(self.prompt_len, self.length)   # the n texts of a prompt share what precedes
        self.cache[:, :, :, new] = self.cache[:, :, source, new]
        self.length += 1
        return self.read(token.view(-1, 1))

    def read(self, idx):
        """The logits after the last column of idx, which ends at position self.length."""
        start = self.length - idx.size(1)
        x = self.model.hidden_states(idx, self.cache, start, self.pad)      # (rows, T, C)
        return F.linear(x[:, -1], self.model.wte.weight)
