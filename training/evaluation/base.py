"""How good a model is: zero-shot classification and retrieval, exact, in chunks that bound memory."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import ArgumentError
from ...processing.prompts import prompts_for
from ..data.rows import BadRow, CaptionChooser, decode_image

# Shapes: I images, T captions, K classes, E embedding


def batched(items: Iterable, size: int) -> Iterator[list]:
    chunk: list = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


@torch.inference_mode()
def embed_images(model, processor, images: Iterable, batch_size: int = 256) -> Tensor:
    """PIL images -> (I, E) of unit length, on the CPU, in the order given."""
    parts = []
    for chunk in batched(images, batch_size):
        pixels = processor.image_processor(chunk, return_tensors="pt")["pixel_values"]
        pixels = pixels.to(model.device, model.dtype)
        features = model.get_image_features(pixels, pooled_only=True).pooler_output
        parts.append(F.normalize(features.float(), dim=-1).cpu())
    return torch.cat(parts)


@torch.inference_mode()
def embed_texts(model, processor, texts: Iterable[str], batch_size: int = 256) -> Tensor:
    """Texts -> (T, E) of unit length, on the CPU, in the order given."""
    parts = []
    for chunk in batched(texts, batch_size):
        config = getattr(model.config, "qformer_config", None) or model.config.text_config
        ids = processor.read_texts(chunk, config.max_position_embeddings)
        features = model.get_text_features(ids["input_ids"].to(model.device), pooled_only=True).pooler_output
        parts.append(F.normalize(features.float(), dim=-1).cpu())
    return torch.cat(parts)


def embed_classes(model, processor, names: list[str], templates="name", batch_size: int = 256) -> Tensor:
    """Class names -> (K, E): the mean of a class' prompts, of unit length (openai/CLIP, notebooks)."""
    prompts = prompts_for(names, templates)
    return class_means(embed_texts(model, processor, [text for row in prompts for text in row], batch_size), names)


def class_means(prompt_embeds: Tensor, names: list[str]) -> Tensor:
    """Embeddings of every class' prompts (K * prompts, E), one class after the other -> (K, E) of unit length."""
    return F.normalize(prompt_embeds.view(len(names), -1, prompt_embeds.shape[-1]).mean(dim=1), dim=-1)


def number_labels(values: list, names: list[str] | None, column: str) -> tuple[list[int | None], list[str]]:
    """The number of each label's class (None where it is None, -1 or empty), and the names of the classes.

    Args:
        values: names or numbers. names: of the classes; those of the labels themselves where not given.

    Raises ArgumentError, naming the `column`, where labels are neither, or have no name.
    """
    given = [value for value in values if value not in (None, -1, "")]
    if not given or not isinstance(given[0], (int, str)):
        raise ArgumentError(f"--class_column {column} must hold names or labels, not {values[0]!r}.")
    if isinstance(given[0], str):
        names = names or sorted(set(given))
        numbers = {name: number for number, name in enumerate(names)}
        if unknown := sorted(set(given) - numbers.keys()):
            raise ArgumentError(f"--class_column {column} holds {unknown[0]!r}, which --class_names does not.")
        return [numbers.get(value) for value in values], names
    if names is None:
        raise ArgumentError(f"--class_column {column} holds numbers without names: give --class_names.")
    if not 0 <= min(given) <= max(given) < len(names):
        raise ArgumentError(
            f"--class_column {column}: labels go from {min(given)} to {max(given)}, of {len(names)} names."
        )
    return [None if value in (None, -1) else value for value in values], names


def ranks(queries: Tensor, targets: Tensor, right: Tensor, chunk: int = 1024) -> Tensor:
    """How many wrong targets stand before the best right one, for each query; ties count against the model.

    Args:
        queries: (Q, E); targets: (N, E).
        right: (Q, N) bool, or (Q,) the number of the one right target.
    """
    result = []
    for start in range(0, len(queries), chunk):
        scores = queries[start : start + chunk] @ targets.T  # (chunk, N)
        correct = right[start : start + chunk]
        if correct.ndim == 1:
            correct = correct[:, None] == torch.arange(len(targets))
        result.append(rank_of_best(scores, correct))
    return torch.cat(result)


def rank_of_best(scores: Tensor, correct: Tensor) -> Tensor:
    """How many wrong targets stand before the best right one, in each row of (Q, N) scores; ties count against."""
    best = scores.masked_fill(~correct, float("-inf")).amax(dim=1, keepdim=True)
    return ((scores >= best) & ~correct).sum(dim=1)


