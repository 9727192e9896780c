"""Turns photos and crops into the patches that the vision tower reads.

Pixel limits and the crop's margin come from one `ImageConfig`, and photos through `task.photo`, so
that training, sampling, rating and evaluation see the same pixels, the same way up. The levels are
those that `transformers`' `Qwen2VLImageProcessorPil` normalises and repeats for each frame; here
both happen on the device (`model.vision.VisionInputs.of`).
"""

from __future__ import annotations

import dataclasses

import numpy as np
from PIL import Image

from morer1_jax.errors import DataError, one_line
from morer1_jax.model.config import ImageConfig
from morer1_jax.model.vision_layout import Grid
from morer1_jax.task.fact import Fact
from morer1_jax.task.photos import Photos, read_photo

Box = tuple[float, float, float, float]
# The processor's own limit on the ratio of the longer side to the shorter.
_LONGEST = 200


@dataclasses.dataclass(frozen=True)
class Patches:
    """The images of one sample, one after another.

    Attributes:
        values: uint8 [patches, channels * patch * patch], in the processor's order of one frame.
        grids: (1, rows, columns) of each image, in patches.
    """

    values: np.ndarray
    grids: tuple[tuple[int, int, int], ...]


def crop_box(box: Box, size: tuple[int, int], config: ImageConfig) -> tuple[int, int, int, int]:
    """Returns the crop's (left, top, right, bottom) pixels in a photo of (width, height) `size`.

    A long and thin box grows around its centre until the processor takes the crop's shape, which
    it can wherever the processor takes the photo's own shape.

    Args:
        box: (x centre, y centre, width, height), fractions of the photo.
    """
    min_length = config.crop_least
    for _ in range(2):
        # Each side with its margin, moved into the photo, in whole pixels.
        spans = []
        for centre, extent, pixels in zip(box[:2], box[2:], size, strict=True):
            length = extent * pixels * (1 + 2 * config.crop_margin)
            length = min(max(length, min_length), pixels)
            start = min(max(centre * pixels - length / 2, 0), pixels - length)
            spans.append((int(start), min(max(round(start + length), int(start) + 1), pixels)))
        (left, right), (top, bottom) = spans
        # A shape that the processor refuses gets a longer short side, in a second round.
        sides = right - left, bottom - top
        if max(sides) <= _LONGEST * min(sides):
            break
        # One pixel more, because edges are rounded.
        min_length = -(-max(sides) // _LONGEST) + 1
    return left, top, right, bottom


class ImageReader:
    """Reads photos and crops as patches, of a dataset's facts or of a single photo.

    Args:
        photos: where the facts' photos are.

    Raises:
        DataError: from the methods: a photo cannot be read, or the processor refuses its shape.
    """

    def __init__(self, photos: Photos, config: ImageConfig) -> None:
        self.photos = photos
        self.config = config

    def open(self, fact: Fact) -> Image.Image:
        """Reads the fact's photo, RGB, upright."""
        return read_photo(self.photos, fact)

    def pair(self, fact: Fact) -> tuple[Image.Image, Image.Image]:
        """Returns the fact's photo, and its crop to the object's box."""
        photo = self.open(fact)
        return photo, photo.crop(crop_box(fact.box, photo.size, self.config))

    def patches(self, fact: Fact, which: int | None = None) -> Patches:
        """Reads a fact's photo and crop as patches; or only the photo (0) or the crop (1)."""
        return self.encode(self.open(fact), fact.box, self._name(fact), which)

    def encode(self, photo: Image.Image, box: Box, name: str, which: int | None = None) -> Patches:
        """Returns a photo and its crop as patches, or one of the two.

        Args:
            photo: RGB and upright, as `open_photo` returns it.
            box: (x centre, y centre, width, height), fractions of the photo.
            name: what errors call the photo.
            which: the photo (0) or the crop (1) alone; None: both.
        """
        # Grids of both images first: a refused shape is an error before any pixel is scaled.
        grids = self._grids(box, photo.size, name)
        crop = photo.crop(crop_box(box, photo.size, self.config))
        # Only the images that `which` names become patches.
        pairs = list(zip((photo, crop), grids, strict=True))
        pairs = pairs if which is None else [pairs[which]]
        values = [self._patchify(image, grid) for image, grid in pairs]
        return Patches(np.concatenate(values), tuple(grid for _, grid in pairs))

    def grids(self, fact: Fact, size: tuple[int, int]) -> tuple[Grid, ...]:
        """Returns the grids of `patches` for a photo of (width, height) `size`, without pixels."""
        return self._grids(fact.box, size, self._name(fact))

    def _name(self, fact: Fact) -> str:
        return f"{self.photos.name(fact)} (fact {fact.id})"

    def _grids(self, box: Box, size: tuple[int, int], name: str) -> tuple[Grid, ...]:
        left, top, right, bottom = crop_box(box, size, self.config)
        return self._grid("photo", *size, name), self._grid(
            "crop", right - left, bottom - top, name
        )

    def _patchify(self, image: Image.Image, grid: Grid) -> np.ndarray:
        """Returns the patches: units of merge × merge patches row by row, in each c, p, p."""
        p, m = self.config.patch_size, self.config.merge_size
        _, rows, columns = grid
        image = image.resize((columns * p, rows * p), Image.Resampling.BICUBIC)
        pixels = np.asarray(image).reshape(rows // m, m, p, columns // m, m, p, 3)
        return pixels.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns, -1)

    def _grid(self, what: str, width: int, height: int, name: str) -> Grid:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        config = self.config
        try:
            rows, columns = smart_resize(
                height,
                width,
                factor=config.patch_size * config.merge_size,
                min_pixels=config.min_pixels,
                max_pixels=config.max_pixels,
            )
        except ValueError as error:
            raise DataError(
                f"{name}: expected a {what} whose shape the processor takes, found {width} × "
                f"{height} pixels: {one_line(error)}; leave it out"
            ) from None
        return 1, rows // config.patch_size, columns // config.patch_size
