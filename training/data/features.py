"""Cache what a frozen model computes for images on disk. It does not change if images are not augmented."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets.utils.py_utils import iter_batched
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ...files import cache_folder
from ...loading import hash_weights
from .rows import BadRow, picture_of
from .samples import Sample, SampleMaker

# Shapes: R rows, (...) the shape of one image's features: (M, D) tokens of a tower, or an embedding (E,)


def key_of(module: nn.Module, config, image_processor, rows, image_column: str) -> str:
    """A hash of all that the features depend on: weights, configuration, preprocessing and rows."""
    digest = blake2b(digest_size=16)
    hash_weights(digest, module)
    digest.update(config.to_json_string().encode())
    digest.update(image_processor.to_json_string().encode())
    digest.update(f"{rows._fingerprint} {image_column}".encode())
    return digest.hexdigest()


class Features:
    """Features (R, ...) of rows in float32, memory-mapped from disk.

    Args:
        path: the file that `compute_features` returned.

    Attributes:
        bad: the cause for each row whose image cannot be used.
    """

    def __init__(self, path: Path):
        self.values = np.load(path, mmap_mode="r")
        self.bad = {int(row): cause for row, cause in json.loads(path.with_suffix(".json").read_text()).items()}

    def __getitem__(self, row: int) -> Tensor:
        """The features of a row. Raises BadRow if its image cannot be used."""
        if row in self.bad:
            raise BadRow(self.bad[row])
        return torch.from_numpy(self.values[row].copy())


@torch.inference_mode()
def compute_features(
    encode: Callable[[list[Image.Image]], Tensor], key: str, rows, image_column: str, max_pixels: int,
    batch_size: int = 256,
) -> Path:  # fmt: skip
    """Compute the features of all rows and write them atomically, unless the file exists already.

    Args:
        encode: returns the features (B, ...) of images.
        key: the name of the cache file (see `key_of`).
        rows: rows of a data set.
        image_column: column with the images.
        max_pixels: larger images, in pixels, count as bad rows.
        batch_size: images per batch.

    Returns:
        The path of the .npy file. The bad rows are in a .json file beside it.

    Raises:
        OSError: if no row has a usable image.
    """
    path = cache_folder() / f"{key}.npy"
    if path.is_file() and path.with_suffix(".json").is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, values, bad = path.with_suffix(".writing.npy"), None, {}
    for numbers in iter_batched(tqdm(range(len(rows)), desc="Image features", unit="image"), batch_size):
        good, images = [], []
        for number in numbers:
            try:
                images.append(picture_of(rows[number], image_column, max_pixels))
                good.append(number)
            except BadRow as error:
                bad[number] = str(error)
        if not images:
            continue
        found = encode(images).float().cpu().numpy()
        if values is None:
            values = np.lib.format.open_memmap(temporary, "w+", np.float32, (len(rows), *found.shape[1:]))
        values[good] = found
    if values is None:
        raise OSError("No row has a usable image.")
    values.flush()
    path.with_suffix(".json").write_text(json.dumps(bad))
    os.replace(temporary, path)
    return path


@dataclass(kw_only=True)
class FeatureMaker(SampleMaker):
    """Make samples whose pixels are the cached features of the image tower."""

    features: Features

    def pixels(self, row: dict, column: str, key, rng) -> Tensor:
        """The features (M, D) of a row. Raises BadRow if its image cannot be used."""
        return self.features[key]


@dataclass(kw_only=True)
class TaughtMaker(SampleMaker):
    """Make samples with the embeddings that the teacher of a distillation has of the images."""

    features: Features

    def __call__(self, row: dict, key: Any, epoch: int) -> Sample:
        sample = super().__call__(row, key, epoch)
        sample.teacher = self.features[key]
        return sample
