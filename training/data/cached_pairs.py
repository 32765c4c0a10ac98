"""Pairs whose locked towers have run already: batches of features, read from the cache folder.

Each row has a number of views: augmented versions of its image, and drawn texts. They are the samples that a
`SampleMaker` makes in the epochs 0, 1, ... An epoch uses one view of all images and one of all texts, so that in time
every view of an image meets every view of its text.
"""

import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ...errors import BadDataError
from ...files import cache_folder
from ...loading import hash_weights
from .batches import Batch, Collator
from .rows import BadRow
from .samples import Sample, SampleMaker

FACTS = "facts.json"

# Shapes: R rows, V views, U distinct texts, N tokens, M positions of an image, P and D widths of a tower, B batch,
# T texts of a batch


class CachedPairs:
    """The features of all rows, memory-mapped from disk.

    Args:
        folder: the folder that `compute_pairs` returned.

    Attributes:
        images: (V, R, P) pooled outputs of the image tower.
        states: (V, R, M, D) states of the image tower; None if they were not kept.
        texts: (U, D) pooled outputs of the text tower, or (U, N) token ids, padded on the right.
        text_of: (V, R) index of a view's text.
        caption_ids: (V, R) integers, equal for equal captions.
        image_ids: (R,) integers, equal for equal images.
        bad: (row, cause) of each row that cannot be used; the next good row stands in for it.
    """

    def __init__(self, folder: Path):
        facts = json.loads((folder / FACTS).read_text())
        self.bad = [(row, cause) for row, cause in facts["bad"]]
        self.images = np.load(folder / "images.npy", mmap_mode="r")
        states = folder / "states.npy"
        self.states = np.load(states, mmap_mode="r") if states.is_file() else None
        self.texts = np.load(folder / "texts.npy")
        self.text_of, self.caption_ids = np.load(folder / "text_of.npy"), np.load(folder / "caption_ids.npy")
        self.image_ids = np.load(folder / "image_ids.npy")

    def batches(self, draws: Iterable[tuple[int, int]], size: int) -> Iterator[Batch]:
        """Yield the batches of drawn rows.

        Args:
            draws: (row number, epoch) of each sample, without an end.
            size: samples of a batch.
        """
        draws, skipped, views = iter(draws), list(self.bad), len(self.images)
        while True:
            rows, epochs = np.array(list(itertools.islice(draws, size))).T  # (B,) each
            view = (epochs + epochs // views) % views
            texts, text_index = in_order(self.text_of[view, rows])
            tokens = self.texts[texts]  # (T, D) or (T, N)
            if tokens.dtype != np.float32:
                tokens = tokens[:, : (tokens != self.texts[0, -1]).any(axis=0).sum() or 1]
            yield Batch(
                pixels=torch.from_numpy(self.images[epochs % views, rows]),
                input_ids=torch.from_numpy(tokens),
                text_index=torch.from_numpy(text_index),
                caption_ids=torch.from_numpy(self.caption_ids[view, rows]),
                image_ids=torch.from_numpy(self.image_ids[rows]),
                skipped=skipped,
                extra={}
                if self.states is None
                else {"image_states": torch.from_numpy(self.states[epochs % views, rows])},
            )
            skipped = []


def in_order(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct values (T,) in the order of their first appearance, and the index of each of the values (B,)."""
    distinct, first, index = np.unique(values, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return distinct[order], rank[index]


@torch.inference_mode()
def compute_pairs(
    rows,
    maker: SampleMaker,
    collator: Collator,
    views: int,
    images: nn.Module,
    texts: nn.Module | None,
    to_pixel_values: Callable[[Tensor], Tensor],
    facts: dict,
    with_states: bool = False,
    batch_size: int = 128,
) -> Path:
    """Run the towers on all views of all rows, unless that was done before.

    Args:
        rows: rows of a data set.
        maker: makes the samples.
        collator: tokenizes texts.
        views: number of views of each row.
        images: the image tower, in evaluation mode.
        texts: the text tower, in evaluation mode; None: texts are only tokenized.
        to_pixel_values: augments and normalises images (B, C, S, S) on the device.
        facts: everything else that the features depend on, which must fit into JSON.
        with_states: also keep the states of the image tower.
        batch_size: images or texts at a time.

    Returns:
        The folder with the features.

    Raises:
        BadDataError: if no row can be used.
        OSError: if the disk has too little space.
    """
    facts |= {"views": views, "rows": rows._fingerprint, "texts": texts is not None, "states": with_states}
    folder = cache_folder() / "features" / key_of([images] + ([texts] if texts is not None else []), facts)
    if (folder / FACTS).is_file():
        return folder
    fresh = folder.with_name(f".unfinished-{folder.name}-{os.getpid()}")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        pairs, device = PairWriter(fresh, views, len(rows)), next(images.parameters()).device
        bar = tqdm(total=views * len(rows), desc="Features of the locked towers", unit="image")
        for view in range(views):
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                torch.manual_seed(view)
                for first in range(0, len(rows), batch_size):
                    numbers = range(first, min(first + batch_size, len(rows)))
                    samples = pairs.usable(rows, numbers, view, maker)
                    bar.update(len(numbers))
                    if samples:
                        pixels = torch.stack([sample.pixels for sample in samples.values()]).to(device)
                        output = images(to_pixel_values(pixels), pooled_only=not with_states)
                        pairs.write(view, samples, output.pooler_output, states_of(output) if with_states else None)
        bar.close()
        pairs.finish(lambda known: embed_texts(known, collator, texts, device, batch_size))
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder


def states_of(output) -> Tensor:
    """The outputs of all positions (B, M, D) that an image tower gives; a ResNet's are a grid."""
    return output.as_sequence() if hasattr(output, "as_sequence") else output.last_hidden_state


class PairWriter:
    """Writes the features of pairs into the files that `CachedPairs` reads."""

    def __init__(self, folder: Path, views: int, rows: int):
        self.folder, self.views, self.rows = folder, views, rows
        self.texts: dict[str, int] = {}  # each distinct text and its number
        self.bad: dict[int, str] = {}
        self.arrays = {name: np.zeros((views, rows), np.int64) for name in ("text_of", "caption_ids")}
        self.image_ids, self.features = np.zeros(rows, np.int64), {}

    def usable(self, rows, numbers: range, view: int, maker: SampleMaker) -> dict[int, Sample]:
        """The samples of those rows that can be used; the others are noted."""
        samples = {}
        for number in numbers:
            try:
                samples[number] = maker(rows[number], number, view)
            except BadRow as error:
                self.bad.setdefault(number, str(error))
        return samples

    def write(self, view: int, samples: dict[int, Sample], pooled: Tensor, states: Tensor | None) -> None:
        """Write a batch.

        Args:
            view: number of the view.
            samples: the B samples by row number.
            pooled: (B, P) outputs of the image tower.
            states: (B, M, D), or None; kept in float16 if the tower ran in bfloat16, whose values fit there.
        """
        numbers = list(samples)
        found = {"images": pooled.float()}
        if states is not None:
            found["states"] = states.half() if states.dtype == torch.bfloat16 else states
        for name, value in found.items():
            value = value.cpu().numpy()
            if name not in self.features:
                self.features[name] = self.open(name, value)
            self.features[name][view, numbers] = value
        texts = [self.texts.setdefault(sample.text, len(self.texts)) for sample in samples.values()]
        self.arrays["text_of"][view, numbers] = texts
        self.arrays["caption_ids"][view, numbers] = [sample.caption_id for sample in samples.values()]
        self.image_ids[numbers] = [sample.image_id for sample in samples.values()]

    def open(self, name: str, value: np.ndarray) -> np.memmap:
        """Create the file for values like these of all rows and views. Raises OSError if the disk is too full."""
        shape = (self.views, self.rows, *value.shape[1:])
        size, free = math.prod(shape) * value.itemsize, shutil.disk_usage(self.folder).free
        if size > free:
            raise OSError(
                f"The cached features need {size / 1e9:.1f} GB, but {self.folder.parent} has {free / 1e9:.1f} GB left: "
                "lower --cached_views, or let VLP_CACHE name a folder on a larger disk."
            )
        return np.lib.format.open_memmap(self.folder / f"{name}.npy", "w+", value.dtype, shape)

    def finish(self, embed: Callable[[list[str]], np.ndarray]) -> None:
        """Write what is left; `embed` turns the distinct texts into the array that `CachedPairs.texts` describes.

        Raises:
            BadDataError: if no row can be used.
        """
        good = [number for number in range(self.rows) if number not in self.bad]
        if not good:
            raise BadDataError("No row can be used: see --image_column and --caption_column.")
        for number in self.bad:  # the next good row stands in, as in `PairDataset`
            other = next((each for each in good if each > number), good[0])
            for array in (*self.features.values(), *self.arrays.values()):
                array[:, number] = array[:, other]
            self.image_ids[number] = self.image_ids[other]
        for array in self.features.values():
            array.flush()
        for name, array in (self.arrays | {"image_ids": self.image_ids, "texts": embed(list(self.texts))}).items():
            np.save(self.folder / f"{name}.npy", array)
        (self.folder / FACTS).write_text(json.dumps({"bad": list(self.bad.items())}))


def embed_texts(
    texts: list[str], collator: Collator, tower: nn.Module | None, device: torch.device, batch_size: int
) -> np.ndarray:
    """Run the text tower on texts: (U, D); without a tower, tokenize them: (U, N).

    Texts of similar length are embedded together.
    """
    texts = [collator.prompt + text for text in texts]
    if tower is None:
        tokens = collator.processor.tokenize(texts, collator.max_length)["input_ids"]
        pad = collator.processor.tokenizer.pad_token_id
        return torch.nn.functional.pad(tokens, (0, 1), value=pad).numpy()  # the last column is padding alone
    order, values = sorted(range(len(texts)), key=lambda number: len(texts[number])), None
    for first in tqdm(range(0, len(order), batch_size), desc="Texts", unit="batch"):
        numbers = order[first : first + batch_size]
        tokens = collator.processor.tokenize([texts[number] for number in numbers], collator.max_length)["input_ids"]
        found = tower(tokens.to(device), pooled_only=True).pooler_output.float().cpu().numpy()
        values = np.zeros((len(texts), found.shape[1]), np.float32) if values is None else values
        values[numbers] = found
    return values


def key_of(towers: list[nn.Module], facts: dict) -> str:
    """A hash of the towers' weights and of all facts that the features depend on."""
    digest = blake2b(json.dumps(facts, sort_keys=True, default=str).encode(), digest_size=16)
    for tower in towers:
        digest.update(tower.config.to_json_string().encode())
        hash_weights(digest, tower)
    return digest.hexdigest()
