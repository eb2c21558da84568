"""
Scores of generated texts, each compared with several references, as in E2E's official script.

sacrebleu computes BLEU, and its tokenizer splits the words for NIST. METEOR, ROUGE-L and CIDEr are
computed by pycocoevalcap, which calls Java; without it they are left out.
"""
import math
import shutil
from collections import Counter
from importlib.util import find_spec


def report_missing_packages(greedy):
    """Print which scores will be left out. Raise ValueError if BLEU or beam search cannot be
    computed."""
    if not can_use_coco():
        print("METEOR, ROUGE-L and CIDEr are left out: they need pycocoevalcap (pip) and Java")
    if not find_spec("sacrebleu"):
        raise ValueError("BLEU and NIST need sacrebleu: pip install sacrebleu")
    if not (greedy or find_spec("transformers")):
        raise ValueError("beam search needs transformers: pip install transformers, or pass "
                         "--greedy")


def can_use_coco():
    return bool(find_spec("pycocoevalcap") and shutil.which("java"))


def text_scores(prompts, texts, references):
    """{score: value} of the texts, each of which has a prompt and a list of references."""
    scores = bleu_and_nist(texts, references)
    scores["slots"] = slots_mentioned(prompts, texts)
    if can_use_coco():
        scores |= coco_scores(texts, references)
    return scores


def bleu_and_nist(texts, references):
    import sacrebleu
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
    columns = []                                            # all first references, all second, ...
    for i in range(max(map(len, references))):
        columns.append([own[i] if i < len(own) else None for own in references])
    metric = sacrebleu.BLEU(lowercase=True, force=True)     # force: E2E's texts are tokenized
    bleu = metric.corpus_score(texts, columns).score
    tokenize = Tokenizer13a()

    def words(text):
        return tokenize(text.lower()).split()

    reference_words = []
    for own in references:
        reference_words.append(list(map(words, own)))
    score = nist(list(map(words, texts)), reference_words)
    return {"bleu": bleu, "nist": score, "signature": str(metric.get_signature())}


def nist(texts, references, longest=5):
    """
    NIST (Doddington 2002) of lists of words. A text's n-gram is credited as often as it occurs in
    the reference that contains it most often. Its weight is log₂ of how often its first n - 1
    words occur in all references, divided by how often the whole n-gram does. nltk's NIST differs:
    it compares each text with one of its references, so that its values are lower.
    """
    counts = Counter()                                      # n-grams of all references
    mean_length = 0
    for own in references:
        n_words = sum(map(len, own))
        counts[()] += n_words
        mean_length += n_words / len(own)
        for reference in own:
            for n in range(1, longest + 1):
                counts.update(ngrams(reference, n))
    score = 0
    for n in range(1, longest + 1):
        information = 0
        total = 0
        for text, own in zip(texts, references):
            allowed = Counter()
            for reference in own:
                allowed |= Counter(ngrams(reference, n))
            found = Counter(ngrams(text, n))
            total += found.total()
            for ngram, count in (found & allowed).items():
                information += count * math.log2(counts[ngram[:-1]] / counts[ngram])
        score += information / max(1, total)
    # short texts: the penalty is 1/2 if they have two thirds of the references' mean length
    length = max(1, sum(map(len, texts)))
    shortness = math.log(min(1, length / max(1, mean_length))) / math.log(1.5)
    return score * 0.5 ** shortness ** 2


def ngrams(words, n):
    return zip(*[words[i:] for i in range(n)])


def slots_mentioned(prompts, texts):
    """Share of the values in prompts like "name : Aromi | food : Chinese" that the texts contain
    word for word. The values yes and no are not counted."""
    hits = []
    for prompt, text in zip(prompts, texts):
        for slot in prompt.split(" | "):
            value = slot.partition(" : ")[2].strip().lower()
            if value not in ("", "yes", "no"):
                hits.append(value in text.lower())
    return sum(hits) / max(1, len(hits))


def coco_scores(texts, references):
    """METEOR and ROUGE-L in percent, and CIDEr."""
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    written = {}
    wanted = {}
    for i, (text, own) in enumerate(zip(texts, references)):
        written[i] = [{"caption": text}]
        wanted[i] = [{"caption": reference} for reference in own]
    tokenizer = PTBTokenizer()
    written = tokenizer.tokenize(written)
    wanted = tokenizer.tokenize(wanted)
    meteor, _ = Meteor().compute_score(wanted, written)
    rouge_l, _ = Rouge().compute_score(wanted, written)
    cider, _ = Cider().compute_score(wanted, written)
    return {"meteor": 100 * meteor, "rouge_l": 100 * float(rouge_l), "cider": float(cider)}
