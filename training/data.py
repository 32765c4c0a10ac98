"""From rows to batches: bad rows are skipped and counted, one caption is drawn, images become uint8 squares."""

import io
import random
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms.v2 import functional as tv

from ..processing.augmentation import PerImage
from ..processing.prompts import TEMPLATES, prompts_for

TRIES = 1000  # rows in a row that may be bad before the data is given up
MAX_ASPECT = 1000


class BadRow(ValueError):
    """A row that cannot be used; its message is the cause, under which it is counted."""


class BadDataError(RuntimeError):
    """More rows are bad than the run allows."""


def decode_image(source: Any, max_pixels: int) -> Image.Image:
    """A picture from bytes, a path, or {"bytes", "path"}. Raises BadRow with the cause."""
    if isinstance(source, dict):
        source = source.get("bytes") or source.get("path")
    if not source:
        raise BadRow("no image")
    try:
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        if image.width * image.height > max_pixels:
            raise BadRow("decompression bomb")
        if max(image.size) > MAX_ASPECT * min(image.size):
            raise BadRow(f"longer than {MAX_ASPECT} times its width")  # scaled to its shorter side, it would be huge
        image.load()
        return image
    except BadRow:
        raise
    except FileNotFoundError:
        raise BadRow("missing image file") from None
    except Image.DecompressionBombError:
        raise BadRow("decompression bomb") from None
    except UnidentifiedImageError:
        raise BadRow("not an image") from None
    except Exception:  # Pillow's readers raise whatever a broken file makes of their arithmetic
        raise BadRow("truncated or broken image") from None


def texts_of(value: Any) -> list[str]:
    """What a cell holds that is more than white space: a text, or a list of them."""
    values = value if isinstance(value, list) else [value]
    return [text.strip() for text in values if isinstance(text, str) and text.strip()]


@dataclass(kw_only=True)
class CaptionChooser:
    """What is read to the model for an image: one of its captions, at times keywords, at times in a template.

    Columns and templates may be several, joined by commas: those of one language after those of another, in the same
    order. A caption's keywords and template are then those of its own language.
    """

    caption_column: str = "caption"
    tag_column: str | None = None
    tag_share: float = 0.0
    templates: str = "name"
    template_share: float = 0.0

    def captions(self, row: dict) -> list[str]:
        """All captions of a row that are more than white space. Raises BadRow where there is none."""
        captions = [text for column in self.caption_column.split(",") for text in texts_of(row.get(column))]
        if not captions:
            raise BadRow("empty caption")
        return captions

    def in_one_language(self, number: int) -> "CaptionChooser":
        """The chooser of the language whose columns stand at a place."""
        columns = {name: getattr(self, name).split(",") for name in ("caption_column", "tag_column", "templates")
                   if getattr(self, name)}  # fmt: skip
        return replace(self, **{name: values[min(number, len(values) - 1)] for name, values in columns.items()})

    def choose(self, row: dict, rng: random.Random) -> tuple[str, str]:
        """The text to read, and the caption that it stands for; of several languages, one is drawn first."""
        columns = self.caption_column.split(",")
        if len(columns) > 1:
            told = [number for number, column in enumerate(columns) if texts_of(row.get(column))]
            return self.in_one_language(rng.choice(told)).choose(row, rng)
        caption = text = rng.choice(self.captions(row))
        tags = row.get(self.tag_column) if self.tag_share else None
        tags = tags.split(",") if isinstance(tags, str) else tags or []
        tags = [tag.strip() for tag in tags if tag and tag.strip()]
        if tags and rng.random() < self.tag_share:
            some = ", ".join(rng.sample(tags, rng.randint(1, min(4, len(tags)))))
            text = some if rng.random() < 0.5 else f"{caption}, {some}"
        if self.template_share and rng.random() < self.template_share:
            text = rng.choice(TEMPLATES[self.templates]).format(text)
        return text, caption


def stable_id(value: Any) -> int:
    """The same 63-bit integer for the same value, in every process and run."""
    return int.from_bytes(blake2b(str(value).lower().encode(), digest_size=8).digest(), "big") >> 1


