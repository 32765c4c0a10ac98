"""Look at every picture of a data set once: whether it can be read, its size, and what identifies it."""

import dataclasses
import io
import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ...processing.pictures import content_of, read_picture, to_rgb
from ..arguments import MAX_PIXELS, check_values, option, require_at_least_one
from .rows import BadRow, picture_of, root_of

SMALL = 16  # cells a side of the small picture that near duplicates are found with
THUMBNAIL = 96  # pixels of the longer side
CHUNK = 64  # rows that a process takes at a time

# Shapes: P pictures


@dataclass(kw_only=True)
class CheckArguments:
    """Options of the check-up of a data set."""

    dataset_name: str | None = option(None, "data to check, as --dataset_name of training; not shards")
    dataset_config_name: str | None = option(None, "configuration of a hub data set")
    train_split: str = option("train", "split to train on")
    eval_dataset_name: str | None = option(None, "data to evaluate on; the same data if only --eval_split is given")
    eval_split: str | None = option(
        None,
        "split to evaluate on, which is searched for pictures of the training data; test or validation, if there is "
        "one, if not given",
    )
    image_column: str = option("image", "column with the images or their paths")
    caption_column: str = option("caption", "column with the captions, or several, joined by commas")
    image_root: str | None = option(None, "folder that image paths start from; that of the data file if not given")
    eval_image_root: str | None = option(
        None, "folder that the image paths of the evaluation data start from; --image_root if not given"
    )
    encoding: str | None = option(None, "encoding of a table, such as cp1252; UTF-8 if not given")
    max_image_pixels: int = option(MAX_PIXELS, "larger images, in pixels, count as decompression bombs")
    model: str | None = option(
        None,
        "folder or hub name of a CLIP or BLIP, to find the pairs that fit worst and pictures that look alike to it",
    )
    tokenizer_name: str | None = option(
        None, "tokenizer to count tokens with; that of --model, or else one that is trained on the captions"
    )
    max_length: int = option(77, "maximum number of tokens that training will use")
    vocab_size: int = option(49408, "vocabulary size of a tokenizer that is trained on the captions")
    measure: bool = option(True, "measure the speed of training on this machine, with the recipe that is recommended")
    num_workers: int | None = option(None, "processes that read pictures; one per CPU core if not given")
    num_threads: int | None = option(None, "CPU threads to compute with; one per CPU core if not given")
    batch_size: int = option(64, "with --model: pictures or texts at a time")
    output_dir: str | None = option(None, "folder for the report; runs/check if not given")

    def __post_init__(self):
        check_values(self)
        require_at_least_one(self, "max_length", "batch_size", "max_image_pixels", "num_threads")


@dataclass
class PictureFacts:
    """What is known of the picture of a row.

    Attributes:
        cause: why it cannot be read; None if it can.
        example: what was tried, such as the path of a missing file.
        width, height: size in pixels, upright.
        format: such as "JPEG".
        bytes: size of the file.
        digest: hash of the file's content; equal for identical files.
        small: (384,) uint8, see `fingerprint`.
    """

    cause: str | None = None
    example: str = ""
    width: int = 0
    height: int = 0
    format: str = ""
    bytes: int = 0
    digest: bytes = b""
    small: np.ndarray | None = None


def facts_of(row: dict, column: str, max_pixels: int) -> PictureFacts:
    """Read the picture of a row. JPEGs are decoded at a fraction of their size."""
    facts = PictureFacts()
    source = content_of(row.get(column))
    try:
        if isinstance(source, bytes):
            content = source
        elif isinstance(source, (str, os.PathLike)) and os.path.isfile(source):
            with open(source, "rb") as file:
                content = file.read()
        else:
            content = None
        if content:
            facts.bytes, facts.digest = len(content), blake2b(content, digest_size=16).digest()
            with Image.open(io.BytesIO(content)) as opened:
                facts.format = opened.format or ""
    except Exception:  # the reason is found below
        content = None
    sizes: list[tuple[int, int]] = []

    def enough(width: int, height: int) -> float:
        sizes.append((width, height))
        return 4 * SMALL / min(width, height)

    try:
        image = to_rgb(
            picture_of({column: content or source}, column, max_pixels, lambda s, most: read_picture(s, most, enough))
        )
    except BadRow as error:
        place = error.example or (str(source) if isinstance(source, (str, os.PathLike)) else "")
        return dataclasses.replace(facts, cause=str(error), example=place)
    facts.width, facts.height = sizes[0] if sizes else image.size
    facts.small = fingerprint(image)
    return facts


def fingerprint(image: Image.Image) -> np.ndarray:
    """The picture in small, which changes little if it is resized or compressed.

    Args:
        image: an RGB image.

    Returns:
        (384,) uint8: the brightness of 16 x 16 cells, and two colour differences (YCbCr) of 8 x 8 cells.
    """
    small = np.asarray(image.resize((SMALL, SMALL), Image.Resampling.BOX, reducing_gap=2.0).convert("YCbCr"))
    colours = small[..., 1:].reshape(SMALL // 2, 2, SMALL // 2, 2, 2).mean(axis=(1, 3))
    return np.concatenate([small[..., 0].flatten(), colours.round().astype(np.uint8).flatten()])


# --- all rows, in several processes -----------------------------------------------------------------------------------

_shared: dict[str, Any] = {}  # what the processes inherit


def survey(rows, column: str, max_pixels: int, processes: int, what: str = "Pictures") -> list[PictureFacts]:
    """Read the pictures of all rows.

    Args:
        rows: rows of a data set.
        column: the image column.
        max_pixels: larger pictures are refused.
        processes: number of processes.
        what: label of the progress bar.

    Returns:
        The facts of each row.
    """
    _shared.update(rows=rows.select_columns([column]), column=column, max_pixels=max_pixels)
    starts = range(0, len(rows), CHUNK)
    with tqdm(total=len(rows), desc=what, unit=" pictures") as bar:
        found: list[PictureFacts] = []
        for part in parts(starts, processes):
            found += part
            bar.update(len(part))
    return found


def parts(starts: range, processes: int) -> Iterator[list[PictureFacts]]:
    if processes <= 1 or len(starts) < 2 or "fork" not in multiprocessing.get_all_start_methods():
        yield from map(chunk, starts)
        return
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        yield from pool.imap(chunk, starts)


def chunk(start: int) -> list[PictureFacts]:
    """The facts of CHUNK rows from `start` on."""
    rows, column = _shared["rows"], _shared["column"]
    values = rows[start : start + CHUNK][column]
    return [facts_of({column: value}, column, _shared["max_pixels"]) for value in values]


def thumbnail(row: dict, column: str, max_pixels: int) -> Image.Image | None:
    """A small version of a row's picture; None if it cannot be read."""
    try:
        image = to_rgb(picture_of(row, column, max_pixels)).copy()
    except BadRow:
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return image


def advice_for(facts: list[PictureFacts], option: str = "--image_root", tried: str | None = None) -> str:
    """The folder to start paths from, if pictures are missing and would be found there; else an empty text.

    Args:
        facts: the facts of each row.
        option: the option that names the folder.
        tried: the folder that paths started from; None for that of the data.
    """
    missing = next((each.example for each in facts if each.cause == "missing image file"), "")
    root = root_of(missing, tried) if missing else None
    return f"They would be found with {option} {root}." if root else ""
