"""From samples to batches, and the bad rows that are met on the way."""

import signal
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ...errors import BadDataError
from .rows import describe
from .samples import Sample


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
