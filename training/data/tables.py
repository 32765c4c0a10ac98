"""Load tables of pairs: CSV, TSV, JSON and the text files of Flickr8k and Flickr30k, as a `datasets.Dataset`."""

import codecs
import csv
import gzip
import os
import zlib
from pathlib import Path

import datasets
import pyarrow as pa

from ...errors import ArgumentError, brief, printable
from ...files import kind_of
from .delimited import CAPTION_NAMES, IMAGE_NAMES, list_in, read_delimited
from .known_formats import EXPECTED, layouts, read_json

DELIMITED = (".csv", ".tsv", ".txt", ".token")
JSON = (".json", ".jsonl", ".ndjson")
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
         codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # fmt: skip  # UTF-32's begins like UTF-16's
TRIED = 20  # rows whose pictures are looked for, to find their folder


def kind_of_table(path: Path | str) -> str | None:
    """The ending of a table that can be read, in lower case and without .gz; None for other files."""
    ending = Path(str(path).lower().removesuffix(".gz")).suffix
    return ending if ending in (*DELIMITED, *JSON) else None


def load_tables(
    paths: list[Path],
    split: str = "train",
    image_column: str = "image",
    image_root: Path | None = None,
    option: str = "--dataset_name",
    second_image_column: str = "second_image",
    caption_column: str = "caption",
    encoding: str | None = None,
) -> datasets.Dataset:
    """Load a split of one or several tables.

    If there is a column `split`, it selects the rows; otherwise all rows belong to the split "train".

    Args:
        paths: the files.
        split: the split to load.
        image_column: column with the paths of the images.
        image_root: folder that image paths start from; None: that of each table.
        option: the option that names the files, for error messages.
        second_image_column: column with the paths of second images, of tables that have one.
        caption_column: column with the captions, or several, joined by commas.
        encoding: encoding of the files, such as cp1252; None: UTF-8, or what a byte order mark says.

    Returns:
        The rows, in which the paths of pictures are complete.

    Raises:
        ArgumentError: if a file does not exist or cannot be read, or the split or the column does not exist.
    """
    rows, told = [], printable(paths[0], 160)
    for path in paths:
        found = read_table(path, split, image_column, caption_column, option, encoding)
        found = [with_image(row, image_column, second_image_column) for row in found]
        columns = list(dict.fromkeys(str(key) for row in found for key in row if key is not None))
        name = column_like(columns, image_column, "image", IMAGE_NAMES)
        if name is None:
            raise no_column(path, image_column, columns, "--image_column")
        if name != image_column:
            found = [{image_column if key == name else key: value for key, value in row.items()} for row in found]
        second = all(isinstance(row.get(second_image_column), (str, type(None))) for row in found)
        complete(found, [image_column] + [second_image_column] * second, image_root or path.parent, split, path)
        rows += found
    columns = list(dict.fromkeys(str(key) for row in rows for key in row if key is not None))
    if "split" in columns:
        rows = [row for row in rows if row.get("split", split) == split]
        if not rows:
            raise ArgumentError(f"{told} has a column split, but no row whose split is {split!r}.")
    table = {column: column_of([row.get(column) for row in rows]) for column in columns}
    return datasets.Dataset.from_dict({text_of(name): values for name, values in table.items()})


