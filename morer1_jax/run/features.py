"""Encodes every photo and crop once and keeps the features, where no vision part trains."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from morer1_jax.batch import VisionBatch, pad
from morer1_jax.config.schema import to_tree
from morer1_jax.config.settings import Settings
from morer1_jax.data.collate import Collator
from morer1_jax.data.dataset import Dataset
from morer1_jax.data.digests import differences, of_lines
from morer1_jax.data.features import FEATURES, FeatureStore, Place, write_index
from morer1_jax.data.images import crop_box
from morer1_jax.data.loader import load_ahead
from morer1_jax.data.sample import SampleReader
from morer1_jax.errors import ConfigError, DataError, NotFiniteError
from morer1_jax.files import allocate, atomic_dir
from morer1_jax.hosts import group
from morer1_jax.hosts.stop import check_stop
from morer1_jax.learn.trainable import TrainableParts
from morer1_jax.model.config import ImageConfig, VisionConfig
from morer1_jax.model.vision import VisionInputs, VisionTower
from morer1_jax.progress import progress
from morer1_jax.run import mesh as meshes
from morer1_jax.run.finite import ways
from morer1_jax.run.store import Store
from morer1_jax.run.trainee import Trainee
from morer1_jax.task.fact import Fact
from morer1_jax.task.photos import photo_digests
from morer1_jax.weights.finite import count_not_finite
from morer1_jax.weights.published import Checkpoint

# Images encoded at once, for each part of the mesh that rows are split over.
_ROWS = 8
# The store's folder in a workdir.
_FOLDER = "features"


def check_frozen(parts: TrainableParts) -> None:
    """Checks that neither tower nor merger trains, since features of what trains go stale.

    Raises:
        ConfigError: one of them trains.
    """
    for name, share in (("vision", parts.vision), ("merger", parts.merger)):
        if share:
            raise ConfigError(
                f"config.data.keep_features: expected tune.{name} = 0, since kept features of what "
                f"trains go stale, found {share:g}; set it to 0, or keep_features to False"
            )


def features_origin(
    settings: Settings, dataset: Dataset, images: ImageConfig, checkpoint: Checkpoint | None
) -> dict[str, str]:
    """Returns digests of all that features depend on, by name."""
    weights = (
        checkpoint.digest if checkpoint else json.dumps([settings.seed, to_tree(settings.model)])
    )
    return photo_digests(dataset.photos) | {
        "model": of_lines([weights, settings.runtime.dtype, settings.tune.frozen_dtype]),
        "pixel limits or crop": of_lines([repr(images)]),
    }


def check_features(workdir: Path, vision: VisionConfig, origin: Mapping[str, str]) -> None:
    """Checks that kept features, if there are any, are those of this run.

    Args:
        origin: from `features_origin`.

    Raises:
        DataError: they have no digests, or are of other photos or of another model.
    """
    if (workdir / _FOLDER).exists():
        _check_origin(FeatureStore(workdir / _FOLDER, vision), origin)


def open_features(
    store: Store,
    origin: Mapping[str, str],
    dataset: Dataset,
    trainee: Trainee,
    reader: SampleReader,
    workers: int,
) -> FeatureStore:
    """Opens the run's features, of all facts of all splits; encodes them if they are missing.

    Args:
        store: the run's workdir.
        origin: from `features_origin`.
        workers: threads that read photos ahead.

    Raises:
        DataError: kept features have no digests, or are of other photos or of another model.
        NotFiniteError: the tower's output is not finite.
    """
    folder = store.folder / _FOLDER
    if not group.of_first("kept features", folder.exists):
        # All encode, each its own rows; the first writes.
        with atomic_dir(folder) if group.is_first() else contextlib.nullcontext() as partial:
            _encode(partial, origin, dataset, trainee, reader, workers)
        group.meet("features are kept")
    store.share(_FOLDER)
    features = FeatureStore(folder, reader.vision)
    _check_origin(features, origin)
    return features


def _check_origin(store: FeatureStore, origin: Mapping[str, str]) -> None:
    if changed := differences(store.made_of, origin):
        found = f"others ({changed})" if store.made_of else "no digests of what they were made of"
        raise DataError(
            f"{store.folder}: expected features of this run's photos and model, found {found}; "
            "delete the folder, and they are encoded anew"
        )


def features_shape(
    dataset: Dataset, trainee: Trainee, reader: SampleReader
) -> tuple[tuple[int, int], str]:
    """Returns the shape [tokens, d] and the dtype of a run's features."""
    model = trainee.policy.model
    tokens = _distinct_images(dataset, reader).tokens
    return (tokens, model.config.text.hidden_size), model.runtime.dtype


