"""WebDataset shards: write any data set as shards, and stream them so that a run can resume in the middle of one.

In each epoch, the shards are shuffled and distributed among the streams, so each sample is read once per epoch. The
number of streams is fixed when a run starts; the workers of all processes share them evenly, and a run may be resumed
with another number of workers and processes. A stream shuffles the samples of a few shards (a window) at a time. The
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import IterableDataset
from tqdm import tqdm

from ...errors import ArgumentError, BadDataError, ResumeError, brief, printable
from ...files import check_output, write_whole
from ...processing.pictures import PictureError, extensions, formats, picture_bytes
from ...processing.prompts import CLASS_NAMES
from ..arguments import EMOJI, TrainingArguments, check_values, option, require_at_least_one
from ..objectives.distributed import processes
from .rows import BadRow, describe, picture_id, texts_of, unusable
from .samples import TRIES, Sample, SampleMaker
from .sources import load_rows, require_text
from .streaming import RowSource, StreamedRows

INDEX = "index.json"
WINDOW = 4  # shards that a worker reads from at a time, whose samples are shuffled together
STREAMS = 8  # least number of streams, if there are enough shards
TEXTS = ("txt", "json", "cls")  # kinds of files that hold a caption
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


class ShardDataset(IterableDataset):
    """An endless stream of pairs from WebDataset shards, shuffled anew each epoch.

    `Sample.place` is the position of the sample's stream after it, so that a run can resume with the next one.

    Args:
        sources: the shards of each source, in which a sample is an image file with a .txt, .json or .cls file; or a
            data set that is streamed.
        weights: relative sampling weight of each source; None: equal weights.
        maker: makes the sample of a row.
        seed: seed of the order.
        rank: number of this process.
        processes: number of processes.
        places: the position to resume from, by stream number: `Sample.place` of the last sample of each stream. None:
            the beginning.
        first_batch: number of batches that this process has taken before; they come from its workers in turn.
        workers: workers of each process.
        kinds: which files to read.
    """

    def __init__(
        self, sources: list, weights: list[float] | None, maker: SampleMaker, seed: int, rank: int = 0,
        processes: int = 1, places: dict[str, dict] | None = None, first_batch: int = 0, workers: int = 1,
        kinds: "Kinds | None" = None,
    ):  # fmt: skip
        self.sources, self.weights = sources, weights or [1.0] * len(sources)
        self.maker, self.seed, self.rank, self.processes = maker, seed, rank, processes
        self.places, self.first_batch, self.kinds = places or {}, first_batch, kinds or Kinds()
        self.streams, self.window = streams_of(sources, processes * max(1, workers), self.places)

    def __iter__(self) -> Iterator[Sample]:
        worker = torch.utils.data.get_worker_info()
        workers = worker.num_workers if worker else 1
        # A DataLoader starts with its first worker, so that worker must get the streams whose turn it is.
        turn = ((worker.id if worker else 0) + self.first_batch) % workers
        own = [
            Stream(self, number) for number in range(self.rank * workers + turn, self.streams, self.processes * workers)
        ]
        samples = [iter(stream) for stream in own]
        while True:  # the stream that has given the fewest samples is next
            yield next(samples[min(range(len(own)), key=lambda index: own[index].draws)])

    def to_row(self, files: dict[str, bytes]) -> dict:
        """Turn the files of a sample into a row.

        Args:
            files: contents by kind (extension, lower case).

        Returns:
            The fields of the .json file, the image (None if there is none), and the captions: those of the .json file,
            or else the .txt file, or else the name of the class in the .cls file.

        Raises:
            BadRow: if the .json file is invalid, or a class has no name.
        """
        column, kinds = self.maker.chooser.caption_column.split(",")[0], self.kinds
        try:
            content = json.loads(files["json"]) if "json" in files else {}
            row = {column: content} if isinstance(content, list) else dict(content)
        except (ValueError, TypeError, RecursionError):
            raise BadRow("broken JSON") from None
        text = next((files[kind] for kind in kinds.captions if kind in files), None)
        if text is not None and (kinds.captions != TEXT or not row.get(column)):
            row[column] = text.decode("utf-8", "replace")
        if "cls" in files and not row.get(column):
            row[column] = kinds.class_name(files["cls"].decode("utf-8", "replace").strip())
        pictures = kinds.images or [kind for kind in files if is_picture(kind)]
        row[self.maker.image_column] = next((files[kind] for kind in pictures if kind in files), None)
        return row


class Stream:
    """One of the streams of a `ShardDataset`; iterates over its samples. `draws` is the number of samples so far."""

    def __init__(self, data: ShardDataset, number: int):
        self.data, self.number = data, number
        self.place = data.places.get(str(number), {"draws": 0, "sources": [None] * len(data.sources)})
        self.draws = self.place["draws"]

    def __iter__(self) -> Iterator[Sample]:
        data = self.data
        sources = [
            RowSource(part, data.seed, self.number, data.streams, at) if isinstance(part, StreamedRows)
            else Source(part, data.seed + 7919 * number, self.number, data.streams, at, data.window)
            for number, (part, at) in enumerate(zip(data.sources, self.place["sources"], strict=True))
        ]  # fmt: skip
        iterators, skipped = [iter(source) for source in sources], []
        while True:
            rng = random.Random(f"{data.seed}-{self.number}-{self.draws}")
            files, key, epoch = next(rng.choices(iterators, data.weights)[0])
            self.draws += 1
            try:
                row = files if isinstance(data.sources[0], StreamedRows) else data.to_row(files)
                sample = data.maker(row, key, epoch)
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
            place = {"draws": self.draws, "sources": [list(source.place) for source in sources],
                     "streams": data.streams, "window": data.window}  # fmt: skip
            sample.place = {str(self.number): place}
            yield sample


TEXT = ("txt",)


@dataclass(frozen=True)
class Kinds:
    """Which files of a sample to read, by kind (extension, lower case).

    Attributes:
        images: kinds of the image, the first that is there; empty: whatever is a picture.
        captions: kinds of the caption; others than .txt come before what the .json file says.
        class_names: names of the classes whose numbers are in .cls files; None: there are none.
    """

    images: tuple[str, ...] = ()
    captions: tuple[str, ...] = TEXT
    class_names: tuple[str, ...] | None = None

    def class_name(self, text: str) -> str:
        """The caption that a .cls file stands for. Raises BadRow for a number without a name."""
        if not text.isdecimal():
            return text
        if self.class_names is None or int(text) >= len(self.class_names):
            raise BadRow("a class number without a name")
        return self.class_names[int(text)]


def kinds_of(arguments: TrainingArguments) -> Kinds:
    """The files that the options of a run name."""
    names = getattr(arguments, "class_names", None)
    return Kinds(
        images=endings(arguments.shard_image_key),
        captions=endings(arguments.shard_caption_key) or TEXT,
        class_names=tuple(CLASS_NAMES[names]) if names else None,
    )


def endings(text: str | None) -> tuple[str, ...]:
    """The endings in a text such as "jpg,png" or "jpg;png", in lower case and without a dot in front."""
    return tuple(part.strip().lower().removeprefix(".") for part in re.split("[,;]", text or "") if part.strip())


def streams_of(sources: list, workers: int, places: dict[str, dict]) -> tuple[int, int]:
    """The number of streams of a run, and of shards that each of them reads at a time.

    Args:
        sources: the shards of each source.
        workers: the workers of all processes, at most as many as there are shards in each source.
        places: the positions of the streams in a state to resume from, whose number they keep; empty for a new run.

    Raises:
        ResumeError: if there are more workers than streams.
    """
    if places:
        place = next(iter(places.values()))
        streams, window = place.get("streams", workers), place.get("window", WINDOW)
        if workers > streams:
            raise ResumeError(
                f"The run reads its shards in {streams} streams, so it cannot be resumed with {workers} workers "
                "(processes times --num_workers)."
            )
        return streams, window
    each = max(1, min(STREAMS // workers, min(map(len, sources)) // workers))
    return each * workers, max(1, WINDOW // each)


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
