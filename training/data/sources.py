"""Load image-text pairs from a folder, a table or the hub as rows of a `datasets.Dataset`."""

import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow as pa

from ...errors import ArgumentError, brief, printable
from ...files import kind_of, usable_path
from ..arguments import EMOJI

EMOJI_FOLDER = Path(__file__).parent / "emoji"
KINDS = "a .csv, .tsv, .json or .jsonl table, a folder, or .tar shards"
TABLES = (".csv", ".tsv", ".json", ".jsonl")


def is_shards(name: str) -> bool:
    """Whether the name of a data set denotes WebDataset shards."""
    return any(part.split("?")[0].endswith((".tar", ".tar.gz", ".tgz")) for part in name.split("::"))


def load_rows(
    name: str, split: str, image_column: str, image_root: str | None = None, config: str | None = None,
    option: str = "--dataset_name", second_image_column: str = "second_image",
):  # fmt: skip
    """Load a split of a data set without decoding its images.

    Args:
        name: "emoji", a hub name, a folder, or a table; see `TrainingArguments.dataset_name`.
        split: the split to load.
        image_column: column with the images or their paths.
        image_root: folder that image paths start from; None: the folder of the data.
        config: configuration of a hub data set.
        option: the option that names the data, for error messages.
        second_image_column: column with a second image, of data that has one.

    Returns:
        A `datasets.Dataset` with {"bytes": ..., "path": ...} in `image_column`, and in `second_image_column` if there
        is one.

    Raises:
        ArgumentError: if the data, the split or the column does not exist, or the data is empty.
    """
    if not name.strip():
        raise ArgumentError(f"{option} must be a table, a folder, or a hub name such as owner/name; got {name!r}.")
    path = Path(name) if name == EMOJI else usable_path(name, option)
    told = printable(name, 120)
    if path.suffix in TABLES:
        rows = load_table(path, split, image_column, Path(image_root) if image_root else path.parent, option,
                          second_image_column)  # fmt: skip
    elif name != EMOJI and path.exists() and not path.is_dir():
        raise ArgumentError(f"{option} {told} is {kind_of(path)} that is not read; expected {KINDS}.")
    else:
        rows = load_with_datasets(EMOJI_FOLDER if name == EMOJI else path if path.is_dir() else name, config, split,
                                  option)  # fmt: skip
    require_column(rows, image_column, told)
    if not len(rows):
        raise ArgumentError(f"{told}, split {split!r}, has no rows.")
    base = Path(image_root) if image_root else path
    rows = with_images(rows, image_column, base, told, path.is_dir(), "--image_column")
    second = rows.features.get(second_image_column)
    images = isinstance(second, datasets.Image) or getattr(second, "dtype", "") in ("string", "large_string", "binary")
    if second_image_column != image_column and images:
        rows = with_images(rows, second_image_column, base, told, path.is_dir(), "--second_image_column")
    return rows


def with_images(
    rows: datasets.Dataset, column: str, base: Path, name: str, is_folder: bool, option: str
) -> datasets.Dataset:
    """Cast a column to images that are not decoded.

    Args:
        rows: the data.
        column: the image column.
        base: folder that paths start from, in a folder of data.
        name: name of the data, for error messages.
        is_folder: whether the data is a folder, whose paths are relative; those of a table are already complete.
        option: the option that names the column, for error messages.

    Raises:
        ArgumentError: if the column holds neither images, their bytes, nor paths.
    """
    feature = rows.features[column]
    text = isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string", "null")
    try:
        if text and is_folder:
            rows = rows.map(lambda row: {column: path_of(row[column], base)})
        elif isinstance(feature, datasets.Value) and not text and "binary" not in feature.dtype:
            raise ArgumentError(f"its type is {feature.dtype}")
        return rows.cast_column(column, datasets.Image(decode=False))
    except Exception as error:
        raise ArgumentError(
            f"{option} {printable(column, 60)} of {name} must hold images, their bytes or their paths: "
            f"{brief(error)[:160]}"
        ) from error


def require_column(rows, column: str, name: str, option: str = "--image_column") -> None:
    """Raise ArgumentError, which names the option, unless a column exists."""
    if column not in rows.column_names:
        raise no_column(name, column, rows.column_names, option)


