"""Accuracy of zero-shot classification: top-k, and the mean over classes."""

import datasets
import evaluate
from vlp.training.evaluation.metrics import describe
from vlp.training.evaluation.scores import estimate, hits_at, mean, mean_per_class

DESCRIPTION = """Top-k accuracy, and the mean of the per-class accuracies, which the CLIP paper reports for data sets
with unbalanced classes."""
KWARGS = """
Args:
    predictions: the class indices for each image, best first.
    references: the class index of each image.
    k: the values of k.
    resamples: bootstrap resamples for the intervals; 0: no intervals.
    seed: seed of the bootstrap.
Returns:
    zero_shot_topK for each k and zero_shot_mean_per_class, from 0 to 1, and NAME_interval for each.
"""


class ZeroShotAccuracy(evaluate.Metric):
    def _info(self):
        return describe(DESCRIPTION, KWARGS, datasets.List(datasets.Value("int64")), datasets.Value("int64"))

    def _compute(self, predictions, references, k=(1, 5), resamples=0, seed=0):
        right = [[label] for label in references]
        statistics = {f"zero_shot_top{each}": mean(hits_at(predictions, right, each)) for each in k}
        first = hits_at(predictions, right, 1)
        statistics["zero_shot_mean_per_class"] = mean_per_class(first, references)
        return estimate(statistics, len(references), resamples, seed)
