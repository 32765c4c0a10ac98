"""Scores of samples and their bootstrap intervals: the maths behind `training/evaluation/metrics`.

A statistic is a function from weights, one per unit (such as an image), to a number. With weights of 1 it gives the
value of the metric; with the counts of a resample it gives one bootstrap draw (Efron, 1979).
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable

import numpy as np
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider_scorer import CiderScorer
from pycocoevalcap.rouge.rouge import Rouge

# Shapes: N samples, U units that are resampled, K classes

Statistic = Callable[[np.ndarray], np.ndarray]  # weights (..., U) of the units -> values (...)
PART = 2_000_000  # weights that are computed together

ARTICLES = {"a", "an", "the"}
NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
           "seven": "7", "eight": "8", "nine": "9", "ten": "10"}  # fmt: skip


def estimate(statistics: dict[str, Statistic], units: int, resamples: int = 0, seed: int = 0) -> dict:
    """Compute each statistic and its 95 % bootstrap interval.

    Args:
        statistics: the statistics by name.
        units: number of units.
        resamples: number of bootstrap resamples, usually 1,000; 0: no intervals.
        seed: seed of the bootstrap.

    Returns:
        The value of each statistic under its name and, if there are resamples, [low, high] under NAME_interval.
    """
    ones, rng = np.ones(units), np.random.default_rng(seed)
    result: dict = {name: float(statistic(ones)) for name, statistic in statistics.items()}
    if not resamples:
        return result
    draws: dict[str, list[np.ndarray]] = {name: [] for name in statistics}
    together = max(1, PART // units)
    for first in range(0, resamples, together):
        count = min(together, resamples - first)
        weights = [np.bincount(rng.integers(0, units, units), minlength=units) for _ in range(count)]
        for name, statistic in statistics.items():
            draws[name].append(statistic(np.array(weights, float)))
    for name, values in draws.items():
        bounds = np.nanpercentile(np.concatenate(values), [2.5, 97.5])
        result[f"{name}_interval"] = [float(bound) for bound in bounds]
    return result


def mean(scores, groups=None) -> Statistic:
    """The mean of scores (N,).

    Args:
        scores: (N,).
        groups: (N,) the unit of each sample, if several samples, such as an image's captions, are resampled together;
            None: each sample is a unit.

    Returns:
        A statistic.
    """
    scores = np.asarray(scores, float)
    groups = np.arange(len(scores)) if groups is None else np.asarray(groups)

    totals, counts = np.bincount(groups, scores), np.bincount(groups).astype(float)  # of each unit

    def statistic(weights: np.ndarray) -> np.ndarray:
        weights = weights[..., : len(counts)]
        with np.errstate(invalid="ignore"):  # a resample without any of these units has no mean
            return (weights @ totals) / (weights @ counts)

    return statistic


def mean_per_class(hits, labels) -> Statistic:
    """The mean over classes of the accuracy in each class. Classes without samples do not count.

    The weight of a sample is one over the size of its class in the full data, also in a resample. Leaving out the
    classes that a resample misses would make the intervals of small classes too narrow.

    Args:
        hits: (N,) 1 if the prediction is right, else 0.
        labels: (N,) class indices.

    Returns:
        A statistic.
    """
    hits, labels = np.asarray(hits, float), np.asarray(labels)
    shares = 1 / np.bincount(labels)[labels]

    def statistic(weights: np.ndarray) -> np.ndarray:
        return (weights @ (shares * hits)) / (weights @ shares)

    return statistic


def hits_at(ranked: list[list[int]], right: list[list[int]], k: int) -> list[float]:
    """Whether at least one right answer is among the first k.

    Args:
        ranked: the results of each query, best first.
        right: the right answers of each query.
        k: number of results that count.

    Returns:
        1 or 0 for each query.
    """
    return [float(bool(set(answers[:k]) & set(wanted))) for answers, wanted in zip(ranked, right, strict=True)]


def words(text: str) -> str:
    """Normalise a caption for scoring: lower case, without punctuation, words separated by single spaces.

    This replaces Stanford's Java tokenizer in coco-caption; the scores differ slightly.
    """
    text = unicodedata.normalize("NFC", text).lower()
    return " ".join(re.findall(r"\w+(?:['’.,-]\w+)*|[^\w\s.,;:!?\"'`()\[\]{}…-]", text))


def caption_statistics(captions: list[str], references: list[list[str]]) -> dict[str, Statistic]:
    """Statistics of generated captions: CIDEr, BLEU-1 to 4, ROUGE-L and exact matches.

    CIDEr is from 0 to 10; its document frequencies are computed from all references.

    Args:
        captions: the generated caption of each image.
        references: the human captions of each image.

    Returns:
        The statistics by name: cider, bleu_1 to bleu_4, rouge_l, caption_exact.
    """
    captions = [words(text) for text in captions]
    references = [[words(text) for text in texts] for texts in references]
    bleu, cider = BleuScorer(n=4), CiderScorer(n=4)
    for text, wanted in zip(captions, references, strict=True):
        bleu += (text, wanted)
        cider += (text, wanted)
    rouge = [Rouge().calc_score([text], wanted) for text, wanted in zip(captions, references, strict=True)]
    exact = [text in wanted for text, wanted in zip(captions, references, strict=True)]
    statistics = {"cider": mean(cider.compute_score()[1])}
    statistics |= {f"bleu_{order}": corpus_bleu(bleu, order) for order in (1, 2, 3, 4)}
    return statistics | {"rouge_l": mean(rouge), "caption_exact": mean(exact)}


def corpus_bleu(scorer: BleuScorer, order: int) -> Statistic:
    """The corpus BLEU (Papineni et al., 2002) with the closest reference length, as in pycocoevalcap.

    Args:
        scorer: a BleuScorer with all captions and references.
        order: largest n-gram, 1 to 4.

    Returns:
        A statistic.
    """
    tests = scorer.ctest
    guesses = np.array([test["guess"][:order] for test in tests], float)  # (N, order)
    correct = np.array([test["correct"][:order] for test in tests], float)
    lengths = np.array([test["testlen"] for test in tests], float)
    wanted = np.array([min((abs(r - test["testlen"]), r) for r in test["reflen"])[1] for test in tests], float)

    def statistic(weights: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore"):
            precision = np.log((weights @ correct + 1e-15) / (weights @ guesses + 1e-9)).mean(axis=-1)
        penalty = np.minimum(0.0, 1 - (weights @ wanted + 1e-9) / (weights @ lengths + 1e-15))
        return np.exp(precision + penalty)

    return statistic


def plain_answer(text: str) -> str:
    """Normalise an answer as VQA does: lower case, no punctuation, no articles, numbers as digits.

    Source: VQA, vqaEvaluation/vqaEval.py. Apostrophes are removed, whereas the original inserts missing ones ("dont"
    becomes "don't").
    """
    text = text.lower().replace("\n", " ").replace("\t", " ").strip().replace("'", "").replace("’", "")
    text = re.sub(r"(?<=\d),(?=\d)", "", text)
    text = re.sub(r"(?<!\d)\.|\.(?!\d)", "", text)
    text = re.sub(r"[;/\[\]\"{}()=+\\_\-><@`,?!]", " ", text)
    return " ".join(NUMBERS.get(word, word) for word in text.split() if word not in ARTICLES)


def preferences(true: list[float], false: list[float]) -> list[float]:
    """Whether each true caption scores higher than its false one: 1, or 0, or 0.5 if the scores are equal."""
    return [(1 + (one > other) - (one < other)) / 2 for one, other in zip(true, false, strict=True)]


def answer_scores(answers: list[str], given: list[list[str]]) -> list[float]:
    """The VQA accuracy of each answer, from 0 to 1, given the human answers to each question."""
    return [vqa_accuracy(plain_answer(answer), [plain_answer(text) for text in texts])
            for answer, texts in zip(answers, given, strict=True)]  # fmt: skip


def vqa_accuracy(answer: str, given: list[str]) -> float:
    """Compute VQA's accuracy: min(1, matching human answers / 3), averaged over leaving out each human answer in turn.

    Source: visualqa.org/evaluation.html. With fewer than three human answers, an answer is right if it is one of them.

    Args:
        answer: the normalised prediction.
        given: the normalised human answers.

    Returns:
        The accuracy, 0 to 1.
    """
    if len(given) < 3:
        return float(answer in given)
    counts = Counter(given)
    matches = [counts[answer] - (answer == left_out) for left_out in given]
    return sum(min(1.0, count / 3) for count in matches) / len(given)