def no_column(name: object, column: str, columns: list[str], option: str) -> ArgumentError:
    """The error for a column that does not exist, with the names of the first ones, and what may have gone wrong."""
    shown = ", ".join(printable(each, 40) for each in columns[:8]) + (
        f" and {len(columns) - 8} more" * (len(columns) > 8)
    )
    hint = ""
    if len(columns) == 1 and any(mark in columns[0] for mark in ";|\t"):
        hint = " The columns seem to be separated by something else than commas: convert the table."
    elif near := [each for each in columns if each.strip().lower() == column.strip().lower()]:
        hint = f" Did you mean {near[0]!r}?"
    return ArgumentError(
        f"{printable(name, 120)} has no column {printable(repr(column), 60)}; its columns are {shown}. Choose one with "
        f"{option}.{hint}"
    )


def require_text(rows, column: str, name: str, option: str) -> None:
    """Raise ArgumentError, which names the option, unless a column holds text or lists of text."""
    require_column(rows, column, name, option)
    feature = rows.features[column]
    inner = getattr(feature, "feature", feature)
    if not isinstance(inner, datasets.Value) or inner.dtype not in ("string", "large_string", "null"):
        raise ArgumentError(f"{option} {column} of {name} must hold text or lists of text, not {feature}.")


def load_with_datasets(
    name: str | Path, config: str | None, split: str, option: str = "--dataset_name"
) -> datasets.Dataset:
    """Load a split of a folder or a hub data set with the `datasets` library.

    Args:
        name: a folder as a Path, or a hub name.
        config: configuration of a hub data set.
        split: the split to load.
        option: the option that names the data, for error messages.

    Raises:
        ArgumentError: if the data or the split does not exist, or cannot be loaded.
    """
    if not isinstance(name, Path) and ("/" not in name or name.startswith(("/", "."))):
        raise ArgumentError(
            f"{option} {printable(name, 120)}: there is no such file or folder; expected {KINDS}, or the name of a "
            "data set on the hub, which has the form owner/name."
        )
    try:
        if isinstance(name, Path) and ((name / "dataset_dict.json").is_file() or (name / "state.json").is_file()):
            saved = datasets.load_from_disk(str(name))
            if isinstance(saved, datasets.DatasetDict) and split not in saved:
                raise ArgumentError(f"{name} has no split {split!r}; its splits are {', '.join(saved)}.")
            if isinstance(saved, datasets.DatasetDict):
                return saved[split]
            if split != str(saved.split or "train"):
                raise ArgumentError(f"{name} has the split {str(saved.split or 'train')!r} only, not {split!r}.")
            return saved
        if isinstance(name, Path) and (files := sorted(name.glob(f"data/{split}-*.parquet"))):
            # Files are listed one by one: for a folder, `datasets` may return a cached folder of the same name.
            return datasets.load_dataset("parquet", data_files={split: [str(path) for path in files]}, split=split)
        return datasets.load_dataset(str(name), config, split=split)
    except ArgumentError:
        raise
    except Exception as error:  # the readers of `datasets` can fail in any way on damaged files
        cause = error.__cause__ or error
        raise ArgumentError(
            f"{option} {printable(name, 120)}, split {printable(repr(split), 40)}, cannot be read: {brief(cause)[:260]}"
        ) from error


def load_table(
    path: Path, split: str, image_column: str, image_root: Path, option: str = "--dataset_name",
    second_image_column: str = "second_image",
) -> datasets.Dataset:  # fmt: skip
    """Load a split of a CSV, TSV, JSON or JSONL file.

    The JSON formats of COCO and Karpathy give the columns image, caption and image_id. If there is a column `split`, it
    selects the rows; otherwise all rows belong to the split "train".

    Args:
        path: the file.
        split: the split to load.
        image_column: column with the paths of the images.
        image_root: folder that image paths start from.
        option: the option that names the file, for error messages.
        second_image_column: column with the paths of second images, of tables that have one.

    Raises:
        ArgumentError: if the file does not exist or cannot be read, or the split or the column does not exist.
    """
    told = printable(path, 160)
    if not path.is_file():
        what = f"is {kind_of(path)}, not a file" if os.path.lexists(path) else "does not exist"
        raise ArgumentError(f"{option} {told} {what}.")
    try:
        rows = read_table(path, split)
    except ArgumentError:
        raise
    except UnicodeDecodeError as error:
        raise ArgumentError(
            f"{told} is not encoded in UTF-8 (byte 0x{error.object[error.start]:02x} at {error.start:,}): convert it, "
            "for example with `iconv -f latin1 -t utf-8`."
        ) from None
    except RecursionError:
        raise ArgumentError(f"{told} is nested too deeply.") from None
    except (ValueError, csv.Error, KeyError, TypeError, AttributeError) as error:
        place = (
            f"{type(error).__name__}: {error}" if isinstance(error, (KeyError, TypeError, AttributeError)) else error
        )
        raise ArgumentError(
            f"{told} cannot be read as {path.suffix[1:]}: {brief(str(place))[:160]}. Expected rows with the columns "
            "image and caption, or the files of COCO or Karpathy."
        ) from error
    if not rows:
        raise ArgumentError(f"{told}, split {split!r}, has no rows.")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ArgumentError(
                f"{told}: row {number + 1} is {printable(repr(row), 60)}; expected an object with the columns as keys."
            )
    columns = list(dict.fromkeys(str(key) for row in rows for key in row if key is not None))
    if image_column not in columns:
        raise no_column(path, image_column, columns, "--image_column")
    if "split" in columns:
        rows = [row for row in rows if row.get("split", split) == split]
        if not rows:
            raise ArgumentError(f"{told} has a column split, but no row whose split is {split!r}.")
    table = {column: [row.get(column) for row in rows] for column in columns}
    if missing := [number for number, name in enumerate(table[image_column]) if isinstance(name, (dict, list, bool))]:
        row = missing[0]
        raise ArgumentError(
            f"{told}: {printable(image_column, 40)} of row {row + 1} is "
            f"{printable(repr(table[image_column][row]), 60)}; expected the path of a picture."
        )
    table[image_column] = [path_of(name, image_root) for name in table[image_column]]
    second = second_image_column
    if second in table and all(isinstance(name, str) or name is None for name in table[second]):
        table[second] = [path_of(name, image_root) for name in table[second]]
    return datasets.Dataset.from_dict({text_of(name): column_of(values) for name, values in table.items()})


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