@dataclass
class Sample:
    """One pair, ready for a batch; `skipped` names the bad rows that were met on the way to it."""

    pixels: Tensor  # (3, S, S) uint8, or what an image tower gave before, (M, D)
    text: str
    caption_id: int
    image_id: int
    skipped: list[tuple[Any, str]] = field(default_factory=list)
    answers: list[tuple[str, float]] | None = None  # of a question, with their weights
    label: int | None = None  # whether the text is true of two images; pixels are then (2, 3, S, S)
    place: dict[str, dict] = field(default_factory=dict)  # where a stream of shards is after it, by the stream's number


@dataclass(kw_only=True)
class SampleMaker:
    """Row -> Sample. The random choices depend on the seed, the epoch and the row alone."""

    chooser: CaptionChooser
    per_image: PerImage
    image_column: str = "image"
    max_image_pixels: int = Image.MAX_IMAGE_PIXELS or 89_478_485
    seed: int = 0
    cache: dict[Any, Tensor] | None = None

    def __call__(self, row: dict, key: Any, epoch: int) -> Sample:
        # Rows with the same captions get the same text in an epoch: a batch then holds it once.
        caption_rng = random.Random(f"{self.seed}-{epoch}-{self.chooser.captions(row)}")
        text, caption = self.chooser.choose(row, caption_rng)
        rng = random.Random(f"{self.seed}-{epoch}-{key}")
        pixels = self.pixels(row, self.image_column, key, rng)
        return Sample(pixels, text, stable_id(caption), stable_id(self.image_id(row, key)))

    def pixels(self, row: dict, column: str, key: Any, rng: random.Random) -> Tensor:
        """(3, S, S) uint8 of the image in a column. Raises BadRow where it cannot be used."""
        pixels = None if self.cache is None else self.cache.get((key, column))
        if pixels is None:
            image = decode_image(row[column], self.max_image_pixels)
            pixels = tv.pil_to_tensor(self.per_image(image, rng))
            if self.cache is not None:
                self.cache[key, column] = pixels
        return pixels

    def image_id(self, row: dict, key: Any) -> Any:
        """What tells images apart: their id, the file where one caption a row points to it, else the row."""
        if row.get("image_id") is not None:
            return row["image_id"]
        source = row[self.image_column]
        in_a_file = isinstance(source, dict) and source.get("path") and not source.get("bytes")
        return source["path"] if in_a_file else f"row {key}"


@dataclass(kw_only=True)
class QuestionMaker(SampleMaker):
    """Row -> Sample of a question (VQA): its caption asks, and each answer weighs as often as it was given."""

    answer_column: str = "answers"

    def __call__(self, row: dict, key: Any, epoch: int) -> Sample:
        sample = super().__call__(row, key, epoch)
        answers = answers_of(row, self.answer_column)
        sample.answers = [(answer, count / len(answers)) for answer, count in Counter(answers).items()]
        return sample


def answers_of(row: dict, column: str) -> list[str]:
    """The answers to a row's question. Raises BadRow where there is none."""
    answers = texts_of(row.get(column))
    if not answers:
        raise BadRow("no answer")
    return answers


@dataclass(kw_only=True)
class ReasoningMaker(SampleMaker):
    """Row -> Sample of two images and whether its caption is true of them (NLVR2)."""

    second_image_column: str = "second_image"
    label_column: str = "label"

    def __call__(self, row: dict, key: Any, epoch: int) -> Sample:
        sample = super().__call__(row, key, epoch)
        rng = random.Random(f"{self.seed}-{epoch}-{key}-second")
        sample.pixels = torch.stack([sample.pixels, self.pixels(row, self.second_image_column, key, rng)])
        sample.label = label_of(row, self.label_column)
        return sample


def label_of(row: dict, column: str) -> int:
    """1 where a row says true, 0 where false. Raises BadRow where it says neither."""
    value = str(row.get(column)).strip().lower()
    if value not in ("1", "0", "true", "false"):
        raise BadRow("no label")
    return int(value in ("1", "true"))


