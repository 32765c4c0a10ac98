"""Draw the README's figure: unseen drawings classified by CLIP, captioned by BLIP and named by BLIP-2.

    python benchmarks/three_models.py [--seed 1]

The seed selects the drawings. docs/three-models.png shows the results, right or wrong.
"""

import argparse
import textwrap
from pathlib import Path

import matplotlib
from accelerate import PartialState
from vlp.model_cards.plots import RIGHT, WRONG
from vlp.training.data.sources import load_rows
from vlp.training.evaluation.arguments import EvaluationArguments
from vlp.training.evaluation.examples import caption_examples, class_examples
from vlp.training.evaluation.tasks import prepare_data, use_of

from vlp.inference import load

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "docs/three-models.png"
# Title of the column, folder of the model, task, prompt, and what makes the examples.
COLUMNS = (
    ("CLIP classifies", "clip-emoji", "zero-shot", "", class_examples),
    ("BLIP captions", "blip-emoji", "captioning", "", caption_examples),
    ("BLIP-2 writes", "blip2-emoji", "captioning", "The emoji is", caption_examples),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=6)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    rows = load_rows("emoji", "test", "image")
    found, drawn = [], None  # the rows of the drawings
    for _, name, task, prompt, make in COLUMNS:
        arguments = EvaluationArguments(task=task, class_column="caption" if task == "zero-shot" else None)
        pictures = prepare_data(rows, arguments, PartialState())
        if drawn is None:
            drawn = [pictures.items[number].rows[0] for number in pictures.draw(options.count, options.seed)]
        chosen = [next(n for n, item in enumerate(pictures.items) if row in item.rows) for row in drawn]
        found.append(make(load(ROOT / "model_cards" / name, use_of(arguments)), pictures, chosen, [prompt]))
    figure, axes = plt.subplots(options.count, 4, figsize=(11, 1.25 * options.count), dpi=90,
                                width_ratios=(0.8, 1.4, 1.4, 1.4))  # fmt: skip
    for line, examples in zip(axes, zip(*found, strict=True), strict=True):
        for axis in line:
            axis.axis("off")
        line[0].imshow(examples[0]["image"])
        line[0].set_title(textwrap.fill(examples[0]["label"], 20), fontsize=9, fontweight="bold", parse_math=False)
        for axis, example in zip(line[1:], examples, strict=True):
            for place, (text, share, right) in enumerate(example["predictions"]):
                text = text if len(text) <= 40 else text[:39] + "…"
                text += "" if share is None else f"  {100 * share:.0f} %"
                axis.text(0, 0.85 - 0.33 * place, text, color=RIGHT if right else WRONG, fontsize=10, va="top",
                          fontweight="bold" if right else "normal", parse_math=False)  # fmt: skip
    for axis, column in zip(axes[0][1:], COLUMNS, strict=True):
        axis.set_title(column[0], fontsize=12, fontweight="bold", loc="left", pad=14)
    figure.tight_layout()
    figure.savefig(TARGET)
    print(f"Figure written to {TARGET}.")


if __name__ == "__main__":
    main()
