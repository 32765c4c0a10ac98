"""Plots and galleries for the model card."""

import textwrap
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from ..errors import printable

RIGHT, WRONG = "#1a7f37", "#57606a"


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plot_history(history: list[dict], losses: list[str], path: Path) -> None:
    """Plot losses over the optimiser steps, with a moving average over a tenth of the entries.

    Args:
        history: entries with "step" and losses.
        losses: names of the losses to plot.
        path: PNG file to write.
    """
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(7, 3.2), dpi=110)
    for name in losses:
        entries = [entry for entry in history if name in entry]  # a loss may start later than others
        steps, values = [entry["step"] for entry in entries], [entry[name] for entry in entries]
        window = max(1, len(values) // 10)
        smooth = [sum(values[max(0, i - window + 1) : i + 1]) / len(values[max(0, i - window + 1) : i + 1])
                  for i in range(len(values))]  # fmt: skip
        line = axis.plot(steps, values, alpha=0.3, linewidth=1)[0]
        axis.plot(steps, smooth, color=line.get_color(), label=f"{name} loss")
    axis.set_xlabel("optimiser step")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def plot_examples(examples: list[dict], path: Path, columns: int = 4) -> None:
    """Draw a gallery: each picture with its label and, below it, the predictions with their probabilities, if any.

    Args:
        examples: dicts with "image", "label" and "predictions", a list of (text, probability or None, whether it is
            right).
        path: PNG file to write.
        columns: pictures per row.
    """
    plt = _pyplot()
    rows = -(-len(examples) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.6 * columns, 2.7 * rows), dpi=90, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, example in zip(axes.flat, examples, strict=False):
        axis.imshow(example["image"])
        axis.set_title("\n".join(wrapped(example["label"], 30, 4)), fontsize=9, fontweight="bold", parse_math=False)
        line = 0
        for name, probability, right in example["predictions"]:
            colour = RIGHT if right else WRONG
            share = "" if probability is None else f"  {100 * probability:.0f} %"
            for text in wrapped(name, 34, 1 if len(example["predictions"]) > 1 else 3, share):
                axis.text(0.5, -0.06 - 0.11 * line, text, color=colour, fontsize=8,
                          ha="center", va="top", transform=axis.transAxes, parse_math=False)  # fmt: skip
                line += 1
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def wrapped(text: str, width: int, most: int, ending: str = "") -> list[str]:
    """Break a text into lines.

    Args:
        text: the text.
        width: characters of a line.
        most: lines; the last one ends with "…" if the text is longer.
        ending: what follows the text on its last line.
    """
    lines = textwrap.wrap(printable(text), width) or [""]
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1][: width - 1] + "…"]
    return [*lines[:-1], lines[-1] + ending]


