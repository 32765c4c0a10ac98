"""Draw scenes: shapes, textures and outlines on backgrounds, with noise and blur."""

import colorsys
import io
import math
import random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .world import Scene, Thing

SIDE = 96  # pixels
SCALE = 2  # shapes are drawn this much larger, then reduced, which smooths their edges
HUES = {  # hue, saturation and value from 0 to 1, and how far the hue varies
    "red": (0.0, 0.85, 0.85, 0.015), "orange": (0.083, 0.92, 0.97, 0.012), "yellow": (0.155, 0.85, 0.97, 0.015),
    "green": (0.36, 0.75, 0.65, 0.04), "blue": (0.61, 0.8, 0.85, 0.03), "purple": (0.77, 0.65, 0.62, 0.02),
    "pink": (0.92, 0.42, 0.98, 0.02),
}  # fmt: skip


def draw_scene(scene: Scene, rng: random.Random) -> Image.Image:
    """Draw a scene as an RGB picture of SIDE x SIDE pixels.

    Args:
        scene: the scene.
        rng: source of the style: background, outlines, turns, noise and blur.
    """
    noise = np.random.default_rng(rng.getrandbits(63))
    picture = background(rng, noise)
    outline = rng.choice([None, (20, 20, 25), (245, 245, 240)])
    for thing in scene.things:
        draw_thing(picture, thing, outline, rng)
    picture = picture.resize((SIDE, SIDE), Image.Resampling.BOX)
    if rng.random() < 0.5:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.8)))
    grain = noise.normal(0, rng.uniform(0, 10), (SIDE, SIDE, 1 if rng.random() < 0.5 else 3))
    return Image.fromarray((np.asarray(picture) + grain).clip(0, 255).astype(np.uint8))


def jpeg(picture: Image.Image, rng: random.Random) -> bytes:
    """The bytes of a picture as JPEG of a random quality."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=rng.randint(80, 95))
    return buffer.getvalue()


def rgb(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    """A colour of hue, saturation and value from 0 to 1, as integers from 0 to 255."""
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, min(1, max(0, saturation)), min(1, max(0, value)))
    return round(255 * red), round(255 * green), round(255 * blue)


def background(rng: random.Random, noise: np.random.Generator) -> Image.Image:
    """A background of little saturation: even, a gradient, a pattern, or clouds."""
    light = rng.choice([rng.uniform(0.8, 1), rng.uniform(0.08, 0.3), rng.uniform(0.45, 0.75)])
    one, two = (
        np.array(rgb(rng.random(), rng.uniform(0, 0.15), light + rng.uniform(-0.1, 0.1)), float) for _ in range(2)
    )
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    kind = rng.randrange(5)
    if kind == 0:
        mix = np.zeros((SIDE, SIDE))
    elif kind == 1:
        angle = rng.uniform(0, math.tau)
        mix = (math.cos(angle) * (x - 0.5) + math.sin(angle) * (y - 0.5)) / 1.5 + 0.5
    elif kind == 2:
        count = rng.randint(3, 10)
        mix = ((x * count).astype(int) + (y * count).astype(int)) % 2
    elif kind == 3:
        mix = (((x + rng.choice([-1, 0, 1]) * y) * rng.randint(3, 12)).astype(int) % 2).astype(float)
    else:
        cells = Image.fromarray((noise.random((6, 6)) * 255).astype(np.uint8))
        mix = np.asarray(cells.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) / 255
    drawn = Image.fromarray((one + (two - one) * mix[..., None]).clip(0, 255).astype(np.uint8))
    return drawn.resize((SIDE * SCALE, SIDE * SCALE), Image.Resampling.NEAREST)


def draw_thing(picture: Image.Image, thing: Thing, outline: tuple | None, rng: random.Random) -> None:
    """Draw an object onto a picture."""
    side = math.ceil(2 * thing.radius * SIDE * SCALE) + 4
    mask = Image.new("L", (side, side))
    turn = math.radians(rng.uniform(-18, 18))
    draw_shape(ImageDraw.Draw(mask), thing.shape, side / 2, side / 2 - 2, turn)
    hue, saturation, value, spread = HUES[thing.colour]
    hue += rng.uniform(-spread, spread)
    saturation, value = saturation + rng.uniform(-0.07, 0.07), value + rng.uniform(-0.05, 0.03)
    filled = Image.new("RGB", (side, side), rgb(hue, saturation, value))
    paint = ImageDraw.Draw(filled)
    second = rgb(hue, saturation * 0.35, value + 0.3) if rng.random() < 0.6 else rgb(hue, saturation, value * 0.5)
    step = max(5, side // rng.randint(5, 7))
    if thing.texture == "striped":
        slope = rng.choice([-1, 0, 1])
        for start in range(-side, 2 * side, step):
            paint.line([(start, 0), (start + slope * side, side)], fill=second, width=max(2, step // 3))
    elif thing.texture == "dotted":
        for row, top in enumerate(range(step // 2, side, step)):
            for left in range(step // 2 + (row % 2) * step // 2, side, step):
                reach = max(1.5, step / 4)
                paint.ellipse([left - reach, top - reach, left + reach, top + reach], fill=second)
    left, top = round(thing.x * SIDE * SCALE - side / 2), round(thing.y * SIDE * SCALE - side / 2)
    if outline is not None:
        picture.paste(outline, (left, top), mask)
        mask = mask.filter(ImageFilter.MinFilter(5))
    picture.paste(filled, (left, top), mask)


def draw_shape(paint: ImageDraw.ImageDraw, shape: str, middle: float, radius: float, turn: float) -> None:
    """Draw a white shape, turned by an angle, around the middle of a mask."""

    def points(*polar: tuple[float, float]) -> list[tuple[float, float]]:
        """Points at (share of the radius, angle from the top, clockwise, in turns)."""
        return [
            (middle + reach * radius * math.sin(math.tau * angle + turn),
             middle - reach * radius * math.cos(math.tau * angle + turn))
            for reach, angle in polar
        ]  # fmt: skip

    if shape in ("circle", "ring"):
        paint.ellipse([middle - radius, middle - radius, middle + radius, middle + radius], fill=255)
        if shape == "ring":
            hole = 0.58 * radius
            paint.ellipse([middle - hole, middle - hole, middle + hole, middle + hole], fill=0)
    elif shape == "heart":
        curve = []
        for number in range(48):
            t = math.tau * number / 48
            x = 16 * math.sin(t) ** 3
            y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) + 2.5
            curve.append((math.hypot(x, y) / 17, math.atan2(x, y) / math.tau))
        paint.polygon(points(*curve), fill=255)
    elif shape == "cross":
        wide, long = 0.34, 0.94
        corners = [(-wide, -long), (wide, -long), (wide, -wide), (long, -wide), (long, wide), (wide, wide),
                   (wide, long), (-wide, long), (-wide, wide), (-long, wide), (-long, -wide),
                   (-wide, -wide)]  # fmt: skip
        paint.polygon(points(*[(math.hypot(x, y), math.atan2(x, -y) / math.tau) for x, y in corners]), fill=255)
    elif shape == "star":
        paint.polygon(points(*[(1 if n % 2 == 0 else 0.45, n / 10) for n in range(10)]), fill=255)
    else:
        corners, start = {"triangle": (3, 0), "square": (4, 0.125)}[shape]
        paint.polygon(points(*[(1, start + n / corners) for n in range(corners)]), fill=255)
