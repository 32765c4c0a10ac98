"""Turn rows into samples: skip bad rows, draw a caption, and preprocess the image to a uint8 square."""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision.transforms.v2 import functional as tv

from ...processing.augmentation import PerImage
from ...processing.pictures import MAX_PIXELS
from .rows import BadRow, CaptionChooser, answers_of, label_of, picture_id, picture_of, stable_id, texts_of, unusable

TRIES = 1000  # consecutive bad rows after which loading fails


@dataclass
class Sample:
    """A preprocessed pair; `skipped` lists the bad rows that were skipped before it."""

    pixels: Tensor  # (3, S, S) uint8, or cached features (M, D) of the image tower
    text: str
    caption_id: int
    image_id: int
    skipped: list[tuple[Any, str]] = field(default_factory=list)
    answers: list[tuple[str, float]] | None = None  # VQA: answers and their weights
    label: int | None = None  # NLVR2: 1 if the text is true of both images; pixels are (2, 3, S, S)
    teacher: Tensor | None = None  # (E,) the embedding of the image that the teacher of a distillation has
    turns: tuple[str, ...] | None = None  # what the text answers: a question, or a conversation that ends with one
    place: dict[str, dict] = field(default_factory=dict)  # shards: position of its stream, by stream number


@dataclass(kw_only=True)
class SampleMaker:
    """Make a sample from a row. The random choices depend only on the seed, the epoch and the row.

    Attributes:
        chooser: draws the text.
        per_image: the augmentation, which returns an S x S picture.
        image_column: column with the images.
        max_image_pixels: larger images, in pixels, are refused.
        seed: seed of the random choices.
        cache: preprocessed images by (row key, column); None to preprocess an image each time.
        prompt_column: column with a question that the caption answers; None if there is none.
        history_column: column with the questions and answers before that question, in turn; may be missing or empty.
        teacher_texts: for distillation: turns texts into the teacher's tokens (T, N) or embeddings (T, E).
        same_views: whether all rows of a picture get the same augmentation in an epoch, so that it is encoded once.
    """

    chooser: CaptionChooser
    per_image: PerImage
    image_column: str = "image"
    max_image_pixels: int = MAX_PIXELS
    seed: int = 0
    cache: dict[Any, Tensor] | None = None
    prompt_column: str | None = None
    history_column: str | None = None
    teacher_texts: Callable[[list[str]], Tensor] | None = None
    same_views: bool = False
    last: tuple | None = None  # with same_views: what the last picture was made from, and its pixels

    def __call__(self, row: dict, key: Any, epoch: int) -> Sample:
        # Rows with the same captions get the same text in an epoch, so a batch contains it only once.
        caption_rng = random.Random(f"{self.seed}-{epoch}-{self.chooser.captions(row)}")
        text, caption = self.chooser.choose(row, caption_rng)
        identity = picture_id(row, *self.image_columns)
        view = (self.seed, epoch, identity if self.same_views else key)
        if self.last is None or self.last[0] != view:
            pixels = self.views(row, view[2], "-".join(map(str, view)))
            self.last = (view, pixels) if self.same_views else None
        else:
            pixels = self.last[1]
        sample = Sample(pixels, text, stable_id(caption.lower()), stable_id(identity))
        if self.prompt_column:
            question = next(iter(texts_of(row.get(self.prompt_column))), None)
            if question is None:
                raise BadRow("no question")
            history = texts_of(row.get(self.history_column)) if self.history_column else []
            if len(history) % 2:
                raise BadRow("a question without an answer before the last question")
            sample.turns = (*history, question)
        return sample

    @property
    def image_columns(self) -> tuple[str, ...]:
        """The columns of the images of a sample."""
        return (self.image_column,)

    def views(self, row: dict, key: Any, seed: str) -> Tensor:
        """The preprocessed image of a sample, or several; `seed` determines the augmentation."""
        return self.pixels(row, self.image_column, key, random.Random(seed))

    def pixels(self, row: dict, column: str, key: Any, rng: random.Random) -> Tensor:
        """The preprocessed image of a column.

        Args:
            row: a row of the data set.
            column: the image column.
            key: identifies the row in the cache.
            rng: source of the random choices of the augmentation.

        Returns:
            The image, (3, S, S) uint8.

        Raises:
            BadRow: if the image cannot be used.
        """
        pixels = None if self.cache is None else self.cache.get((key, column))
        if pixels is None:
            image = picture_of(
                row, column, self.max_image_pixels, lambda source, most: self.per_image.read(source, rng, most)
            )
            pixels = tv.pil_to_tensor(image)
            if self.cache is not None:
                self.cache[key, column] = pixels
        return pixels


