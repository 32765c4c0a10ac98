"""WebDataset shards: find them, check them, and read their samples in an order that a run can resume in.

In each epoch, the shards are shuffled and distributed among the streams, so each sample is read once per epoch. The
number of streams is fixed when a run starts; the workers of all processes share them evenly, and a run may be resumed
with another number of workers and processes. A stream shuffles the samples of a few shards (a window) at a time. The
position of a stream is three numbers per source: epoch, window in the epoch, and sample in the window.
"""

import contextlib
import gzip
import importlib.util
import json
import math
import os
import random
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ArgumentError, BadDataError, brief, printable
from ...processing.pictures import extensions, formats
from ..arguments import TrainingArguments
from ..objectives.distributed import processes

INDEX = "index.json"
WINDOW = 4  # shards that a worker reads from at a time, whose samples are shuffled together
TEXTS = ("txt", "json", "cls")  # kinds of files that hold a caption


MOST_SHARDS = 1_000_000
SCHEMES = ("file", "http", "https", "hf", "gs", "s3", "sftp", "ftps", "scp")


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

    The files of a sample share their name up to the first dot, as WebDataset says; or up to the last dot, if more
    samples are complete that way, as in img.0001.jpg with img.0001.txt.

    Args:
        shard: name of the shard.
        path: its local file.

    Returns:
        The samples, without files that are truncated, and the error that ended the scan; None if there was none.
    """
    size, problem, found = os.path.getsize(path), None, []
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if info.isfile() and 0 <= info.size <= size - info.offset_data:
                    found.append((info.name, (info.offset_data, info.size)))
    except Exception as error:  # damaged headers can make tarfile raise anything
        problem = brief(error)[:200]
    first, last = (grouped(shard, found, by_last_dot) for by_last_dot in (False, True))
    more = sum(map(is_complete, last)) > sum(map(is_complete, first))
    return (last if more else first), problem


def grouped(shard: str, found: list[tuple[str, tuple[int, int]]], by_last_dot: bool) -> list[Member]:
    """Group the files of a tar into samples.

    Args:
        shard: name of the shard.
        found: the name, and the offset and size, of each file.
        by_last_dot: split names at their last dot, not at the first one.
    """
    members: dict[str, dict[str, tuple[int, int]]] = {}
    for path, location in found:
        folder, name = os.path.split(path)
        key, _, kind = name.rpartition(".") if by_last_dot else name.partition(".")
        if key and kind:
            members.setdefault(os.path.join(folder, key), {})[kind.lower()] = location
    return [Member(shard, key, files) for key, files in members.items()]


def is_complete(member: Member) -> bool:
    """Whether a sample has a picture and a text."""
    return any(map(is_picture, member.files)) and any(kind in TEXTS for kind in member.files)


# --- the streams ------------------------------------------------------------------------------------------------------


@dataclass
class Window:
    """The samples of a few shards, which stay open until `stack` is closed."""

    members: list[Member]
    files: dict[str, int]  # file descriptors by shard
    broken: list[tuple[Any, str]]  # what was wrong with shards
    stack: contextlib.ExitStack


class Source:
    """One stream's share of the shards of a source; iterates over their samples without end.

    While a window is read, the next one is opened in the background.

    Args:
        paths: all shards of the source, at least as many as there are streams.
        seed: seed of the order.
        stream: number of this stream.
        streams: number of streams.
        place: epoch, window and sample to start at; None: the beginning.
        window: number of shards that are open at a time.
    """

    def __init__(
        self, paths: list[str], seed: int, stream: int, streams: int, place: list[int] | None = None,
        window: int = WINDOW,
    ):  # fmt: skip
        self.paths, self.seed, self.stream, self.streams, self.window = paths, seed, stream, streams, window
        self.place = place or [0, 0, 0]
        self.broken: list[tuple[Any, str]] = []

    def windows(self, epoch: int) -> list[list[str]]:
        """This stream's shards of an epoch, in windows of a few shards."""
        order = list(self.paths)
        random.Random(f"{self.seed}-{epoch}").shuffle(order)
        first = (self.stream - epoch * len(order)) % self.streams  # continue where the last epoch ended
        own = order[first :: self.streams]
        return [own[i : i + self.window] for i in range(0, len(own), self.window)]

    def __iter__(self) -> Iterator[tuple[dict[str, bytes], str, int]]:
        """Yield the files of each sample by kind, its key, and the epoch. `place` then points to the next sample."""
        empty, ahead = 0, None
        with ThreadPoolExecutor(1) as background:
            try:
                while True:
                    epoch, number, start = self.place
                    count = len(self.windows(epoch))
                    if number == count:
                        self.place = [epoch + 1, 0, 0]
                        continue
                    window = ahead.result() if ahead else self.open(epoch, number)
                    following = (epoch, number + 1) if number + 1 < count else (epoch + 1, 0)
                    ahead = background.submit(self.open, *following)
                    with window.stack:
                        self.broken += window.broken
                        empty = 0 if window.members else empty + 1
                        if empty > count + 1:  # a whole epoch
                            last = f" The last: {printable(self.broken[-1][0], 200)}." if self.broken else ""
                            raise BadDataError(f"None of {len(self.paths)} shards has a sample.{last}")
                        for index in range(start, len(window.members)):
                            member = window.members[index]
                            self.place = [epoch, number, index + 1]
                            file = window.files[member.shard]
                            content = {kind: os.pread(file, size, at) for kind, (at, size) in member.files.items()}
                            yield content, f"{member.shard}/{member.key}", epoch
                    self.place = [epoch, number + 1, 0]
            finally:
                if ahead:
                    ahead.result().stack.close()

    def open(self, epoch: int, number: int) -> Window:
        """Open the shards of a window, and list its samples in their shuffled order."""
        window = Window([], {}, [], contextlib.ExitStack())
        windows = self.windows(epoch)
        for shard in windows[number] if number < len(windows) else []:
            try:
                path = window.stack.enter_context(on_disk(shard))
                members, problem = scan(shard, path)
                file = window.stack.enter_context(open(path, "rb")).fileno()
                if hasattr(os, "posix_fadvise"):  # the samples are read in random order
                    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED)
                window.files[shard] = file
                window.members += members
            except Exception as error:  # fetching and decompressing can fail in any way
                problem = brief(error)[:200]
            if problem:
                window.broken.append((f"shard {shard}: {problem}", "truncated or broken shard"))
        random.Random(f"{self.seed}-{epoch}-{number}-{self.stream}").shuffle(window.members)
        return window


def is_picture(kind: str) -> bool:
    """Whether files of this kind (extension, lower case) are pictures; `write_shards` may use the name of a format."""
    return f".{kind}" in extensions() or kind.upper() in formats()
