"""Photos and crops as the patches the vision tower reads.

Pixel limits and the crop's margin come from one `ImageConfig`, so that training, sampling, rating
and evaluation see the same pixels. The processor is `transformers`' own (its PIL backend).
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from morer1_jax.task import more
from morer1_jax.task.fact import DataError, Fact, one_line


@dataclasses.dataclass(frozen=True)
class ImageConfig:
    """How pixels become patches.

    Attributes:
      min_pixels, max_pixels: an image is scaled to lie between, keeping its shape nearly.
      crop_margin: how much of the box's width and height is added on each side of the crop.
      crop_least: least width and height of the crop in the photo's pixels; a smaller box grows
        around its centre.
      patch_size, merge_size, temporal_patch_size: the vision tower's.
    """

    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    crop_margin: float = 0.1
    crop_least: int = 28
    patch_size: int = 14
    merge_size: int = 2
    temporal_patch_size: int = 2


@dataclasses.dataclass(frozen=True)
class Patches:
    """The images of one sample, one after another.

    Attributes:
      values: float32 [patches, channels * temporal * patch * patch], in the processor's order.
      grids: (1, rows, columns) of each image, in patches.
    """

    values: np.ndarray
    grids: tuple[tuple[int, int, int], ...]


def crop_box(
    box: tuple[float, float, float, float], size: tuple[int, int], config: ImageConfig
) -> tuple[int, int, int, int]:
    """The crop's (left, top, right, bottom) in pixels, inside a photo of (width, height) `size`.

    Args:
      box: (x centre, y centre, width, height), fractions of the photo.
    """
    spans = []
    for centre, extent, pixels in zip(box[:2], box[2:], size, strict=True):
        length = extent * pixels * (1 + 2 * config.crop_margin)
        length = min(max(length, config.crop_least), pixels)
        start = min(max(centre * pixels - length / 2, 0), pixels - length)
        spans.append((int(start), min(max(round(start + length), int(start) + 1), pixels)))
    (left, right), (top, bottom) = spans
    return left, top, right, bottom


class ImageReader:
    """Reads a fact's photo and crop from a dataset's folder.

    Raises (from its methods):
      DataError: a photo that cannot be read, or whose shape the processor refuses.
    """

    def __init__(
        self,
        folder: str | Path,
        config: ImageConfig,
        photo_path: more.PhotoPath = more.photo_path,
    ) -> None:
        self.folder = Path(folder)
        self._photo_path = photo_path
        self.config = config

    @functools.cached_property
    def _processor(self) -> Any:
        # Imported when first used: whoever only opens photos does not wait for it.
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
            Qwen2VLImageProcessorPil,
        )

        return Qwen2VLImageProcessorPil(
            min_pixels=self.config.min_pixels,
            max_pixels=self.config.max_pixels,
            patch_size=self.config.patch_size,
            merge_size=self.config.merge_size,
            temporal_patch_size=self.config.temporal_patch_size,
        )

    def open(self, fact: Fact) -> Image.Image:
        """The fact's photo, decoded, RGB."""
        path = self._photo_path(self.folder, fact)
        try:
            with Image.open(path) as photo:
                return photo.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(
                f"{path}: photo of {fact.id} cannot be read: {one_line(error)}; expected a whole "
                "photo, copy it anew"
            ) from None

    def pair(self, fact: Fact) -> tuple[Image.Image, Image.Image]:
        """Photo and crop of the object's box."""
        photo = self.open(fact)
        return photo, photo.crop(crop_box(fact.box, photo.size, self.config))

    def patches(self, fact: Fact, which: int | None = None) -> Patches:
        """Photo and crop as patches, or of the two only the photo (0) or the crop (1)."""
        try:
            pair = self.pair(fact)
            images = list(pair) if which is None else [pair[which]]
            out = self._processor(images=images)
        except ValueError as error:
            if isinstance(error, DataError):
                raise
            raise self._refused(fact, error) from None
        grids = tuple(tuple(int(n) for n in grid) for grid in out["image_grid_thw"])
        return Patches(np.asarray(out["pixel_values"], np.float32), grids)

    def grids(self, fact: Fact, size: tuple[int, int]) -> tuple[tuple[int, int, int], ...]:
        """The grids `patches` would give for a photo of (width, height) `size`, without pixels."""
        left, top, right, bottom = crop_box(fact.box, size, self.config)
        try:
            return tuple(
                self._grid(width, height) for width, height in (size, (right - left, bottom - top))
            )
        except ValueError as error:
            raise self._refused(fact, error) from None

    def _refused(self, fact: Fact, error: ValueError) -> DataError:
        path = self._photo_path(self.folder, fact)
        return DataError(
            f"{path}: photo of {fact.id}: {one_line(error)}; leave the photo's facts out"
        )

    def _grid(self, width: int, height: int) -> tuple[int, int, int]:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        config = self.config
        rows, columns = smart_resize(
            height,
            width,
            factor=config.patch_size * config.merge_size,
            min_pixels=config.min_pixels,
            max_pixels=config.max_pixels,
        )
        return 1, rows // config.patch_size, columns // config.patch_size
