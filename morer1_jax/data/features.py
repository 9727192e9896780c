"""Reads image features that were kept on disk, for a vision tower that does not change.

folder/
  index.json     fact id to its images' places and grids; the array's shape and dtype; digests of
                 what the features were made of
  features.bin   [tokens, d], the tower's output for one image after another
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import ml_dtypes  # noqa: F401  (gives NumPy the type bfloat16)
import numpy as np

from morer1_jax.data.images import Patches
from morer1_jax.errors import DataError
from morer1_jax.files import read_json, write_json
from morer1_jax.model.config import VisionConfig
from morer1_jax.task.fact import Fact

INDEX, FEATURES = "index.json", "features.bin"
# Where an image's features begin, and its grid.
Place = tuple[int, tuple[int, int, int]]


class FeatureStore:
    """Reads the features of facts' images from disk, a fact at a time.

    Args:
        vision: the tower that made the features.

    Attributes:
        made_of: digests of the photos and of all else the features depend on, by name; empty if an
            earlier version made them.

    Raises:
        DataError: the index or the features are missing or malformed.
    """

    def __init__(self, folder: Path, vision: VisionConfig) -> None:
        self.folder = Path(folder)
        self._vision = vision
        try:
            index = read_json(self.folder / INDEX, "delete the folder")
            self._places: dict[str, list[Place]] = index["facts"]
            self.made_of: dict[str, str] = index.get("made_of", {})
            shape, dtype = tuple(index["shape"]), np.dtype(index["dtype"])
            self._features = np.memmap(self.folder / FEATURES, dtype, "r", shape=shape)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{self.folder}: expected an index and features, found {error}; delete the folder"
            ) from None

    def __reduce__(self) -> tuple[type[FeatureStore], tuple[Path, VisionConfig]]:
        # A worker process opens the file itself: pickling would copy the whole array to it.
        return FeatureStore, (self.folder, self._vision)

    @property
    def nothing(self) -> np.ndarray:
        """The features of no image, [0, d]."""
        return np.asarray(self._features[:0])

    def images(self, fact: Fact) -> Patches:
        """Reads the features [tokens, d] of a fact's photo and crop, and their grids, as `Patches`.

        Raises:
            DataError: the store has no features of the fact.
        """
        places = self._places.get(fact.id)
        if places is None:
            raise DataError(
                f"{self.folder}: expected features of fact {fact.id}, found none; delete the folder"
            )
        features = [
            self._features[start : start + self._vision.image_cost([grid]).tokens]
            for start, grid in places
        ]
        grids = tuple(tuple(grid) for _, grid in places)
        return Patches(np.concatenate(features), grids)


def write_index(
    folder: Path,
    places: Mapping[str, list[Place]],
    shape: tuple[int, int],
    dtype: str,
    made_of: Mapping[str, str],
) -> None:
    """Writes the index of a store, after its features."""
    index = {"shape": shape, "dtype": dtype, "facts": places, "made_of": made_of}
    write_json(folder / INDEX, index, indent=None)
