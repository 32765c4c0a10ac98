"""Train-time augmentation: a crop of each image where it is decoded, and more on the batch, on the device."""

import math
import random

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as tv

from .clip import resize_and_crop

# Shapes: B images, S side


class PerImage:
    """A PIL image of any size and mode -> an RGB square of S pixels.

    Args:
        crop: "random" (CLIP's and open_clip's: 90 to 100 % of the area, ratio 3/4 to 4/3, bicubic) or "middle" (as in
            evaluation).
    """

    def __init__(self, side: int, crop: str):
        self.side, self.crop = side, crop

    def __call__(self, image: Image.Image, rng: random.Random) -> Image.Image:
        if self.crop == "middle":
            return resize_and_crop(image, self.side)
        left, top, width, height = random_box(image.width, image.height, rng)
        image = image.convert("RGB")
        return tv.resized_crop(
            image, top, left, height, width, [self.side, self.side], tv.InterpolationMode.BICUBIC, antialias=True
        )


def random_box(
    width: int, height: int, rng: random.Random, scale=(0.9, 1.0), ratio=(3 / 4, 4 / 3)
) -> tuple[int, int, int, int]:
    """Left, top, width and height of a random crop, as torchvision's RandomResizedCrop, from a given rng."""
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, width - w), rng.randint(0, height - h), w, h
    side_w = min(width, round(height * ratio[1]))
    side_h = min(height, round(width / ratio[0]))
    return (width - side_w) // 2, (height - side_h) // 2, side_w, side_h


class StrongAugmentation:
    """For small data: every image of a batch is turned, scaled, stretched, shifted and recoloured on its own.

    torchvision's transforms draw once for a whole batch; these draw for each image in one vectorised step. The colours
    stay recognisable: what a picture shows may hang on them (flags, hearts).
    """

    def __init__(
        self,
        degrees: float = 15.0,
        scale: tuple[float, float] = (0.75, 1.25),
        stretch: float = 0.15,
        shear: float = 0.15,
        shift: float = 0.1,
        brightness: float = 0.3,
        contrast: float = 0.3,
        saturation: float = 0.4,
        hue: float = 0.05,
        grey_share: float = 0.1,
    ):
        self.degrees, self.scale, self.stretch, self.shear, self.shift = degrees, scale, stretch, shear, shift
        self.brightness, self.contrast, self.saturation = brightness, contrast, saturation
        self.hue, self.grey_share = hue, grey_share

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 or floats from 0 to 1 -> floats from 0 to 1, on the same device."""
        images = images.float() / 255 if images.dtype == torch.uint8 else images
        return self.recolour(self.move(images)).clamp_(0, 1)

    def move(self, images: Tensor) -> Tensor:
        count, device = len(images), images.device
        angle = uniform(count, -self.degrees, self.degrees, device) * math.pi / 180
        scale = uniform(count, *self.scale, device)
        stretch = torch.exp(uniform(count, -self.stretch, self.stretch, device))
        shear = uniform(count, -self.shear, self.shear, device)
        shift_x, shift_y = (uniform(count, -2 * self.shift, 2 * self.shift, device) for _ in range(2))
        cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
        rows = [
            torch.stack([cos * stretch, shear / scale - sin, shift_x], 1),
            torch.stack([sin, cos / stretch, shift_y], 1),
        ]
        grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
        # Zero padding of the negative: what comes in from outside is white, the ground of most drawings.
        return 1 - F.grid_sample(1 - images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    def recolour(self, images: Tensor) -> Tensor:
        """Brightness, contrast, saturation and hue are linear in RGB: one 3 x 3 matrix and an offset for each image."""
        count, device = len(images), images.device
        brightness = uniform(count, 1 - self.brightness, 1 + self.brightness, device)
        contrast = uniform(count, 1 - self.contrast, 1 + self.contrast, device)
        saturation = uniform(count, 1 - self.saturation, 1 + self.saturation, device)
        saturation = saturation * (torch.rand(count, device=device) >= self.grey_share)
        grey = torch.tensor([0.299, 0.587, 0.114], device=device).expand(3, 3)  # ITU-R 601, as torchvision
        saturate = torch.lerp(grey, torch.eye(3, device=device), saturation[:, None, None])
        turn = hue_rotation(uniform(count, -self.hue, self.hue, device) * 2 * math.pi)
        matrix = (brightness * contrast)[:, None, None] * (turn @ saturate)  # (B, 3, 3)
        offset = (1 - contrast) * brightness * images.mean(dim=(1, 2, 3))
        return torch.baddbmm(offset[:, None, None], matrix, images.flatten(2)).view_as(images)


def uniform(count: int, low: float, high: float, device: torch.device) -> Tensor:
    return torch.empty(count, device=device).uniform_(low, high)


def hue_rotation(angle: Tensor) -> Tensor:
    """(B,) angles -> (B, 3, 3) rotations of RGB space about the grey axis."""
    cos, sin = torch.cos(angle), torch.sin(angle) / math.sqrt(3)
    same, less, more = cos + (1 - cos) / 3, (1 - cos) / 3 - sin, (1 - cos) / 3 + sin
    return torch.stack([same, less, more, more, same, less, less, more, same], dim=1).view(-1, 3, 3)


class ToPixelValues:
    """A batch of uint8 images -> what a model takes: augmented, then normalised as the image processor does."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], augment=None):
        self.mean, self.std, self.augment = mean, std, augment

    def __call__(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 -> (B, 3, S, S) float32, on the same device."""
        images = self.augment(pixels) if self.augment else pixels.float() / 255
        mean = torch.tensor(self.mean, device=images.device).view(3, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(3, 1, 1)
        return images.sub_(mean).div_(std)
