"""VQA accuracy: predicted answers compared with human answers."""

import datasets
import evaluate
from vlp.training.evaluation.metrics import describe
from vlp.training.evaluation.scores import answer_scores, estimate, mean

DESCRIPTION = """The accuracy of an answer is min(1, matching human answers / 3), averaged over leaving out each human
answer in turn. Case, punctuation, articles and numbers are normalised first (visualqa.org/evaluation.html)."""
KWARGS = """
Args:
    predictions: the predicted answer to each question.
    references: the human answers to each question.
    groups: the unit of each question, numbered from 0, if several are resampled together.
    resamples: bootstrap resamples for the intervals; 0: no intervals.
    seed: seed of the bootstrap.
Returns:
    vqa_accuracy, from 0 to 1, and vqa_accuracy_interval.
"""


class VqaAccuracy(evaluate.Metric):
    def _info(self):
        return describe(DESCRIPTION, KWARGS, datasets.Value("string"), datasets.List(datasets.Value("string")))

    def _compute(self, predictions, references, groups=None, resamples=0, seed=0):
        scores = answer_scores(predictions, references)
        units = len(scores) if groups is None else max(groups) + 1
        return estimate({"vqa_accuracy": mean(scores, groups)}, units, resamples, seed)
