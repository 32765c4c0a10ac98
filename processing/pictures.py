"""Read pictures from files, bytes, PIL images and arrays.

Training, evaluation, search, the demo, CapFilt and the image processors all read pictures here, so a model is trained,
evaluated and used on the same pixels.
"""

import io
import os
import stat
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

# Shapes: H height, W width, C channels

MAX_PIXELS = 89_478_485  # Pillow's own limit for decompression bombs
MAX_ASPECT = 1000  # a longer picture would become huge when its shorter side is scaled
# Formats that Pillow decodes without another program. EPS is left out because it starts Ghostscript.
FORMATS = (
    "AVIF", "BLP", "BMP", "CUR", "DCX", "DDS", "DIB", "FITS", "FLI", "FTEX", "GBR", "GIF", "ICNS", "ICO", "IM", "JPEG",
    "JPEG2000", "MPO", "MSP", "PCD", "PCX", "PIXAR", "PNG", "PPM", "PSD", "QOI", "SGI", "SPIDER", "SUN", "TGA", "TIFF",
    "WEBP", "XBM", "XPM", "XVTHUMB",
)  # fmt: skip
HEIC = "HEIC, which Pillow cannot read: convert it to JPEG"
UNSAFE = ("EPS", "WMF", "EMF")  # refused even where the caller opened the file


Draft = Callable[[int, int], float]
ORIENTATION = 0x0112  # EXIF


class PictureError(ValueError):
    """A picture that cannot be used; the message is the cause, by which such pictures are counted."""


def content_of(source: Any) -> Any:
    """The bytes or the path in a mapping with "bytes" or "path"; any other source as it is."""
    return (source.get("bytes") or source.get("path")) if isinstance(source, dict) else source


def read_picture(source: Any, max_pixels: int = MAX_PIXELS, draft: Draft | None = None) -> Image.Image:
    """Read a picture, upright, opaque and with eight bits per channel.

    Args:
        source: bytes, a path, a PIL image, an array (see `from_array`), or a mapping with "bytes" or "path", as
            `datasets` stores pictures. Of an animation, the first frame is read.
        max_pixels: larger pictures are refused as decompression bombs.
        draft: from (width, height) of a JPEG to the share (0 to 1) of its size that is enough; it is then decoded at
            1/2, 1/4 or 1/8, which is several times faster. None: all pictures are decoded in full.

    Returns:
        A PIL image. Its mode is RGB if the picture had transparent pixels or more than eight bits per channel;
        otherwise the mode is unchanged (see `upright_and_opaque`).

    Raises:
        PictureError: if there is no picture, it cannot be decoded, or the source is a URL, which is never downloaded.
    """
    source = content_of(source)
    if isinstance(source, Image.Image):
        return decode(source, max_pixels)
    if source is None or (isinstance(source, (str, bytes)) and not source):
        raise PictureError("no image")
    if is_array(source):
        return upright_and_opaque(from_array(source)[0])
    if not isinstance(source, (str, bytes, os.PathLike)):
        raise PictureError(f"not an image but of type {type(source).__name__}")
    if isinstance(source, str) and "://" in source:
        raise PictureError("a URL, which is not downloaded")
    if not isinstance(source, bytes):
        require_file(source)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats()) as image:
            return decode(image, max_pixels, draft)
    except PictureError:
        raise
    except FileNotFoundError:
        raise PictureError("missing image file") from None
    except Image.DecompressionBombError:
        raise PictureError("decompression bomb") from None
    except (UnidentifiedImageError, IsADirectoryError):
        raise PictureError(HEIC if is_heic(source) else "not an image") from None
    except Exception:  # a broken file can make Pillow's decoders raise anything
        raise PictureError("truncated or broken image") from None


def is_heic(source: bytes | str | os.PathLike) -> bool:
    """Whether the bytes or the file begin as those of a HEIC picture, which phones take."""
    if isinstance(source, bytes):
        start = source[:12]
    elif os.path.isfile(source):
        with open(source, "rb") as file:
            start = file.read(12)
    else:
        return False
    return start[4:8] == b"ftyp" and start[8:12] in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")


def require_file(path: str | os.PathLike) -> None:
    """Raise PictureError unless a path is a file: reading a named pipe would wait for ever."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        raise PictureError("missing image file") from None
    if not stat.S_ISREG(mode):
        raise PictureError("not an image")


def decode(image: Image.Image, max_pixels: int, draft: Draft | None = None) -> Image.Image:
    """Decode an opened picture (see `read_picture`).

    Args:
        image: the picture.
        max_pixels: larger pictures are refused as decompression bombs.
        draft: as for `read_picture`.

    Raises:
        PictureError: if it is too large, unsafe or broken.
    """
    if image.format in UNSAFE:
        raise PictureError(f"an image of format {image.format}, which is not decoded")
    if image.width * image.height > max_pixels:
        raise PictureError("decompression bomb")
    if not image.width or not image.height:
        raise PictureError("an image without pixels")
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise PictureError(f"longer than {MAX_ASPECT} times its width")
    try:
        if draft is not None and image.format == "JPEG":
            decode_smaller(image, draft)
        image.load()
        return upright_and_opaque(image)
    except PictureError:
        raise
    except Exception:
        raise PictureError("truncated or broken image") from None


def decode_smaller(image: Image.Image, draft: Draft) -> None:
    """Let an opened JPEG be decoded at 1/2, 1/4 or 1/8 of its size, if that leaves at least the share that is wanted.

    The decoder scales by computing fewer coefficients of each block of 8 x 8 pixels (libjpeg, scale_num and
    scale_denom).
    """
    width, height = image.size
    turned = image.getexif().get(ORIENTATION) in (5, 6, 7, 8)
    share = draft(height, width) if turned else draft(width, height)
    divisor = next((each for each in (8, 4, 2) if share * each <= 1), None)
    if divisor:  # `draft` takes the size that the result must at least have
        image.draft(image.mode, (max(1, width // divisor), max(1, height // divisor)))


def upright_and_opaque(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation, lay transparent pixels on white, and scale values to eight bits per channel.

    OpenAI's `_transform` does none of these: it ignores the orientation, shows whatever is stored under transparent
    pixels, and clips 16-bit grey to white. Opaque pictures with eight bits keep their mode, because OpenAI resizes
    before it converts to RGB; their pixels are exactly OpenAI's.

    Args:
        image: a decoded PIL image of any mode.

    Returns:
        An RGB image if the picture had transparent pixels or was of mode I, I;16, F or LAB; otherwise the same mode.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return Image.fromarray(to_eight_bits(np.asarray(image), image.mode)).convert("RGB")
    if image.mode == "LAB":
        return ImageCms.applyTransform(image, lab_to_rgb())
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        if rgba.getchannel("A").getextrema()[0] < 255:
            return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture to RGB; returns the same object if it is RGB already."""
    return image if image.mode == "RGB" else image.convert("RGB")


