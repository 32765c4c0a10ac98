"""What a row of a data set holds: its picture, its captions, answers and labels, and what is wrong with it."""

import os
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

from PIL import Image

from ...processing.pictures import MAX_PIXELS, PictureError, read_picture
from ...processing.prompts import TEMPLATES, prompts_for
from ..arguments import TrainingArguments


class BadRow(ValueError):
    """A row that cannot be used; the message is the cause, and bad rows are counted by cause."""


def picture_of(row: dict, column: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture in a column, as `read_picture` reads it. Raises BadRow, with the cause, if it cannot be read."""
    try:
        return read_picture(row.get(column), max_pixels)
    except PictureError as error:
        raise BadRow(str(error)) from None


def texts_of(value: Any) -> list[str]:
    """What a cell holds that is more than white space: a text, or a list of them."""
    values = value if isinstance(value, list) else [value]
    return [text.strip() for text in values if isinstance(text, str) and text.strip()]


def captions_of(row: dict, columns: str) -> list[str]:
    """All captions of a row, of one column or several joined by commas. Raises BadRow if there is none."""
    captions = [text for column in columns.split(",") for text in texts_of(row.get(column))]
    if not captions:
        raise BadRow("empty caption")
    return captions


def picture_id(row: dict, image_column: str) -> str:
    """What identifies a picture: its `image_id`, else its file's path, else its bytes, the latter two as hashes.

    Rows with the same identity are rows of one picture, whose captions are all right for it.
    """
    if row.get("image_id") is not None:
        return str(row["image_id"])
    source = row[image_column]
    if isinstance(source, dict):
        source = source.get("bytes") or source.get("path")
    if isinstance(source, bytes):
        return f"bytes:{blake2b(source, digest_size=16).hexdigest()}"
    return f"path:{blake2b(os.fspath(source).encode(errors='surrogatepass'), digest_size=16).hexdigest()}"


@dataclass(kw_only=True)
class CaptionChooser:
    """What is read to the model for an image: one of its captions, at times keywords, at times in a template.

    Columns and templates may be several, joined by commas: those of one language after those of another, in the same
    order. A caption's keywords and template are then those of its own language.
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
        """The chooser of the language whose columns stand at a place."""
        columns = {name: getattr(self, name).split(",") for name in ("caption_column", "tag_column", "templates")
                   if getattr(self, name)}  # fmt: skip
        return replace(self, **{name: values[min(number, len(values) - 1)] for name, values in columns.items()})

    def choose(self, row: dict, rng: random.Random) -> tuple[str, str]:
        """The text to read, and the caption that it stands for; of several languages, one is drawn first."""
        columns = self.caption_column.split(",")
        if len(columns) > 1:
            told = [number for number, column in enumerate(columns) if texts_of(row.get(column))]
            return self.in_one_language(rng.choice(told)).choose(row, rng)
        caption = text = rng.choice(self.captions(row))
        tags = row.get(self.tag_column) if self.tag_share else None
        tags = tags.split(",") if isinstance(tags, str) else tags or []
        tags = [tag.strip() for tag in tags if tag and tag.strip()]
        if tags and rng.random() < self.tag_share:
            some = ", ".join(rng.sample(tags, rng.randint(1, min(4, len(tags)))))
            text = some if rng.random() < 0.5 else f"{caption}, {some}"
        if self.template_share and rng.random() < self.template_share:
            text = rng.choice(TEMPLATES[self.templates]).format(text)
        return text, caption


def stable_id(value: Any) -> int:
    """The same 63-bit integer for the same value, in every process and run."""
    return int.from_bytes(blake2b(str(value).encode(errors="surrogatepass"), digest_size=8).digest(), "big") >> 1


def answers_of(row: dict, column: str) -> list[str]:
    """The answers to a row's question. Raises BadRow where there is none."""
    answers = texts_of(row.get(column))
    if not answers:
        raise BadRow("no answer")
    return answers


def label_of(row: dict, column: str) -> int:
    """1 where a row says true, 0 where false. Raises BadRow where it says neither."""
    value = str(row.get(column)).strip().lower()
    if value not in ("1", "0", "true", "false"):
        raise BadRow("no label")
    return int(value in ("1", "true"))


def describe(causes: Counter) -> str:
    return ", ".join(f"{cause}: {count}" for cause, count in causes.most_common()) or "none"


def caption_texts(rows, chooser: CaptionChooser) -> Iterator[str]:
    """Every caption, keyword list and template, to train a tokenizer on."""
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
            tags = row[chooser.tag_column] or []
            yield tags if isinstance(tags, str) else ", ".join(tag for tag in tags if tag)
        if chooser.template_share:
            yield from prompts_for(captions[:1], chooser.templates)[0]


def make_chooser(arguments: TrainingArguments) -> CaptionChooser:
    return CaptionChooser(
        caption_column=arguments.caption_column,
        tag_column=arguments.tag_column,
        tag_share=arguments.tag_share,
        templates=arguments.templates,
        template_share=arguments.template_share,
    )
