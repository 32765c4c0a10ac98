"""Read samples from shards, or from a data set that is streamed, in streams that the workers of all processes share."""

import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import IterableDataset

from ...errors import ResumeError
from ...processing.prompts import CLASS_NAMES
from ..arguments import TrainingArguments
from .rows import BadRow, unusable
from .samples import TRIES, Sample, SampleMaker
from .shards import WINDOW, Source, is_picture
from .streaming import RowSource, StreamedRows

STREAMS = 8  # least number of streams, if there are enough shards


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
