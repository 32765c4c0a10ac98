"""Accuracy of image-text matching: classifying pairs as matched or unmatched."""

import datasets
import evaluate
from vlp.training.evaluation.metrics import describe
from vlp.training.evaluation.scores import estimate, mean

DESCRIPTION = """The share of pairs that are classified correctly, for all, matched and unmatched pairs."""
KWARGS = """
Args:
    predictions: 1 if a pair is predicted to match, else 0.
    references: 1 if it matches, else 0.
    groups: the unit of each pair, numbered from 0, if several are resampled together.
    resamples: bootstrap resamples for the intervals; 0: no intervals.
    seed: seed of the bootstrap.
Returns:
    itm_accuracy, itm_accuracy_matched and itm_accuracy_unmatched, from 0 to 1, and NAME_interval for each.
"""


class ItmAccuracy(evaluate.Metric):
    def _info(self):
        number = datasets.Value("int64")
        return describe(DESCRIPTION, KWARGS, number, number)

    def _compute(self, predictions, references, groups=None, resamples=0, seed=0):
        groups = list(range(len(predictions))) if groups is None else groups
        hits = [int(prediction == label) for prediction, label in zip(predictions, references, strict=True)]
        statistics = {"itm_accuracy": mean(hits, groups)}
        for name, kind in (("matched", 1), ("unmatched", 0)):
            of_kind = [index for index, label in enumerate(references) if label == kind]
            if of_kind:
                scores, units = [hits[index] for index in of_kind], [groups[index] for index in of_kind]
                statistics[f"itm_accuracy_{name}"] = mean(scores, units)
        return estimate(statistics, max(groups) + 1, resamples, seed)
