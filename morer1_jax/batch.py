"""Batches: the arrays of fixed shapes that the compiled programs take.

A batch is a NamedTuple of NumPy arrays whose leading axis is the row, so that any program can take
it and a mesh can shard it by rows. Rows are padded on the right to a `data.shapes.Shape`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8


class VisionBatch(NamedTuple):
    """Patches in the slots of the vision tower's layout; see `VisionConfig.layout`.

    Attributes:
        patches: levels of one frame, c = channels · patch_size²; any levels stand in padding.
            `model.vision.VisionInputs.of` normalises them on the device.
        mean: of each channel (k), with levels from 0 to 1.
        inverse_std: 1 / standard deviation of each channel, with levels from 0 to 1.
    """

    patches: UInt8[np.ndarray, "b w p c"]
    positions: Int[np.ndarray, "b w p 2"]
    image_ids: Int[np.ndarray, "b w p"]
    part_ids: Int[np.ndarray, "b w p"]
    mean: Float[np.ndarray, "b k"]
    inverse_std: Float[np.ndarray, "b k"]


class EncodedBatch(NamedTuple):
    """Images that the vision tower has run on, up to its merger, in place of patches.

    Attributes:
        hidden: what the tower's blocks give for the patches of the image token at each place of the
            row, n = places · merge²; whatever is finite where there is none.
    """

    hidden: Float[np.ndarray, "b n d"]


class FeatureBatch(NamedTuple):
    """Features computed before training, in place of patches.

    They stand in the order of the text's image tokens, padded to as many as the tower would return.
    """

    features: Float[np.ndarray, "b m d"]


Images = VisionBatch | EncodedBatch | FeatureBatch
"""The images of a batch's rows, in one of three stages of encoding."""


class SequenceBatch(NamedTuple):
    """Whole samples, prompt and target, possibly several to a row.

    Attributes:
        tokens: int32; padding holds the pad id.
        targets: int32, the token that follows each one.
        weights: float32, 1 where the loss counts the target.
        segment_ids: int32, from 1 for the row's samples, 0 for padding.
        positions: int32, the three M-RoPE axes.
        vision_index: int32, merged slot of the vision token at each place, -1 elsewhere.
    """

    tokens: Int[np.ndarray, "b s"]
    targets: Int[np.ndarray, "b s"]
    weights: Float[np.ndarray, "b s"]
    segment_ids: Int[np.ndarray, "b s"]
    positions: Int[np.ndarray, "b 3 s"]
    vision_index: Int[np.ndarray, "b s"]
    vision: Images


class PromptBatch(NamedTuple):
    """Prompts to sample from.

    Attributes:
        tokens: int32; padding holds the pad id.
        mask: True where there is a token.
        positions: int32, the three M-RoPE axes.
        vision_index: as in `SequenceBatch`.
        next_position: int32, the position of the first sampled token on all three axes.
        fact: int32, the fact's number in its split; keys the sampling noise.
        gold: int32, the id of the right label.
    """

    tokens: Int[np.ndarray, "b s"]
    mask: Bool[np.ndarray, "b s"]
    positions: Int[np.ndarray, "b 3 s"]
    vision_index: Int[np.ndarray, "b s"]
    next_position: Int[np.ndarray, " b"]
    fact: Int[np.ndarray, " b"]
    gold: Int[np.ndarray, " b"]
    vision: Images


def pad(values: np.ndarray, length: int, fill: float) -> np.ndarray:
    """Fills the last axis up to `length`."""
    width = [(0, 0)] * (values.ndim - 1) + [(0, length - values.shape[-1])]
    return np.pad(values, width, constant_values=fill)


def stack(rows: Sequence[Any]) -> Any:
    """Stacks NamedTuples of arrays (and of NamedTuples) field by field."""
    first = rows[0]
    if isinstance(first, tuple):
        return type(first)(*(stack(field) for field in zip(*rows, strict=True)))
    return np.stack(rows)
