"""WebDataset shards: write any data set as shards, and stream them so that a run can resume in the middle of one.

In each epoch, the shards are shuffled and distributed among the streams. There is one stream per worker of each
process, so each sample is read once per epoch. A stream shuffles the samples of a few shards (a window) at a time. The
position of a stream is three numbers per source: epoch, window in the epoch, and sample in the window.
"""

import contextlib
import gzip
import importlib.util
import io
import json
import math
import os
import random
import re
import shutil
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import IterableDataset
from tqdm import tqdm

from ...errors import ArgumentError, BadDataError, brief, printable
from ...files import check_output, write_whole
from ...processing.pictures import PictureError, extensions, formats, picture_bytes
from ..arguments import EMOJI, TrainingArguments, check_values, option, require_at_least_one
from ..objectives.distributed import processes
from .rows import BadRow, describe, picture_id, texts_of, unusable
from .samples import TRIES, Sample, SampleMaker
from .sources import load_rows, require_text

INDEX = "index.json"
WINDOW = 4  # shards per window, whose samples are shuffled together
EXTENSION = {"JPEG2000": "jp2", "MPO": "mpo", "SUN": "ras", "SPIDER": "spider"}  # if it differs from the format's name


MOST_SHARDS = 1_000_000
SCHEMES = ("file", "http", "https", "hf", "gs", "s3", "sftp", "ftps", "scp")


@dataclass(kw_only=True)
class ShardsArguments:
    """Options of writing a data set as WebDataset shards."""

    dataset_name: str = option(EMOJI, "pairs to write, as --dataset_name of training")
    dataset_config_name: str | None = option(None, "configuration of a hub data set")
    train_split: str = option("train", "split to read")
    image_column: str = option("image", "column with the images or their paths; all other columns are stored as JSON")
    caption_column: str = option("caption", "column with the captions; the first caption is also stored as text")
    image_root: str | None = option(None, "folder that image paths start from; that of the data file if not given")
    encoding: str | None = option(None, "encoding of a table, such as cp1252; UTF-8 if not given")
    samples_per_shard: int = option(1000, "samples per shard; training needs a shard per worker of each process")
    seed: int = option(0, "seed of the order of the samples")
    output_dir: str | None = option(None, "folder for the shards and their index; runs/shards if not given")

    def __post_init__(self):
        check_values(self)
        require_at_least_one(self, "samples_per_shard")


# --- sources ----------------------------------------------------------------------------------------------------------


def require_webdataset() -> None:
    if not importlib.util.find_spec("webdataset"):
        raise ArgumentError('Shards need webdataset: pip install "vlp[webdataset]".')


def expand(source: str) -> list[str]:
    """The shards of a pattern such as data/{000..099}.tar, sorted by name."""
    from webdataset.shardlists import expand_urls

    told = f"--dataset_name {printable(source, 120)}"
    ranges = [abs(int(last) - int(first)) for first, last in re.findall(r"{(\d{1,18})\.\.(\d{1,18})", source)]
    if math.prod(count + 1 for count in ranges) > MOST_SHARDS:
        raise ArgumentError(f"{told} names more than {MOST_SHARDS:,} shards.")
    try:
        paths = sorted(path for part in expand_urls(source) for path in expand_urls(part))
    except Exception as error:  # unbalanced braces, missing variables
        raise ArgumentError(
            f"{told} is not a pattern of shards, such as data/{{000..099}}.tar: {brief(error)[:120]}"
        ) from error
    for path in paths[:1]:
        scheme = path.split("://")[0] if "://" in path else ""
        if scheme and scheme not in SCHEMES:
            raise ArgumentError(f"{told}: {scheme}:// is not read; expected one of {', '.join(SCHEMES)}, or pipe:.")
    return paths


def read_index(paths: list[str]) -> dict[str, dict[str, int]] | None:
    """Read the index files that `write_shards` stores beside the shards.

    Args:
        paths: the shards.

    Returns:
        {"samples": ..., "bytes": ...} of each shard; None if a shard is not in an index.
    """
    known: dict[str, dict[str, int]] = {}
    for folder in {os.path.dirname(path) for path in paths}:
        index = Path(folder) / INDEX
        if index.is_file():
            known |= {os.path.join(folder, name): facts for name, facts in facts_in(index).items()}
    return {path: known[path] for path in paths} if all(path in known for path in paths) else None


def facts_in(index: Path) -> dict[str, dict[str, int]]:
    """The facts about the shards in an index file. Raises ArgumentError if it is damaged."""
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["shards"]
        for name, facts in shards.items():
            for key, least in (("samples", 1), ("bytes", 0)):
                value = facts[key]
                if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**48:
                    raise ValueError(f"{key} of {name} is {value!r}")
        return shards
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise ArgumentError(
            f"{printable(index, 160)} is damaged ({brief(repr(error))[:120]}): remove it, or write the shards again."
        ) from error


