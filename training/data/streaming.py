"""Stream a data set, from the hub or from local files, without downloading or converting it first.

`datasets` reads the rows in their order; here they are shuffled in windows, and the position is kept so that a run
resumes with the next row. As with shards, the files are divided among the streams of a run (see `shards`).
"""

import copy
import functools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from ...errors import ArgumentError, brief, printable
from ..arguments import EMOJI, TrainingArguments
from .sources import EMOJI_FOLDER, KINDS, files_of, require_column, require_text
from .tables import kind_of_table, with_names

ROWS = 1000  # rows of a window, which are shuffled together
READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}


class StreamedRows:
    """A split of a data set that is read row by row.

    Args:
        rows: the data set, with images that are not decoded.

    Attributes:
        num_shards: number of parts that it can be divided into.
        size: number of rows; None if it is not known.
    """

    def __init__(self, rows: datasets.IterableDataset):
        self.rows, self.num_shards = rows, rows.num_shards
        split = (rows.info.splits or {}).get(str(rows.split))
        self.size = split.num_examples if split else None

    def __len__(self) -> int:
        return self.num_shards


class RowSource:
    """One stream's share of a data set; iterates over its rows without end.

    Args:
        data: the data set, with at least as many parts as there are streams.
        seed: seed of the order.
        stream: number of this stream.
        streams: number of streams.
        place: epoch, window, row in the window, and `datasets`' state before the window; None: the beginning.
    """

    def __init__(self, data: StreamedRows, seed: int, stream: int, streams: int, place: list | None = None):
        self.data, self.seed, self.stream, self.streams = data, seed, stream, streams
        self.place = place or [0, 0, 0, None]
        self.broken: list[tuple[Any, str]] = []

    def __iter__(self) -> Iterator[tuple[dict, str, int]]:
        """Yield each row, its key, and the epoch. `place` then points to the next row."""
        while True:
            epoch, window, start, state = self.place
            share = (self.stream + epoch) % self.streams  # another one in each epoch
            part = self.data.rows.shard(self.streams, share)
            if state is not None:
                part.load_state_dict(copy.deepcopy(state))
            batches = part.iter(ROWS)  # unlike iteration by rows, it does not divide the data among workers again
            while True:
                state = copy.deepcopy(part.state_dict())
                batch = next(batches, None)
                if batch is None:
                    break
                numbers = list(range(len(next(iter(batch.values())))))
                random.Random(f"{self.seed}-{epoch}-{window}-{share}").shuffle(numbers)
                for index in range(start, len(numbers)):
                    number = numbers[index]
                    self.place = [epoch, window, index + 1, state]
                    row = {name: values[number] for name, values in batch.items()}
                    yield row, f"part {share}, row {window * ROWS + number}", epoch
                window, start = window + 1, 0
            self.place = [epoch + 1, 0, 0, None]


def load_stream(arguments: TrainingArguments) -> StreamedRows:
    """The training data of a run with --streaming.

    Raises:
        ArgumentError: if it does not exist or cannot be streamed, or a column is missing.
    """
    return stream_of(
        arguments.dataset_name, arguments.dataset_config_name, arguments.train_split, arguments.image_column,
        arguments.caption_column,
    )  # fmt: skip


@functools.lru_cache(maxsize=2)
def stream_of(name: str, config: str | None, split: str, image_column: str, caption_column: str) -> StreamedRows:
    """Open a data set for streaming; see `load_stream`."""
    told = f"--dataset_name {printable(name, 120)}"
    paths = [EMOJI_FOLDER] if name == EMOJI else files_of(name, "--dataset_name")
    try:
        if paths[0].is_file():
            ending = kind_of_table(paths[0]) or paths[0].suffix.lower()
            if ending not in READERS:
                raise ArgumentError(f"{told} is not a file that can be streamed; expected {KINDS}.")
            files = {split: [str(path) for path in paths]}
            rows = datasets.load_dataset(READERS[ending], data_files=files, split=split, streaming=True)
        else:
            folder = Path(paths[0])
            if folder.is_dir() and (files := sorted(folder.glob(f"**/{split}-*.parquet"))):
                rows = datasets.load_dataset(
                    "parquet", data_files={split: [str(file) for file in files]}, split=split, streaming=True
                )
            else:
                rows = datasets.load_dataset(
                    str(folder) if folder.is_dir() else name, config, split=split, streaming=True
                )
        if rows.features is None:
            rows = rows._resolve_features()
    except ArgumentError:
        raise
    except Exception as error:  # the readers of `datasets` can fail in any way
        raise ArgumentError(
            f"{told}, split {printable(repr(split), 40)}, cannot be streamed: {brief(error)[:260]}"
        ) from error
    rows = with_names(rows, image_column, caption_column)
    require_column(rows, image_column, told)
    for column in caption_column.split(","):
        require_text(rows, column, told, "--caption_column")
    feature = rows.features[image_column]
    if isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string"):
        raise ArgumentError(
            f"{told} holds paths or URLs of images, not images: --streaming reads images that are in the data itself."
        )
    rows = rows.cast_column(image_column, datasets.Image(decode=False))
    return StreamedRows(rows)


def check_stream(arguments: TrainingArguments, workers: int) -> None:
    """Check that a data set can be streamed with the given options, and set `shard_size` if it is known.

    Args:
        arguments: options of the run.
        workers: the workers of all processes.

    Raises:
        ArgumentError: if it has too few files, or the options do not fit.
    """
    data = load_stream(arguments)
    if data.num_shards < workers:
        raise ArgumentError(
            f"--dataset_name {printable(arguments.dataset_name, 120)} has {data.num_shards} files, fewer than the "
            f"{workers} workers that would read them: lower --num_workers."
        )
    if arguments.shard_size is None:
        arguments.shard_size = data.size
    for option in ("hold_out", "cache_images"):
        if getattr(arguments, option):
            raise ArgumentError(f"--{option} needs all rows, which --streaming does not load.")
    if arguments.shard_size is None and not (arguments.max_train_steps or arguments.max_train_minutes):
        raise ArgumentError(
            "The number of rows is not known: give --max_train_steps, --max_train_minutes or --shard_size."
        )
