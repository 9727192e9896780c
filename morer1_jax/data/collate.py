"""Lays samples out as the arrays of a batch, in rows of one fixed shape."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Shaped

from morer1_jax.batch import FeatureBatch, PromptBatch, SequenceBatch, VisionBatch, pad, stack
from morer1_jax.data.features import FeatureStore
from morer1_jax.data.images import Patches
from morer1_jax.data.positions import mrope_positions
from morer1_jax.data.sample import Sample, SampleReader
from morer1_jax.data.shapes import Shape
from morer1_jax.errors import DataError
from morer1_jax.model.config import ImageConfig, VisionConfig
from morer1_jax.model.special import SpecialIds
from morer1_jax.model.vision_layout import Grid, VisionLayout

# Stands for the images of rows that are not laid out yet.
_LATER = np.zeros(0, np.int32)


class Collator:
    """Lays samples out in rows.

    Args:
        special: ids of the tokens that stand for padding and images.
        vision: the tower that the images are for.
        images: mean and standard deviation of its pixels' channels.
        features: the store that the samples' images come from; None: they come as patches.
    """

    def __init__(
        self,
        special: SpecialIds,
        vision: VisionConfig,
        images: ImageConfig,
        features: FeatureStore | None = None,
    ) -> None:
        self._special = special
        self._vision_config = vision
        self._mean = np.float32(images.image_mean)
        self._inverse_std = 1 / np.float32(images.image_std)
        self._features = features

    @classmethod
    def of(cls, reader: SampleReader) -> Collator:
        """Returns the collator of a reader's samples."""
        return cls(reader.special, reader.vision, reader.photos.config, reader.features)

    def prompts(
        self, samples: Sequence[Sample], noise_ids: Sequence[int], shape: Shape
    ) -> PromptBatch:
        """Lays prompts out, one to a row; targets are left out.

        Args:
            noise_ids: the key of each row's sampling noise.
            shape: of the rows; consecutive rows share a row of images as it says.

        Raises:
            DataError: a sample exceeds the shape; the message names it and the config's keys.
        """
        rows = []
        for sample, noise_id in zip(samples, noise_ids, strict=True):
            length = len(sample.prompt)
            self._check_length([sample], length, shape)
            positions = self._positions(sample.prompt, sample.images.grids)
            rows.append(
                PromptBatch(
                    tokens=pad(sample.prompt, shape.length, self._special.pad),
                    mask=np.arange(shape.length) < length,
                    positions=pad(positions, shape.length, 0),
                    vision_index=_LATER,
                    next_position=np.int32(positions.max() + 1),
                    fact=np.int32(noise_id),
                    gold=np.int32(sample.gold),
                    vision=_LATER,
                )
            )
        return self._with_images(stack(rows), [[sample] for sample in samples], shape)

    def sequences(self, rows: Sequence[Sequence[Sample]], shape: Shape) -> SequenceBatch:
        """Lays prompts and targets out, the samples of a row one after another; a row may be empty.

        Args:
            shape: of the rows; consecutive rows share a row of images as it says.

        Raises:
            DataError: a row exceeds the shape; the message names its facts and the config's keys.
        """
        batch = stack([self._sequence(samples, shape) for samples in rows])
        return self._with_images(batch, rows, shape)

    def image(self, image: Patches, slots: int) -> tuple[VisionBatch, Int[np.ndarray, " m"]]:
        """Lays one image out alone, in a row without its axis.

        Returns:
            The patches, and the merged slots of the image's tokens in their order.
        """
        layout = self._layout([image], slots)
        return self._vision(layout, [image]), layout.token_slots

    def _sequence(self, samples: Sequence[Sample], shape: Shape) -> SequenceBatch:
        # Each column begins with nothing, so that a row without samples has a type.
        tokens, targets, segments = ([np.zeros(0, np.int32)] for _ in range(3))
        weights, positions = [np.zeros(0, np.float32)], [np.zeros((3, 0), np.int32)]
        for number, sample in enumerate(samples, start=1):
            ids = np.r_[sample.prompt, sample.target]
            tokens.append(ids)
            targets.append(np.r_[ids[1:], np.int32(self._special.pad)])
            weights.append(_target_weights(len(sample.prompt), len(sample.target)))
            segments.append(np.full(len(ids), number, np.int32))
            positions.append(self._positions(ids, sample.images.grids))
        row, length = np.concatenate(tokens), shape.length
        self._check_length(samples, len(row), shape)
        return SequenceBatch(
            tokens=pad(row, length, self._special.pad),
            targets=pad(np.concatenate(targets), length, self._special.pad),
            weights=pad(np.concatenate(weights), length, 0.0),
            segment_ids=pad(np.concatenate(segments), length, 0),
            positions=pad(np.concatenate(positions, axis=1), length, 0),
            vision_index=_LATER,
            vision=_LATER,
        )

    def _with_images(
        self,
        batch: PromptBatch | SequenceBatch,
        rows: Sequence[Sequence[Sample]],
        shape: Shape,
    ) -> PromptBatch | SequenceBatch:
        """Returns a batch with the images of its rows' samples."""
        indices, images = [], []
        for start in range(0, len(rows), shape.sharing):
            neighbours = slice(start, start + shape.sharing)
            samples = list(itertools.chain(*rows[neighbours]))
            self._check_slots(samples, shape)
            row_images = [sample.images for sample in samples]
            layout = self._layout(row_images, shape.slots)
            tokens = batch.tokens[neighbours]
            indices.append(self._vision_index(layout, tokens.reshape(-1)).reshape(tokens.shape))
            images.append(self._vision(layout, row_images))
        return batch._replace(vision_index=np.concatenate(indices), vision=stack(images))

    def _check_length(self, samples: Sequence[Sample], tokens: int, shape: Shape) -> None:
        if tokens > shape.length:
            raise DataError(
                f"{_names(samples)}: expected a row with room for {tokens} tokens, found "
                f"{shape.length}; raise data.prompt_length or data.completion_length, or pack fewer"
            )

    def _check_slots(self, samples: Sequence[Sample], shape: Shape) -> None:
        slots = sum(self._vision_config.image_cost(sample.images.grids).slots for sample in samples)
        if slots > shape.slots:
            raise DataError(
                f"{_names(samples)}: expected a row with room for {slots} attention windows, found "
                f"{shape.slots}; raise data.windows, or pack fewer"
            )

    def _positions(
        self, tokens: Int[np.ndarray, " s"], grids: Sequence[Grid]
    ) -> Int[np.ndarray, "3 s"]:
        return mrope_positions(
            tokens,
            grids,
            merge_size=self._vision_config.spatial_merge_size,
            image_token_id=self._special.image,
            video_token_id=self._special.video,
        )

    def _layout(self, images: Sequence[Patches], slots: int) -> VisionLayout:
        """Returns the places of the patches of a row's samples."""
        grids = [grid for sample_images in images for grid in sample_images.grids]
        counts = [len(sample_images.grids) for sample_images in images]
        return self._vision_config.layout(grids, samples=counts, slots=slots)

    def _vision_index(
        self, layout: VisionLayout, tokens: Int[np.ndarray, " s"]
    ) -> Int[np.ndarray, " s"]:
        if self._features is not None:
            # Features from a store stand in the order of the text's image tokens.
            is_image = tokens == self._special.image
            return np.where(is_image, np.cumsum(is_image) - 1, -1).astype(np.int32)
        return layout.feature_index(tokens, image_token_id=self._special.image)

    def _vision(
        self, layout: VisionLayout, images: Sequence[Patches]
    ) -> VisionBatch | FeatureBatch:
        if self._features is not None:
            features = _values(self._features.nothing, images)
            slots = layout.image_ids.size // self._vision_config.spatial_merge_size**2
            return FeatureBatch(np.pad(features, ((0, slots - len(features)), (0, 0))))
        no_patches = np.zeros((0, self._vision_config.frame_dim), np.uint8)
        return VisionBatch(
            patches=layout.place(_values(no_patches, images)),
            positions=layout.positions,
            image_ids=layout.image_ids,
            part_ids=layout.part_ids,
            mean=self._mean,
            inverse_std=self._inverse_std,
        )


def _names(samples: Sequence[Sample]) -> str:
    return ", ".join(sample.name for sample in samples)


def _values(empty: Shaped[np.ndarray, "0 c"], images: Sequence[Patches]) -> np.ndarray:
    """Returns the values of a row's images, one after another; of a row without any, `empty`."""
    return np.concatenate([empty, *(sample_images.values for sample_images in images)])


def _target_weights(prompt: int, target: int) -> np.ndarray:
    """Returns 1 where the next token is the target's (from the prompt's last place on), else 0."""
    weights = np.zeros(prompt + target, np.float32)
    weights[prompt - 1 : prompt + target - 1] = 1.0
    return weights
