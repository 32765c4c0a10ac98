"""What a frozen image tower gives, computed once and kept on disk: it never changes where images are not augmented."""

import json
import os
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from datasets.utils.py_utils import iter_batched
from torch import Tensor
from tqdm import tqdm

from ...modeling_vlp.blip2 import VlpBlip2PreTrainedModel
from .rows import BadRow, picture_of
from .samples import SampleMaker

# Shapes: R rows, M tokens of an image, D width of the tower


def cache_folder() -> Path:
    """Where features are kept: the folder named by VLP_CACHE, or ~/.cache/vlp."""
    return Path(os.environ.get("VLP_CACHE", Path.home() / ".cache" / "vlp"))


def key_of(model: VlpBlip2PreTrainedModel, processor, rows, image_column: str) -> str:
    """A name that is another one where the tower, the preprocessing or the rows are others."""
    digest = blake2b(digest_size=16)
    for name, value in sorted(model.vision_model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    digest.update(model.config.vision_config.to_json_string().encode())
    digest.update(processor.image_processor.to_json_string().encode())
    digest.update(f"{rows._fingerprint} {image_column}".encode())
    return digest.hexdigest()


class Features:
    """Features (R, M, D) of rows, read from the disk as they are asked for, in the tower's own precision.

    Attributes:
        bad: rows whose image cannot be used, with the cause.
    """

    def __init__(self, path: Path):
        self.values = np.load(path, mmap_mode="r")
        self.bad = {int(row): cause for row, cause in json.loads(path.with_suffix(".json").read_text()).items()}

    def __getitem__(self, row: int) -> Tensor:
        """(M, D). Raises BadRow where the row's image cannot be used."""
        if row in self.bad:
            raise BadRow(self.bad[row])
        return torch.from_numpy(self.values[row].copy())


@torch.inference_mode()
def compute_features(
    model: VlpBlip2PreTrainedModel, processor, rows, image_column: str, max_pixels: int, batch_size: int = 256,
) -> Path:  # fmt: skip
    """Compute the features of all rows, unless they are on the disk; returns their file. Whole, or not there."""
    path = cache_folder() / f"{key_of(model, processor, rows, image_column)}.npy"
    if path.is_file() and path.with_suffix(".json").is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh, values, bad = path.with_suffix(".writing.npy"), None, {}
    training = model.training
    model.eval()
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
        pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        states = model.see(pixels.to(model.device, model.dtype)).float().cpu().numpy()
        if values is None:
            values = np.lib.format.open_memmap(fresh, "w+", np.float32, (len(rows), *states.shape[1:]))
        values[good] = states
    model.train(training)
    if values is None:
        raise OSError("No row has an image that can be used.")
    values.flush()
    path.with_suffix(".json").write_text(json.dumps(bad))
    os.replace(fresh, path)
    return path


@dataclass(kw_only=True)
class FeatureMaker(SampleMaker):
    """Row -> Sample whose pixels are the image tower's features."""

    features: Features

    def pixels(self, row: dict, column: str, key, rng) -> Tensor:
        """(M, D). Raises BadRow if the row's image cannot be used."""
        return self.features[key]