class PairDataset(Dataset):
    """Pairs by number. A bad row is replaced by the next good one, so that batches keep their size."""

    def __init__(self, rows, maker: SampleMaker):
        # Where images are kept in memory, rows are too: to read one from Arrow takes longer than to augment it.
        self.rows = list(rows) if maker.cache is not None else rows
        self.maker = maker

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, draw: tuple[int, int]) -> Sample:
        """Sample of (row number, epoch)."""
        number, epoch = draw
        skipped = []
        for attempt in range(min(TRIES, len(self))):
            key = (number + attempt) % len(self)
            try:
                sample = self.maker(self.rows[key], key, epoch)
            except BadRow as error:
                skipped.append((key, str(error)))
                continue
            sample.skipped = skipped
            return sample
        causes = Counter(cause for _, cause in skipped)
        raise BadDataError(f"{len(skipped)} rows in a row cannot be used: {describe(causes)}.")


class DrawSampler(Sampler):
    """Rows in a new order each epoch, the same on every machine, dealt out to the processes; it never ends.

    Args:
        group_ids: rows with equal ids stand together in runs of up to `group_size`, so that a batch holds several
            images of the same caption.
        start: draws that were made before, by all processes together (to resume).
    """

    def __init__(self, size: int, seed: int, rank: int = 0, processes: int = 1, start: int = 0,
                 group_ids: list[int] | None = None, group_size: int = 1):  # fmt: skip
        self.size, self.seed, self.rank, self.processes = size, seed, rank, processes
        self.start, self.group_ids, self.group_size = start, group_ids, group_size

    def order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * epoch)
        order = torch.randperm(self.size, generator=generator).tolist()
        if self.group_ids is None or self.group_size == 1:
            return order
        members: dict[int, list[int]] = {}
        for number in order:
            members.setdefault(self.group_ids[number], []).append(number)
        runs = [
            rows[i : i + self.group_size] for rows in members.values() for i in range(0, len(rows), self.group_size)
        ]
        shuffled = torch.randperm(len(runs), generator=generator).tolist()
        return [number for run in shuffled for number in runs[run]]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        position, epoch, order = self.start + self.rank, -1, []
        while True:
            if position // self.size != epoch:
                epoch = position // self.size
                order = self.order(epoch)
            yield order[position % self.size], epoch
            position += self.processes


@dataclass
class Batch:
    """What a step gets, and the bad rows that were met while it was made."""

    pixels: Tensor  # (B, 3, S, S) uint8; of two images for each text (2 B, 3, S, S); cached features (B, M, D)
    input_ids: Tensor  # (T, N): the different texts of the batch, N the longest of them
    text_index: Tensor  # (B,): which of the texts belongs to each image
    caption_ids: Tensor  # (B,)
    image_ids: Tensor  # (B,)
    skipped: list[tuple[Any, str]]
    extra: dict[str, Tensor] = field(default_factory=dict)  # what a fine-tuning task needs beside
    place: dict[str, dict] = field(default_factory=dict)  # as `Sample.place`

    def __len__(self) -> int:
        return len(self.text_index)

    def pin_memory(self) -> "Batch":
        """What a DataLoader with `pin_memory` calls, for copies to the device that nobody waits for."""
        names = ("pixels", "input_ids", "text_index", "caption_ids", "image_ids")
        extra = {name: value.pin_memory() for name, value in self.extra.items()}
        return replace(self, extra=extra, **{name: getattr(self, name).pin_memory() for name in names})


