"""Read the picture, captions, answers and label of a row, and report bad rows."""

import contextlib
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from ...errors import BadDataError, printable
from ...processing.pictures import MAX_PIXELS, PictureError, content_of, read_picture
from ...processing.prompts import TEMPLATES, prompts_for
from ..arguments import TrainingArguments

MOST_ENTRIES = 100_000  # files and folders that are looked through for one that is missing
TEXT_FIELDS = ("answer", "caption", "raw", "text", "sentence")  # of a caption or an answer that is an object


class BadRow(ValueError):
    """A row that cannot be used. The message is the cause; bad rows are counted by cause.

    Attributes:
        example: what was tried, such as the path of a missing file; "" if the cause says it all.
    """

    def __init__(self, cause: str, example: str = ""):
        super().__init__(cause)
        self.example = example


DOWNLOAD = (
    "pictures are not downloaded in training; download them once into shards: img2dataset --url_list TABLE "
    "--input_format csv --url_col URL_COLUMN --caption_col CAPTION_COLUMN --output_format webdataset --output_folder "
    "shards --image_size 384, then --dataset_name 'shards/{00000..00009}.tar'"
)
ADVICE = {
    "missing image file": "paths start from the folder of the data, or from --image_root",
    "a URL, which is not downloaded": DOWNLOAD,
    "a class number without a name": "name the classes with --class_names",
    "empty caption": "choose the column with --caption_column",
    "no image": "choose the column with --image_column",
    "no answer": "choose the column with --answer_column",
    "no label": "labels are 0, 1, true or false, or the names of classes",
}


def unusable(what: str, causes: Counter, example: str = "") -> BadDataError:
    """The error for rows of which none can be used.

    Args:
        what: which rows, such as "10 consecutive rows cannot be used".
        causes: the number of rows for each cause.
        example: the first thing that was tried, such as the path of a file.
    """
    first = f" The first: {printable(example, 160)}." if example else ""
    cause = next((cause for cause, _ in causes.most_common() if cause in ADVICE), None)
    advice = f" Advice: {ADVICE[cause]}." if cause else ""
    if cause == "missing image file" and (root := root_of(example)) is not None:
        advice = f" It would be found with --image_root {printable(root, 160)}."
    return BadDataError(f"{what}: {describe(causes)}.{first}{advice}")


def root_of(missing: str, tried: str | None = None) -> Path | None:
    """The folder to start paths from so that a missing file is found: its name is looked for near by.

    Args:
        missing: path that was tried.
        tried: the folder that paths started from, if that is known.

    Returns:
        The folder; None if there is no such file in the nearest folder that exists, below it or, if paths started from
        it, in one beside it.
    """
    path, entries = Path(missing), 0
    if not path.is_absolute():
        return None
    near = next(parent for parent in path.parents if parent.is_dir())
    if near == Path(near.anchor):
        return None
    for place, folders, files in os.walk(near):
        folders.sort()
        if path.name in files:
            found = Path(place, path.name).parts
            same = (
                next(n for n in range(1, len(found) + 1) if n == len(path.parts) or found[-n:] != path.parts[-n:]) - 1
            )
            return Path(*found[: len(found) - same])
        entries += len(folders) + len(files)
        if entries > MOST_ENTRIES:
            break
    if tried and near == Path(os.path.abspath(tried)):
        with contextlib.suppress(OSError):
            for folder in sorted(islice(near.parent.iterdir(), MOST_ENTRIES)):
                if os.path.isfile(folder / path.relative_to(near)):
                    return folder
    return None


def picture_of(
    row: dict, column: str, max_pixels: int = MAX_PIXELS, read: Callable[[Any, int], Image.Image] = read_picture
) -> Image.Image:
    """Read the picture of a row.

    Args:
        row: a row of the data set.
        column: the image column.
        max_pixels: larger pictures, in pixels, are refused as decompression bombs.
        read: reads a picture of at most so many pixels, and raises PictureError if it cannot.

    Returns:
        What `read` returned.

    Raises:
        BadRow: if it cannot be read.
    """
    try:
        return read(row.get(column), max_pixels)
    except PictureError as error:
        source = content_of(row.get(column))
        raise BadRow(str(error), "" if source is None or isinstance(source, bytes) else str(source)) from None


def texts_of(value: Any) -> list[str]:
    """The non-empty texts of a cell, without surrounding white space.

    The cell holds a text, an object with a text, such as VQAv2's answers, or a list of these.
    """
    values = value if isinstance(value, list) else [value]
    values = [
        next((each[field] for field in TEXT_FIELDS if field in each), None) if isinstance(each, dict) else each
        for each in values
    ]
    # A lone half of a surrogate pair, which JSON may contain, is no character; tokenizers refuse it.
    texts = (text.encode("utf-8", "replace").decode().strip() for text in values if isinstance(text, str))
    return [text for text in texts if text]


def texts_in(row: dict, columns: str) -> list[str]:
    """All texts of a row, from one column or several joined by commas."""
    return [text for column in columns.split(",") for text in texts_of(row.get(column))]


def captions_of(row: dict, columns: str) -> list[str]:
    """All captions of a row, from one column or several joined by commas. Raises BadRow if there is none."""
    captions = texts_in(row, columns)
    if not captions:
        raise BadRow("empty caption")
    return captions


