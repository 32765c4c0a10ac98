"""From rows to samples: bad rows are skipped and counted, one caption is drawn, images become uint8 squares."""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision.transforms.v2 import functional as tv

from ...errors import BadDataError
from ...processing.augmentation import PerImage
from ...processing.pictures import MAX_PIXELS
from .rows import BadRow, CaptionChooser, answers_of, describe, label_of, picture_id, picture_of, stable_id

TRIES = 1000  # rows in a row that may be bad before the data is given up


@dataclass
class Sample:
    """One pair, ready for a batch; `skipped` names the bad rows that were met on the way to it."""

    pixels: Tensor  # (3, S, S) uint8, or what an image tower gave before, (M, D)
    text: str
    caption_id: int
    image_id: int
    skipped: list[tuple[Any, str]] = field(default_factory=list)
    answers: list[tuple[str, float]] | None = None  # of a question, with their weights
    label: int | None = None  # whether the text is true of two images; pixels are then (2, 3, S, S)
    place: dict[str, dict] = field(default_factory=dict)  # where a stream of shards is after it, by the stream's number


@dataclass(kw_only=True)
class SampleMaker:
    """Row -> Sample. The random choices depend on the seed, the epoch and the row alone."""

    chooser: CaptionChooser
    per_image: PerImage
    image_column: str = "image"
    max_image_pixels: int = MAX_PIXELS
    seed: int = 0
    cache: dict[Any, Tensor] | None = None

    def __call__(self, row: dict, key: Any, epoch: int) -> Sample:
        # Rows with the same captions get the same text in an epoch: a batch then holds it once.
        caption_rng = random.Random(f"{self.seed}-{epoch}-{self.chooser.captions(row)}")
        text, caption = self.chooser.choose(row, caption_rng)
        rng = random.Random(f"{self.seed}-{epoch}-{key}")
        pixels = self.pixels(row, self.image_column, key, rng)
        return Sample(pixels, text, stable_id(caption.lower()), stable_id(picture_id(row, self.image_column)))

    def pixels(self, row: dict, column: str, key: Any, rng: random.Random) -> Tensor:
        """(3, S, S) uint8 of the image in a column. Raises BadRow where it cannot be used."""
        pixels = None if self.cache is None else self.cache.get((key, column))
        if pixels is None:
            image = picture_of(row, column, self.max_image_pixels)
            pixels = tv.pil_to_tensor(self.per_image(image, rng))
            if self.cache is not None:
                self.cache[key, column] = pixels
        return pixels


@dataclass(kw_only=True)
class QuestionMaker(SampleMaker):
    """Row -> Sample of a question (VQA): its caption asks, and each answer weighs as often as it was given."""

    answer_column: str = "answers"

    def __call__(self, row: dict, key: Any, epoch: int) -> Sample:
        sample = super().__call__(row, key, epoch)
        answers = answers_of(row, self.answer_column)
        sample.answers = [(answer, count / len(answers)) for answer, count in Counter(answers).items()]
        return sample


@dataclass(kw_only=True)
class ReasoningMaker(SampleMaker):
    """Row -> Sample of two images and whether its caption is true of them (NLVR2)."""

    second_image_column: str = "second_image"
    label_column: str = "label"

    def __call__(self, row: dict, key: Any, epoch: int) -> Sample:
        sample = super().__call__(row, key, epoch)
        rng = random.Random(f"{self.seed}-{epoch}-{key}-second")
        sample.pixels = torch.stack([sample.pixels, self.pixels(row, self.second_image_column, key, rng)])
        sample.label = label_of(row, self.label_column)
        return sample


class PairDataset(Dataset):
    """Pairs by number. A bad row is replaced by the next good one, so that batches keep their size."""

    def __init__(self, rows, maker: SampleMaker):
        # Where images are kept in memory, rows are too: to read one from Arrow takes longer than to augment it.
        self.rows = list(rows) if maker.cache is not None else rows
        self.maker = maker

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, draw: tuple[int, int]) -> Sample:
        """Sample of (row number, epoch)."""
        number, epoch = draw
        skipped = []
        for attempt in range(min(TRIES, len(self))):
            key = (number + attempt) % len(self)
            try:
                sample = self.maker(self.rows[key], key, epoch)
            except BadRow as error:
                skipped.append((key, str(error)))
                continue
            sample.skipped = skipped
            return sample
        causes = Counter(cause for _, cause in skipped)
        raise BadDataError(f"{len(skipped)} rows in a row cannot be used: {describe(causes)}.")


class DrawSampler(Sampler):
    """Rows in a new order each epoch, the same on every machine, dealt out to the processes; it never ends.

    Args:
        group_ids: rows with equal ids stand together in runs of up to `group_size`, so that a batch holds several
            images of the same caption.
        start: draws that were made before, by all processes together (to resume).
    """

    def __init__(self, size: int, seed: int, rank: int = 0, processes: int = 1, start: int = 0,
                 group_ids: list[int] | None = None, group_size: int = 1):  # fmt: skip
        self.size, self.seed, self.rank, self.processes = size, seed, rank, processes
        self.start, self.group_ids, self.group_size = start, group_ids, group_size

    def order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * epoch)
        order = torch.randperm(self.size, generator=generator).tolist()
        if self.group_ids is None or self.group_size == 1:
            return order
        members: dict[int, list[int]] = {}
        for number in order:
            members.setdefault(self.group_ids[number], []).append(number)
        runs = [
            rows[i : i + self.group_size] for rows in members.values() for i in range(0, len(rows), self.group_size)
        ]
        shuffled = torch.randperm(len(runs), generator=generator).tolist()
        return [number for run in shuffled for number in runs[run]]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        position, epoch, order = self.start + self.rank, -1, []
        while True:
            if position // self.size != epoch:
                epoch = position // self.size
                order = self.order(epoch)
            yield order[position % self.size], epoch
            position += self.processes