def check_shards(arguments: TrainingArguments) -> None:
    """Check that the shards can be streamed with the given options, and set `shard_size` from the index files.

    Raises:
        ArgumentError: if webdataset is not installed, a shard is missing or incomplete, there are fewer shards than
            workers, or the options do not fit.
    """
    require_webdataset()
    sources = [expand(source) for source in arguments.dataset_name.split("::")]
    streams = max(1, arguments.num_workers) * processes()
    for paths in sources:
        for path in paths:
            if "://" not in path and not path.startswith("pipe:") and not os.path.isfile(path):
                raise ArgumentError(f"--dataset_name {arguments.dataset_name}: there is no shard {path}.")
        if len(paths) < streams:
            raise ArgumentError(
                f"--dataset_name {arguments.dataset_name}: the {len(paths)} shards from {paths[0]} on are fewer than "
                f"the {streams} workers that read them ({processes()} processes of {max(1, arguments.num_workers)}): "
                "lower --num_workers, or write smaller shards (`training shards --samples_per_shard`)."
            )
    indices = [read_index(paths) for paths in sources]
    for path, facts in (item for index in indices if index for item in index.items()):
        if os.path.getsize(path) != facts["bytes"]:
            raise ArgumentError(
                f"{path} has {os.path.getsize(path)} bytes, its index says {facts['bytes']}: the copy is incomplete."
            )
    if arguments.shard_size is None and all(indices):
        arguments.shard_size = sum(facts["samples"] for index in indices for facts in index.values())
    if arguments.shard_weights:
        try:
            weights = [float(weight) for weight in arguments.shard_weights.split("::")]
        except ValueError:
            weights = []
        if len(weights) != len(sources) or min(weights) < 0 or not sum(weights):
            raise ArgumentError(
                f"--shard_weights must be {len(sources)} numbers joined by ::, one per source, not "
                f"{arguments.shard_weights!r}."
            )
    if arguments.shard_size is None and not (arguments.max_train_steps or arguments.max_train_minutes):
        raise ArgumentError(
            "Shards without an index have no known length: give --max_train_steps, --max_train_minutes or --shard_size."
        )
    if arguments.cache_images:
        raise ArgumentError("--cache_images would keep all shards in memory: use --no-cache_images.")


# --- one shard --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Member:
    """The files of a sample in a tar: the offset and the size in bytes of each kind (extension)."""

    shard: str
    key: str
    files: dict[str, tuple[int, int]]


@contextlib.contextmanager
def on_disk(path: str) -> Iterator[str]:
    """The path of a shard as a plain local tar.

    A `pipe:` command, a URL or a .tar.gz is fetched and decompressed to a temporary file, which is deleted on exit.
    """
    if "://" not in path and not path.startswith("pipe:") and path.endswith(".tar"):
        yield path
        return
    from webdataset.gopen import gopen

    with tempfile.NamedTemporaryFile(suffix=".tar") as file:
        with gopen(path, "rb") as stream:
            compressed = path.split("?")[0].endswith("gz")
            shutil.copyfileobj(gzip.open(stream) if compressed else stream, file)
        file.flush()
        yield file.name


def scan(shard: str, path: str) -> tuple[list[Member], str | None]:
    """List the samples of a tar from its headers.

    Args:
        shard: name of the shard.
        path: its local file.

    Returns:
        The samples, without files that are truncated, and the error that ended the scan; None if there was none.
    """
    members: dict[str, dict[str, tuple[int, int]]] = {}
    size, problem = os.path.getsize(path), None
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                folder, name = os.path.split(info.name)
                key, _, kind = name.partition(".")
                if info.isfile() and kind and 0 <= info.size <= size - info.offset_data:
                    location = info.offset_data, info.size
                    members.setdefault(os.path.join(folder, key), {})[kind.lower()] = location
    except Exception as error:  # damaged headers can make tarfile raise anything
        problem = brief(error)[:200]
    return [Member(shard, key, files) for key, files in members.items()], problem


# --- the streams ------------------------------------------------------------------------------------------------------


