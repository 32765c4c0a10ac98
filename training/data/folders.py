"""Load a folder of pictures: with a table, with a text file beside each picture, or with a folder for each class."""

import os
from collections.abc import Iterator
from pathlib import Path

import datasets

from ...errors import ArgumentError, printable
from ...processing.pictures import extensions
from .tables import kind_of_table, load_tables

# Names of folders and files that stand for a split
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
METADATA = "metadata."  # the table of `datasets`' imagefolder
EXPECTED = (
    "a table of pictures and captions, such as metadata.csv with the columns file_name and caption; a text file beside "
    "each picture, such as 1.txt beside 1.jpg; or a folder of pictures for each class"
)


def load_folder(path: Path, split: str, option: str, **options) -> datasets.Dataset | None:
    """Load a split of a folder of pictures.

    Folders named as splits, such as train and test, divide it; without them, all pictures belong to "train".

    Args:
        path: the folder.
        split: the split to load.
        option: the option that names the folder, for error messages.
        options: further arguments of `load_tables`.

    Returns:
        The rows: those of the table; or image and caption; or, for folders of classes, image, caption (the name of the
        class) and label (a ClassLabel). None if the folder has no pictures.

    Raises:
        ArgumentError: if the pictures have no captions, the split does not exist, or several tables are possible.
    """
    base = folder_of_split(path, split, option)
    if base is None:
        return None
    files = list(files_below(base))
    pictures = [file for file in files if file.suffix.lower() in extensions()]
    names = {file.with_suffix("") for file in pictures}
    beside = {file.with_suffix(""): file for file in files if file.suffix.lower() == ".txt"}
    tables = tables_of(files, names, split)
    if tables:
        return load_tables(tables, option=option, split="train" if base != path else split, **options)
    if not pictures:
        return None
    if base == path and split != "train":
        raise ArgumentError(
            f"{option} {printable(path, 120)} has no split {split!r}, because no folder in it is named after one: name "
            "another folder with --eval_dataset_name and --eval_split train."
        )
    if beside:
        return from_text_files(pictures, beside)
    if all(len(file.relative_to(base).parts) > 1 for file in pictures):
        return from_classes(pictures, base)
    raise ArgumentError(
        f"{option} {printable(path, 120)} has {len(pictures):,} pictures, but no captions; expected {EXPECTED}."
    )


def folder_of_split(path: Path, split: str, option: str) -> Path | None:
    """The folder of a split, or the whole folder if it is not divided; None if the split is not found among files."""
    known = {name: SPLITS[kind] for kind in SPLITS for name in (kind, *SPLITS[kind])}
    folders = {each.name.lower(): each for each in path.iterdir() if each.is_dir()}
    for name in (split.lower(), *known.get(split.lower(), ())):
        if name in folders:
            return folders[name]
    divided = sorted(name for name in folders if name in known)
    if divided and any(each.is_file() and kind_of_table(each) for each in path.iterdir()):
        return path  # such as captions.csv beside the folders of pictures
    if divided:
        raise ArgumentError(
            f"{option} {printable(path, 120)} has no split {split!r}; its splits are {', '.join(divided)}."
        )
    return path


def files_below(folder: Path) -> Iterator[Path]:
    """All files below a folder, sorted, without hidden ones."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place, name) for name in sorted(files) if not name.startswith("."))


def tables_of(files: list[Path], pictures: set[Path], split: str) -> list[Path]:
    """The tables of a folder: all that `datasets`' imagefolder would read, or else the only one there is.

    Args:
        files: all files.
        pictures: paths of the pictures without their endings; text files beside them are no tables.
        split: the split to read, by which one of several tables may be named.

    Raises:
        ArgumentError: if there are several.
    """
    tables = [file for file in files if kind_of_table(file) and file.with_suffix("") not in pictures]
    if metadata := [file for file in tables if file.name.lower().startswith(METADATA)]:
        return metadata
    texts = [file for file in tables if file.suffix.lower() == ".txt"]
    if len(texts) < len(tables):  # notes and licences are often text files
        tables = [file for file in tables if file not in texts]
    tables = [file for file in tables if file.suffix.lower() != ".txt" or "caption" in file.name.lower()]
    if len(tables) > 1:
        names = next((names for names in SPLITS.values() if split.lower() in names), (split.lower(),))
        tables = [file for file in tables if any(name in file.stem.lower() for name in names)] or tables
    if len(tables) > 1:
        shown = ", ".join(printable(file.name, 60) for file in tables[:5])
        raise ArgumentError(
            f"{printable(tables[0].parent, 120)} has {len(tables)} tables ({shown}): name the one to read instead of "
            "the folder."
        )
    return tables


def from_text_files(pictures: list[Path], beside: dict[Path, Path]) -> datasets.Dataset:
    """Pictures with text files of the same name; each line is a caption. A picture without one has no caption."""
    captions = []
    for file in pictures:
        text = beside.get(file.with_suffix(""))
        content = text.read_text(encoding="utf-8-sig", errors="replace") if text else ""
        captions.append([line.strip() for line in content.split("\n") if line.strip()] or None)
    return datasets.Dataset.from_dict({"image": [str(file) for file in pictures], "caption": captions})


def from_classes(pictures: list[Path], base: Path) -> datasets.Dataset:
    """Pictures in folders of classes; the name of the class is the caption."""
    folders = [file.relative_to(base).parts[0] for file in pictures]
    names = sorted(set(folders))
    captions = {name: name.replace("_", " ").strip() for name in names}
    numbers = {name: number for number, name in enumerate(names)}
    rows = {
        "image": [str(file) for file in pictures],
        "caption": [captions[folder] for folder in folders],
        "label": [numbers[folder] for folder in folders],
    }
    features = datasets.Features(
        image=datasets.Value("string"),
        caption=datasets.Value("string"),
        label=datasets.ClassLabel(names=[captions[name] for name in names]),
    )
    return datasets.Dataset.from_dict(rows, features=features)
