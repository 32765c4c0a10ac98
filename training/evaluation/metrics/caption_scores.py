"""CIDEr, BLEU, ROUGE-L and exact matches of captions, with pycocoevalcap's scorers but not its Java tokenizer."""

import datasets
import evaluate
from vlp.training.evaluation.metrics import describe
from vlp.training.evaluation.scores import caption_statistics, estimate

DESCRIPTION = """CIDEr (0 to 10; papers report 100 times its value), BLEU-1 to 4, ROUGE-L, and the share of captions
that equal a reference. Texts are compared without case and punctuation."""
KWARGS = """
Args:
    predictions: the generated caption of each image.
    references: the human captions of each image.
    resamples: bootstrap resamples for the intervals; 0: no intervals.
    seed: seed of the bootstrap.
Returns:
    cider, bleu_1 to bleu_4, rouge_l, caption_exact, and NAME_interval for each.
"""


class CaptionScores(evaluate.Metric):
    def _info(self):
        return describe(DESCRIPTION, KWARGS, datasets.Value("string"), datasets.List(datasets.Value("string")))

    def _compute(self, predictions, references, resamples=0, seed=0):
        return estimate(caption_statistics(predictions, references), len(predictions), resamples, seed)