class Source:
    """One stream's share of the shards of a source; iterates over their samples without end.

    Args:
        paths: all shards of the source, at least as many as there are streams.
        seed: seed of the order.
        stream: number of this stream.
        streams: number of streams.
        place: epoch, window and sample to start at; None: the beginning.
    """

    def __init__(self, paths: list[str], seed: int, stream: int, streams: int, place: list[int] | None = None):
        self.paths, self.seed, self.stream, self.streams = paths, seed, stream, streams
        self.place = place or [0, 0, 0]
        self.broken: list[tuple[Any, str]] = []

    def windows(self, epoch: int) -> list[list[str]]:
        """This stream's shards of an epoch, in windows of a few shards."""
        order = list(self.paths)
        random.Random(f"{self.seed}-{epoch}").shuffle(order)
        first = (self.stream - epoch * len(order)) % self.streams  # continue where the last epoch ended
        own = order[first :: self.streams]
        return [own[i : i + WINDOW] for i in range(0, len(own), WINDOW)]

    def __iter__(self) -> Iterator[tuple[dict[str, bytes], str, int]]:
        """Yield the files of each sample by kind, its key, and the epoch. `place` then points to the next sample."""
        empty = 0
        while True:
            epoch, window, start = self.place
            windows = self.windows(epoch)
            if window == len(windows):
                self.place = [epoch + 1, 0, 0]
                continue
            with contextlib.ExitStack() as stack:
                members, files = [], {}
                for shard in windows[window]:
                    members += self.open(shard, files, stack)
                random.Random(f"{self.seed}-{epoch}-{window}-{self.stream}").shuffle(members)
                empty = 0 if members else empty + 1
                if empty > len(windows) + 1:  # a whole epoch
                    last = f" The last: {printable(self.broken[-1][0], 200)}." if self.broken else ""
                    raise BadDataError(f"None of {len(self.paths)} shards has a sample.{last}")
                for number in range(start, len(members)):
                    member = members[number]
                    self.place = [epoch, window, number + 1]
                    file = files[member.shard]
                    content = {kind: os.pread(file, size, at) for kind, (at, size) in member.files.items()}
                    yield content, f"{member.shard}/{member.key}", epoch
            self.place = [epoch, window + 1, 0]

    def open(self, shard: str, files: dict[str, int], stack: contextlib.ExitStack) -> list[Member]:
        """Open a shard for as long as its window is read, and list its samples. Errors go to `broken`."""
        try:
            path = stack.enter_context(on_disk(shard))
            members, problem = scan(shard, path)
            files[shard] = stack.enter_context(open(path, "rb")).fileno()
        except Exception as error:  # fetching and decompressing can fail in any way
            members, problem = [], brief(error)[:200]
        if problem:
            self.broken.append((f"shard {shard}: {problem}", "truncated or broken shard"))
        return members


class ShardDataset(IterableDataset):
    """An endless stream of pairs from WebDataset shards, shuffled anew each epoch.

    `Sample.place` is the position of the stream after a sample, so that a run can resume with the next one.

    Args:
        sources: the shards of each source; a sample is an image file with a .txt or .json file.
        weights: relative sampling weight of each source; None: equal weights.
        maker: makes the sample of a row.
        seed: seed of the order.
        rank: number of this process.
        processes: number of processes.
        places: the position to resume from, by stream number: `Sample.place` of the last sample of each stream. None:
            the beginning.
        first_batch: number of batches that this process has taken before; they come from its workers in turn.
    """

    def __init__(
        self, sources: list[list[str]], weights: list[float] | None, maker: SampleMaker, seed: int, rank: int = 0,
        processes: int = 1, places: dict[str, dict] | None = None, first_batch: int = 0,
    ):  # fmt: skip
        self.sources, self.weights = sources, weights or [1.0] * len(sources)
        self.maker, self.seed, self.rank, self.processes = maker, seed, rank, processes
        self.places, self.first_batch = places or {}, first_batch

    def __iter__(self) -> Iterator[Sample]:
        worker = torch.utils.data.get_worker_info()
        workers = worker.num_workers if worker else 1
        # A DataLoader starts with its first worker, so that worker must get the stream whose turn it is.
        turn = ((worker.id if worker else 0) + self.first_batch) % workers
        stream = self.rank * workers + turn
        place = self.places.get(str(stream), {"draws": 0, "sources": [None] * len(self.sources)})
        sources = [Source(paths, self.seed + 7919 * number, stream, self.processes * workers, at)
                   for number, (paths, at) in enumerate(zip(self.sources, place["sources"], strict=True))]  # fmt: skip
        streams, draws = [iter(source) for source in sources], place["draws"]
        skipped: list[tuple[Any, str]] = []
        while True:
            rng = random.Random(f"{self.seed}-{stream}-{draws}")
            files, key, epoch = next(rng.choices(streams, self.weights)[0])
            draws += 1
            try:
                sample = self.maker(self.to_row(files), key, epoch)
            except BadRow as error:
                skipped.append((key, str(error)))
                if len(skipped) >= TRIES:
                    causes = Counter(cause for _, cause in skipped)
                    raise unusable(f"{TRIES} consecutive samples cannot be used", causes, key) from None
                continue
            for source in sources:
                skipped += source.broken
                source.broken = []
            sample.skipped, skipped = skipped, []
            sample.place = {str(stream): {"draws": draws, "sources": [list(source.place) for source in sources]}}
            yield sample

    def to_row(self, files: dict[str, bytes]) -> dict:
        """Turn the files of a sample into a row.

        Args:
            files: contents by kind (extension, lower case).

        Returns:
            The fields of the .json file, the image (None if there is none), and the caption: that of the .json file, or
            else the .txt file.

        Raises:
            BadRow: if the .json file is invalid.
        """
        column = self.maker.chooser.caption_column.split(",")[0]
        try:
            row = dict(json.loads(files["json"])) if "json" in files else {}
        except (ValueError, TypeError, RecursionError):
            raise BadRow("broken JSON") from None
        if "txt" in files and not row.get(column):
            row[column] = files["txt"].decode("utf-8", "replace")
        row[self.maker.image_column] = next((files[kind] for kind in files if is_picture(kind)), None)
        return row


