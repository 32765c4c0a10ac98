"""What each sample scores, and how sure a mean over samples is: the maths behind `training/metrics`.

A statistic takes weights, one for each unit (an image), and gives a number: with weights of 1 it is the value, with
the counts of a resampling it is one draw of the bootstrap (Efron, 1979).
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable

import numpy as np
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider_scorer import CiderScorer
from pycocoevalcap.rouge.rouge import Rouge

# Shapes: N samples, U units that are drawn anew, K classes

Statistic = Callable[[np.ndarray], float]

ARTICLES = {"a", "an", "the"}
NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
           "seven": "7", "eight": "8", "nine": "9", "ten": "10"}  # fmt: skip


def estimate(statistics: dict[str, Statistic], units: int, resamples: int = 0, seed: int = 0) -> dict:
    """The value of each statistic and, under NAME_interval, its 95 % bootstrap interval where `resamples` are drawn.

    Args:
        units: how many units there are to draw from. resamples: how often; 1,000 are usual.
    """
    whole, rng = np.ones(units), np.random.default_rng(seed)
    result: dict = {name: statistic(whole) for name, statistic in statistics.items()}
    if not resamples:
        return result
    draws: dict[str, list[float]] = {name: [] for name in statistics}
    for _ in range(resamples):
        weights = np.bincount(rng.integers(0, units, units), minlength=units).astype(float)
        for name, statistic in statistics.items():
            draws[name].append(statistic(weights))
    for name, values in draws.items():
        result[f"{name}_interval"] = [float(bound) for bound in np.nanpercentile(values, [2.5, 97.5])]
    return result


def mean(scores, groups=None) -> Statistic:
    """The mean of scores (N,).

    Args:
        groups: (N,) the unit of each sample, where several samples, such as an image's captions, are drawn together.
    """
    scores = np.asarray(scores, float)
    groups = np.arange(len(scores)) if groups is None else np.asarray(groups)

    def statistic(weights: np.ndarray) -> float:
        each = weights[groups]
        return float(each @ scores / each.sum()) if each.sum() else float("nan")

    return statistic


def mean_per_class(hits, labels) -> Statistic:
    """The mean over classes of the share of hits (N,) in each; classes that no sample is of do not count.

    A sample counts as one over the number of its class' samples, which a draw leaves as it is: were classes that a draw
    misses left out, those of few samples would seem surer than they are.
    """
    hits, labels = np.asarray(hits, float), np.asarray(labels)
    shares = 1 / np.bincount(labels)[labels]

    def statistic(weights: np.ndarray) -> float:
        each = weights * shares
        return float(each @ hits / each.sum())

    return statistic


def hits_at(ranked: list[list[int]], right: list[list[int]], k: int) -> list[float]:
    """1 where one of the right answers is among the first k, else 0."""
    return [float(bool(set(answers[:k]) & set(wanted))) for answers, wanted in zip(ranked, right, strict=True)]


def words(text: str) -> str:
    """A caption to score: lower case, its punctuation taken off, parted by single spaces.

    What coco-caption does with Stanford's tokenizer, without Java; the figures differ a little from its own.
    """
    text = unicodedata.normalize("NFC", text).lower()
    return " ".join(re.findall(r"\w+(?:['’.,-]\w+)*|[^\w\s.,;:!?\"'`()\[\]{}…-]", text))


def caption_statistics(written: list[str], references: list[list[str]]) -> dict[str, Statistic]:
    """CIDEr (0 to 10; its document frequencies are those of all references), BLEU-1 to 4, ROUGE-L, exact matches."""
    written = [words(text) for text in written]
    references = [[words(text) for text in texts] for texts in references]
    bleu, cider = BleuScorer(n=4), CiderScorer(n=4)
    for text, wanted in zip(written, references, strict=True):
        bleu += (text, wanted)
        cider += (text, wanted)
    rouge = [Rouge().calc_score([text], wanted) for text, wanted in zip(written, references, strict=True)]
    exact = [text in wanted for text, wanted in zip(written, references, strict=True)]
    statistics = {"cider": mean(cider.compute_score()[1])}
    statistics |= {f"bleu_{order}": corpus_bleu(bleu, order) for order in (1, 2, 3, 4)}
    return statistics | {"rouge_l": mean(rouge), "caption_exact": mean(exact)}


def corpus_bleu(scorer: BleuScorer, order: int) -> Statistic:
    """BLEU (Papineni et al., 2002) of a corpus, with the reference whose length is closest, as pycocoevalcap's."""
    tests = scorer.ctest
    guesses = np.array([test["guess"][:order] for test in tests], float)  # (N, order)
    correct = np.array([test["correct"][:order] for test in tests], float)
    lengths = np.array([test["testlen"] for test in tests], float)
    wanted = np.array([min((abs(r - test["testlen"]), r) for r in test["reflen"])[1] for test in tests], float)

    def statistic(weights: np.ndarray) -> float:
        with np.errstate(divide="ignore"):
            precision = np.log((weights @ correct + 1e-15) / (weights @ guesses + 1e-9)).mean()
        written = weights @ lengths
        penalty = min(0.0, 1 - (weights @ wanted + 1e-9) / (written + 1e-15))
        return float(np.exp(precision + penalty))

    return statistic


def plain_answer(text: str) -> str:
    """An answer as VQA compares it: no case, punctuation, articles; numbers as digits.

    Source: VQA, vqaEvaluation/vqaEval.py. Apostrophes are taken off where that puts them in ("dont" is "don't").
    """
    text = text.lower().replace("\n", " ").replace("\t", " ").strip().replace("'", "").replace("’", "")
    text = re.sub(r"(?<=\d),(?=\d)", "", text)
    text = re.sub(r"(?<!\d)\.|\.(?!\d)", "", text)
    text = re.sub(r"[;/\[\]\"{}()=+\\_\-><@`,?!]", " ", text)
    return " ".join(NUMBERS.get(word, word) for word in text.split() if word not in ARTICLES)


def vqa_accuracy(answer: str, given: list[str]) -> float:
    """VQA's accuracy: as good as right where three people gave the answer, averaged over leaving out each of them.

    Source: visualqa.org/evaluation.html. Of fewer than three answers, each is right.
    """
    if len(given) < 3:
        return float(answer in given)
    counts = Counter(given)
    left = [counts[answer] - (answer == one) for one in given]
    return sum(min(1.0, count / 3) for count in left) / len(given)
