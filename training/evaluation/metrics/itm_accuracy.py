"""Accuracy of image-text matching: whether pairs are told from pairs that are not."""

import datasets
import evaluate
from vlp.training.evaluation.metrics import describe
from vlp.training.evaluation.scores import estimate, mean

DESCRIPTION = """The share of pairs, matched and not, that are told rightly, and of each kind by itself."""
KWARGS = """
Args:
    predictions: 1 where a pair is said to match, else 0. references: 1 where it does, else 0.
    groups: the unit of each pair, numbered from 0, where several are drawn together.
    resamples, seed: of the bootstrap; 0 for no intervals.
Returns:
    itm_accuracy, itm_accuracy_matched and itm_accuracy_unmatched, shares from 0 to 1, and NAME_interval of each.
"""


class ItmAccuracy(evaluate.Metric):
    def _info(self):
        number = datasets.Value("int64")
        return describe(DESCRIPTION, KWARGS, number, number)

    def _compute(self, predictions, references, groups=None, resamples=0, seed=0):
        groups = list(range(len(predictions))) if groups is None else groups
        told = [int(said == true) for said, true in zip(predictions, references, strict=True)]
        statistics = {"itm_accuracy": mean(told, groups)}
        for name, kind in (("matched", 1), ("unmatched", 0)):
            of_kind = [place for place, true in enumerate(references) if true == kind]
            if of_kind:
                scores, units = [told[place] for place in of_kind], [groups[place] for place in of_kind]
                statistics[f"itm_accuracy_{name}"] = mean(scores, units)
        return estimate(statistics, max(groups) + 1, resamples, seed)