def read_table(
    path: Path, split: str, image_column: str, caption_column: str, option: str, encoding: str | None
) -> list[dict]:
    """Read the rows of a table; of formats that have splits, only those of the split. See `load_tables`."""
    told = printable(path, 160)
    if not path.is_file():
        what = f"is {kind_of(path)}, not a file" if os.path.lexists(path) else "does not exist"
        raise ArgumentError(f"{option} {told} {what}.")
    kind = kind_of_table(path)
    try:
        text = read_text(path, encoding)
        if kind in JSON:
            rows = read_json(text, split, path)
        else:
            rows = read_delimited(text, kind in (".tsv", ".token"), image_column, caption_column)
    except ArgumentError:
        raise
    except RecursionError:
        raise ArgumentError(f"{told} is nested too deeply.") from None
    except (ValueError, csv.Error, KeyError, TypeError, AttributeError, EOFError, OSError, zlib.error) as error:
        place = (
            f"{type(error).__name__}: {error}" if isinstance(error, (KeyError, TypeError, AttributeError)) else error
        )
        raise ArgumentError(
            f"{told} cannot be read as {kind[1:]}: {brief(str(place))[:160]}. Expected {EXPECTED}."
        ) from error
    if not rows:
        raise ArgumentError(f"{told}, split {split!r}, has no rows.")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ArgumentError(
                f"{told}: row {number + 1} is {printable(repr(row), 60)}; expected an object with the columns as keys."
            )
    if split != "train" and not any("split" in row for row in rows):
        others = (
            "evaluate on another file (--eval_dataset_name, with --eval_split train) or train without a part of this "
            "one (--hold_out 10% or COLUMN=VALUE)"
        )
        advice = {"--dataset": "use --split train", "--eval_dataset_name": "use --eval_split train"}.get(option, others)
        raise ArgumentError(
            f"{path} has no column split, so all rows are in split 'train' and there is no split {split!r}: {advice}."
        )
    return with_lists(rows)


def read_text(path: Path, encoding: str | None) -> str:
    """The content of a text file, which may be compressed by gzip.

    Args:
        path: the file.
        encoding: its encoding; None: UTF-8, or what a byte order mark says.

    Raises:
        ArgumentError: if it has another encoding.
    """
    content = path.read_bytes()
    if content.startswith(b"\x1f\x8b"):
        content = gzip.decompress(content)
    mark = next((name for start, name in MARKS.items() if content.startswith(start)), "utf-8")
    try:
        return content.decode(encoding or mark)
    except LookupError:
        raise ArgumentError(
            f"--encoding {printable(encoding, 40)} is not known; examples are utf-8, utf-16, cp1252 and latin-1."
        ) from None
    except UnicodeError as error:
        place, shown = "", encoding or mark.upper().removesuffix("-SIG")
        if isinstance(error, UnicodeDecodeError):
            place = f" (byte 0x{error.object[error.start]:02x} at {error.start:,})"
        zeros = content[:1000].count(0) > len(content[:1000]) // 4
        advice = "utf-16-le or utf-16-be" if zeros else "cp1252 (Western European Windows) or latin-1"
        raise ArgumentError(
            f"{printable(path, 160)} is not encoded in {shown}{place}: give its encoding with --encoding, "
            f"for example {advice}."
        ) from None


# --- columns ----------------------------------------------------------------------------------------------------------


def with_image(row: dict, image_column: str, second_image_column: str) -> dict:
    """Take the first and the second picture from a list `images`, if the row has no column of images."""
    images = row.get("images")
    if image_column in row or not isinstance(images, list) or not all(isinstance(each, str) for each in images):
        return row
    names = dict(zip((image_column, second_image_column), images, strict=False))
    return {image_column: None} | names | {name: value for name, value in row.items() if name != "images"}


def column_like(columns: list[str], wanted: str, default: str, names: tuple[str, ...]) -> str | None:
    """The column that is meant by a name: that of this name, or else, if it is the default, one of a usual name."""
    lower = {column.strip().lower(): column for column in reversed(columns)}
    if wanted in columns or wanted != default:
        return wanted if wanted in columns else None
    return next((lower[name] for name in names if name in lower), None)


def complete(rows: list[dict], columns: list[str], root: Path, split: str, path: Path) -> None:
    """Make the paths of pictures complete, in place.

    Args:
        rows: the rows.
        columns: the columns with paths.
        root: folder that they start from, or one above that.
        split: name of the split, which pictures of public data sets are in a folder of.
        path: the table, for error messages.

    Raises:
        ArgumentError: if a cell holds something else than a path.
    """
    folder = folder_of_pictures([row.get(columns[0]) for row in rows[:TRIED]], root, split)
    for number, row in enumerate(rows):
        for column in columns:
            if column not in row:
                continue
            if isinstance(row[column], (dict, list, bool)):
                raise ArgumentError(
                    f"{printable(path, 160)}: {printable(column, 40)} of row {number + 1} is "
                    f"{printable(repr(row[column]), 60)}; expected the path of a picture."
                )
            row[column] = path_of(row[column], folder)


