"""Images and captions for CLIP."""

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling

from ..modeling_vlp.publishing import PublishesCode

# Image.MAX_IMAGE_PIXELS guards against decompression bombs: twice as many pixels raise Image.DecompressionBombError.


def resize_and_crop(image: Image.Image, side: int, resample: int = PILImageResampling.BICUBIC) -> Image.Image:
    """Scale the shorter side to `side` pixels, cut the square in the middle, then convert to RGB.

    Exactly OpenAI's order and rounding (clip/clip.py, `_transform`; torchvision's Resize and CenterCrop): palette and
    transparent images are resized before they lose their mode.
    """
    image = crop_middle(scale_shorter_side(image, side, resample), side, side)
    return image if image.mode == "RGB" else image.convert("RGB")


def scale_shorter_side(image: Image.Image, side: int, resample: int) -> Image.Image:
    width, height = image.size
    if width <= height:
        size = (side, int(side * height / width))
    else:
        size = (int(side * width / height), side)
    return image if size == image.size else image.resize(size, resample)


def crop_middle(image: Image.Image, width: int, height: int) -> Image.Image:
    left = int(round((image.width - width) / 2.0))
    top = int(round((image.height - height) / 2.0))
    return image.crop((left, top, left + width, top + height))  # beyond the border: black, as torchvision pads


class VlpClipImageProcessor(PilBackend):
    """OpenAI's evaluation preprocessing, bit for bit, with the names of transformers' CLIPImageProcessor.

    Accepts PIL images (any mode), and numpy arrays or tensors, channels first or last, of values 0 to 255 (0 to 1 with
    `do_rescale=False`). Returns `pixel_values` (B, 3, S, S).
    """

    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size = {"shortest_edge": 224}
    default_to_square = False
    crop_size = {"height": 224, "width": 224}
    do_resize = True
    do_center_crop = True
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    do_convert_rgb = True  # always: a model has three channels; the name is there for those who read it

    def process_image(self, image, do_rescale: bool | None = None, **kwargs) -> Image.Image:
        """Any image-like thing as a PIL image, its mode kept: the conversion to RGB comes after the crop."""
        if isinstance(image, Image.Image):
            return image
        array = np.asarray(image)
        if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[-1] not in (1, 3, 4):
            array = np.moveaxis(array, 0, -1)
        if array.ndim == 3 and array.shape[-1] == 1:
            array = array[..., 0]
        if array.ndim not in (2, 3):
            raise ValueError(f"An image must have 2 or 3 dimensions, got an array of shape {array.shape}.")
        if array.dtype != np.uint8:
            array = np.clip(np.rint(array * (255 if do_rescale is False else 1)), 0, 255).astype(np.uint8)
        return Image.fromarray(array)

    def _preprocess(self, images, do_resize, size, resample, do_center_crop, crop_size, do_convert_rgb, **kwargs):
        do_normalize, return_tensors = kwargs["do_normalize"], kwargs.get("return_tensors")
        mean = torch.tensor(kwargs["image_mean"]).view(3, 1, 1)
        std = torch.tensor(kwargs["image_std"]).view(3, 1, 1)
        pixel_values = []
        for image in images:
            if do_resize and size.shortest_edge:
                image = scale_shorter_side(image, size.shortest_edge, resample)
            elif do_resize:
                image = image.resize((size.width, size.height), resample)
            if do_center_crop:
                image = crop_middle(image, crop_size.width, crop_size.height)
            # A model has three channels: an image is never left in another mode.
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
            pixel_values.append((pixels - mean) / std if do_normalize else pixels)
        return BatchFeature({"pixel_values": pixel_values}, tensor_type=return_tensors)


class VlpClipProcessor(PublishesCode, ProcessorMixin):
    """Images and captions in one call: `processor(images=..., text=..., return_tensors="pt")`.

    Captions are padded on the right to the longest of the batch, and cut to what the tokenizer's `model_max_length`
    allows, the end token kept.
    """

    def __init__(self, image_processor=None, tokenizer=None, **kwargs):
        super().__init__(image_processor, tokenizer)

    def __call__(self, images=None, text=None, **kwargs):
        kwargs.setdefault("padding", True)
        kwargs.setdefault("truncation", True)
        return super().__call__(images=images, text=text, **kwargs)

    def read_texts(self, texts: list[str], max_length: int):
        """Texts as a batch of token ids, cut to `max_length` and padded to the longest."""
        return self.tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