def read_table(path: Path, split: str) -> list[dict]:
    """Read the rows of a table; of the COCO and Karpathy formats, only those of the split.

    Raises:
        ArgumentError: if the split is not "train" and the table has no splits.
    """
    if path.suffix in (".csv", ".tsv"):
        with path.open(newline="", encoding="utf-8-sig") as file:  # Excel writes a byte order mark
            content = file.read()
        if content.count('"') % 2:
            line = content[: content.rindex('"')].count("\n") + 1
            raise ArgumentError(
                f"{printable(path, 160)} has an odd number of quotes, the last in line {line:,}: rows would be lost. "
                'Close or double the quote (""), or save the table as JSON Lines.'
            )
        delimiter = "\t" if path.suffix == ".tsv" else ","
        rows = list(csv.DictReader(io.StringIO(content, newline=""), delimiter=delimiter))
    elif path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    else:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        if isinstance(content, dict):
            karpathy = any("split" in image for image in content.get("images", [])[:1])
            if split != "train" and not karpathy:
                return refuse_split(path, split)
            return list(read_coco_or_karpathy(content, split, path))
        rows = content
        if not isinstance(rows, list):
            raise ValueError(f"it is {printable(repr(content), 40)}")
    if rows and split != "train" and not any("split" in row for row in rows):
        return refuse_split(path, split)
    return rows


def refuse_split(path: Path, split: str) -> list[dict]:
    raise ArgumentError(
        f"{path} has no column split, so all rows are in split 'train' and there is no split {split!r}: use --hold_out "
        "COLUMN=VALUE, or another file with --eval_dataset_name and --eval_split train."
    )


def read_coco_or_karpathy(content: dict, split: str, path: Path) -> Iterator[dict]:
    """Read COCO's captions_*.json (images, annotations) or Karpathy's dataset_*.json (images with sentences).

    Args:
        content: the parsed JSON.
        split: the split to read (Karpathy only; images without a split match any).
        path: the file, for error messages.

    Returns:
        An iterator over rows with image, caption (a list) and image_id.

    Raises:
        ArgumentError: if there is no list `images`.
    """
    images = content.get("images")
    if not isinstance(images, list):
        raise ArgumentError(
            f"{path}: expected a list of rows, or an object with a list `images`, as in COCO's and Karpathy's files."
        )
    if "annotations" in content:
        captions: dict = {}
        for annotation in content["annotations"]:
            captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
        for image in images:
            if image["id"] in captions:
                yield {"image": image["file_name"], "caption": captions[image["id"]], "image_id": str(image["id"])}
        return
    for image in images:
        # Karpathy's "restval" images are training images, as is usual with these splits.
        image_split = "train" if image.get("split") == "restval" else image.get("split", split)
        if image_split == split:
            name = str(Path(image.get("filepath", "")) / image["filename"])
            captions = [sentence["raw"] for sentence in image["sentences"]]
            yield {"image": name, "caption": captions, "image_id": str(image.get("imgid", name))}
