"""Prepare the pictures of an evaluation: group usable rows by picture and divide them among the processes.

Several rows with the same picture, such as one row per caption, become one picture with several texts. The results are
therefore the same whether a table has one caption per row or a list of captions.
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

from ..data.rows import BadRow, answers_of, captions_of, label_of, picture_id, picture_of, unusable
from .arguments import EvaluationArguments


@dataclass
class Picture:
    """A picture and its rows.

    Attributes:
        rows: row numbers, in order.
        texts: the captions of all rows, in order (vqa: the questions; nlvr: the sentences; composition: the first
            caption of each row).
        sources: the row number of each text.
        label: the class index, of tasks that have classes; None for others.
    """

    rows: list[int]
    texts: list[str] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    label: int | None = None


@dataclass
class Pictures:
    """The pictures to evaluate on. The list is the same in every process; each process works on its own share.

    Attributes:
        table: the rows, with undecoded images.
        arguments: the options of the evaluation.
        state: the process state of accelerate.
        items: all usable pictures, in the order of their first rows.
        used: number of usable rows.
        skipped: number of unusable rows by cause.
        names: the class names, of tasks that have classes; None for others.
        answers: vqa: candidate answers to rank in addition to generating one; may be empty.
        train, validation: linear-probe, few-shot: the pictures that the classifier learns from; None for other tasks,
            and for data without a validation split.
    """

    table: datasets.Dataset
    arguments: EvaluationArguments
    state: PartialState
    items: list[Picture]
    used: int
    skipped: Counter
    names: list[str] | None = None
    answers: list[str] = field(default_factory=list)
    train: "Pictures | None" = None
    validation: "Pictures | None" = None

    def __len__(self) -> int:
        return len(self.items)

    @property
    def own(self) -> list[int]:
        """The indices of this process's pictures."""
        return list(range(self.state.process_index, len(self.items), self.state.num_processes))

    @property
    def own_texts(self) -> list[tuple[int, int]]:
        """The keys of this process's texts: the index of the picture, and the position among its texts."""
        return [(number, position) for number in self.own for position in range(len(self.items[number].texts))]

    def text_of(self, key: tuple[int, int]) -> str:
        """The text of a key."""
        return self.items[key[0]].texts[key[1]]

    def row_of(self, key: tuple[int, int]) -> int:
        """The row number of a key's text."""
        return self.items[key[0]].sources[key[1]]

    def image(self, number: int) -> Image.Image:
        """Read a picture, given its index in `items`."""
        arguments = self.arguments
        return picture_of(self.table[self.items[number].rows[0]], arguments.image_column, arguments.max_image_pixels)

    def pair(self, key: tuple[int, int]) -> tuple[Image.Image, Image.Image]:
        """Read the two pictures, left and right, that the text of a key is about."""
        row, arguments = self.table[self.row_of(key)], self.arguments
        left, right = (
            picture_of(row, column, arguments.max_image_pixels)
            for column in (arguments.image_column, arguments.second_image_column)
        )
        return left, right

    def draw(self, count: int, seed: int) -> list[int]:
        """Draw `count` random indices of pictures, or all if there are fewer."""
        return torch.randperm(len(self.items), generator=torch.Generator().manual_seed(seed))[:count].tolist()

    def batches(self, items: list, text: str) -> Iterator[list]:
        """Split items into batches, with a progress bar in the main process.

        Args:
            items: what this process works on.
            text: description of the progress bar.
        """
        batches = list(iter_batched(items, self.arguments.batch_size))
        yield from tqdm(batches, desc=text, disable=not self.state.is_main_process, leave=False)

    def gather(self, found: list[tuple]) -> list[tuple]:
        """Gather tuples (key, ...) from all processes, sorted by key."""
        return gather_sorted(found)


def gather_sorted(found: list[tuple]) -> list[tuple]:
    """Gather tuples (key, ...) from all processes, sorted by key."""
    return sorted(gather_object(found), key=lambda item: item[0])


def find_pictures(
    table: datasets.Dataset, arguments: EvaluationArguments, state: PartialState,
    labels: list[int | None] | None = None, names: list[str] | None = None,
) -> Pictures:  # fmt: skip
    """Check the rows, divided among the processes, and group the usable ones by picture.

    Args:
        table: rows with undecoded images.
        arguments: the options of the evaluation.
        state: the process state of accelerate.
        labels: the class index of each row, None if it has none; None for tasks without classes.
        names: the class names.

    Returns:
        The usable pictures, the same in every process.

    Raises:
        BadDataError: if no row is usable.
    """
    table = table.select(range(min(len(table), arguments.max_samples or len(table))))
    found, skipped, examples = [], Counter(), []
    for number in range(state.process_index, len(table), state.num_processes):
        row = table[number]
        try:
            picture_of(row, arguments.image_column, arguments.max_image_pixels)
            found.append((number, *key_and_texts(row, number, arguments, labels)))
        except BadRow as error:
            skipped[str(error)] += 1
            examples.append((number, error.example))
    found = gather_sorted(found)
    skipped = sum(gather_object([skipped]), Counter())
    if not found:
        example = next((text for _, text in examples if text), "")
        raise unusable("The evaluation data has no usable row", skipped, example)
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
    """The key that a picture's rows share, and the texts of a row.

    Args:
        row: a row of the table.
        number: its number.
        arguments: the options of the evaluation.
        labels: the class index of each row; None for tasks without classes.

    Raises:
        BadRow: if the task cannot use the row.
    """
    task, others = arguments.task, [arguments.second_image_column] if arguments.task == "nlvr" else []
    identity = picture_id(row, arguments.image_column, *others)
    if labels is not None:
        if labels[number] is None:
            raise BadRow("no label")
        return (identity, labels[number]), []
    texts = captions_of(row, arguments.caption_column)
    if task == "vqa":
        answers_of(row, arguments.answer_column)
    if task == "composition":
        captions_of(row, arguments.wrong_column)
        texts = texts[:1]
    if task == "nlvr":
        picture_of(row, arguments.second_image_column, arguments.max_image_pixels)
        label_of(row, arguments.label_column)
    return (identity,), texts
