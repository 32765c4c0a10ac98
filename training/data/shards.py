"""WebDataset shards: written from any data set, and read so that a run can stop and go on in the middle of one.

An epoch is all shards in a new order. They are dealt out to streams, one for each worker of each process, so that each
sample is read once by one of them; a stream mixes the samples of a few shards at a time. Where a stream is, are three
numbers for each source: its epoch, its window of shards in it, and the sample in that.
"""

import contextlib
import gzip
import importlib.util
import io
import json
import os
import random
import shutil
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import IterableDataset
from tqdm import tqdm

from ...errors import ArgumentError, BadDataError
from ...files import check_output, write_whole
from ...processing.pictures import PictureError, extensions, formats, picture_bytes
from ..arguments import EMOJI, TrainingArguments, option, require_at_least_one
from ..objectives.distributed import processes
from .rows import BadRow, describe, picture_id, texts_of
from .samples import TRIES, Sample, SampleMaker
from .sources import load_rows

INDEX = "index.json"
TOGETHER = 4  # shards whose samples a stream mixes
EXTENSION = {"JPEG2000": "jp2", "MPO": "mpo", "SUN": "ras", "SPIDER": "spider"}  # where it is not the format's name


@dataclass(kw_only=True)
class ShardsArguments:
    """WebDataset shards, written from any data set that training reads."""

    dataset_name: str = option(EMOJI, "pairs to write, as for training")
    dataset_config_name: str | None = option(None, "configuration of a hub data set")
    train_split: str = option("train", "split to read")
    image_column: str = option("image", "column with the images, or with their paths; all others go in as JSON")
    caption_column: str = option("caption", "column with captions, of which the first goes in as text too")
    image_root: str | None = option(None, "folder that image paths start from; that of the file where not given")
    samples_per_shard: int = option(1000, "there must be a shard for each worker of each process")
    seed: int = option(0, "seed of the order in which they are written")
    output_dir: str | None = option(None, "folder of the shards and their index; runs/shards where not given")

    def __post_init__(self):
        require_at_least_one(self, "samples_per_shard")


# --- what a source is -------------------------------------------------------------------------------------------------


def require_webdataset() -> None:
    if not importlib.util.find_spec("webdataset"):
        raise ArgumentError('Shards need webdataset: pip install "vlp[webdataset]".')


def expand(source: str) -> list[str]:
    """The shards of a pattern such as data/{000..099}.tar, in the order of their names."""
    from webdataset.shardlists import expand_urls

    return sorted(path for part in expand_urls(source) for path in expand_urls(part))


def read_index(paths: list[str]) -> dict[str, dict[str, int]] | None:
    """Samples and bytes of each shard, from the index that `write_shards` left beside them; None without one."""
    known: dict[str, dict[str, int]] = {}
    for folder in {os.path.dirname(path) for path in paths}:
        index = Path(folder) / INDEX
        if index.is_file():
            shards = json.loads(index.read_text())["shards"]
            known |= {os.path.join(folder, name): facts for name, facts in shards.items()}
    return {path: known[path] for path in paths} if all(path in known for path in paths) else None


