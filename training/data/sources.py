"""Load image-text pairs from a folder, a table or the hub as rows of a `datasets.Dataset`."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import datasets

from ...errors import ArgumentError
from ..arguments import EMOJI

EMOJI_FOLDER = Path(__file__).parent / "emoji"
TABLES = (".csv", ".tsv", ".json", ".jsonl")


def is_shards(name: str) -> bool:
    """Whether the name of a data set denotes WebDataset shards."""
    return any(part.split("?")[0].endswith((".tar", ".tar.gz", ".tgz")) for part in name.split("::"))


def load_rows(name: str, split: str, image_column: str, image_root: str | None = None, config: str | None = None):
    """Load a split of a data set without decoding its images.

    Args:
        name: "emoji", a hub name, a folder, or a table; see `TrainingArguments.dataset_name`.
        split: the split to load.
        image_column: column with the images or their paths.
        image_root: folder that image paths start from; None: the folder of the data.
        config: configuration of a hub data set.

    Returns:
        A `datasets.Dataset` with {"bytes": ..., "path": ...} in `image_column`.

    Raises:
        ArgumentError: if the data, the split or the column does not exist, or the data is empty.
    """
    path = Path(name)
    if path.suffix in TABLES:
        rows = load_table(path, split, image_column, Path(image_root) if image_root else path.parent)
    else:
        rows = load_with_datasets(EMOJI_FOLDER if name == EMOJI else path if path.is_dir() else name, config, split)
    require_column(rows, image_column, name)
    if not len(rows):
        raise ArgumentError(f"{name}, split {split!r}, has no rows.")
    if isinstance(rows.features[image_column], datasets.Value) and path.is_dir():
        base = Path(image_root) if image_root else path
        rows = rows.map(lambda row: {image_column: str(base / row[image_column])})
    return rows.cast_column(image_column, datasets.Image(decode=False))


def require_column(rows, column: str, name: str, option: str = "--image_column") -> None:
    """Raise ArgumentError, which names the option, unless a column exists."""
    if column not in rows.column_names:
        columns = ", ".join(rows.column_names)
        raise ArgumentError(f"{name} has no column {column!r}; its columns are {columns}. Choose one with {option}.")


def require_text(rows, column: str, name: str, option: str) -> None:
    """Raise ArgumentError, which names the option, unless a column holds text or lists of text."""
    require_column(rows, column, name, option)
    feature = rows.features[column]
    inner = getattr(feature, "feature", feature)
    if not isinstance(inner, datasets.Value) or inner.dtype not in ("string", "large_string", "null"):
        raise ArgumentError(f"{option} {column} of {name} must hold text or lists of text, not {feature}.")


def load_with_datasets(name: str | Path, config: str | None, split: str) -> datasets.Dataset:
    """Load a split of a folder or a hub data set with the `datasets` library.

    Args:
        name: a folder as a Path, or a hub name.
        config: configuration of a hub data set.
        split: the split to load.

    Raises:
        ArgumentError: if the data or the split does not exist, or cannot be loaded.
    """
    if not isinstance(name, Path) and ("/" not in name or name.startswith(("/", "."))):
        raise ArgumentError(
            f"--dataset_name {name}: there is no such file or folder. A hub name has the form owner/name."
        )
    try:
        if isinstance(name, Path) and ((name / "dataset_dict.json").is_file() or (name / "state.json").is_file()):
            saved = datasets.load_from_disk(str(name))
            if isinstance(saved, datasets.DatasetDict) and split not in saved:
                raise ArgumentError(f"{name} has no split {split!r}; its splits are {', '.join(saved)}.")
            return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        if isinstance(name, Path) and (files := sorted(name.glob(f"data/{split}-*.parquet"))):
            # Files are listed one by one: for a folder, `datasets` may return a cached folder of the same name.
            return datasets.load_dataset("parquet", data_files={split: [str(path) for path in files]}, split=split)
        return datasets.load_dataset(str(name), config, split=split)
    except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise ArgumentError(f"{name}, split {split!r}: {error}") from error
    except (FileNotFoundError, ConnectionError) as error:
        raise ArgumentError(f"--dataset_name {name}: {error}") from error


def load_table(path: Path, split: str, image_column: str, image_root: Path) -> datasets.Dataset:
    """Load a split of a CSV, TSV, JSON or JSONL file.

    The JSON formats of COCO and Karpathy give the columns image, caption and image_id. If there is a column `split`, it
    selects the rows; otherwise all rows belong to the split "train".

    Args:
        path: the file.
        split: the split to load.
        image_column: column with the paths of the images.
        image_root: folder that image paths start from.

    Raises:
        ArgumentError: if the file does not exist or cannot be read, or the split or the column does not exist.
    """
    if not path.is_file():
        raise ArgumentError(f"--dataset_name {path}: there is no such file.")
    try:
        rows = read_table(path, split)
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error, KeyError, TypeError) as error:
        raise ArgumentError(f"{path} cannot be read as {path.suffix[1:]} with pairs: {error!r}.") from error
    if not rows:
        raise ArgumentError(f"{path}, split {split!r}, has no rows.")
    columns = list(dict.fromkeys(str(key) for row in rows for key in row if key is not None))
    if image_column not in columns:
        raise ArgumentError(
            f"{path} has no column {image_column!r}; its columns are {', '.join(columns)}. "
            "Choose one with --image_column."
        )
    if "split" in columns:
        rows = [row for row in rows if row.get("split", split) == split]
        if not rows:
            raise ArgumentError(f"{path} has a column split, but no row whose split is {split!r}.")
    table = {column: [row.get(column) for row in rows] for column in columns}
    table[image_column] = [name and str(image_root / str(name)) for name in table[image_column]]
    for column, values in table.items():
        if any(isinstance(value, list) for value in values):  # some rows with one caption, others with several
            table[column] = [value if isinstance(value, list) or value is None else [value] for value in values]
    return datasets.Dataset.from_dict(table)


def read_table(path: Path, split: str) -> list[dict]:
    """Read the rows of a table; of the COCO and Karpathy formats, only those of the split.

    Raises:
        ArgumentError: if the split is not "train" and the table has no splits.
    """
    if path.suffix in (".csv", ".tsv"):
        with path.open(newline="", encoding="utf-8-sig") as file:  # Excel writes a byte order mark
            rows = list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
    elif path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    else:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        if isinstance(content, dict):
            karpathy = any("split" in image for image in content.get("images", [])[:1])
            if split != "train" and not karpathy:
                return refuse_split(path, split)
            return list(read_coco_or_karpathy(content, split, path))
        rows = content
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
