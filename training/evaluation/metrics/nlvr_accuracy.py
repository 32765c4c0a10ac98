"""Accuracy on NLVR2: predicting whether a sentence is true of two images."""

import datasets
import evaluate
from vlp.training.evaluation.metrics import describe
from vlp.training.evaluation.scores import estimate, mean

DESCRIPTION = """The share of sentences whose prediction (true or false of two images) is correct."""
KWARGS = """
Args:
    predictions: 1 for true, 0 for false.
    references: 1 for true, 0 for false.
    groups: the unit of each sentence, numbered from 0, if several are resampled together.
    resamples: bootstrap resamples for the intervals; 0: no intervals.
    seed: seed of the bootstrap.
Returns:
    nlvr_accuracy, from 0 to 1, and nlvr_accuracy_interval.
"""


class NlvrAccuracy(evaluate.Metric):
    def _info(self):
        number = datasets.Value("int64")
        return describe(DESCRIPTION, KWARGS, number, number)

    def _compute(self, predictions, references, groups=None, resamples=0, seed=0):
        hits = [int(prediction == label) for prediction, label in zip(predictions, references, strict=True)]
        units = len(hits) if groups is None else max(groups) + 1
        return estimate({"nlvr_accuracy": mean(hits, groups)}, units, resamples, seed)
