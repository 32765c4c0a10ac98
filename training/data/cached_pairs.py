"""Pairs whose locked towers have run already: batches of features, read from the cache folder.

Each row has a number of views: augmented versions of its image, and drawn texts. They are the samples that a
`SampleMaker` makes in the epochs 0, 1, ... An epoch uses one view of all images and one of all texts, so that in time
every view of an image meets every view of its text.
"""

import itertools
import json
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
from .samples import SampleMaker

FACTS = "facts.json"

# Shapes: R rows, V views, U distinct texts, N tokens, D width of a tower, B batch, T texts of a batch


class CachedPairs:
    """The features of all rows, memory-mapped from disk.

    Args:
        folder: the folder that `compute_pairs` returned.

    Attributes:
        images: (V, R, D) pooled outputs of the image tower.
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
        batch_size: images or texts at a time.

    Returns:
        The folder with the features.

    Raises:
        BadDataError: if no row can be used.
    """
    facts = facts | {"views": views, "rows": rows._fingerprint, "texts": texts is not None}
    folder = cache_folder() / "features" / key_of([images] + ([texts] if texts is not None else []), facts)
    if (folder / FACTS).is_file():
        return folder
    fresh = folder.with_name(f".unfinished-{folder.name}-{os.getpid()}")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    device, known, bad, good, values = next(images.parameters()).device, {}, [], [], None
    text_of = np.zeros((views, len(rows)), np.int64)
    caption_ids, image_ids = np.zeros_like(text_of), np.zeros(len(rows), np.int64)
    bar = tqdm(total=views * len(rows), desc="Features of the locked towers", unit="image")
    for view in range(views):
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(view)
            for first in range(0, len(rows), batch_size):
                numbers, samples = [], []
                for number in range(first, min(first + batch_size, len(rows))):
                    try:
                        samples.append(maker(rows[number], number, view))
                        numbers.append(number)
                    except BadRow as error:
                        bad += [(number, str(error))] if view == 0 else []
                bar.update(min(batch_size, len(rows) - first))
                if not samples:
                    continue
                pixels = to_pixel_values(torch.stack([sample.pixels for sample in samples]).to(device))
                found = images(pixels, pooled_only=True).pooler_output.float().cpu().numpy()
                if values is None:
                    shape = (views, len(rows), found.shape[1])
                    values = np.lib.format.open_memmap(fresh / "images.npy", "w+", np.float32, shape)
                values[view, numbers] = found
                text_of[view, numbers] = [known.setdefault(sample.text, len(known)) for sample in samples]
                caption_ids[view, numbers] = [sample.caption_id for sample in samples]
                image_ids[numbers] = [sample.image_id for sample in samples]
                good += numbers if view == 0 else []
    bar.close()
    if values is None:
        shutil.rmtree(fresh)
        raise BadDataError("No row can be used: see --image_column and --caption_column.")
    for number, _ in bad:  # the next good row stands in, as in `PairDataset`
        other = next((each for each in good if each > number), good[0])
        for array in (values, text_of, caption_ids):
            array[:, number] = array[:, other]
        image_ids[number] = image_ids[other]
    values.flush()
    arrays = {"text_of": text_of, "caption_ids": caption_ids, "image_ids": image_ids,
              "texts": embed_texts(list(known), collator, texts, device, batch_size)}  # fmt: skip
    for name, array in arrays.items():
        np.save(fresh / f"{name}.npy", array)
    (fresh / FACTS).write_text(json.dumps({"bad": bad}))
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(fresh, folder)
    return folder


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
