"""Scores of answers against what would be right, by the definitions of the benchmarks that use them.

Each takes an answer and the right ones (several captions, several annotators), and gives a number for that sample; the score is the mean.
Those with a parameter `marks` (boxes.py) also get the objects of sample and answer; their mean is over the samples that have some.
BLEU, chrF and CIDEr are defined on the whole set and computed there.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

from vlm_dist.errors import ConfigError
from vlm_dist.scoring.boxes import Marks, box_accuracy, iou, pointing

Metric = Callable[..., float]
"""(answer, right answers) -> number, or (answer, right answers, marks: Marks) -> number."""

LOWER_IS_BETTER = ("cer", "wer")
TOLERANCE = 0.05  # of ChartQA's relaxed accuracy
ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = re.compile(r"[^\w\s]|_")


def exact_match(answer: str, truths: Sequence[str]) -> float:
    """1 if equal to one but for case, outer and repeated white space, and a full stop at the end."""
    return float(any(_normal(answer) == _normal(truth) for truth in truths))


def token_f1(answer: str, truths: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of words, without punctuation and articles (SQuAD, Rajpurkar et al. 2016,
    arXiv:1606.05250); the best over the right answers."""

    def one(truth: str) -> float:
        ours, theirs = _words(answer), _words(truth)
        common = sum((Counter(ours) & Counter(theirs)).values())
        if not ours or not theirs:
            return float(ours == theirs)
        return 2 * common / (len(ours) + len(theirs))

    return max(map(one, truths))


def anls(answer: str, truths: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity, 0 below a half (ST-VQA, Biten et al. 2019, arXiv:1905.13648)."""
    from rapidfuzz.distance import Levenshtein

    best = max(Levenshtein.normalized_similarity(_normal(answer), _normal(truth)) for truth in truths)
    return best if best >= 0.5 else 0.0


def vqa_accuracy(answer: str, truths: Sequence[str]) -> float:
    """min(1, annotators who said so / 3), averaged over leaving one annotator out (VQA, Antol et al. 2015, arXiv:1505.00468); with fewer
    than three right answers: whether it is one of them."""
    hits = [_words(answer) == _words(truth) for truth in truths]
    if len(hits) < 3:
        return float(any(hits))
    return sum(min(1.0, (sum(hits) - hit) / 3) for hit in hits) / len(hits)


def relaxed_accuracy(answer: str, truths: Sequence[str]) -> float:
    """1 if within 5 % of a right number, or equal to a right text (ChartQA, Masry et al. 2022, arXiv:2203.10244)."""

    def one(truth: str) -> bool:
        ours, theirs = _number(answer), _number(truth)
        if ours is None or theirs is None:
            return _normal(answer) == _normal(truth)
        return abs(ours - theirs) <= TOLERANCE * abs(theirs)

    return float(any(map(one, truths)))


def cer(answer: str, truths: Sequence[str]) -> float:
    """Character error rate, by jiwer; the least over the right answers. May exceed 1."""
    import jiwer

    return min(float(jiwer.cer(truth, answer)) if truth else float(bool(answer)) for truth in truths)


def wer(answer: str, truths: Sequence[str]) -> float:
    """Word error rate, by jiwer; the least over the right answers. May exceed 1."""
    import jiwer

    return min(float(jiwer.wer(truth, answer)) if truth.split() else float(bool(answer)) for truth in truths)


PER_SAMPLE: dict[str, Metric] = {
    "exact_match": exact_match, "token_f1": token_f1, "anls": anls, "vqa_accuracy": vqa_accuracy, "relaxed_accuracy": relaxed_accuracy,
    "cer": cer, "wer": wer, "iou": iou, "box_accuracy@0.5": box_accuracy, "box_accuracy@0.75": partial(box_accuracy, least=0.75),
    "pointing": pointing,
}  # fmt: skip
WHOLE_SET = ("bleu", "chrf", "cider")


def find_metric(name: str) -> Metric | None:
    """The function of a name, or of `module:function`; None for those of the whole set.

    Raises:
        ConfigError: there is no such metric or function.
    """
    if name in PER_SAMPLE:
        return PER_SAMPLE[name]
    if name in WHOLE_SET:
        if name == "cider" and importlib.util.find_spec("pycocoevalcap") is None:
            raise ConfigError("evaluation.metrics: cider needs pycocoevalcap; pip install 'vlm_dist[cider]'")
        return None
    module, _, function = name.partition(":")
    if not function:
        known = ", ".join((*PER_SAMPLE, *WHOLE_SET))
        raise ConfigError(f"evaluation.metrics: no metric '{name}'; there are {known}, or module:function of your own")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # where a user's own file lies: the command itself lies elsewhere
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"evaluation.metrics: '{name}': {error}; expected a function (answer, right answers) -> number") from None
    return found  # pyright: ignore[reportReturnType]  (the user's own)


def is_about_objects(metric: Metric) -> bool:
    """Whether it has a parameter `marks`."""
    return "marks" in inspect.signature(metric).parameters


def value_of(metric: Metric, answer: str, truths: Sequence[str], marks: Marks) -> float | None:
    """What a metric says of an answer; None: it is about objects, and the answer was to mark none."""
    if not is_about_objects(metric):
        return float(metric(answer, truths))
    return float(metric(answer, truths, marks=marks)) if marks.truth else None


def of_whole_set(name: str, answers: Sequence[str], truths: Sequence[Sequence[str]]) -> float:
    """BLEU (Papineni et al. 2002) or chrF (Popović 2015) by sacrebleu, as a share of 1; CIDEr-D (Vedantam et al. 2015, arXiv:1411.5726) by
    its authors' pycocoevalcap, from 0 to 10, on lower-case words without punctuation."""
    if name == "cider":
        return _cider(answers, truths)
    import sacrebleu

    most = max(map(len, truths), default=1)
    references = [[right[number] if number < len(right) else None for right in truths] for number in range(most)]
    metric = sacrebleu.BLEU() if name == "bleu" else sacrebleu.CHRF()
    return metric.corpus_score(list(answers), references).score / 100  # pyright: ignore[reportArgumentType]  (None: no further reference)


def _cider(answers: Sequence[str], truths: Sequence[Sequence[str]]) -> float:
    from pycocoevalcap.cider.cider import Cider

    def words(text: str) -> str:
        return " ".join(PUNCTUATION.sub(" ", text.casefold()).split())

    said = {number: [words(answer)] for number, answer in enumerate(answers)}
    right = {number: [words(truth) for truth in each] for number, each in enumerate(truths)}
    return float(Cider().compute_score(right, said)[0])


def _normal(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".").rstrip()


def _words(text: str) -> list[str]:
    return ARTICLES.sub(" ", PUNCTUATION.sub(" ", text.casefold())).split()


def _number(text: str) -> float | None:
    text = text.strip().rstrip(".").replace(",", "").lstrip("$€£")
    share = text.endswith("%")
    try:
        return float(text.rstrip("%").strip()) / (100 if share else 1)
    except ValueError:
        return None
