"""Preprocessing of images that keep their resolution and shape, as SigLIP 2's NaFlex models read them."""

from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature
from transformers.image_utils import PILImageResampling
from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches
from transformers.processing_utils import ImagesKwargs

from ..modeling_vlp.patches import patches_of
from .clip import VlpClipImageProcessor, normalised, refuse_unsupported
from .pictures import to_rgb

# Shapes: B images, N patches at most, P patch side


def fit_patches(image: Image.Image, patch_size: int, max_num_patches: int, resample: int) -> Image.Image:
    """Scale an image to as many patches as allowed, keeping its shape as far as whole patches can.

    Args:
        image: an RGB image.
        patch_size: side of a patch in pixels.
        max_num_patches: maximum number of patches.
        resample: PIL's resampling filter.

    Returns:
        An image whose sides are multiples of `patch_size`; small ones are enlarged.
    """
    size = size_in_patches(*image.size, patch_size, max_num_patches)
    return image if size == image.size else image.resize(size, resample)


def size_in_patches(width: int, height: int, patch_size: int, max_num_patches: int) -> tuple[int, int]:
    """The width and height in pixels to which `fit_patches` scales an image of this size."""
    height, width = get_image_size_for_max_num_patches(height, width, patch_size, max_num_patches)
    return width, height


def padded_patches(images: list[Tensor], patch_size: int) -> tuple[Tensor, Tensor]:
    """Cut images of several shapes into patches.

    Args:
        images: B images (3, H, W); all sides are multiples of `patch_size`.
        patch_size: P, in pixels.

    Returns:
        (B, N, P * P * 3), padded with zeros to the image with the most patches, and the rows and columns (B, 2).
    """
    patches = [patches_of(image, patch_size) for image in images]
    shapes = [[image.shape[1] // patch_size, image.shape[2] // patch_size] for image in images]
    return pad_sequence(patches, batch_first=True), torch.tensor(shapes)


class NaflexKwargs(ImagesKwargs, total=False):
    """The options of `VlpNaflexImageProcessor` besides those of all image processors."""

    patch_size: int
    max_num_patches: int


class VlpNaflexImageProcessor(VlpClipImageProcessor):
    """Images of variable resolution and shape: each is scaled to at most `max_num_patches` patches and keeps its shape.

    Reads pictures as `VlpClipImageProcessor` does. The values are those of transformers' Siglip2ImageProcessor.

    Returns:
        `pixel_values` (B, N, P * P * 3), patches row by row, padded with zeros to N = `max_num_patches`, and
        `spatial_shapes` (B, 2), the rows and columns of each image.

    Raises:
        ValueError: if a picture cannot be read (PictureError), or an option is not supported.
    """

    valid_kwargs = NaflexKwargs
    resample = PILImageResampling.BILINEAR
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    size = None
    crop_size = None
    do_center_crop = False
    patch_size = 16
    max_num_patches = 256
    model_input_names = ["pixel_values", "spatial_shapes"]

    def _validate_preprocess_kwargs(self, do_resize: Any = None, size: Any = None, **kwargs) -> None:
        return super()._validate_preprocess_kwargs(**kwargs)  # the size follows from each image

    def _preprocess(
        self, images: list[tuple[Image.Image, bool]], do_resize, patch_size, max_num_patches, resample, do_rescale,
        rescale_factor, do_normalize, image_mean, image_std, do_center_crop=None, size=None, return_tensors=None,
        **kwargs,
    ) -> BatchFeature:  # fmt: skip
        refuse_unsupported(None, **kwargs)
        if do_center_crop:
            raise ValueError("do_center_crop=True is not supported: whole images are used.")
        if min(patch_size, max_num_patches) < 1:
            raise ValueError(f"patch_size and max_num_patches must be positive: {patch_size}, {max_num_patches}.")
        pixel_values, shapes = [], []
        for image, unit_range in images:
            image = to_rgb(image)
            if do_resize:
                image = fit_patches(image, patch_size, max_num_patches, resample)
            rows, columns = image.height // patch_size, image.width // patch_size
            if (columns * patch_size, rows * patch_size) != image.size or rows * columns > max_num_patches:
                raise ValueError(
                    f"An image of {image.height} x {image.width} pixels is not resized, but is not of at most "
                    f"{max_num_patches} whole patches of {patch_size} pixels."
                )
            pixels = normalised(
                image, unit_range, rescale_factor if do_rescale else None,
                (image_mean, image_std) if do_normalize else None,
            )  # fmt: skip
            patches = patches_of(pixels, patch_size)
            pixel_values.append(torch.nn.functional.pad(patches, (0, 0, 0, max_num_patches - len(patches))))
            shapes.append([rows, columns])
        return BatchFeature({"pixel_values": pixel_values, "spatial_shapes": shapes}, tensor_type=return_tensors)
