"""Accuracy of zero-shot classification: top-k, and the mean over classes."""

import datasets
import evaluate
from vlp.training.evaluation.metrics import describe
from vlp.training.evaluation.scores import estimate, hits_at, mean, mean_per_class

DESCRIPTION = """The share of images whose class is among the first k, and the mean over classes of the share in each,
which the paper reports where classes are of uneven size."""
KWARGS = """
Args:
    predictions: for each image, the numbers of classes, the best first.
    references: the number of each image's class.
    k: which accuracies to give. resamples, seed: of the bootstrap; 0 for no intervals.
Returns:
    zero_shot_topK for each k and zero_shot_mean_per_class, shares from 0 to 1, and NAME_interval of each.
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
