"""Preprocessing of images and captions for CLIP."""

import os

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin
from transformers.image_processing_backends import PilBackend
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
)
from transformers.processing_utils import ProcessingKwargs

from ..modeling_vlp.publishing import PublishesCode
from .pictures import from_array, is_array, read_picture, to_rgb, upright_and_opaque

LONG = 100  # pictures longer than this many times their width are cut before they are scaled


def resize_and_crop(image: Image.Image, side: int, resample: int = PILImageResampling.BICUBIC) -> Image.Image:
    """Scale the shorter side to `side` pixels, crop the square in the middle, then convert to RGB.

    Order and rounding are exactly OpenAI's (clip/clip.py, `_transform`; torchvision's Resize and CenterCrop): palette
    images are resized before they are converted.

    Args:
        image: an image as `read_picture` returns it.
        side: side of the result in pixels.
        resample: PIL's resampling filter.

    Returns:
        An RGB image of `side` x `side` pixels.
    """
    return to_rgb(crop_middle(scale_shorter_side(without_ends(image), side, resample), side, side))


def without_ends(image: Image.Image) -> Image.Image:
    """Cut the ends off a very long picture, of which only the square in the middle is used.

    Scaled as a whole, a picture of 1 x 50000 pixels would take gigabytes. Others are returned as they are.
    """
    short, long = sorted(image.size)
    if long <= LONG * short:
        return image
    return crop_middle(image, min(image.width, LONG * short), min(image.height, LONG * short))


def scale_shorter_side(image: Image.Image, side: int, resample: int, longest: int | None = None) -> Image.Image:
    """Scale the shorter side of an image, keeping its aspect ratio.

    Args:
        image: the image.
        side: new length of the shorter side in pixels; less if the longer side would exceed `longest`.
        resample: PIL's resampling filter.
        longest: maximum length of the longer side in pixels; None for no limit.
    """
    height, width = get_size_with_aspect_ratio((image.height, image.width), side, longest)
    return image if (width, height) == image.size else image.resize((width, height), resample)


def crop_middle(image: Image.Image, width: int, height: int) -> Image.Image:
    """Crop a rectangle in the middle. If it exceeds the image, the outside is black, like torchvision's padding."""
    left = int(round((image.width - width) / 2.0))
    top = int(round((image.height - height) / 2.0))
    return image.crop((left, top, left + width, top + height))


class VlpClipImageProcessor(PilBackend):
    """OpenAI's evaluation preprocessing, with the names of transformers' CLIPImageProcessor.

    Accepts what `read_picture` reads: paths, PIL images of any mode, arrays and tensors with channels first or last.
    Opaque pictures with eight bits per channel give exactly OpenAI's pixel values. Unlike OpenAI's code, this class
    applies the EXIF orientation, lays transparent pixels on white and scales 16-bit values (see `upright_and_opaque`).

    Returns:
        `pixel_values` (B, 3, S, S).

    Raises:
        ValueError: if a picture cannot be read (PictureError), or an option is not supported.
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
    do_convert_rgb = True
    rgb_before_resize = False

    def fetch_images(self, image_url_or_urls):
        """Read pictures from paths, nested lists included; URLs are refused."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(item) for item in image_url_or_urls]
        if isinstance(image_url_or_urls, (str, os.PathLike)):
            return read_picture(image_url_or_urls)
        return super().fetch_images(image_url_or_urls)

    def process_image(self, image, input_data_format=None, **kwargs) -> tuple[Image.Image, bool]:
        """Convert one input to a picture that is ready to be resized.

        Args:
            image: a PIL image, an array or a tensor.
            input_data_format: "channels_first", "channels_last", or None to infer it from the shape.

        Returns:
            The picture, and whether its values were floats in [0, 1].

        Raises:
            ValueError: if the picture cannot be read, or the format is unknown.
        """
        if not is_array(image):
            return read_picture(image), False
        layout = {None: None, ChannelDimension.FIRST: "first", ChannelDimension.LAST: "last", "none": None}
        if input_data_format not in layout:
            raise ValueError(f"input_data_format must be channels_first or channels_last, got {input_data_format!r}.")
        picture, unit_range = from_array(image, layout[input_data_format])
        return upright_and_opaque(picture), unit_range

    def _preprocess(
        self, images: list[tuple[Image.Image, bool]], do_resize, size, resample, do_center_crop, crop_size, do_rescale,
        rescale_factor, do_normalize, image_mean, image_std, return_tensors=None, **kwargs,
    ) -> BatchFeature:  # fmt: skip
        refuse_unsupported(size if do_resize else None, **kwargs)
        pixel_values = []
        for image, unit_range in images:
            image = to_rgb(image) if self.rgb_before_resize else image
            if do_resize and size.shortest_edge:
                image = without_ends(image) if do_center_crop else image
                image = scale_shorter_side(image, size.shortest_edge, resample, size.longest_edge)
            elif do_resize:
                image = image.resize((size.width, size.height), resample)
            if do_center_crop:
                image = crop_middle(image, crop_size.width, crop_size.height)
            statistics = (image_mean, image_std) if do_normalize else None
            pixel_values.append(
                normalised(to_rgb(image), unit_range, rescale_factor if do_rescale else None, statistics)
            )
        return BatchFeature({"pixel_values": pixel_values}, tensor_type=return_tensors)


