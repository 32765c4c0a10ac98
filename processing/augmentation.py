"""Training augmentation: each image is cropped when it is decoded; the batch is augmented further on the device."""

import math
import random
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as tv

from .clip import resize_and_crop
from .naflex import fit_patches, size_in_patches
from .pictures import MAX_PIXELS, read_picture, to_rgb

Box = tuple[int, int, int, int]  # left, top, width, height
Size = tuple[int, int]  # width, height

# Shapes: B images, S side


class PerImage:
    """Crop and resize one image. Maps a PIL image of any size and mode to an RGB square of S pixels.

    Args:
        side: S, in pixels.
        crop: "random" (a random crop, resized bicubically), or as in evaluation: "middle" (CLIP's centre crop) or
            "squeeze" (BLIP's resize of the whole image to a square).
        scale: smallest fraction of the area that a random crop keeps: 0.9 for CLIP and open_clip, 0.2 for BLIP.
        flip: whether to mirror half of the random crops.
        random_augment: whether to apply BLIP's RandomAugment to the random crops.
    """

    resample = Image.Resampling.BICUBIC

    def __init__(self, side: int, crop: str, scale: float = 0.9, flip: bool = False, random_augment: bool = False):
        self.side, self.crop, self.scale, self.flip = side, crop, scale, flip
        self.random_augment = random_augment

    def read(self, source: Any, rng: random.Random, max_pixels: int = MAX_PIXELS) -> Image.Image:
        """Read a picture, crop it and resize it.

        A JPEG of which the random crop is at least twice as large as the result is decoded at 1/2, 1/4 or 1/8 of its
        size. The result differs by less than 2 of 255 on average from that of the whole picture (benchmarks/data.py).

        Args:
            source: as for `read_picture`.
            rng: source of random numbers.
            max_pixels: larger pictures are refused.

        Raises:
            PictureError: if it cannot be read.
        """
        if self.crop != "random":
            return self(read_picture(source, max_pixels), rng)
        drawn: list[tuple[int, int, Box, Size]] = []

        def share_needed(width: int, height: int) -> float:
            box = self.box(width, height, rng)
            drawn.append((width, height, box, self.size(box, rng)))
            return max(new / old for new, old in zip(drawn[0][3], box[2:], strict=True))

        image = read_picture(source, max_pixels, share_needed)
        if not drawn:  # not a JPEG
            share_needed(*image.size)
        return self.cropped(image, *drawn[0], rng)

    def __call__(self, image: Image.Image, rng: random.Random) -> Image.Image:
        if self.crop == "middle":
            return resize_and_crop(image, self.side)
        if self.crop == "squeeze":
            return to_rgb(image).resize((self.side, self.side), Image.Resampling.BICUBIC)
        box = self.box(*image.size, rng)
        return self.cropped(image, *image.size, box, self.size(box, rng), rng)

    def box(self, width: int, height: int, rng: random.Random) -> Box:
        """Draw a random crop of an image of this size."""
        return random_box(width, height, rng, (self.scale, 1.0))

    def size(self, box: Box, rng: random.Random) -> Size:
        """The size to which a crop is resized."""
        return self.side, self.side

    def cropped(
        self, image: Image.Image, width: int, height: int, box: Box, size: Size, rng: random.Random
    ) -> Image.Image:
        """Crop and augment an image.

        Args:
            image: the whole picture, perhaps smaller than it was.
            width: original width.
            height: original height.
            box: the crop in the original picture.
            size: width and height of the result.
            rng: source of random numbers.
        """
        left, top, crop_width, crop_height = box
        if image.size == (width, height):
            image = to_rgb(image.crop((left, top, left + crop_width, top + crop_height))).resize(size, self.resample)
        else:
            x, y = image.width / width, image.height / height
            region = (left * x, top * y, (left + crop_width) * x, (top + crop_height) * y)
            image = to_rgb(image).resize(size, self.resample, box=region)
        if self.flip and rng.random() < 0.5:
            image = tv.horizontal_flip(image)
        return random_augment(image, rng) if self.random_augment else image