def picture_id(row: dict, *image_columns: str) -> str:
    """The identity of a row's picture or pictures. All captions of rows with the same identity describe the same ones.

    Args:
        row: a row of the data set; its images are paths, bytes, or {"bytes": ..., "path": ...}.
        image_columns: the image columns.

    Returns:
        The row's `image_id` if it has one, for the first image; otherwise, and for the others, a hash of its bytes if
        they are in the row, or of its path.
    """
    first, *others = image_columns
    identity = str(row["image_id"]) if row.get("image_id") is not None else content_id(row.get(first))
    return " ".join([identity, *(content_id(row.get(column)) for column in others)])


def content_id(image: Any) -> str:
    """A hash of an image's bytes if they are given, or of its path."""
    source = content_of(image)
    if isinstance(source, bytes):
        return f"bytes:{blake2b(source, digest_size=16).hexdigest()}"
    if not isinstance(source, (str, os.PathLike)):
        return f"other:{stable_id(source)}"
    return f"path:{blake2b(os.fspath(source).encode(errors='surrogatepass'), digest_size=16).hexdigest()}"


@dataclass(kw_only=True)
class CaptionChooser:
    """Choose the training text of an image: one of its captions, sometimes with keywords, sometimes in a template.

    For several languages, the column and template names of each language are joined by commas, in the same order. A
    caption is then combined with keywords and templates of its own language only.

    Attributes:
        caption_column: column with the captions.
        tag_column: column with the keywords; None if there is none.
        tag_share: share of texts (0 to 1) with keywords.
        templates: name of the templates (see `processing.prompts`).
        template_share: share of texts (0 to 1) that are put into a template.
    """

    caption_column: str = "caption"
    tag_column: str | None = None
    tag_share: float = 0.0
    templates: str = "name"
    template_share: float = 0.0

    def captions(self, row: dict) -> list[str]:
        """All captions of a row. Raises BadRow if there is none."""
        return captions_of(row, self.caption_column)

    def in_one_language(self, number: int) -> "CaptionChooser":
        """The chooser for one language, given its position in the column names."""
        columns = {name: getattr(self, name).split(",") for name in ("caption_column", "tag_column", "templates")
                   if getattr(self, name)}  # fmt: skip
        return replace(self, **{name: values[min(number, len(values) - 1)] for name, values in columns.items()})

    def choose(self, row: dict, rng: random.Random) -> tuple[str, str]:
        """Draw the text of an image. If there are several languages, one with a caption is drawn first.

        Args:
            row: a row of the data set.
            rng: source of the random choices.

        Returns:
            The text, and the caption that it was made from.

        Raises:
            BadRow: if the row has no caption.
        """
        columns = self.caption_column.split(",")
        if len(columns) > 1:
            available = [number for number, column in enumerate(columns) if texts_of(row.get(column))]
            return self.in_one_language(rng.choice(available)).choose(row, rng)
        caption = text = rng.choice(self.captions(row))
        tags = row.get(self.tag_column) if self.tag_share else None
        tags = texts_of(tags.split(",") if isinstance(tags, str) else tags)
        if tags and rng.random() < self.tag_share:
            some = ", ".join(rng.sample(tags, rng.randint(1, min(4, len(tags)))))
            text = some if rng.random() < 0.5 else f"{caption}, {some}"
        if self.template_share and rng.random() < self.template_share:
            text = rng.choice(TEMPLATES[self.templates]).format(text)
        return text, caption


def stable_id(value: Any) -> int:
    """A 63-bit hash of a value that is the same in every process and run."""
    return int.from_bytes(blake2b(str(value).encode(errors="surrogatepass"), digest_size=8).digest(), "big") >> 1


def answers_of(row: dict, column: str) -> list[str]:
    """The answers to a row's question. Raises BadRow if there is none."""
    answers = texts_of(row.get(column))
    if not answers:
        raise BadRow("no answer")
    return answers


def label_of(row: dict, column: str) -> int:
    """The label of a row: 1 for true, 0 for false. Raises BadRow if it is neither."""
    value = str(row.get(column)).strip().lower()
    if value not in ("1", "0", "true", "false"):
        raise BadRow("no label")
    return int(value in ("1", "true"))


def describe(causes: Counter) -> str:
    """Causes with their counts as text, most frequent first; "none" if there are none."""
    return ", ".join(f"{cause}: {count}" for cause, count in causes.most_common()) or "none"


def caption_texts(rows, chooser: CaptionChooser) -> Iterator[str]:
    """The texts to train a tokenizer on: captions, keyword lists and filled-in templates.

    Args:
        rows: rows of a data set; rows without a caption are skipped.
        chooser: the columns and templates to use.

    Returns:
        An iterator over the texts.
    """
    count = len(chooser.caption_column.split(","))
    if count > 1:
        for number in range(count):
            yield from caption_texts(rows, chooser.in_one_language(number))
        return
    columns = [chooser.caption_column] + ([chooser.tag_column] if chooser.tag_share else [])
    for row in rows.select_columns(columns):
        try:
            captions = chooser.captions(row)
        except BadRow:
            continue
        yield from captions
        if chooser.tag_share:
            yield ", ".join(texts_of(row[chooser.tag_column]))
        if chooser.template_share:
            yield from prompts_for(captions[:1], chooser.templates)[0]


def make_chooser(arguments: TrainingArguments) -> CaptionChooser:
    """The CaptionChooser that the training options describe."""
    return CaptionChooser(
        caption_column=arguments.caption_column,
        tag_column=arguments.tag_column,
        tag_share=arguments.tag_share,
        templates=arguments.templates,
        template_share=arguments.template_share,
    )
