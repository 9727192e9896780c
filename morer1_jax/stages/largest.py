"""The largest batches that a config permits: for shapes and FLOPs, before there is any data.

Each row is one fact as long as the limits, with two images that fill all image slots; or rows have
a run's own shape. The arrays take no memory: they repeat one number.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from morer1_jax.batch import EncodedBatch, FeatureBatch, PromptBatch, SequenceBatch, VisionBatch
from morer1_jax.config.settings import DataSettings
from morer1_jax.data.grammar import GrammarTables
from morer1_jax.data.shapes import Shape
from morer1_jax.model.vlm import Qwen25VL

_IMAGES = 2
# The tables of a readable answer follow from tokenizer and labels. Those of Qwen's tokenizer and
# some 20 labels are smaller than these sizes, with which they take four megabytes.
_CLASSES, _STEP_STATES, _ANSWER_STATES = 1024, 512, 1024


def sequences(
    data: DataSettings, model: Qwen25VL, rows: int, *, shape: Shape | None = None
) -> SequenceBatch:
    """Returns samples of a prompt and a target each.

    Args:
        shape: of the rows; None: the largest.
    """
    longest = _rounded(data.prompt_length + data.completion_length, data.round_to)
    shape = shape or Shape(longest, data.windows)
    length = shape.length
    weights = np.zeros(length, np.float32)
    weights[-data.completion_length :] = 1.0
    return SequenceBatch(
        tokens=_repeated(0, (rows, length)),
        targets=_repeated(0, (rows, length)),
        weights=np.broadcast_to(weights, (rows, length)),
        segment_ids=_repeated(1, (rows, length)),
        positions=_repeated(0, (rows, 3, length)),
        vision_index=_repeated(-1, (rows, length)),
        vision=_vision(data, model, rows, shape),
    )


def prompts(
    data: DataSettings,
    model: Qwen25VL,
    rows: int,
    *,
    encoded: bool = False,
    shape: Shape | None = None,
) -> PromptBatch:
    """Returns prompts to sample from.

    Args:
        encoded: whether the tower has run on their images.
        shape: of the rows; None: the largest.
    """
    shape = shape or Shape(prompt_length(data), data.windows)
    length, images = shape.length, _vision(data, model, rows, shape)
    if encoded and isinstance(images, VisionBatch):
        vision = model.config.vision
        places = (rows, length * vision.spatial_merge_size**2, vision.hidden_size)
        images = EncodedBatch(np.broadcast_to(np.zeros((), jnp.dtype(model.runtime.dtype)), places))
    return PromptBatch(
        tokens=_repeated(0, (rows, length)),
        mask=np.broadcast_to(np.True_, (rows, length)),
        positions=_repeated(0, (rows, 3, length)),
        vision_index=_repeated(-1, (rows, length)),
        next_position=_repeated(0, (rows,)),
        fact=_repeated(0, (rows,)),
        gold=_repeated(0, (rows,)),
        vision=images,
    )


def prompt_length(data: DataSettings) -> int:
    """Returns the tokens of a prompt's row."""
    return _rounded(data.prompt_length, data.round_to)


def grammar(rows: int) -> GrammarTables:
    """Returns the shapes of the answer's tables over a vocabulary of so many rows."""
    return GrammarTables(
        token_class=jax.ShapeDtypeStruct((rows,), jnp.int16),
        steps_next=jax.ShapeDtypeStruct((_CLASSES, _STEP_STATES), jnp.int16),
        answer_next=jax.ShapeDtypeStruct((_CLASSES, _ANSWER_STATES), jnp.int16),
        effort_added=jax.ShapeDtypeStruct((_CLASSES, _STEP_STATES), jnp.int16),
        steps_accept=jax.ShapeDtypeStruct((_STEP_STATES,), bool),
        answer_label=jax.ShapeDtypeStruct((_ANSWER_STATES,), jnp.int16),
        steps_distance=jax.ShapeDtypeStruct((_STEP_STATES,), jnp.int16),
        answer_distance=jax.ShapeDtypeStruct((_ANSWER_STATES,), jnp.int16),
    )


def _vision(
    data: DataSettings, model: Qwen25VL, rows: int, shape: Shape
) -> VisionBatch | FeatureBatch:
    vision, windows, rows = model.config.vision, shape.slots, rows // shape.sharing
    slots = (rows, windows, vision.window_patches)
    if data.keep_features:
        tokens = windows * vision.window_patches // vision.spatial_merge_size**2
        places = (rows, tokens, model.config.text.hidden_size)
        # As they are kept, in the dtype of activations.
        return FeatureBatch(np.broadcast_to(np.zeros((), jnp.dtype(model.runtime.dtype)), places))
    # Every second window is of the second image, and each window a part of its own.
    parts = np.arange(windows, dtype=np.int32)[:, None]
    return VisionBatch(
        patches=np.broadcast_to(np.uint8(0), (*slots, vision.frame_dim)),
        positions=_repeated(0, (*slots, 2)),
        image_ids=np.broadcast_to(parts % _IMAGES, slots),
        part_ids=np.broadcast_to(parts, slots),
        mean=np.broadcast_to(np.float32(0), (rows, vision.in_channels)),
        inverse_std=np.broadcast_to(np.float32(1), (rows, vision.in_channels)),
    )


def _repeated(value: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.broadcast_to(np.int32(value), shape)


def _rounded(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
