"""Accuracy of choosing the true caption of a picture, not a false one of the same or nearly the same words."""

import datasets
import evaluate
from vlp.training.evaluation.metrics import describe
from vlp.training.evaluation.scores import estimate, mean, preferences

DESCRIPTION = """The share of pairs in which the true caption scores higher than the false one. Equal scores count as a
half, so that a model that cannot tell them apart has 0.5, which is chance (Thrush et al., 2022, arXiv:2204.03162;
Yuksekgonul et al., 2022, arXiv:2210.01936)."""
KWARGS = """
Args:
    predictions: the score of the true caption.
    references: the score of the false one.
    groups: the unit of each pair, numbered from 0, if several are resampled together.
    resamples: bootstrap resamples for the intervals; 0: no intervals.
    seed: seed of the bootstrap.
Returns:
    composition_accuracy, from 0 to 1, and composition_accuracy_interval.
"""


class CompositionAccuracy(evaluate.Metric):
    def _info(self):
        number = datasets.Value("float32")
        return describe(DESCRIPTION, KWARGS, number, number)

    def _compute(self, predictions, references, groups=None, resamples=0, seed=0):
        hits = preferences(predictions, references)
        units = len(hits) if groups is None else max(groups) + 1
        return estimate({"composition_accuracy": mean(hits, groups)}, units, resamples, seed)