class Collator:
    """Samples -> Batch; a text that stands twice is read once, and padding goes to the longest, never further.

    Args:
        prompt: what is put before every text.
    """

    def __init__(self, processor, max_length: int, prompt: str = ""):
        self.processor, self.max_length, self.prompt = processor, max_length, prompt

    def __call__(self, samples: list[Sample]) -> Batch:
        texts = {text: number for number, text in enumerate(dict.fromkeys(sample.text for sample in samples))}
        tokens = self.processor.read_texts([self.prompt + text for text in texts], self.max_length)
        pixels = torch.stack([sample.pixels for sample in samples])
        return Batch(
            pixels=pixels.flatten(0, -4) if pixels.ndim > 3 else pixels,
            input_ids=tokens["input_ids"],
            text_index=torch.tensor([texts[sample.text] for sample in samples]),
            caption_ids=torch.tensor([sample.caption_id for sample in samples]),
            image_ids=torch.tensor([sample.image_id for sample in samples]),
            skipped=[bad for sample in samples for bad in sample.skipped],
            extra=self.extra(samples),
            place=samples[-1].place,
        )

    def extra(self, samples: list[Sample]) -> dict[str, Tensor]:
        """The answers of questions, one after the other, or the labels of pairs of images, where there are."""
        if samples[0].answers is not None:
            answers = [(place, *answer) for place, sample in enumerate(samples) for answer in sample.answers]
            tokens = self.processor.read_texts([text for _, text, _ in answers], self.max_length)
            return {
                "answer_ids": tokens["input_ids"],
                "answer_index": torch.tensor([place for place, _, _ in answers]),
                "answer_weights": torch.tensor([weight for _, _, weight in answers]),
            }
        if samples[0].label is not None:
            return {"labels": torch.tensor([sample.label for sample in samples])}
        return {}


class BadRows:
    """The bad rows of a run, each counted once, by cause.

    Args:
        max_share: share of rows that may be bad.
        size: rows in all, where that is known.
    """

    def __init__(self, max_share: float, size: int | None = None):
        self.max_share, self.size, self.causes, self.seen = max_share, size, {}, 0

    def update(self, batch: Batch) -> None:
        """Count a batch. Raises BadDataError where the share of bad rows is past what is allowed."""
        self.seen += len(batch)
        self.causes.update(batch.skipped)
        rows = self.seen + len(self.causes)
        rows = min(rows, self.size or rows)
        if self.seen >= 100 and len(self.causes) > self.max_share * rows:
            raise BadDataError(
                f"{len(self.causes)} of the first {rows} rows cannot be used ({self.describe()}), "
                f"more than --max_bad_share {self.max_share}."
            )

    def describe(self) -> str:
        return describe(Counter(self.causes.values()))


def describe(causes: Counter) -> str:
    return ", ".join(f"{cause}: {count}" for cause, count in causes.most_common()) or "none"


def train_loader(arguments, dataset: Dataset, sampler: Sampler | None, collator: Collator) -> DataLoader:
    """Batches of one process, without end; a data set that streams has no sampler."""
    return DataLoader(
        dataset,
        batch_size=arguments.per_device_train_batch_size,
        sampler=sampler,
        collate_fn=collator,
        num_workers=arguments.num_workers,
        persistent_workers=arguments.num_workers > 0,
        worker_init_fn=leave_interruptions_to_the_main_process,
        pin_memory=torch.cuda.is_available(),
        drop_last=True,
        generator=torch.Generator(),  # its own: the global one is what augmentation draws from, and is resumed
    )


def leave_interruptions_to_the_main_process(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; a loader's must live on until the main one has saved the state."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def caption_texts(rows, chooser: CaptionChooser) -> Iterator[str]:
    """Every caption, keyword list and template, to train a tokenizer on."""
    count = len(chooser.caption_column.split(","))
    if count > 1:
        for number in range(count):
            yield from caption_texts(rows, chooser.in_one_language(number))
        return
    columns = [chooser.caption_column] + ([chooser.tag_column] if chooser.tag_share else [])
    for row in rows.select_columns(columns):
        try:
            captions = chooser.captions(row)
        except BadRow:
            continue
        yield from captions
        if chooser.tag_share:
            tags = row[chooser.tag_column] or []
            yield tags if isinstance(tags, str) else ", ".join(tag for tag in tags if tag)
        if chooser.template_share:
            yield from prompts_for(captions[:1], chooser.templates)[0]
