"""Beam search compared with that of transformers, and with greedy decoding."""
import random

import pytest
import torch

import lora
from beam import beam_search
from conftest import random_gpt, randomise
from model import GPT

V = 101


def pair(seed, tmp_path):
    """The same random GPT-2 of transformers and of model.py, in float64."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.set_verbosity_error()
    config = transformers.GPT2Config(vocab_size=V, n_positions=64, n_layer=2, n_head=2, n_embd=32)
    theirs = transformers.GPT2LMHeadModel(config).double().eval()
    torch.manual_seed(seed)
    for p in theirs.parameters():
        p.data = (torch.randn(p.shape) * 0.3).double()
    torch.save(theirs.state_dict(), tmp_path / "hf.bin")
    return theirs, GPT.from_pretrained(tmp_path / "hf.bin", n_head=2).double()


def by_transformers(model, prompts, n, stop, n_beams, **options):
    longest = max(map(len, prompts))
    pad = stop or 0
    padded = []
    mask = []
    for prompt in prompts:
        n_pad = longest - len(prompt)
        padded.append([pad] * n_pad + prompt)
        mask.append([0] * n_pad + [1] * len(prompt))
    rows = model.generate(torch.tensor(padded), attention_mask=torch.tensor(mask),
                          max_new_tokens=n, num_beams=n_beams, do_sample=False,
                          eos_token_id=stop, pad_token_id=pad, **options)
    texts = []
    for row in rows[:, longest:].tolist():
        texts.append(row[:row.index(stop)] if stop in row else row)
    return texts


@pytest.mark.parametrize("n_beams", [10, 2])
def test_beam_search_equals_transformers(tmp_path, n_beams):
    """Prompts of different lengths end with `stop`, as E2E's do. Early ends, and none."""
    lengths = []
    for seed in range(16):
        theirs, ours = pair(seed, tmp_path)
        rng = random.Random(seed)
        length_penalty = rng.choice([0.0, 0.8, 0.9, 1.0, 2.0])
        likely = ours.generate([[1, 2]], 6)[0][-1]
        unlikely = ours(torch.tensor([[1, 2]]))[0][0, -1].argmin().item()
        for stop in (likely, unlikely):
            others = [i for i in range(V) if i != stop]
            prompts = []
            for _ in range(4):
                length = rng.randint(1, 9)
                prompt = rng.choices(others, k=length)
                prompts.append([*prompt, stop])
            want = by_transformers(theirs, prompts, 20, stop, n_beams, no_repeat_ngram_size=4,
                                   length_penalty=length_penalty)
            got = beam_search(ours, prompts, 20, stop, n_beams, length_penalty)
            assert got == want, (seed, stop)
            lengths += map(len, want)
    early = sum(length < 20 for length in lengths)
    assert len(lengths) == 128 and 40 < early < 100


def test_beam_search_without_a_last_token_and_with_repetitive_prompts(tmp_path):
    """A text may repeat an n-gram of its prompt, but none of its own."""
    transformers = pytest.importorskip("transformers")

    class NewTokensOnly(transformers.NoRepeatNGramLogitsProcessor):
        def __call__(self, input_ids, scores):
            return super().__call__(input_ids[:, 12:], scores)

    repeated = 0
    for seed in range(8):
        theirs, ours = pair(seed, tmp_path)
        likely = ours.generate([[seed]], 12)[0]
        prompts = [likely, likely[:7], [seed] * 3]
        processors = transformers.LogitsProcessorList([NewTokensOnly(4)])
        want = by_transformers(theirs, prompts, 20, None, 10, length_penalty=0.9,
                               logits_processor=processors)
        assert beam_search(ours, prompts, 20, None) == want
        for prompt, text in zip(prompts, want):
            ngrams = [tuple(text[i:i + 4]) for i in range(17)]
            assert len(set(ngrams)) == 17
            repeated += any(tuple(prompt[i:i + 4]) in ngrams for i in range(len(prompt) - 3))
    assert repeated


def test_one_beam_is_greedy_and_ten_are_better():
    model = random_gpt()
    randomise(lora.inject(model, "q v", rank=4, dropout=0.5)).train()
    prompts = [[1, 2, 3], [4]]
    greedy = model.generate(prompts, 12)
    assert beam_search(model, prompts, 12, None, n_beams=1, ngram=99) == greedy
    searched = beam_search(model, prompts, 12, None, ngram=99)
    assert model.training
    for prompt, text, other in zip(prompts, searched, greedy):
        assert log_p(model.eval(), prompt, text) > log_p(model, prompt, other)
    with pytest.raises(ValueError, match="exceed the block of 64"):
        beam_search(model, prompts, 63, None)
    for no_work in (([], 5), ([[1]], 0)):
        with pytest.raises(ValueError, match="at least one prompt and one new token"):
            beam_search(model, *no_work, None)


def test_a_failed_search_leaves_the_model_in_training_mode():
    model = random_gpt().train()
    with pytest.raises(ValueError):
        beam_search(model, [[1]], 1000, None)
    assert model.training


def test_the_search_ends_when_no_running_text_can_improve():
    model = random_gpt()
    stop = model.generate([[1, 2]], 1)[0][0]
    reads = []
    model.ln_f.register_forward_hook(lambda *_: reads.append(1))
    assert beam_search(model, [[1, 2]], 60, stop, n_beams=2) == [[]]
    assert len(reads) < 60


def log_p(model, prompt, text):
    logits, _ = model(torch.tensor([prompt + text]))
    steps = logits[0, len(prompt) - 1:-1].log_softmax(-1)
    return steps[range(len(text)), text].sum()
