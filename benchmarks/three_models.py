"""The README's figure: the same unseen drawings named by CLIP, captioned by BLIP, looked up by BLIP-2.

    python benchmarks/three_models.py model_cards/clip-emoji model_cards/blip-emoji runs/blip2-emoji [--seed 1]

The drawings are drawn by the seed; docs/three-models.png shows what came out, right or wrong.
"""

import argparse
import textwrap
from pathlib import Path

import matplotlib
from transformers import AutoModel, AutoProcessor
from vlp.model_cards.plots import RIGHT, WRONG
from vlp.training.data.rows import CaptionChooser
from vlp.training.data.sources import load_rows
from vlp.training.evaluation.base import Evaluator
from vlp.training.evaluation.blip import BlipEvaluator
from vlp.training.evaluation.blip2 import Blip2Evaluator

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

TITLES = ("", "CLIP names it", "BLIP writes", "BLIP-2 finds")
TARGET = Path(__file__).parents[1] / "docs/three-models.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("clip", "blip", "blip2"):
        parser.add_argument(name, help="folder of a model")
    parser.add_argument("--count", type=int, default=6)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    rows = load_rows("emoji", "test", "image")
    data = (rows, CaptionChooser(), "image", 10**8)
    told = []
    for name, evaluator in (
        (options.clip, Evaluator(*data, "caption")),
        (options.blip, BlipEvaluator(*data)),
        (options.blip2, Blip2Evaluator(*data, rerank_posterior=True, top_k=16)),
    ):
        model, processor = AutoModel.from_pretrained(name).eval(), AutoProcessor.from_pretrained(name)
        told.append(evaluator.examples(model, processor, options.count, options.seed))
    figure, axes = plt.subplots(options.count, 4, figsize=(11, 1.25 * options.count), dpi=90,
                                width_ratios=(0.8, 1.4, 1.4, 1.4))  # fmt: skip
    for line, examples in zip(axes, zip(*told, strict=True), strict=True):
        for axis in line:
            axis.axis("off")
        line[0].imshow(examples[0]["image"])
        line[0].set_title(textwrap.fill(examples[0]["label"], 20), fontsize=9, fontweight="bold", parse_math=False)
        for axis, example in zip(line[1:], examples, strict=True):
            for place, (text, share) in enumerate(example["predictions"]):
                text = text if len(text) <= 40 else text[:39] + "…"
                text += "" if share is None else f"  {100 * share:.0f} %"
                right = example["predictions"][place][0].lower() == example["label"].lower()
                axis.text(0, 0.85 - 0.33 * place, text, color=RIGHT if right else WRONG, fontsize=10, va="top",
                          fontweight="bold" if right else "normal", parse_math=False)  # fmt: skip
    for axis, title in zip(axes[0], TITLES, strict=True):
        if title:
            axis.set_title(title, fontsize=12, fontweight="bold", loc="left", pad=14)
    figure.tight_layout()
    figure.savefig(TARGET)
    print(f"Written: {TARGET}")


if __name__ == "__main__":
    main()