def plot_curve(positions: list[float], values: dict[str, list[float]], label: str, path: Path) -> None:
    """Plot metrics over a number.

    Args:
        positions: the numbers.
        values: by name of the metric, its value at each position.
        label: what the number is.
        path: PNG file to write.
    """
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(7, 3.6), dpi=110)
    for name, each in values.items():
        axis.plot(positions, each, marker="o", markersize=3, label=printable(name, 80))
    axis.set_xlabel(label)
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def plot_confusion(pairs: list[tuple[int, int]], names: list[str], path: Path, most: int = 24) -> None:
    """Draw a confusion matrix, normalised over the images of each class.

    Args:
        pairs: (class, predicted class) of every image.
        names: the class names.
        path: PNG file to write.
        most: maximum number of classes; if there are more, those that are confused most often are shown.
    """
    plt = _pyplot()
    shown = range(len(names))
    if len(names) > most:
        wrong = Counter(tuple(sorted(pair)) for pair in pairs if pair[0] != pair[1])
        shown = list(dict.fromkeys(number for pair, _ in wrong.most_common() for number in pair))[:most]
        shown = sorted(shown or range(most))
    place = {number: index for index, number in enumerate(shown)}
    counts, totals = Counter(pairs), Counter(right for right, _ in pairs)
    table = [[counts[row, column] / max(totals[row], 1) for column in place] for row in place]
    labels = [printable(names[number]) for number in shown]
    labels = [label if len(label) <= 28 else label[:27] + "…" for label in labels]
    side = 2.5 + 0.3 * len(labels)
    figure, axis = plt.subplots(figsize=(side + 1, side), dpi=90)
    image = axis.imshow(table, cmap="Blues", vmin=0, vmax=1)
    axis.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7, parse_math=False)
    axis.set_yticks(range(len(labels)), labels, fontsize=7, parse_math=False)
    axis.set_xlabel("predicted class")
    axis.set_ylabel("class")
    if len(names) > len(labels):
        axis.set_title(f"the {len(labels)} of {len(names):,} classes that are confused most often", fontsize=8)
    figure.colorbar(image, ax=axis, fraction=0.046, label="share of the images of the class")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def plot_retrieval(rows: list[tuple[str, list]], path: Path) -> None:
    """Draw the images that were retrieved for each text, best first. Correct images have a green frame.

    Args:
        rows: (text, [(image, whether it is correct), ...]) of each text.
        path: PNG file to write.
    """
    plt = _pyplot()
    columns = max(len(found) for _, found in rows)
    figure, axes = plt.subplots(len(rows), columns, figsize=(1.3 * columns, 1.6 * len(rows)), dpi=90, squeeze=False)
    for line, (text, found) in zip(axes, rows, strict=True):
        for axis in line:
            axis.axis("off")
        for axis, (image, right) in zip(line, found, strict=False):
            axis.axis("on")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.imshow(image.convert("RGB"))
            axis.spines[:].set(color=RIGHT if right else "#d0d7de", linewidth=3 if right else 0.5)
        line[0].set_title(f"“{printable(text)}”", fontsize=9, fontweight="bold", loc="left", parse_math=False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def plot_heatmaps(rows: list[tuple], path: Path, most: int = 6) -> None:
    """Draw each image, and beside it one heat map per word of its text.

    Args:
        rows: (image, label, `Heatmap`) each.
        path: PNG file to write.
        most: maximum number of words.
    """
    plt = _pyplot()
    columns = 1 + max(1, min(most, max(len(heat.words) for _, _, heat in rows)))
    figure, axes = plt.subplots(len(rows), columns, figsize=(1.4 * columns, 1.7 * len(rows)), dpi=90, squeeze=False)
    for line, (image, label, heat) in zip(axes, rows, strict=True):
        label = printable(label)
        for axis in line:
            axis.axis("off")
        picture = image.convert("RGB")
        extent = (0, picture.width, picture.height, 0)
        line[0].imshow(picture)
        line[0].set_title(label if len(label) <= 22 else label[:21] + "…", fontsize=8, fontweight="bold",
                          parse_math=False)  # fmt: skip
        for axis, word, grid in zip(line[1:], heat.words, heat.maps, strict=False):
            axis.imshow(picture.convert("L"), cmap="gray", extent=extent)
            axis.imshow(grid.float().cpu().numpy(), cmap="inferno", alpha=0.6, extent=extent, interpolation="bilinear")
            axis.set_title(printable(word), fontsize=8, parse_math=False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def plot_metrics(evaluations: list[dict], title: Callable[[str], str], path: Path) -> None:
    """Plot metrics over the optimiser steps, in per cent. CIDEr is left out.

    Args:
        evaluations: metrics of each evaluation, with "step".
        title: maps the name of a metric to its label.
        path: PNG file to write.
    """
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(7, 3.2), dpi=110)
    for name in [name for name in evaluations[-1] if name not in ("step", "cider")]:
        entries = [entry for entry in evaluations if name in entry]
        axis.plot([e["step"] for e in entries], [100 * e[name] for e in entries], marker="o", markersize=3,
                  linewidth=1, label=title(name).replace("`", ""))  # fmt: skip
    axis.set_xlabel("optimiser step")
    axis.set_ylabel("%")
    axis.legend(frameon=False, fontsize=6, bbox_to_anchor=(1, 1), loc="upper left")
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def overlay(image, grid):
    """Overlay an image with a heat map.

    Args:
        image: a PIL image.
        grid: (S, S) tensor; its values are scaled to 0 to 1.

    Returns:
        A PIL image.
    """
    import matplotlib
    import numpy as np
    from PIL import Image

    grid = grid.float().cpu()
    grid = (grid - grid.min()) / (grid.max() - grid.min()).clamp(min=1e-12)
    heat = Image.fromarray((255 * grid.numpy()).astype("uint8")).resize(image.size, Image.Resampling.BICUBIC)
    colours = Image.fromarray((255 * matplotlib.colormaps["inferno"](np.asarray(heat))[..., :3]).astype("uint8"))
    return Image.blend(image.convert("L").convert("RGB"), colours, 0.6)