@dataclass(kw_only=True)
class QuestionMaker(SampleMaker):
    """Make VQA samples: the caption is the question; an answer's weight is the share of people who gave it."""

    answer_column: str = "answers"

    def __call__(self, row: dict, key: Any, epoch: int) -> Sample:
        sample = super().__call__(row, key, epoch)
        answers = answers_of(row, self.answer_column)
        sample.answers = [(answer, count / len(answers)) for answer, count in Counter(answers).items()]
        return sample


@dataclass(kw_only=True)
class ReasoningMaker(SampleMaker):
    """Make NLVR2 samples: two images, and whether the caption is true of them."""

    second_image_column: str = "second_image"
    label_column: str = "label"

    @property
    def image_columns(self) -> tuple[str, ...]:
        return (self.image_column, self.second_image_column)

    def views(self, row: dict, key: Any, seed: str) -> Tensor:
        right = self.pixels(row, self.second_image_column, key, random.Random(f"{seed}-second"))
        return torch.stack([super().views(row, key, seed), right])

    def __call__(self, row: dict, key: Any, epoch: int) -> Sample:
        sample = super().__call__(row, key, epoch)
        sample.label = label_of(row, self.label_column)
        return sample


class PairDataset(Dataset):
    """A map-style data set of pairs. A bad row is replaced by the next good one, so batches keep their size.

    Args:
        rows: rows of a data set.
        maker: makes the sample of a row.
    """

    def __init__(self, rows, maker: SampleMaker):
        # If images are cached in memory, rows are too: reading a row from Arrow takes longer than augmenting it.
        self.rows = list(rows) if maker.cache is not None else rows
        self.maker = maker

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, draw: tuple[int, int]) -> Sample:
        """The sample of a row in an epoch.

        Args:
            draw: (row number, epoch).

        Raises:
            BadDataError: if `TRIES` consecutive rows, or all rows, cannot be used.
        """
        number, epoch = draw
        skipped, example = [], ""
        for attempt in range(min(TRIES, len(self))):
            key = (number + attempt) % len(self)
            try:
                sample = self.maker(self.rows[key], key, epoch)
            except BadRow as error:
                skipped.append((key, str(error)))
                example = example or error.example
                continue
            sample.skipped = skipped
            return sample
        causes = Counter(cause for _, cause in skipped)
        raise unusable(f"{len(skipped)} consecutive rows cannot be used", causes, example)


class DrawSampler(Sampler):
    """Endless sampler that shuffles the rows each epoch and splits them among the processes.

    The order depends only on the seed and the epoch. It yields (row number, epoch).

    Args:
        size: number of rows.
        seed: seed of the order.
        rank: number of this process.
        processes: number of processes.
        start: number of samples that all processes drew before, to resume.
        group_ids: one id per row; rows with equal ids are placed together in runs of up to `group_size`, so that a
            batch contains several images with the same caption. None: no grouping.
        group_size: maximum length of such a run.
    """

    def __init__(self, size: int, seed: int, rank: int = 0, processes: int = 1, start: int = 0,
                 group_ids: list[int] | None = None, group_size: int = 1):  # fmt: skip
        self.size, self.seed, self.rank, self.processes = size, seed, rank, processes
        self.start, self.group_ids, self.group_size = start, group_ids, group_size

    def order(self, epoch: int) -> list[int]:
        """The row numbers of an epoch in their order, for all processes."""
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
