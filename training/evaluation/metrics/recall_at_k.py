"""Recall at k of retrieval, where a query may have several right answers."""

import datasets
import evaluate
from vlp.training.evaluation.metrics import describe
from vlp.training.evaluation.scores import estimate, hits_at, mean

DESCRIPTION = """The share of queries that have one of their right answers among the first k, as CLIP, BLIP and their
peers report it."""
KWARGS = """
Args:
    predictions: for each query, what was found, the best first (numbers).
    references: for each query, all that is right (numbers).
    k: which recalls to give. groups: the unit of each query, numbered from 0, where several are drawn together.
    resamples, seed: of the bootstrap; 0 for no intervals.
Returns:
    recall_at_K for each k, a share from 0 to 1, and recall_at_K_interval.
"""


class RecallAtK(evaluate.Metric):
    def _info(self):
        numbers = datasets.List(datasets.Value("int64"))
        return describe(DESCRIPTION, KWARGS, numbers, numbers)

    def _compute(self, predictions, references, k=(1, 5, 10), groups=None, resamples=0, seed=0):
        units = len(predictions) if groups is None else max(groups) + 1
        statistics = {f"recall_at_{each}": mean(hits_at(predictions, references, each), groups) for each in k}
        return estimate(statistics, units, resamples, seed)
