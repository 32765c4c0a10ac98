"""VQA accuracy: answers compared with those that people gave."""

import datasets
import evaluate
from vlp.training.evaluation.metrics import describe
from vlp.training.evaluation.scores import estimate, mean, plain_answer, vqa_accuracy

DESCRIPTION = """An answer is right where three of ten people gave it, averaged over leaving out each of them; case,
punctuation, articles and numbers are written in one way first (visualqa.org/evaluation.html)."""
KWARGS = """
Args:
    predictions: an answer to each question. references: for each question, the answers that people gave.
    groups: the unit of each question, numbered from 0, where several are drawn together.
    resamples, seed: of the bootstrap; 0 for no intervals.
Returns:
    vqa_accuracy, from 0 to 1, and vqa_accuracy_interval.
"""


class VqaAccuracy(evaluate.Metric):
    def _info(self):
        return describe(DESCRIPTION, KWARGS, datasets.Value("string"), datasets.List(datasets.Value("string")))

    def _compute(self, predictions, references, groups=None, resamples=0, seed=0):
        scores = [
            vqa_accuracy(plain_answer(answer), [plain_answer(one) for one in given])
            for answer, given in zip(predictions, references, strict=True)
        ]
        units = len(scores) if groups is None else max(groups) + 1
        return estimate({"vqa_accuracy": mean(scores, groups)}, units, resamples, seed)