def check_shards(arguments: TrainingArguments) -> None:
    """Raise ArgumentError where shards cannot be streamed as the options say."""
    require_webdataset()
    sources = [expand(source) for source in arguments.dataset_name.split("::")]
    streams = max(1, arguments.num_workers) * processes()
    for paths in sources:
        for path in paths:
            if "://" not in path and not path.startswith("pipe:") and not os.path.isfile(path):
                raise ArgumentError(f"--dataset_name {arguments.dataset_name}: there is no shard {path}.")
        if len(paths) < streams:
            raise ArgumentError(
                f"--dataset_name {arguments.dataset_name}: {len(paths)} shards from {paths[0]} on are fewer than the "
                f"{streams} workers that read them ({processes()} processes of {max(1, arguments.num_workers)}): lower "
                "--num_workers, or write smaller shards (`training shards --samples_per_shard`)."
            )
    indices = [read_index(paths) for paths in sources]
    for path, facts in (item for index in indices if index for item in index.items()):
        if os.path.getsize(path) != facts["bytes"]:
            raise ArgumentError(
                f"{path} has {os.path.getsize(path)} bytes, its index says {facts['bytes']}: it was not copied whole."
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
                f"--shard_weights must be {len(sources)} numbers joined by ::, one for each source, not "
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
    """A sample's files in a tar: where the bytes of each kind begin, and how many they are."""

    shard: str
    key: str
    files: dict[str, tuple[int, int]]


@contextlib.contextmanager
def on_disk(path: str) -> Iterator[str]:
    """A shard as a plain tar on this machine; what is not one (a pipe:, a URL, a .tar.gz) is fetched for the while."""
    if "://" not in path and not path.startswith("pipe:") and path.endswith(".tar"):
        yield path
        return
    from webdataset.gopen import gopen

    with tempfile.NamedTemporaryFile(suffix=".tar") as file:
        with gopen(path, "rb") as stream:
            packed = path.split("?")[0].endswith("gz")
            shutil.copyfileobj(gzip.open(stream) if packed else stream, file)
        file.flush()
        yield file.name


def scan(shard: str, path: str) -> tuple[list[Member], str | None]:
    """The whole samples of a tar, by its headers alone, and what is wrong with it."""
    members: dict[str, dict[str, tuple[int, int]]] = {}
    size, problem = os.path.getsize(path), None
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                folder, name = os.path.split(info.name)
                key, _, kind = name.partition(".")
                if info.isfile() and kind and info.offset_data + info.size <= size:
                    place = info.offset_data, info.size
                    members.setdefault(os.path.join(folder, key), {})[kind.lower()] = place
    except (tarfile.TarError, EOFError) as error:
        problem = str(error)
    return [Member(shard, key, files) for key, files in members.items()], problem


# --- the streams ------------------------------------------------------------------------------------------------------


class Source:
    """One stream's part of a source's shards, epoch after epoch.

    Args:
        paths: all shards of the source.
        stream, streams: which of how many streams this is; there are as many shards at least.
        place: epoch, window and sample to begin at.
    """

    def __init__(self, paths: list[str], seed: int, stream: int, streams: int, place: list[int] | None = None):
        self.paths, self.seed, self.stream, self.streams = paths, seed, stream, streams
        self.place = place or [0, 0, 0]
        self.broken: list[tuple[Any, str]] = []

    def windows(self, epoch: int) -> list[list[str]]:
        """This stream's shards of an epoch, a few together."""
        order = list(self.paths)
        random.Random(f"{self.seed}-{epoch}").shuffle(order)
        first = (self.stream - epoch * len(order)) % self.streams  # dealing goes on where the epoch before ended
        mine = order[first :: self.streams]
        return [mine[i : i + TOGETHER] for i in range(0, len(mine), TOGETHER)]

    def __iter__(self) -> Iterator[tuple[dict[str, bytes], str, int]]:
        """Files of a sample by kind, its key, and the epoch, without end; `place` is then that of the next."""
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
                    raise BadDataError(f"None of {len(self.paths)} shards has a sample; the last: {self.broken[-1:]}.")
                for number in range(start, len(members)):
                    member = members[number]
                    self.place = [epoch, window, number + 1]
                    file = files[member.shard]
                    content = {kind: os.pread(file, size, at) for kind, (at, size) in member.files.items()}
                    yield content, f"{member.shard}/{member.key}", epoch
            self.place = [epoch, window + 1, 0]

    def open(self, shard: str, files: dict[str, int], stack: contextlib.ExitStack) -> list[Member]:
        """The samples of a shard, which stays open while its window is read; what is broken is noted."""
        try:
            path = stack.enter_context(on_disk(shard))
            members, problem = scan(shard, path)
            files[shard] = stack.enter_context(open(path, "rb")).fileno()
        except (OSError, EOFError, zlib.error) as error:
            members, problem = [], str(error)
        if problem:
            self.broken.append((f"shard {shard}: {problem}", "truncated or broken shard"))
        return members


class ShardDataset(IterableDataset):
    """Pairs streamed from WebDataset shards, without end, in a new order each epoch.

    Each sample says by `Sample.place` where its stream is after it, so that a run goes on with the next.

    Args:
        sources: the shards of each source; members are an image, and .txt or .json.
        weights: how often each source is drawn from, relative to the others.
        rank, processes: this process, and how many there are.
        places: of each stream by its number, where to begin; those of the samples that the run saw last.
        first_batch: batches that this process took before, from its workers in turn.
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
        # A loader begins with its first worker; the stream whose turn it is must be that one's.
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
                    raise BadDataError(f"{TRIES} samples in a row cannot be used: {describe(causes)}.") from None
                continue
            for source in sources:
                skipped += source.broken
                source.broken = []
            sample.skipped, skipped = skipped, []
            sample.place = {str(stream): {"draws": draws, "sources": [list(source.place) for source in sources]}}
            yield sample

    def to_row(self, files: dict[str, bytes]) -> dict:
        """A sample's files as a row: its picture, and its caption from .json (the caption column) or .txt."""
        column = self.maker.chooser.caption_column.split(",")[0]
        try:
            row = dict(json.loads(files["json"])) if "json" in files else {}
        except (ValueError, TypeError):
            raise BadRow("broken JSON") from None
        if "txt" in files and not row.get(column):
            row[column] = files["txt"].decode("utf-8", "replace")
        row[self.maker.image_column] = next((files[kind] for kind in files if f".{kind}" in extensions()), None)
        return row


# --- writing ----------------------------------------------------------------------------------------------------------


def write_shards(arguments: ShardsArguments) -> None:
    """Write a data set as shards, and their index, in a new order; images stay as they are, byte for byte."""
    require_webdataset()
    from webdataset import ShardWriter

    target, causes = Path(arguments.output_dir), Counter()
    check_output(arguments.output_dir)
    rows = load_rows(
        arguments.dataset_name, arguments.train_split, arguments.image_column, arguments.image_root,
        arguments.dataset_config_name,
    ).shuffle(seed=arguments.seed)  # fmt: skip
    shards: dict[str, dict[str, int]] = {}

    def write(folder: Path) -> None:
        def note(path: str) -> None:
            shards[Path(path).name] = {"samples": writer.count, "bytes": os.path.getsize(path)}

        options = {"maxcount": arguments.samples_per_shard, "encoder": False, "post": note, "verbose": 0}
        with ShardWriter(str(folder / "%05d.tar"), **options) as writer:
            for number, row in enumerate(tqdm(rows, unit=" samples")):
                try:
                    writer.write(
                        {"__key__": f"{number:09d}"} | files_of(row, arguments.image_column, arguments.caption_column)
                    )
                except BadRow as error:
                    causes[str(error)] += 1
        (folder / INDEX).write_text(json.dumps({"shards": shards}, indent=1))

    write_whole(target, write)
    total = sum(shard["samples"] for shard in shards.values())
    print(f"{total:,} samples in {len(shards):,} shards. Left out: {describe(causes)}.")
    print(f"Train on them: --dataset_name '{target}/{{00000..{len(shards) - 1:05d}}}.tar'")


def files_of(row: dict, image_column: str, caption_column: str) -> dict[str, bytes]:
    """A row's image, under the name of its format, its first caption as text, and all but the image as JSON.

    Others' readers, such as open_clip's, take the text. Raises BadRow where there is no image.
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
    text = "".join(texts_of(row.get(caption_column.split(",")[0]))[:1])
    return {kind: content, "txt": text.encode(), "json": json.dumps(rest, ensure_ascii=False, default=str).encode()}