@dataclasses.dataclass(frozen=True)
class _Images:
    """The different images of a dataset.

    Attributes:
        images: each once, as (fact, 0 for its photo or 1 for its crop).
        places: place of the features of each fact's photo and crop, by the fact's id.
        tokens: number of all images' tokens.
    """

    images: list[tuple[Fact, int]]
    places: dict[str, list[Place]]
    tokens: int


def _distinct_images(dataset: Dataset, reader: SampleReader) -> _Images:
    place_of: dict[object, Place] = {}
    images, places, tokens = [], {}, 0
    photo_sizes = dataset.photo_sizes
    for fact in dataset.facts:
        size = photo_sizes[fact.photo]
        keys = (fact.photo, (fact.photo, crop_box(fact.box, size, reader.photos.config)))
        for which, (key, grid) in enumerate(zip(keys, reader.grids(fact, size), strict=True)):
            if key not in place_of:
                place_of[key] = (tokens, grid)
                images.append((fact, which))
                tokens += reader.vision.image_cost([grid]).tokens
        places[fact.id] = [place_of[key] for key in keys]
    return _Images(images, places, tokens)


def _encode(
    folder: Path | None,
    origin: Mapping[str, str],
    dataset: Dataset,
    trainee: Trainee,
    reader: SampleReader,
    workers: int,
) -> None:
    """Encodes every image; writes the features into a folder, or nowhere if it is None."""
    # Compile the tower alone, for one number of rows.
    policy, every = trainee.policy, _distinct_images(dataset, reader)
    images, model = every.images, policy.model
    tower = VisionTower(model.config.vision, model.runtime)
    frames = model.config.vision.temporal_patch_size
    run = meshes.program(
        lambda params, batch: tower.apply({"params": params}, VisionInputs.of(batch, frames)),
        takes=(policy.placed.param_shardings["vision"], policy.placed.rows),
        gives=policy.placed.rows,
    )
    params = trainee.frozen["vision"]
    rows, host = _ROWS * policy.placed.parts, meshes.this_host(policy.placed.mesh)
    # Reserve the file's room first: a disk that is full later would kill a process that writes to
    # mapped memory.
    width, dtype = model.config.text.hidden_size, model.runtime.dtype
    if folder is not None:
        allocate(folder / FEATURES, every.tokens * width * np.dtype(dtype).itemsize)
        out = np.memmap(folder / FEATURES, np.dtype(dtype), "r+", shape=(every.tokens, width))
    collator = Collator.of(dataclasses.replace(reader, features=None))

    def make(number: int) -> tuple[VisionBatch, np.ndarray, np.ndarray]:
        """Returns this host's rows: patches, the slots of each image's tokens, and its number."""
        numbers = np.arange(number * rows, (number + 1) * rows)
        own = np.asarray(host.rows(numbers))
        # The last batch repeats its last image up to the compiled size.
        images_of_rows = [
            collator.image(reader.photos.patches(*images[n]), reader.limits.slots)
            for n in np.minimum(own, len(images) - 1)
        ]
        patches = jax.tree.map(
            lambda *parts: np.stack(parts), *(batch for batch, _ in images_of_rows)
        )
        most = patches.patches.shape[1] * patches.patches.shape[2]
        slots = [pad(token_slots, most, -1) for _, token_slots in images_of_rows]
        return patches, np.stack(slots).astype(np.int32), own.astype(np.int32)

    # Encode batch by batch, and write the features of real rows in their order.
    count = -(-len(images) // rows)
    with progress(desc="encode images", total=len(images), unit="image") as bar:
        batches = load_ahead(make, 0, count, workers=workers)
        start = 0
        for batch, slots, own in batches:
            check_stop()
            batch, slots, own = policy.placed.put((batch, slots, own))
            encoded, slots, numbers = meshes.fetch((run(params, batch), slots, own))
            real_rows = [row for row in np.argsort(numbers) if numbers[row] < len(images)]
            for row in real_rows:
                tokens = encoded[row][slots[row][slots[row] >= 0]]
                _check_finite(tokens, *images[numbers[row]], dtype)
                if folder is not None:
                    out[start : start + len(tokens)] = tokens
                start += len(tokens)
            bar.update(len(real_rows))
    if folder is not None:
        out.flush()
        write_index(folder, every.places, out.shape, dtype, origin)


def _check_finite(tokens: np.ndarray, fact: Fact, which: int, dtype: str) -> None:
    """Checks the features of a fact's photo (0) or crop (1).

    Raises:
        NotFiniteError: they have NaN or infinity.
    """
    if count_not_finite(tokens):
        name = ("photo", "crop")[which]
        raise NotFiniteError(
            f"fact {fact.id}: expected finite features of its {name}, found NaN or infinity in "
            f"{dtype}; {ways(dtype, 'begin with another checkpoint')}"
        )