def zero_shot(image_embeds: Tensor, class_embeds: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 and top-5 accuracy, shares from 0 to 1. Labels: (I,) the number of each image's class."""
    rank = ranks(image_embeds, class_embeds, labels)
    return {f"zero_shot_top{k}": (rank < k).float().mean().item() for k in (1, 5) if k < len(class_embeds)}


def retrieval(image_embeds: Tensor, text_embeds: Tensor, owner: Tensor) -> dict[str, float]:
    """Recall at 1, 5 and 10 both ways, shares from 0 to 1.

    Args:
        owner: (T,) the number of the image that each caption belongs to; an image may have several captions.
    """
    result = {}
    text_rank = ranks(text_embeds, image_embeds, owner)
    image_rank = torch.cat(
        [
            ranks(image_embeds[start : start + 1024], text_embeds, owner == torch.arange(start, stop)[:, None])
            for start in range(0, len(image_embeds), 1024)
            for stop in (min(start + 1024, len(image_embeds)),)
        ]
    )
    for k in (1, 5, 10):
        result[f"text_to_image_recall_at_{k}"] = (text_rank < k).float().mean().item()
        result[f"image_to_text_recall_at_{k}"] = (image_rank < k).float().mean().item()
    return result


def recall(similarity: Tensor, owner: Tensor) -> dict[str, float]:
    """As `retrieval`, from (I, T) similarities of any kind."""
    right = owner == torch.arange(len(similarity))[:, None]  # (I, T)
    to_images = recalls("text_to_image", rank_of_best(similarity.T, right.T))
    to_texts = recalls("image_to_text", rank_of_best(similarity, right))
    return {name: value for pair in zip(to_images.items(), to_texts.items(), strict=True) for name, value in pair}


def recalls(name: str, rank: Tensor) -> dict[str, float]:
    """Recall at 1, 5 and 10 from each query's rank, shares from 0 to 1."""
    return {f"{name}_recall_at_{k}": (rank < k).float().mean().item() for k in (1, 5, 10)}


class Evaluator:
    """Zero-shot classification, where there are classes, and retrieval, where there are captions, on one data set.

    Args:
        rows: a `datasets.Dataset` whose images are not decoded yet; rows that cannot be used are left out.
        class_column: column of class names, or of labels whose names are `class_names` or the column's own.

    Raises ArgumentError where no row can be used, or a label has no name.
    """

    def __init__(
        self, rows, chooser: CaptionChooser, image_column: str, max_pixels: int, class_column: str | None = None,
        class_names: list[str] | None = None, templates="name", batch_size: int = 256,
    ):  # fmt: skip
        self.source, self.image_column, self.max_pixels = rows, image_column, max_pixels
        self.templates, self.batch_size = templates, batch_size
        self.rows, self.captions, self.owner, labels = [], [], [], []
        for number, row in enumerate(rows):
            try:
                told = any(column in row for column in chooser.caption_column.split(","))
                captions = chooser.captions(row) if told else []
                decode_image(row[image_column], max_pixels)
                if class_column and row[class_column] in (None, -1, ""):
                    raise BadRow("no label")
            except BadRow:
                continue
            self.owner += [len(self.rows)] * len(captions)
            self.captions += captions
            self.rows.append(number)
            labels.append(row[class_column] if class_column else None)
        self.skipped = len(rows) - len(self.rows)
        if not self.rows:
            raise ArgumentError("The evaluation data holds no row that can be used.")
        self.names: list[str] | None = None
        if class_column:
            names = class_names or getattr(rows.features[class_column], "names", None)
            numbers, self.names = number_labels(labels, names, class_column)
            self.labels = torch.tensor(numbers)

    def images(self) -> Iterator:
        for number in self.rows:
            yield decode_image(self.source[number][self.image_column], self.max_pixels)

    def __call__(self, model, processor) -> dict[str, float]:
        """All metrics of a model, in evaluation mode; its mode is put back."""
        training = model.training
        model.eval()
        images, result = embed_images(model, processor, self.images(), self.batch_size), {}
        if self.names:
            classes = embed_classes(model, processor, self.names, self.templates, self.batch_size)
            result = zero_shot(images, classes, self.labels)
        if self.captions:
            texts = embed_texts(model, processor, self.captions, self.batch_size)
            result |= retrieval(images, texts, torch.tensor(self.owner))
        model.train(training)
        return result

    def draw(self, count: int, seed: int) -> tuple[list[int], list]:
        """The numbers of some images, drawn by `seed`, and the images."""
        chosen = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(seed))[:count].tolist()
        return chosen, [decode_image(self.source[self.rows[i]][self.image_column], self.max_pixels) for i in chosen]

    def examples(self, model, processor, count: int = 12, seed: int = 0) -> list[dict]:
        """Some images, drawn by `seed`, with their caption and the model's three best names and their probabilities.

        None where there are no classes.
        """
        if not self.names:
            return []
        chosen, pictures = self.draw(count, seed)
        classes = embed_classes(model, processor, self.names, self.templates, self.batch_size)
        scores = model.logit_scale.exp().item() * embed_images(model, processor, pictures) @ classes.T
        best = scores.softmax(dim=1).topk(min(3, len(self.names)))
        return [
            {
                "image": picture.convert("RGB"),
                "label": self.names[self.labels[i]],
                "predictions": [(self.names[k], p) for p, k in zip(values.tolist(), indices.tolist(), strict=True)],
            }
            for i, picture, values, indices in zip(chosen, pictures, best.values, best.indices, strict=True)
        ]
