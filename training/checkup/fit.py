"""Find the pairs that fit worst according to a model: candidates for wrong captions."""

import math
from dataclasses import dataclass

import torch
from datasets.utils.py_utils import iter_batched
from torch import Tensor
from tqdm import tqdm

from ...inference import Predictor
from ..data.rows import BadRow, picture_of

MOST_ODDS = 1e-2  # of the row's own captions against the best other caption, for the pair to be reported
BLOCK = 1 << 26  # similarities at a time

# Shapes: P pictures, C distinct captions, E embedding


@dataclass
class Misfit:
    """A pair whose caption fits its picture badly.

    Attributes:
        row: number of the row.
        caption: the caption of the row that fits best.
        odds: how likely that is, compared with `better`, according to the model.
        better: the caption of another row that fits best.
    """

    row: int
    caption: str
    odds: float
    better: str


def embed_rows(predictor: Predictor, rows, numbers: list[int], column: str, max_pixels: int, batch_size: int) -> Tensor:
    """Embed the pictures of rows that can be read: (P, E) of unit length."""
    found = []
    for batch in tqdm(list(iter_batched(numbers, batch_size)), desc="Embeddings", unit="batch"):
        images = []
        for number in batch:
            try:
                images.append(picture_of(rows[number], column, max_pixels))
            except BadRow as error:  # it was readable a moment ago
                raise OSError(f"row {number} can no longer be read: {error}") from error
        found.append(predictor.embed_images(images).float().cpu())
    return torch.cat(found)


def misfits(
    predictor: Predictor, images: Tensor, numbers: list[int], captions: list[list[str]], batch_size: int
) -> list[Misfit]:
    """The pairs in which another caption of the data fits far better than the pair's own, the worst first.

    Args:
        predictor: the model.
        images: (P, E) embeddings of the pictures.
        numbers: row of each picture.
        captions: captions of each row.
        batch_size: texts at a time.
    """
    texts = list(dict.fromkeys(text for number in numbers for text in captions[number]))
    embedded = torch.cat(
        [
            predictor.embed_texts(batch).float().cpu()
            for batch in tqdm(list(iter_batched(texts, batch_size)), desc="Captions", unit="batch")
        ]
    )
    index, found = {text: number for number, text in enumerate(texts)}, []
    most = math.log(MOST_ODDS) * predictor.temperature
    size = max(1, BLOCK // max(1, len(texts)))
    for first in range(0, len(numbers), size):
        similarities = predictor.similarity(images[first : first + size], embedded)  # (block, C)
        for offset, row in enumerate(similarities):
            own = [index[text] for text in captions[numbers[first + offset]]]
            best = max(own, key=lambda number: row[number].item(), default=None)
            if best is None:
                continue
            value = row[best].item()
            row[own] = -torch.inf
            other = int(row.argmax())
            if value - row[other].item() <= most:
                odds = math.exp((value - row[other].item()) / predictor.temperature)
                found.append(Misfit(numbers[first + offset], texts[best], odds, texts[other]))
    return sorted(found, key=lambda each: each.odds)
