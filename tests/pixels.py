"""Patches as the vision tower reads them, beside those of `transformers`' image processor."""

import functools

import jax
import numpy as np

from morer1_jax.model.vision import normalised


def values(patches, config):
    """An `ImageReader`'s patches, normalised on the device: float32 [n, all frames' numbers]."""
    assert patches.values.dtype == np.uint8
    mean, std = np.float32([config.image_mean]), np.float32([config.image_std])
    batch = patches.values[None, None]
    return np.array(compiled()(batch, mean, 1 / std, frames=config.temporal_patch_size))[0, 0]


@functools.cache
def compiled():
    """`normalised`, compiled."""
    return jax.jit(normalised, static_argnames="frames")


def assert_same(found, expected, name=""):
    """Each value, however small, lies within one unit in the last place of its counterpart."""
    assert found.dtype == expected.dtype == np.float32, name
    assert found.shape == expected.shape, name
    far = np.abs(found - expected) > np.spacing(np.abs(expected))
    assert not far.any(), f"{name}: {far.sum()} of {far.size}"
