"""Encoding every photo and crop once, where neither vision tower nor merger trains."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from morer1_jax.batch import VisionBatch
from morer1_jax.data.digests import differences, of_lines
from morer1_jax.data.encoder import Encoder
from morer1_jax.data.features import FEATURES, FeatureStore, Place, write_index
from morer1_jax.data.images import crop_box
from morer1_jax.data.loader import load_ahead
from morer1_jax.errors import ConfigError, DataError, NotFiniteError
from morer1_jax.files import allocate, atomic_dir
from morer1_jax.learn.trainable import TrainableParts
from morer1_jax.model.scorer import vision_inputs
from morer1_jax.model.vision import VisionTower
from morer1_jax.progress import progress
from morer1_jax.run import mesh as meshes
from morer1_jax.run.finite import ways
from morer1_jax.task import more
from morer1_jax.task.fact import Fact
from morer1_jax.weights.finite import count_not_finite

if TYPE_CHECKING:
    from morer1_jax.run.job import Job

# Images encoded at once, for each part of the mesh that rows are split over.
_ROWS = 8


def check_frozen(parts: TrainableParts) -> None:
    """Features may be kept only of a tower, and a merger, that do not change.

    Raises:
      ConfigError: one of them trains.
    """
    for name, share in (("vision", parts.vision), ("merger", parts.merger)):
        if share:
            raise ConfigError(
                f"config.data.keep_features: True found, but tune.{name} is {share:g}: features "
                "kept of what trains go stale; set it to 0, or keep_features to False"
            )


def feature_store(job: Job) -> FeatureStore:
    """The run's features, of all facts of all splits; encoded now if they are not there yet.

    Raises:
      DataError: those that are there are of other photos, of another model, or do not say.
    """
    check_frozen(job.parts)
    folder = job.workdir / "features"
    merge = job.policy.model.config.vision.spatial_merge_size
    if not folder.exists():
        with atomic_dir(folder) as partial:
            _encode(job, partial, merge)
    store = FeatureStore(folder, merge)
    if changed := differences(store.made_of, _made_of(job)):
        found = f"are of others: {changed}" if store.made_of else "do not say what they are of"
        raise DataError(
            f"{folder}: the features {found}; features of the photos in {job.data}, as this run "
            "sees them, expected; delete the folder, and they are encoded anew"
        )
    return store


def _made_of(job: Job) -> dict[str, str]:
    """Digests of all that features depend on."""
    settings = job.settings
    weights = job.checkpoint.digest if job.checkpoint else repr((settings.seed, settings.model))
    return more.photo_digests(job.photos) | {
        "model": of_lines([weights, settings.runtime.dtype, settings.tune.frozen_dtype]),
        "pixel limits or crop": of_lines([repr(job.images)]),
    }


def features_shape(job: Job) -> tuple[tuple[int, int], str]:
    """Shape [tokens, d] and dtype of all the features of a run."""
    config = job.policy.model.config
    merge = config.vision.spatial_merge_size
    _, _, total = _images(job, job.new_encoder(pixels=True), merge)
    return (total, config.text.hidden_size), job.policy.model.runtime.dtype


def _encode(job: Job, folder: Path, merge: int) -> None:
    encoder, policy = job.new_encoder(pixels=True), job.policy
    images, places, total = _images(job, encoder, merge)
    tower = VisionTower(policy.model.config.vision, policy.model.runtime)
    run = jax.jit(
        lambda params, batch: tower.apply({"params": params}, vision_inputs(batch)),
        in_shardings=(policy.param_shardings["vision"], policy.rows),
        out_shardings=policy.rows,
    )
    params = job.frozen["vision"]
    width, dtype = policy.model.config.text.hidden_size, policy.model.runtime.dtype
    # Whole from the start: where the disk then were full, writing to memory would end the process.
    allocate(folder / FEATURES, total * width * np.dtype(dtype).itemsize)
    out = np.memmap(folder / FEATURES, np.dtype(dtype), "r+", shape=(total, width))
    rows = _ROWS * meshes.batch_parts(job.mesh)

    def make(number: int) -> tuple[VisionBatch, list[np.ndarray]]:
        chunk = images[number * rows : (number + 1) * rows]
        # The last batch is filled up to the compiled size.
        made = [encoder.image(*image) for image in chunk + chunk[-1:] * (rows - len(chunk))]
        patches = jax.tree.map(lambda *parts: np.stack(parts), *(batch for batch, _ in made))
        return patches, [order for _, order in made]

    count = -(-len(images) // rows)
    with progress(desc="encode images", total=len(images), unit="image") as bar:
        batches = load_ahead(make, 0, count, workers=job.settings.data.workers)
        start = 0
        for number, (batch, orders) in enumerate(batches):
            encoded = np.asarray(run(params, policy.put(batch)))
            wanted = min(rows, len(images) - number * rows)
            for row in range(wanted):
                tokens = encoded[row][orders[row]]
                if count_not_finite(tokens):
                    fact, which = images[number * rows + row]
                    raise NotFiniteError(
                        f"fact {fact.id}: the features of {('its photo', 'its crop')[which]} are "
                        f"not finite in {dtype}; {ways(dtype, 'begin with another checkpoint')}"
                    )
                out[start : start + len(tokens)] = tokens
                start += len(tokens)
            bar.update(wanted)
    out.flush()
    write_index(folder, places, out.shape, dtype, _made_of(job))


def _images(
    job: Job, encoder: Encoder, merge: int
) -> tuple[list[tuple[Fact, int]], dict[str, list[Place]], int]:
    """Each different image once, as (fact, 0 for the photo or 1 for the crop); where each fact's
    images will be; and the number of all their tokens."""
    known: dict[object, Place] = {}
    images, places, total = [], {}, 0
    for fact in _facts(job):
        size = job.sizes[fact.photo]
        keys = (fact.photo, (fact.photo, crop_box(fact.box, size, job.images)))
        for which, (key, grid) in enumerate(zip(keys, encoder.grids(fact, size), strict=True)):
            if key not in known:
                known[key] = (total, grid)
                images.append((fact, which))
                total += int(np.prod(grid)) // merge**2
        places[fact.id] = [known[key] for key in keys]
    return images, places, total


def _facts(job: Job) -> Iterator[Fact]:
    for facts in job.facts.values():
        yield from facts