def normalised(
    image: Image.Image, unit_range: bool, factor: float | None, statistics: tuple[tuple, tuple] | None
) -> torch.Tensor:
    """The values of an image as a model reads them.

    Args:
        image: an RGB image.
        unit_range: whether the image was made from floats in [0, 1].
        factor: factor of the values; None: 1.
        statistics: mean and standard deviation of each channel; None: the values are not normalised.

    Returns:
        (3, H, W), float32.
    """
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    pixels = pixels / 255 if unit_range else pixels
    if factor is not None:  # division gives exactly OpenAI's values
        pixels = pixels / 255 if factor == 1 / 255 else pixels * factor
    if statistics is None:
        return pixels
    mean, std = statistics
    return (pixels - as_channels(mean)) / as_channels(std)


def refuse_unsupported(
    size: SizeDict | None, do_convert_rgb: bool | None = None, do_pad: bool | None = None, data_format=None, **kwargs
) -> None:
    """Raise ValueError, naming the value, for options of transformers' image processors that ours do not support."""
    if size is not None and not (size.shortest_edge or (size.height and size.width)):
        raise ValueError(f"size must have shortest_edge, or height and width, got {dict(size)}.")
    if do_convert_rgb is False:
        raise ValueError("do_convert_rgb=False is not supported: the models need three channels.")
    if do_pad:
        raise ValueError("do_pad=True is not supported: images are cropped or resized to one size.")
    if data_format not in (None, ChannelDimension.FIRST):
        raise ValueError(f"data_format={data_format!r} is not supported: pixel_values are (B, 3, S, S).")


def as_channels(values: float | tuple[float, ...]) -> torch.Tensor:
    """One value per channel, or one for all, as a tensor (3, 1, 1) or (1, 1, 1)."""
    return torch.tensor(values).view(-1, 1, 1)


class VlpClipProcessorKwargs(ProcessingKwargs, total=False):
    """The options of `VlpClipProcessor`, by default with padding to the longest text and truncation."""

    _defaults = {"text_kwargs": {"padding": True, "truncation": True}}


def forget_last_call(tokenizer) -> None:
    """Remove the truncation and the padding that a fast tokenizer keeps from its last call.

    They are saved with the tokenizer, and a loaded tokenizer takes them for its own settings: texts would be cut to the
    length of the last call instead of `model_max_length`.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return
    settings = tokenizer.init_kwargs
    for state in (backend.truncation, backend.padding):
        length = None if state is None else state.get("max_length", state.get("length"))
        if length is not None and settings.get("max_length") == length:
            del settings["max_length"]
    backend.no_truncation()
    backend.no_padding()


class VlpProcessorMixin(PublishesCode, ProcessorMixin):
    """transformers' mixin for processors, with the option to publish the package's code."""

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save as transformers does, without the tokenizer's state of its last call. Options: see `PublishesCode`."""
        forget_last_call(self.tokenizer)
        return super().save_pretrained(save_directory, *args, **kwargs)


class VlpClipProcessor(VlpProcessorMixin):
    """Prepares images and captions in one call: `processor(images=..., text=..., return_tensors="pt")`.

    Captions are padded on the right to the longest in the batch, and truncated to the tokenizer's `model_max_length`;
    the end token is kept.
    """

    valid_processor_kwargs = VlpClipProcessorKwargs

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        forget_last_call(tokenizer)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def tokenize(self, texts: list[str], max_length: int):
        """Tokenize texts, truncated to `max_length` tokens and padded to the longest."""
        return self.tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
