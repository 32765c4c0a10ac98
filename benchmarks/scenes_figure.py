"""Draw the figure of the scenes: what similarity ranks, what ITM decides, what BLIP writes, what it and BLIP-2 answer.

    python benchmarks/scenes_figure.py runs/clip-scenes model_cards/blip-scenes model_cards/blip-scenes-vqa \\
        model_cards/blip2-scenes-vqa [--seed 1]

The seed selects scenes of the test split. docs/scenes.png shows the results, right or wrong.
"""

import argparse
import random
import textwrap
from pathlib import Path

import matplotlib
import torch
from vlp.model_cards.plots import RIGHT, WRONG
from vlp.training.data.scenes.drawing import draw_scene
from vlp.training.data.scenes.texts import caption, questions, swapped
from vlp.training.data.scenes.world import make_scene

from vlp.inference import load

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

TITLES = ("", "CLIP compares", "BLIP matches (ITM)", "BLIP describes", "BLIP answers", "BLIP-2 answers")
TARGET = Path(__file__).parents[1] / "docs/scenes.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("clip", "blip", "vqa", "blip2"):
        parser.add_argument(name, help="folder of a model")
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    clip, matcher, captioner, *answerers = (
        load(name, use) for name, use in ((options.clip, "embed"), (options.blip, "match"), (options.blip, "caption"),
                                          (options.vqa, "answer"), (options.blip2, "answer"))
    )  # fmt: skip
    figure, axes = plt.subplots(options.count, 6, figsize=(15.5, 1.5 * options.count), dpi=90,
                                width_ratios=(0.6, 1.5, 1.5, 1.3, 1.3, 1.3))  # fmt: skip
    rng = random.Random(options.seed)
    for line in axes:
        scene = make_scene("test", rng)
        while (colours := swapped(scene, "colours")) is None:
            scene = make_scene("test", rng)
        picture = draw_scene(scene, rng)
        facts = (scene.first.kind, scene.relation, scene.second.kind), colours, swapped(scene, "order")
        texts = [caption(*each, "en", "{0} is {1} {2}") for each in facts]
        similarity = clip.similarity(clip.embed_images([picture]), clip.embed_texts(texts))[0] / clip.temperature
        logits = matcher.match(matcher.encode_images([picture]), torch.zeros(len(texts), dtype=torch.long), texts)
        shares = similarity.softmax(dim=0).tolist(), logits.softmax(dim=1)[:, 1].tolist()
        for axis in line:
            axis.axis("off")
        line[0].imshow(picture)
        for axis, values in zip(line[1:3], shares, strict=True):
            write(axis, [(f"{100 * share:.0f} %  {text}", text == texts[0])
                         for text, share in zip(texts, values, strict=True)])  # fmt: skip
        write(line[3], [(captioner.caption([picture])[0], None)])
        asked = rng.sample(questions(scene, "test", rng), 3)
        for axis, answerer in zip(line[4:], answerers, strict=True):
            answers = answerer.answer([picture] * len(asked), [each.question for each in asked])
            write(axis, [(f"{each.question} {answer}", answer == each.answer)
                         for each, answer in zip(asked, answers, strict=True)])  # fmt: skip
    for axis, title in zip(axes[0], TITLES, strict=True):
        axis.set_title(title, fontsize=11, fontweight="bold", loc="left", pad=12)
    figure.tight_layout()
    figure.savefig(TARGET)
    print(f"Figure written to {TARGET}.")


def write(axis, lines: list[tuple[str, bool | None]]) -> None:
    """Write lines below each other: green if right, grey if wrong, black if it is not known."""
    for place, (text, right) in enumerate(lines):
        axis.text(0, 0.95 - 0.36 * place, textwrap.fill(text, 38), fontsize=8.5, va="top", parse_math=False,
                  color={True: RIGHT, False: WRONG, None: "black"}[right])  # fmt: skip


if __name__ == "__main__":
    main()
