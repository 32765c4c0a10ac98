"""The pictures of an evaluation: usable rows, grouped by picture, and divided among the processes.

Rows of one picture, such as one row for each of its captions, are one picture with several texts, so a table gives the
same figures whether it has one caption per row or a list of them.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets.utils.py_utils import iter_batched
from PIL import Image
from tqdm import tqdm

from ...errors import ArgumentError
from ..data.rows import BadRow, answers_of, captions_of, describe, label_of, picture_id, picture_of
from .arguments import EvaluationArguments


@dataclass
class Picture:
    """A picture and its rows.

    Attributes:
        rows: numbers of its rows, in order. texts: the captions (vqa, nlvr: the questions, the sentence) of all of
            them, in order. sources: for each text, the number of its row. label: zero-shot, the number of its class.
    """

    rows: list[int]
    texts: list[str] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    label: int | None = None


@dataclass
class Pictures:
    """The pictures to evaluate on; the list is the same in every process, and each works on its own share.

    Attributes:
        items: all usable pictures, in the order of their first rows. own: numbers of this process' pictures.
        used: usable rows of all processes. skipped: the other rows, counted by cause.
        names: zero-shot, the names of the classes. answers: vqa, answers to rank as well as to generate.
    """

    table: datasets.Dataset
    arguments: EvaluationArguments
    state: PartialState
    items: list[Picture]
    used: int
    skipped: Counter
    names: list[str] | None = None
    answers: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def own(self) -> list[int]:
        return list(range(self.state.process_index, len(self.items), self.state.num_processes))

    def image(self, number: int) -> Image.Image:
        """The image of a picture, as `read_picture` reads it."""
        arguments = self.arguments
        return picture_of(self.table[self.items[number].rows[0]], arguments.image_column, arguments.max_image_pixels)

    def draw(self, count: int, seed: int) -> list[int]:
        """Numbers of some pictures, drawn at random by the seed."""
        return torch.randperm(len(self.items), generator=torch.Generator().manual_seed(seed))[:count].tolist()

    def batches(self, items: list, text: str) -> Iterator[list]:
        """Batches of this process' work, with a progress bar in the main process."""
        batches = list(iter_batched(items, self.arguments.batch_size))
        yield from tqdm(batches, desc=text, disable=not self.state.is_main_process, leave=False)

    def gather(self, found: list[tuple]) -> list[tuple]:
        """(key, ...) of all processes, ordered by their keys."""
        return sorted(gather_object(found), key=lambda item: item[0])


def find_pictures(
    table: datasets.Dataset, arguments: EvaluationArguments, state: PartialState,
    labels: list[int | None] | None = None, names: list[str] | None = None,
) -> Pictures:  # fmt: skip
    """Check the rows, each in one process, and group the usable ones by picture.

    Args:
        table: rows whose images are not decoded yet.
        labels: zero-shot, the number of each row's class, None if it has none; names: of the classes.

    Raises:
        ArgumentError: if no row is usable.
    """
    table = table.select(range(min(len(table), arguments.max_samples or len(table))))
    found, skipped = [], Counter()
    for number in range(state.process_index, len(table), state.num_processes):
        row = table[number]
        try:
            picture_of(row, arguments.image_column, arguments.max_image_pixels)
            found.append((number, *key_and_texts(row, number, arguments, labels)))
        except BadRow as error:
            skipped[str(error)] += 1
    found = sorted(gather_object(found), key=lambda item: item[0])
    skipped = sum(gather_object([skipped]), Counter())
    if not found:
        raise ArgumentError(f"The evaluation data has no usable row: {describe(skipped)}.")
    pictures: dict[tuple, Picture] = {}
    for number, key, texts in found:
        picture = pictures.setdefault(key, Picture([], label=None if labels is None else labels[number]))
        picture.rows.append(number)
        picture.texts += texts
        picture.sources += [number] * len(texts)
    return Pictures(table, arguments, state, list(pictures.values()), len(found), skipped, names)


def key_and_texts(
    row: dict, number: int, arguments: EvaluationArguments, labels: list[int | None] | None
) -> tuple[tuple, list[str]]:
    """What rows of one picture have in common, and the texts of a row. Raises BadRow if the task cannot use it."""
    identity, task = picture_id(row, arguments.image_column), arguments.task
    if task == "zero-shot":
        if labels is None or labels[number] is None:
            raise BadRow("no label")
        return (identity, labels[number]), []
    texts = captions_of(row, arguments.caption_column)
    if task == "vqa":
        answers_of(row, arguments.answer_column)
    if task == "nlvr":
        picture_of(row, arguments.second_image_column, arguments.max_image_pixels)
        label_of(row, arguments.label_column)
        return (identity, number), texts
    return (identity,), texts
