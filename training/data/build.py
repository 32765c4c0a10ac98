"""Load the training and evaluation rows of a run from its options."""

import os
from collections.abc import Iterable
from hashlib import blake2b

import torch

from ...errors import ArgumentError
from ...processing.pictures import content_of
from ..arguments import TrainingArguments, share_of
from ..machine.hardware import cpu_cores
from ..objectives.distributed import processes
from .rows import picture_id
from .scenes import is_scenes
from .shards import check_shards, expand
from .sources import is_shards, load_rows, require_column, require_text
from .streaming import check_stream, load_stream

MOST_WORKERS = 8


def load_data(arguments: TrainingArguments) -> tuple:
    """Load the training and evaluation data, and check their columns.

    Returns:
        The rows to train on (None for shards) and the rows to evaluate on (None if there is no evaluation).

    Raises:
        ArgumentError: if the data, a split or a column is missing, or the options do not fit together.
    """
    name, rows, eval_rows = arguments.dataset_name, None, None
    if arguments.num_workers is None:
        arguments.num_workers = default_workers(arguments)
    class_column = getattr(arguments, "class_column", None)  # CLIP only: zero-shot classification
    second = getattr(arguments, "second_image_column", "second_image")  # BLIP only: nlvr
    if arguments.streaming:
        if is_shards(name):
            raise ArgumentError("--streaming is for other data than shards, which are always streamed.")
        if is_scenes(name):
            raise ArgumentError("--streaming is for other data than scenes, which are drawn once and cached.")
        check_stream(arguments, max(1, arguments.num_workers) * processes())
    elif is_shards(name):
        check_shards(arguments)
    else:
        rows = load_rows(
            name, arguments.train_split, arguments.image_column, arguments.image_root, arguments.dataset_config_name,
            second_image_column=second, caption_column=arguments.caption_column, encoding=arguments.encoding,
        )  # fmt: skip
        for column in arguments.caption_column.split(","):
            require_text(rows, column, name, "--caption_column")
        for column in (arguments.tag_column or "").split(",") if arguments.tag_share else ():
            require_text(rows, column, name, "--tag_column")
    if arguments.hold_out:
        rows, eval_rows = hold_out(rows, arguments)
    elif arguments.eval_split:
        eval_name = arguments.eval_dataset_name or name
        if is_shards(eval_name):
            raise ArgumentError("Evaluation needs random access to the rows: --eval_dataset_name cannot be shards.")
        image_column = arguments.eval_image_column or arguments.image_column
        config = None if arguments.eval_dataset_name else arguments.dataset_config_name
        option = "--eval_dataset_name" if arguments.eval_dataset_name else "--dataset_name"
        eval_rows = load_rows(
            eval_name, arguments.eval_split, image_column, arguments.eval_image_root or arguments.image_root, config,
            option, second, arguments.caption_column, arguments.encoding,
        )  # fmt: skip
        if image_column != arguments.image_column:
            eval_rows = eval_rows.rename_column(image_column, arguments.image_column)
        if not class_column:
            for column in arguments.caption_column.split(","):
                require_text(eval_rows, column, eval_name, "--caption_column")
    if eval_rows is not None and class_column:
        for column in class_column.split(","):
            require_column(eval_rows, column, arguments.eval_dataset_name or name, "--class_column")
    return rows, eval_rows


def default_workers(arguments: TrainingArguments) -> int:
    """The number of loading workers of a process if none is given: what the machine has, and the data allow."""
    if not torch.accelerator.is_available() or arguments.cache_images or getattr(arguments, "cache_features", False):
        return 0
    most = min(MOST_WORKERS, cpu_cores() // processes())
    if arguments.streaming:
        most = min(most, load_stream(arguments).num_shards // processes())
    elif is_shards(arguments.dataset_name):
        sources = arguments.dataset_name.split("::")
        most = min(most, *(len(expand(source)) // processes() for source in sources))
    return most


def hold_out(rows, arguments: TrainingArguments) -> tuple:
    """Split the rows into training rows and the rows that match `--hold_out`, for evaluation.

    A share is drawn by the pictures and the seed: all rows of a picture, or of a pair of them, are on the same side.

    Raises:
        ArgumentError: if the data is shards, the column is missing, or no row or every row matches.
    """
    if rows is None:
        raise ArgumentError("--hold_out needs random access to the rows: --dataset_name cannot be shards.")
    if "=" in arguments.hold_out:
        column, value = arguments.hold_out.split("=", 1)
        require_column(rows, column, arguments.dataset_name, "--hold_out")
        held = [str(entry) == value for entry in rows[column]]
    else:
        second = getattr(arguments, "second_image_column", None)
        columns = [name for name in (arguments.image_column, second) if name in rows.column_names]
        needed = rows.select_columns([*columns, *({"image_id"} & set(rows.column_names))])
        folder = common_folder(row[column] for row in needed for column in columns)
        share, seed = share_of(arguments.hold_out), arguments.seed
        held = [drawn(picture_id(row | {column: inside(row[column], folder) for column in columns}, *columns), seed)
                < share for row in needed]  # fmt: skip
    if not any(held) or all(held):
        raise ArgumentError(
            f"--hold_out {arguments.hold_out} matches {sum(held)} of {len(held)} rows; it must match some, but not all."
        )
    kept = rows.select([number for number, out in enumerate(held) if not out])
    return kept, rows.select([number for number, out in enumerate(held) if out])


def common_folder(images: Iterable) -> str:
    """The folder of all images that are given by absolute paths."""
    paths = [path for path in map(content_of, images) if isinstance(path, str) and os.path.isabs(path)]
    return os.path.commonpath(paths) if paths else os.sep


def inside(image, folder: str):
    """An image's path relative to a folder, so that data that was moved is divided as before; otherwise its content."""
    source = content_of(image)
    return os.path.relpath(source, folder) if isinstance(source, str) and os.path.isabs(source) else source


def drawn(key: str, seed: int) -> float:
    """A number from 0 to 1 that depends on a key and a seed alone."""
    digest = blake2b(f"{seed} {key}".encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