def is_picture(kind: str) -> bool:
    """Whether files of this kind (extension, lower case) are pictures; `write_shards` may use the name of a format."""
    return f".{kind}" in extensions() or kind.upper() in formats()


# --- writing ----------------------------------------------------------------------------------------------------------


def write_shards(arguments: ShardsArguments) -> None:
    """Write a data set as shuffled shards with an index. The bytes of the images are copied unchanged.

    Raises:
        ArgumentError: if webdataset is not installed, the data cannot be loaded, or the output folder holds other
            files.
    """
    require_webdataset()
    from webdataset import ShardWriter

    target, causes = Path(arguments.output_dir), Counter()
    check_output(arguments.output_dir, sources=[arguments.dataset_name, arguments.image_root])
    rows = load_rows(
        arguments.dataset_name, arguments.train_split, arguments.image_column, arguments.image_root,
        arguments.dataset_config_name, caption_column=arguments.caption_column, encoding=arguments.encoding,
    ).shuffle(seed=arguments.seed)  # fmt: skip
    for column in arguments.caption_column.split(","):
        require_text(rows, column, arguments.dataset_name, "--caption_column")
    shards: dict[str, dict[str, int]] = {}

    def write(folder: Path) -> None:
        def note(path: str) -> None:
            shards[Path(path).name] = {"samples": writer.count, "bytes": os.path.getsize(path)}

        options = {"maxcount": arguments.samples_per_shard, "encoder": False, "post": note, "verbose": 0}
        with ShardWriter(f"{str(folder).replace('%', '%%')}/%05d.tar", **options) as writer:
            for number, row in enumerate(tqdm(rows, unit=" samples")):
                try:
                    writer.write(
                        {"__key__": f"{number:09d}"} | files_of(row, arguments.image_column, arguments.caption_column)
                    )
                except BadRow as error:
                    causes[str(error)] += 1
        if not any(shard["samples"] for shard in shards.values()):
            raise BadDataError(f"no row can be used: {describe(causes)}. No shards were written")
        (folder / INDEX).write_text(json.dumps({"shards": shards}, indent=1))

    target = write_whole(target, write)
    total = sum(shard["samples"] for shard in shards.values())
    print(f"{total:,} samples in {len(shards):,} shards. Skipped rows: {describe(causes)}.")
    print(f"To train on them: --dataset_name '{target}/{{00000..{len(shards) - 1:05d}}}.tar'")


def files_of(row: dict, image_column: str, caption_column: str) -> dict[str, bytes]:
    """The files of a sample: the image, the first caption as text, and all columns except the image as JSON.

    Other readers of WebDataset, such as open_clip's, use the text file.

    Args:
        row: a row of the data set.
        image_column: column with the image.
        caption_column: column with the captions, or several, joined by commas; the first caption becomes the text.

    Returns:
        Contents by kind: the image's format, "txt" and "json".

    Raises:
        BadRow: if there is no image, it cannot be read, or there is no caption.
    """
    try:
        content = picture_bytes(row[image_column])
        with Image.open(io.BytesIO(content), formats=formats()) as image:
            kind = EXTENSION.get(image.format, image.format).lower()
    except PictureError as error:
        raise BadRow(str(error)) from None
    except Exception:
        raise BadRow("not an image") from None
    rest = {"image_id": picture_id(row, image_column)} | {
        k: v for k, v in row.items() if k != image_column and v is not None
    }
    captions = [text for column in caption_column.split(",") for text in texts_of(row.get(column))]
    if not captions:
        raise BadRow("empty caption")
    text = captions[0]
    return {kind: content, "txt": text.encode(), "json": json.dumps(rest, ensure_ascii=False, default=str).encode()}