class PerImageOfAnyShape(PerImage):
    """Crop and resize one image to whole patches, keeping its shape. Maps a PIL image to an RGB image.

    Args:
        patch_size: side of a patch in pixels; both sides of the result are multiples of it.
        max_num_patches: maximum number of patches.
        min_num_patches: draw the maximum for each image from the range between these two, for a random crop; None: the
            maximum is always `max_num_patches`.
        random_crop: whether to crop at random, keeping the shape; otherwise the whole image is used.
        resample: PIL's resampling filter.
        scale, flip, random_augment: as for `PerImage`.
    """

    def __init__(
        self, patch_size: int, max_num_patches: int, min_num_patches: int | None, random_crop: bool, resample: int,
        scale: float = 0.9, flip: bool = False, random_augment: bool = False,
    ):  # fmt: skip
        super().__init__(0, "random" if random_crop else "whole", scale, flip, random_augment)
        self.patch_size, self.max_num_patches = patch_size, max_num_patches
        self.min_num_patches, self.resample = min_num_patches or max_num_patches, resample

    def __call__(self, image: Image.Image, rng: random.Random) -> Image.Image:
        if self.crop == "random":
            return super().__call__(image, rng)
        return fit_patches(to_rgb(image), self.patch_size, self.max_num_patches, self.resample)

    def box(self, width: int, height: int, rng: random.Random) -> Box:
        share = math.sqrt(rng.uniform(self.scale, 1.0))
        new_width, new_height = max(1, round(width * share)), max(1, round(height * share))
        return rng.randint(0, width - new_width), rng.randint(0, height - new_height), new_width, new_height

    def size(self, box: Box, rng: random.Random) -> Size:
        most = rng.randint(self.min_num_patches, self.max_num_patches)
        return size_in_patches(*box[2:], self.patch_size, most)


def random_augment(image: Image.Image, rng: random.Random, count: int = 2) -> Image.Image:
    """BLIP's RandomAugment(2, 5): two of ten operations, each applied with probability 0.5.

    Source: salesforce/BLIP, transform/randaugment.py (with OpenCV). At magnitude 5, its brightness and sharpness have
    the factor 1 and change nothing, like its identity.

    Args:
        image: an RGB image.
        rng: source of random numbers.
        count: number of operations to draw.

    Returns:
        An image of the same size.
    """
    for operation in rng.choices(OPERATIONS, k=count):
        if rng.random() < 0.5 and operation is not None:
            image = operation(image, rng.choice((-1, 1)))
    return image


def affine(image: Image.Image, angle=0.0, shift=(0, 0), shear=(0.0, 0.0)) -> Image.Image:
    """Apply an affine map; the angle and the shears are in degrees, the shift in pixels. Empty areas become grey."""
    center = [0, 0] if any(shear) else None
    return tv.affine(image, angle, list(shift), 1.0, list(shear), tv.InterpolationMode.BILINEAR, 128, center)


SHEAR = math.degrees(math.atan(0.15))
OPERATIONS = (
    None,  # identity
    None,  # brightness
    None,  # sharpness
    lambda image, sign: tv.autocontrast(image),
    lambda image, sign: tv.equalize(image),
    lambda image, sign: affine(image, shear=(sign * SHEAR, 0.0)),
    lambda image, sign: affine(image, shear=(0.0, sign * SHEAR)),
    lambda image, sign: affine(image, shift=(5 * sign, 0)),
    lambda image, sign: affine(image, shift=(0, 5 * sign)),
    lambda image, sign: affine(image, angle=15.0 * sign),
)


