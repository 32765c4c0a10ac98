"""Recall at k of retrieval. A query may have several right answers."""

import datasets
import evaluate
from vlp.training.evaluation.metrics import describe
from vlp.training.evaluation.scores import estimate, hits_at, mean

DESCRIPTION = """The share of queries with at least one right answer among the first k results, as in the papers of CLIP
and BLIP."""
KWARGS = """
Args:
    predictions: the indices of each query's results, best first.
    references: the indices of each query's right answers.
    k: the values of k.
    groups: the unit of each query, numbered from 0, if several are resampled together.
    resamples: bootstrap resamples for the intervals; 0: no intervals.
    seed: seed of the bootstrap.
Returns:
    recall_at_K for each k, from 0 to 1, and recall_at_K_interval.
"""


class RecallAtK(evaluate.Metric):
    def _info(self):
        numbers = datasets.List(datasets.Value("int64"))
        return describe(DESCRIPTION, KWARGS, numbers, numbers)

    def _compute(self, predictions, references, k=(1, 5, 10), groups=None, resamples=0, seed=0):
        units = len(predictions) if groups is None else max(groups) + 1
        statistics = {f"recall_at_{each}": mean(hits_at(predictions, references, each), groups) for each in k}
        return estimate(statistics, units, resamples, seed)