def folder_of_pictures(names: list[object], root: Path, split: str) -> Path:
    """The folder below a root, or the root itself, where the first of some pictures that can be found is."""
    for name in names:
        text = str(name or "")
        if not text or "://" in text or len(text) > 1000 or "\0" in text:
            continue
        for place in layouts(text, split):
            if (root / place).is_file():
                return root / place.removesuffix(text)
    return root


def path_of(name: object, root: Path) -> str | None:
    """The path of a picture that a table names; a URL stays one, so that it is reported as one."""
    text = "" if name is None else text_of(name)
    return (text if "://" in text else str(root / text)) if text else None


def text_of(value: object) -> str:
    """A value as text that can be stored: a lone half of a surrogate pair becomes a question mark."""
    try:
        return str(value).encode("utf-8", "replace").decode()
    except (ValueError, RecursionError):
        return "?"


def with_lists(rows: list[dict]) -> list[dict]:
    """Turn lists that were saved as text into lists, in columns that have nothing else."""
    for column in list(rows[0]):
        values = [row.get(column) for row in rows]
        if not all(isinstance(value, str) or value is None for value in values):
            continue
        found = [list_in(value) for value in values]
        if any(found) and all(known is not None or not value for known, value in zip(found, values, strict=True)):
            for row, known in zip(rows, found, strict=True):
                row[column] = known
    return rows


def column_of(values: list) -> list:
    """A column as `datasets` can store it.

    If some rows have one text and others several, all have a list. Values of different types become texts.
    """
    if any(isinstance(value, list) for value in values):
        values = [value if isinstance(value, list) or value is None else [value] for value in values]
        if all(value is None or all(isinstance(each, (str, type(None))) for each in value) for value in values):
            return [value and [None if each is None else text_of(each) for each in value] for value in values]
    elif all(isinstance(value, (str, type(None))) for value in values):
        return [value and text_of(value) for value in values]
    try:
        pa.array(values)
        return values
    except (pa.ArrowException, OverflowError, ValueError, TypeError, RecursionError):
        if any(isinstance(value, list) for value in values):
            return [None if value is None else [text_of(each) for each in value] for value in values]
        return [None if value is None else text_of(value) for value in values]


def with_names(rows: datasets.Dataset, image_column: str, caption_column: str) -> datasets.Dataset:
    """Give the columns of images and captions their default names, if a data set has them by another usual name."""
    for wanted, default, names in ((image_column, "image", IMAGE_NAMES), (caption_column, "caption", CAPTION_NAMES)):
        name = column_like(rows.column_names, wanted, default, names)
        if name is not None and name != wanted and is_fit(rows.features[name], default):
            rows = rows.rename_column(name, wanted)
    return rows


def is_fit(feature, use: str) -> bool:
    """Whether a column of this type can hold images or captions."""
    kind = getattr(getattr(feature, "feature", feature), "dtype", "")
    return kind in ("string", "large_string") or (use == "image" and kind in ("binary", "PIL.Image.Image", "struct"))


def no_column(name: object, column: str, columns: list[str], option: str) -> ArgumentError:
    """The error for a column that does not exist, with the names of the first ones, and what may have gone wrong."""
    shown = ", ".join(printable(each, 40) for each in columns[:8]) + (
        f" and {len(columns) - 8} more" * (len(columns) > 8)
    )
    near = [each for each in columns if each.strip().lower() == column.strip().lower()]
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ArgumentError(
        f"{printable(name, 120)} has no column {printable(repr(column), 60)}; its columns are {shown}. Choose one with "
        f"{option}.{hint}"
    )