def random_box(width: int, height: int, rng: random.Random, scale=(0.9, 1.0), ratio=(3 / 4, 4 / 3)) -> Box:
    """Draw a random crop as torchvision's RandomResizedCrop does, with a given source of random numbers.

    Args:
        width: width of the image.
        height: height of the image.
        rng: source of random numbers.
        scale: range of the crop's fraction of the area.
        ratio: range of the crop's aspect ratio.

    Returns:
        Left, top, width and height of the crop, in pixels.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, width - w), rng.randint(0, height - h), w, h
    side_w = min(width, round(height * ratio[1]))
    side_h = min(height, round(width / ratio[0]))
    return (width - side_w) // 2, (height - side_h) // 2, side_w, side_h


# Strong augmentation, for small data sets. Tuned on an emoji design that was held out of the training data.
DEGREES, SCALE, STRETCH, SHEARED = 12.0, (0.7, 1.25), 0.15, 0.15  # ranges of the affine map
SHIFT = 0.12  # its shift, as a fraction of the side
RESTYLED = 0.48  # fraction of images with thicker or thinner lines, a blur, sharper edges or an outline
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.2, 0.24, 0.36, 0.036  # ranges, as in torchvision's ColorJitter
GREY = 0.05  # fraction of images converted to grey


def strong_augmentation(images: Tensor) -> Tensor:
    """Rotate, scale, stretch, shift, restyle and recolour each image of a batch independently.

    torchvision's transforms draw one set of parameters per batch; this function draws one per image, and is vectorised.
    Colours stay recognisable, because the meaning may depend on them (flags, hearts).

    Args:
        images: (B, 3, S, S) floats in [0, 1].

    Returns:
        Images of the same shape and range.
    """
    return recolour(restyle(move(images))).clamp_(0, 1)


def move(images: Tensor) -> Tensor:
    """Apply a random affine map to each image (B, 3, S, S): rotation, scale, stretch, shear and shift."""
    count, device = len(images), images.device
    angle = uniform(count, -DEGREES, DEGREES, device) * math.pi / 180
    scale = uniform(count, *SCALE, device)
    stretch = torch.exp(uniform(count, -STRETCH, STRETCH, device))
    shear = uniform(count, -SHEARED, SHEARED, device)
    shift_x, shift_y = (uniform(count, -2 * SHIFT, 2 * SHIFT, device) for _ in range(2))
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    rows = [
        torch.stack([cos * stretch, shear / scale - sin, shift_x], 1),
        torch.stack([sin, cos / stretch, shift_y], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    # Zero padding of the negative: the area outside the image becomes white, the background of most drawings.
    return 1 - F.grid_sample(1 - images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def restyle(images: Tensor) -> Tensor:
    """Apply one of five random line styles to a fraction RESTYLED of the images (B, 3, S, S), in place."""
    kind = torch.rand(len(images), device=images.device) / RESTYLED
    for low, high, redraw in ((0.0, 0.25, thicken), (0.25, 0.375, thin), (0.375, 0.625, blur),
                              (0.625, 0.8125, sharpen), (0.8125, 1.0, outline)):  # fmt: skip
        rows = ((kind >= low) & (kind < high)).nonzero()[:, 0]
        if len(rows):
            images[rows] = redraw(images[rows])
    return images


def recolour(images: Tensor) -> Tensor:
    """Change brightness, contrast, saturation and hue of each image (B, 3, S, S).

    All are linear in RGB, so that they combine to one 3 x 3 matrix and one offset per image.
    """
    count, device = len(images), images.device
    brightness = uniform(count, 1 - BRIGHTNESS, 1 + BRIGHTNESS, device)
    contrast = uniform(count, 1 - CONTRAST, 1 + CONTRAST, device)
    saturation = uniform(count, 1 - SATURATION, 1 + SATURATION, device)
    saturation = saturation * (torch.rand(count, device=device) >= GREY)
    grey = torch.tensor([0.299, 0.587, 0.114], device=device).expand(3, 3)  # ITU-R 601, as torchvision
    saturate = torch.lerp(grey, torch.eye(3, device=device), saturation[:, None, None])
    turn = hue_rotation(uniform(count, -HUE, HUE, device) * 2 * math.pi)
    matrix = (brightness * contrast)[:, None, None] * (turn @ saturate)  # (B, 3, 3)
    offset = (1 - contrast) * brightness * images.mean(dim=(1, 2, 3))
    return torch.baddbmm(offset[:, None, None], matrix, images.flatten(2)).view_as(images)


def thicken(images: Tensor) -> Tensor:
    """Grow dark lines by one pixel."""
    return -F.max_pool2d(-images, 3, 1, 1)


def thin(images: Tensor) -> Tensor:
    """Shrink dark lines by one pixel."""
    return F.max_pool2d(images, 3, 1, 1)


def blur(images: Tensor) -> Tensor:
    return F.avg_pool2d(images, 3, 1, 1, count_include_pad=False)


def sharpen(images: Tensor) -> Tensor:
    strength = uniform(len(images), 0.5, 1.5, images.device).view(-1, 1, 1, 1)
    return images + strength * (images - blur(images))


def outline(images: Tensor) -> Tensor:
    """Darken the edges in brightness."""
    grey = images.mean(dim=1, keepdim=True)
    strength = uniform(len(images), 0.5, 1.5, images.device).view(-1, 1, 1, 1)
    return images - strength * (thin(grey) - thicken(grey))


def uniform(count: int, low: float, high: float, device: torch.device) -> Tensor:
    return torch.empty(count, device=device).uniform_(low, high)


def hue_rotation(angle: Tensor) -> Tensor:
    """Rotations (B, 3, 3) of RGB space about the grey axis, for angles (B,) in radians."""
    cos, sin = torch.cos(angle), torch.sin(angle) / math.sqrt(3)
    same, less, more = cos + (1 - cos) / 3, (1 - cos) / 3 - sin, (1 - cos) / 3 + sin
    return torch.stack([same, less, more, more, same, less, less, more, same], dim=1).view(-1, 3, 3)


class ToPixelValues:
    """Augment and normalise a batch of uint8 images on their device, as input for a model.

    Args:
        mean: the image processor's mean of each channel.
        std: the image processor's standard deviation of each channel.
        augment: maps images (B, 3, S, S) in [0, 1] to the same shape and range; None for no augmentation.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], augment=None):
        self.mean, self.std, self.augment = mean, std, augment

    def __call__(self, pixels: Tensor) -> Tensor:
        """Normalise images on their device.

        Args:
            pixels: (B, 3, S, S), or patches (B, N, P * P * 3), which are not augmented; uint8.

        Returns:
            The same shape, float32.
        """
        images = pixels.float().div_(255)
        mean, std = (torch.tensor(values, device=images.device) for values in (self.mean, self.std))
        if images.ndim == 3:
            return images.unflatten(-1, (-1, 3)).sub_(mean).div_(std).flatten(-2)
        if self.augment:
            images = self.augment(images)
        return images.sub_(mean.view(3, 1, 1)).div_(std.view(3, 1, 1))
