"""Collate samples into batches and count bad rows."""

import signal
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ...errors import BadDataError, UserError
from ...processing.blip2 import VlpInstructBlipProcessor, prompt_of
from ...processing.naflex import VlpNaflexImageProcessor, padded_patches
from .rows import describe
from .samples import Sample


@dataclass
class Batch:
    """The input of a training step, and the bad rows that were skipped while it was prepared."""

    # (B, 3, S, S) uint8; with two images per text (2 B, 3, S, S); cached features (B, M, D); with `spatial_shapes` in
    # `extra`, patches (B, N, P * P * 3) uint8; with `image_index` in it, each image once, and the image of each text
    pixels: Tensor
    input_ids: Tensor  # (T, N): the distinct texts of the batch, padded to the longest
    text_index: Tensor  # (B,): the row of input_ids that belongs to each image
    caption_ids: Tensor  # (B,) integers, equal for equal captions
    image_ids: Tensor  # (B,) integers, equal for equal images
    skipped: list[tuple[Any, str]]  # (row key, cause) of each bad row
    extra: dict[str, Tensor] = field(default_factory=dict)  # further inputs of a fine-tuning task
    place: dict[str, dict] = field(default_factory=dict)  # see `Sample.place`

    def __len__(self) -> int:
        return len(self.text_index)

    def pin_memory(self) -> "Batch":
        """Pin the tensors, so that copies to the device are asynchronous. Called by a DataLoader with `pin_memory`."""
        names = ("pixels", "input_ids", "text_index", "caption_ids", "image_ids")
        extra = {name: value.pin_memory() for name, value in self.extra.items()}
        return replace(self, extra=extra, **{name: getattr(self, name).pin_memory() for name in names})


class Collator:
    """Collate samples into a Batch. Repeated texts are tokenized once; texts are padded to the longest one.

    Args:
        processor: the processor whose tokenizer is used.
        max_length: maximum number of tokens per text.
        prompt: prefix of every text.
        images_once: put each image into the batch once, and the image of each text into `image_index`.
        teacher_texts: for distillation: turns texts into the teacher's tokens (T, N) or embeddings (T, E).
    """

    def __init__(self, processor, max_length: int, prompt: str = "", images_once: bool = False,
                 teacher_texts: Callable[[list[str]], Tensor] | None = None):  # fmt: skip
        self.processor, self.max_length, self.prompt = processor, max_length, prompt
        self.images_once, self.teacher_texts = images_once, teacher_texts
        images = getattr(processor, "image_processor", None)
        self.patch_size = images.patch_size if isinstance(images, VlpNaflexImageProcessor) else None

    def __call__(self, samples: list[Sample]) -> Batch:
        keys = [(sample.turns, sample.text) for sample in samples]
        texts = {key: index for index, key in enumerate(dict.fromkeys(keys))}
        prompts = [self.before(*key) for key in texts]
        whole = [prompt + text for prompt, (_, text) in zip(prompts, texts, strict=True)]
        tokens = self.processor.tokenize(whole, self.max_length)
        shown = {sample.image_id if self.images_once else number: sample for number, sample in enumerate(samples)}
        extra, images = self.extra(samples, prompts), [sample.pixels for sample in shown.values()]
        if self.patch_size is None:
            pixels = torch.stack(images)
        else:
            pixels, extra["spatial_shapes"] = padded_patches(images, self.patch_size)
        if self.teacher_texts is not None:
            extra["teacher_texts"] = self.teacher_texts(whole)
        if samples[0].teacher is not None:
            extra["teacher_images"] = torch.stack([sample.teacher for sample in samples])
        if self.images_once:
            order = {image: number for number, image in enumerate(shown)}
            extra["image_index"] = torch.tensor([order[sample.image_id] for sample in samples])
        return Batch(
            pixels=pixels.flatten(0, -4) if pixels.ndim > 3 else pixels,
            input_ids=tokens["input_ids"],
            text_index=torch.tensor([texts[key] for key in keys]),
            caption_ids=torch.tensor([sample.caption_id for sample in samples]),
            image_ids=torch.tensor([sample.image_id for sample in samples]),
            skipped=[bad for sample in samples for bad in sample.skipped],
            extra=extra,
            place={stream: place for sample in samples for stream, place in sample.place.items()},
        )

    def before(self, turns: tuple[str, ...] | None, text: str) -> str:
        """What comes before a text: the prompt of all texts, or the conversation that this one continues.

        The oldest questions and answers are left out if the text would not fit otherwise.
        """
        if turns is None:
            return self.prompt
        tokenizer, clean = self.processor.tokenizer, self.processor.clean
        while len(turns) > 1 and len(tokenizer(clean(f"{prompt_of(turns)} {text}"))["input_ids"]) >= self.max_length:
            turns = turns[2:]
        return f"{prompt_of(turns)} "

    def extra(self, samples: list[Sample], prompts: list[str]) -> dict[str, Tensor]:
        """What a task needs besides; otherwise empty.

        For VQA, tokenized answers, the sample of each, and weights; for NLVR2, labels; for texts that answer questions,
        the number of tokens before each distinct text; for InstructBLIP, what the Q-Former reads of each distinct text.
        """
        extra = {}
        if isinstance(self.processor, VlpInstructBlipProcessor):
            extra = dict(self.processor.instructions(prompts))
        if samples[0].turns is not None:
            before = self.processor.tokenizer([self.processor.clean(prompt) for prompt in prompts])
            extra["prompt_lengths"] = torch.tensor([len(ids) for ids in before["input_ids"]])
        if samples[0].answers is not None:
            answers = [(index, *answer) for index, sample in enumerate(samples) for answer in sample.answers]
            tokens = self.processor.tokenize([text for _, text, _ in answers], self.max_length)
            return {
                "answer_ids": tokens["input_ids"],
                "answer_index": torch.tensor([index for index, _, _ in answers]),
                "answer_weights": torch.tensor([weight for _, _, weight in answers]),
            }
        if samples[0].label is not None:
            return {"labels": torch.tensor([sample.label for sample in samples])}
        return extra


