"""Draws the synthetic world's photos with Pillow: simple figures, real JPEG files.

The shape of an object (its kind) and its main colour (whose it is) carry meaning. All else varies:
size, place, light, noise, skin, background, and the photo's own dimensions.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Box = tuple[int, int, int, int]
Colour = tuple[int, int, int]

RGB: dict[str, Colour] = {
    "red": (205, 40, 40),
    "green": (40, 150, 60),
    "blue": (45, 75, 200),
    "yellow": (235, 210, 50),
    "purple": (130, 55, 160),
    "orange": (240, 130, 30),
    "teal": (40, 175, 180),
    "pink": (240, 130, 185),
}
_SKIN = ((245, 215, 185), (220, 175, 135), (165, 115, 80), (105, 70, 50))
_DARK = (45, 45, 52)
_PALE = (238, 238, 232)


def _shade(colour: Colour, rng: np.random.Generator, spread: int) -> Colour:
    jitter = rng.integers(-spread, spread + 1, 3)
    return tuple(int(np.clip(c + j, 0, 255)) for c, j in zip(colour, jitter, strict=True))


def _points(box: Box, *fractions: tuple[float, float]) -> list[tuple[float, float]]:
    x0, y0, x1, y1 = box
    return [(x0 + fx * (x1 - x0), y0 + fy * (y1 - y0)) for fx, fy in fractions]


def _player(draw: ImageDraw.ImageDraw, box: Box, colour: Colour, rng: np.random.Generator) -> None:
    skin = _SKIN[rng.integers(len(_SKIN))]
    draw.rectangle(_points(box, (0.25, 0.62), (0.45, 1.0)), fill=_DARK)
    draw.rectangle(_points(box, (0.55, 0.62), (0.75, 1.0)), fill=_DARK)
    draw.polygon(
        _points(box, (0.2, 0.28), (0.8, 0.28), (1.0, 0.6), (0.78, 0.7), (0.22, 0.7), (0.0, 0.6)),
        fill=colour,
    )
    draw.ellipse(_points(box, (0.33, 0.0), (0.67, 0.3)), fill=skin)


def _bystander(
    draw: ImageDraw.ImageDraw, box: Box, colour: Colour, rng: np.random.Generator
) -> None:
    grey = int(rng.integers(95, 165))
    _player(draw, box, (grey, grey, grey), rng)


def _person(draw: ImageDraw.ImageDraw, box: Box, colour: Colour, rng: np.random.Generator) -> None:
    skin = _SKIN[rng.integers(len(_SKIN))]
    draw.polygon(_points(box, (0.2, 0.52), (0.8, 0.52), (1.0, 1.0), (0.0, 1.0)), fill=_DARK)
    draw.polygon(_points(box, (0.42, 0.52), (0.58, 0.52), (0.5, 0.8)), fill=_PALE)
    draw.ellipse(_points(box, (0.28, 0.18), (0.72, 0.56)), fill=skin)
    draw.rectangle(_points(box, (0.26, 0.0), (0.74, 0.22)), fill=colour)
    draw.rectangle(_points(box, (0.08, 0.2), (0.92, 0.3)), fill=colour)


def _badge(draw: ImageDraw.ImageDraw, box: Box, colour: Colour, rng: np.random.Generator) -> None:
    shield = _points(box, (0.0, 0.0), (1.0, 0.0), (1.0, 0.55), (0.5, 1.0), (0.0, 0.55))
    draw.polygon(shield, fill=colour, outline=_DARK, width=2)
    draw.ellipse(_points(box, (0.32, 0.22), (0.68, 0.58)), fill=_PALE)


def _tower(draw: ImageDraw.ImageDraw, box: Box, colour: Colour, rng: np.random.Generator) -> None:
    draw.rectangle(_points(box, (0.22, 0.3), (0.78, 1.0)), fill=colour)
    draw.polygon(_points(box, (0.08, 0.3), (0.5, 0.0), (0.92, 0.3)), fill=_DARK)
    for row in range(3):
        y = 0.4 + 0.19 * row
        draw.rectangle(_points(box, (0.34, y), (0.44, y + 0.1)), fill=_PALE)
        draw.rectangle(_points(box, (0.56, y), (0.66, y + 0.1)), fill=_PALE)


def _cup(draw: ImageDraw.ImageDraw, box: Box, colour: Colour, rng: np.random.Generator) -> None:
    for handle in ((0.0, 0.1, 0.4, 0.5), (0.6, 0.1, 1.0, 0.5)):
        corners = _points(box, handle[:2], handle[2:])
        draw.ellipse(corners, outline=colour, width=2)
    draw.pieslice(_points(box, (0.15, -0.6), (0.85, 0.65)), 0, 180, fill=colour)
    draw.rectangle(_points(box, (0.44, 0.6), (0.56, 0.85)), fill=colour)
    draw.rectangle(_points(box, (0.22, 0.85), (0.78, 1.0)), fill=_DARK)


_DRAW = {
    "player": _player,
    "bystander": _bystander,
    "person": _person,
    "badge": _badge,
    "tower": _tower,
    "cup": _cup,
}


def _background(width: int, height: int, night: bool, rng: np.random.Generator) -> Image.Image:
    light = (12, 45) if night else (120, 225)
    sky, ground = rng.integers(*light, (2, 1)) + rng.integers(-12, 13, (2, 3))
    horizon = int(height * rng.uniform(0.35, 0.7))
    pixels = np.empty((height, width, 3), np.float32)
    pixels[:horizon], pixels[horizon:] = sky, ground
    pixels *= np.linspace(rng.uniform(0.85, 1.0), 1.0, width, dtype=np.float32)[None, :, None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def draw_photo(
    objects: list[tuple[str, str]],
    rng: np.random.Generator,
    *,
    noise: float,
    night: bool = False,
) -> tuple[Image.Image, list[Box]]:
    """Draws objects side by side on a background of random size and light.

    Args:
        objects: `(kind, colour name)` of each object, left to right; the colour of a `blur` or a
            `bystander` is unused.
        rng: the source of all variation.
        noise: standard deviation of the pixel noise, in grey levels of 255.
        night: whether the background is dark; the objects are lit as by day.

    Returns:
        The photo, and each object's `(left, top, right, bottom)` in pixels, inside the photo.
    """
    # The empty photo, wide enough for all objects.
    width = int(rng.integers(36, 45)) * max(len(objects), 2) + int(rng.integers(0, 24))
    height = int(rng.integers(84, 125))
    photo = _background(width, height, night, rng)
    # Each object in its own slot, of random size and place.
    boxes = []
    slot = width / len(objects)
    for place, (kind, colour_name) in enumerate(objects):
        w = slot * rng.uniform(0.6, 0.86)
        h = min(height * rng.uniform(0.45, 0.75), w * rng.uniform(1.3, 1.9))
        left = place * slot + rng.uniform(0.04, 0.96) * (slot - w)
        top = rng.uniform(0.1, 0.95) * (height - h)
        box = (int(left), int(top), min(int(left + w), width - 1), min(int(top + h), height - 1))
        if kind == "blur":
            grey = int(rng.integers(60, 130))
            ImageDraw.Draw(photo).ellipse(box, fill=(grey, grey, grey))
            region = photo.crop(box).filter(ImageFilter.GaussianBlur(5))
            photo.paste(region, box[:2])
        else:
            _DRAW[kind](ImageDraw.Draw(photo), box, _shade(RGB[colour_name], rng, 16), rng)
        boxes.append(box)
    # Light and noise of the whole photo.
    pixels = np.asarray(photo, np.float32) * rng.uniform(0.75, 1.1)
    pixels += rng.normal(0.0, noise, pixels.shape).astype(np.float32)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), boxes
