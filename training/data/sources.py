"""Load image-text pairs from a folder, a table or the hub as rows of a `datasets.Dataset`."""

import glob
import os
import re
from pathlib import Path

import datasets

from ...errors import ArgumentError, brief, printable
from ...files import kind_of, usable_path
from ..arguments import EMOJI
from .folders import SPLITS, load_folder
from .rows import TEXT_FIELDS
from .scenes import is_scenes, load_scenes
from .tables import kind_of_table, load_tables, no_column, path_of, with_names

EMOJI_FOLDER = Path(__file__).parent / "emoji"
KINDS = (
    "a .csv, .tsv, .json, .jsonl, .parquet or .arrow file, several of one kind (a pattern such as 'data/*.csv', or "
    "names joined by ::), a folder, or .tar shards"
)
BINARY = (".parquet", ".arrow")


def is_shards(name: str) -> bool:
    """Whether the name of a data set denotes WebDataset shards."""
    return any(part.split("?")[0].lower().endswith((".tar", ".tar.gz", ".tgz")) for part in name.split("::"))


def load_rows(
    name: str, split: str, image_column: str = "image", image_root: str | None = None, config: str | None = None,
    option: str = "--dataset_name", second_image_column: str = "second_image", caption_column: str = "caption",
    encoding: str | None = None,
):  # fmt: skip
    """Load a split of a data set without decoding its images.

    Columns of images and captions that have other usual names, such as file_name and text, get the default ones.

    Args:
        name: "emoji", "scenes", a hub name, a folder, or files; see `TrainingArguments.dataset_name`.
        split: the split to load.
        image_column: column with the images or their paths.
        image_root: folder that image paths start from; None: the folder of the data.
        config: configuration of a hub data set, or of the scenes (see `scenes.load_scenes`).
        option: the option that names the data, for error messages.
        second_image_column: column with a second image, of data that has one.
        caption_column: column with the captions, or several, joined by commas.
        encoding: encoding of tables; None: UTF-8, or what their byte order mark says.

    Returns:
        A `datasets.Dataset` with {"bytes": ..., "path": ...} in `image_column`, and in `second_image_column` if there
        is one.

    Raises:
        ArgumentError: if the data, the split or the column does not exist, or the data is empty.
    """
    if not name.strip():
        raise ArgumentError(f"{option} must be a table, a folder, or a hub name such as owner/name; got {name!r}.")
    if is_scenes(name):
        return load_scenes(name, config, split, option)
    told, root = printable(name, 120), usable_path(image_root, "--image_root") if image_root else None
    tables = {"image_column": image_column, "image_root": root, "option": option, "encoding": encoding,
              "second_image_column": second_image_column, "caption_column": caption_column}  # fmt: skip
    paths = [EMOJI_FOLDER] if name == EMOJI else files_of(name, option)
    are_tables = all(kind_of_table(path) for path in paths)
    if are_tables:
        rows = load_tables(paths, split, **tables)
    elif all(path.suffix.lower() in BINARY for path in paths):
        rows = load_binary(paths, split, option)
    elif name == EMOJI or not paths[0].is_file():
        rows = load_with_datasets(paths[0] if paths[0].is_dir() else name, config, split, tables)
    elif len(paths) > 1:
        raise ArgumentError(f"{option} {told} is {len(paths)} files of different kinds; expected {KINDS}.")
    else:
        raise ArgumentError(f"{option} {told} is {kind_of(paths[0])} that is not read; expected {KINDS}.")
    rows = with_names(rows, image_column, caption_column)
    require_column(rows, image_column, told)
    if not len(rows):
        raise ArgumentError(f"{told}, split {split!r}, has no rows.")
    base = None  # the paths in tables are complete; those in data sets of the hub stay as they are
    if not are_tables and (root or paths[0].exists()):
        base = root or (paths[0] if paths[0].is_dir() else paths[0].parent)
    rows = with_images(rows, image_column, base, told, "--image_column", second_image_column)
    second = rows.features.get(second_image_column)
    images = isinstance(second, datasets.Image) or getattr(second, "dtype", "") in ("string", "large_string", "binary")
    if second_image_column != image_column and images:
        rows = with_images(rows, second_image_column, base, told, "--second_image_column")
    return rows


def files_of(name: str, option: str) -> list[Path]:
    """The files or the folder that a data set's name stands for; a hub name becomes a path that does not exist.

    Raises:
        ArgumentError: if a pattern matches nothing, or one of several files does not exist.
    """
    found: list[Path] = []
    for part in name.split("::"):
        path = usable_path(part, option)
        matches = sorted(glob.glob(str(path), recursive=True)) if glob.has_magic(part) and not path.exists() else []
        if glob.has_magic(part) and not path.exists() and not matches:
            raise ArgumentError(f"{option} {printable(part, 120)}: no file matches this pattern.")
        found += [Path(match) for match in matches] or [path]
    missing = [path for path in found if not path.is_file()]
    if len(found) > 1 and missing:
        raise ArgumentError(f"{option}: {printable(missing[0], 160)} is not a file.")
    return found


