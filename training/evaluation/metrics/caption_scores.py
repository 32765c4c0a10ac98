"""CIDEr, BLEU, ROUGE-L and exact matches of captions, by pycocoevalcap's scorers, without its Java tokenizer."""

import datasets
import evaluate
from vlp.training.evaluation.metrics import describe
from vlp.training.evaluation.scores import caption_statistics, estimate

DESCRIPTION = """CIDEr (from 0 to 10; papers give 100 times its value), BLEU-1 to 4, ROUGE-L, and the share of captions
that are a reference, word for word. Texts are compared without case and punctuation."""
KWARGS = """
Args:
    predictions: a caption for each image. references: for each image, what people wrote.
    resamples, seed: of the bootstrap; 0 for no intervals.
Returns:
    cider, bleu_1 to bleu_4, rouge_l, caption_exact, and NAME_interval of each.
"""


class CaptionScores(evaluate.Metric):
    def _info(self):
        return describe(DESCRIPTION, KWARGS, datasets.Value("string"), datasets.List(datasets.Value("string")))

    def _compute(self, predictions, references, resamples=0, seed=0):
        return estimate(caption_statistics(predictions, references), len(predictions), resamples, seed)