class BadRows:
    """Count the bad rows of a run by cause. Each row is counted once.

    Args:
        max_share: maximum share of bad rows (0 to 1).
        size: total number of rows; None if it is not known.
    """

    def __init__(self, max_share: float, size: int | None = None):
        self.max_share, self.size, self.causes, self.seen = max_share, size, {}, 0

    def update(self, batch: Batch) -> None:
        """Count the rows of a batch.

        Raises:
            BadDataError: if the share of bad rows exceeds `max_share`.
        """
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
        """The causes and their counts, as text."""
        return describe(Counter(self.causes.values()))


def batches_of(loader: DataLoader) -> Iterator[Batch]:
    """The batches of a loader. An error in a worker gets its own message back, without the worker's traceback.

    Without workers, a thread makes the next batch while the model learns from the last one.
    """
    try:
        yield from loader if loader.num_workers else one_ahead(iter(loader))
    except UserError as error:
        text = str(error)
        if "Original Traceback" not in text:
            raise
        raise type(error)(text.rsplit(f"{type(error).__name__}: ", 1)[-1].strip()) from None


def one_ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches, each of which is made in a thread while the one before it is used."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = thread.submit(next, batches, None)
            yield batch


def train_loader(arguments, dataset: Dataset, sampler: Sampler | None, collator: Collator) -> DataLoader:
    """The endless DataLoader of this process.

    Args:
        arguments: the training options; batch size and number of workers are used.
        dataset: a map-style data set, or a streaming one.
        sampler: draws the samples; None for a streaming data set.
        collator: turns samples into batches.
    """
    return DataLoader(
        dataset,
        batch_size=arguments.per_device_train_batch_size,
        sampler=sampler,
        collate_fn=collator,
        num_workers=arguments.num_workers,
        persistent_workers=arguments.num_workers > 0,
        worker_init_fn=ignore_interrupts,
        pin_memory=torch.cuda.is_available(),
        drop_last=True,
        generator=torch.Generator(),  # leaves the global generator, which is resumed, to augmentation
    )


def ignore_interrupts(worker: int) -> None:
    """Ignore Ctrl-C in a worker: it reaches every process, and workers must live until the state is saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