def to_eight_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """Scale 16-bit, 32-bit or float values to 0..255.

    Args:
        values: an array of any shape.
        mode: Pillow's mode. `I;16` and its variants range from 0 to 65,535. `I` and `F` do not declare a range, so it
            is the smallest of 0..1 (`F` only), 0..255, 0..65,535 and 0..2^31 - 1 that holds all values.

    Returns:
        uint8 values of the same shape.
    """
    values = np.nan_to_num(values.astype(np.float64), nan=0.0)
    largest = values.max(initial=0.0)
    ranges = (1.0, 255.0, 65535.0, 2.0**31 - 1) if mode == "F" else (255.0, 65535.0, 2.0**31 - 1)
    top = 65535.0 if mode.startswith("I;") else next((r for r in ranges if largest <= r), largest)
    return np.clip(np.rint(values * (255.0 / top)), 0, 255).astype(np.uint8)


def is_array(source: Any) -> bool:
    """Whether a source is a NumPy array, a tensor or nested lists of numbers."""
    return isinstance(source, (np.ndarray, list)) or hasattr(source, "detach")


def from_array(array: Any, channels: str | None = None) -> tuple[Image.Image, bool]:
    """Convert an array or a tensor to a picture.

    Floats are taken as values in [0, 1] if none is outside this range and some are not integers, as in transformers'
    processors. Integers of more than eight bits are scaled, not clipped.

    Args:
        array: (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels; booleans, integers, floats or bfloat16.
        channels: "first" or "last"; if None, last if the last axis has 1, 3 or 4 entries, else first.

    Returns:
        A PIL image of mode L, RGB or RGBA, and whether the values were floats in [0, 1].

    Raises:
        PictureError: if the number of axes or channels is unsupported, or the values are out of range.
    """
    if hasattr(array, "detach"):  # a tensor; NumPy has no bfloat16
        array = array.detach().cpu()
        array = array.float() if array.is_floating_point() else array
    array = np.asarray(array)
    if array.ndim not in (2, 3):
        raise PictureError(f"an array of shape {array.shape}; expected (H, W), (H, W, C) or (C, H, W)")
    if array.ndim == 3:
        if channels is None:
            channels = "last" if array.shape[-1] in (1, 3, 4) else "first"
        array = np.moveaxis(array, 0, -1) if channels == "first" else array
        if array.shape[-1] not in (1, 3, 4):
            raise PictureError(f"an array of {array.shape[-1]} channels, {channels}; expected 1, 3 or 4")
        array = array[..., 0] if array.shape[-1] == 1 else array
    if not array.size:
        raise PictureError(f"an array without pixels, of shape {array.shape}")
    unit_range = False
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    elif array.dtype.kind == "f":
        low, high = float(array.min()), float(array.max())
        if not (0 <= low and high <= 255):
            raise PictureError(f"floats from {low:g} to {high:g}; expected 0 to 1, or 0 to 255")
        unit_range = high <= 1 and not np.array_equal(array, np.rint(array))
        array = np.rint(array.astype(np.float64) * (255 if unit_range else 1)).astype(np.uint8)
    elif array.dtype.kind in "iu" and array.dtype != np.uint8:
        if array.min() < 0:
            raise PictureError(f"integers from {array.min()}; expected none below 0")
        array = to_eight_bits(array, "I;16" if array.dtype == np.uint16 else "I")
    elif array.dtype != np.uint8:
        raise PictureError(f"an array of {array.dtype}; expected numbers")
    return Image.fromarray(np.ascontiguousarray(array)), unit_range


@lru_cache(maxsize=1)
def formats() -> list[str]:
    """The formats of FORMATS that the installed Pillow decodes."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


@lru_cache(maxsize=1)
def extensions() -> frozenset[str]:
    """File name extensions of those formats, in lower case, with the dot."""
    readable = set(formats())
    known = Image.registered_extensions() | {".mpo": "JPEG"}  # read by the JPEG plugin
    return frozenset(extension for extension, name in known.items() if name in readable)


@lru_cache(maxsize=1)
def lab_to_rgb():
    return ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")


def picture_bytes(source: Any) -> bytes:
    """The encoded bytes of a picture.

    Args:
        source: a path, bytes, or a mapping with "bytes" or "path".

    Raises:
        PictureError: if there is no picture, or its file is missing.
    """
    source = content_of(source)
    if not source:
        raise PictureError("no image")
    if isinstance(source, bytes):
        return source
    require_file(source)
    try:
        return Path(source).read_bytes()
    except (OSError, ValueError):
        raise PictureError("missing image file") from None