def load_binary(paths: list[Path], split: str, option: str) -> datasets.Dataset:
    """Load .parquet or .arrow files. A column `split` selects rows; without one, all rows belong to "train".

    Raises:
        ArgumentError: if a file cannot be read, or there is no such split.
    """
    kind = paths[0].suffix.lower()[1:]
    try:
        rows = datasets.load_dataset(kind, data_files={"train": [str(path) for path in paths]}, split="train")
    except Exception as error:  # the readers of `datasets` can fail in any way on damaged files
        cause = error.__cause__ or error
        raise ArgumentError(
            f"{option} {printable(paths[0], 120)} cannot be read as {kind}: {brief(cause)[:260]}"
        ) from error
    if "split" in rows.column_names:
        chosen = [number for number, value in enumerate(rows["split"]) if value == split]
        if not chosen:
            raise ArgumentError(f"{printable(paths[0], 120)} has a column split, but no row whose split is {split!r}.")
        return rows.select(chosen)
    if split != "train" and not all(split in path.stem for path in paths):
        raise ArgumentError(
            f"{option} {printable(paths[0], 120)} has no split {split!r}: use --hold_out 10% or COLUMN=VALUE, or name "
            "another file with --eval_dataset_name and --eval_split train."
        )
    return rows


def with_images(
    rows: datasets.Dataset, column: str, base: Path | None, name: str, option: str, second_column: str | None = None
) -> datasets.Dataset:
    """Cast a column to images that are not decoded.

    Args:
        rows: the data.
        column: the image column; of lists of images, the first one is taken.
        base: folder that relative paths start from; None: paths are left as they are.
        name: name of the data, for error messages.
        option: the option that names the column, for error messages.
        second_column: name for the second images of lists of two, if there is no such column.

    Raises:
        ArgumentError: if the column holds neither images, their bytes, nor paths.
    """
    feature = rows.features[column]
    try:
        if isinstance(feature, (datasets.List, datasets.LargeList)):
            if isinstance(feature.feature, datasets.Image):
                rows = rows.cast_column(column, datasets.List(datasets.Image(decode=False)))
            second = second_column if second_column and second_column not in rows.column_names else None
            rows = rows.map(lambda row: taken_apart(row[column], column, second))
            return with_images(rows, column, base, name, option)
        text = isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string", "null")
        if text and base is not None and not all(map(is_complete, rows[column])):
            rows = rows.map(lambda row: {column: path_of(row[column], base)})
        elif isinstance(feature, datasets.Value) and not text and "binary" not in feature.dtype:
            raise ArgumentError(f"its type is {feature.dtype}")
        return rows.cast_column(column, datasets.Image(decode=False))
    except Exception as error:
        raise ArgumentError(
            f"{option} {printable(column, 60)} of {name} must hold images, their bytes or their paths: "
            f"{brief(error)[:160]}"
        ) from error


def is_complete(path: str | None) -> bool:
    """Whether a path needs no folder in front of it, as those in a folder of pictures."""
    return not path or os.path.isabs(path)


def taken_apart(images: list | None, column: str, second: str | None) -> dict:
    """The first image of a list, and the second one if it is wanted."""
    images = [*(images or []), None, None]
    return {column: images[0]} | ({second: images[1]} if second else {})


def require_column(rows, column: str, name: str, option: str = "--image_column") -> None:
    """Raise ArgumentError, which names the option, unless a column exists."""
    if column not in rows.column_names:
        raise no_column(name, column, rows.column_names, option)


def require_text(rows, column: str, name: str, option: str) -> None:
    """Raise ArgumentError, which names the option, unless a column holds text or lists of text."""
    require_column(rows, column, name, option)
    feature = rows.features[column]
    inner = getattr(feature, "feature", feature)
    if isinstance(inner, dict):  # objects with a text
        inner = next((inner[name] for name in TEXT_FIELDS if name in inner), inner)
    if not isinstance(inner, datasets.Value) or inner.dtype not in ("string", "large_string", "null"):
        raise ArgumentError(f"{option} {column} of {name} must hold text or lists of text, not {feature}.")


def binary_files(folder: Path, split: str) -> list[Path]:
    """The .parquet or .arrow files of a split in a folder: those named after it, or all if none is named after one."""
    for kind in BINARY:
        files = [file for file in sorted(folder.iterdir()) if file.suffix.lower() == kind and file.is_file()]
        names = {name for names in SPLITS.values() for name in names} | {split}
        of_split = [file for file in files if re.match(rf"{re.escape(split)}\b", file.stem)]
        if of_split or (split == "train" and not any(re.match(rf"({'|'.join(names)})\b", f.stem) for f in files)):
            if of_split or files:
                return of_split or files
    return []


def load_with_datasets(name: str | Path, config: str | None, split: str, tables: dict) -> datasets.Dataset:
    """Load a split of a folder or a hub data set with the `datasets` library.

    Args:
        name: a folder as a Path, or a hub name.
        config: configuration of a hub data set.
        split: the split to load.
        tables: further arguments of `load_tables`, for tables in a folder.

    Raises:
        ArgumentError: if the data or the split does not exist, or cannot be loaded.
    """
    option = tables["option"]
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
        if isinstance(name, Path):
            if files := binary_files(name, split):
                return load_binary(files, split, option)
            if (rows := load_folder(name, split, **tables)) is not None:
                return rows
        return datasets.load_dataset(str(name), config, split=split)
    except ArgumentError:
        raise
    except Exception as error:  # the readers of `datasets` can fail in any way on damaged files
        cause = error.__cause__ or error
        raise ArgumentError(
            f"{option} {printable(name, 120)}, split {printable(repr(split), 40)}, cannot be read: {brief(cause)[:260]}"
        ) from error
