import functools

import jax
import jax.numpy as jnp
import numpy as np

from morer1_jax.model.layers import scanned
from morer1_jax.model.vision import (
    VisionBlock,
    VisionGroup,
    axial_rotary,
)


@functools.partial(jax.jit, static_argnums=0)
def encode(model, params, images):
    return model.apply({"params": params}, images, method="encode_images")


def features(case, images, vision_index):
    tokens = encode(case.model, case.params, images)
    return np.take_along_axis(np.asarray(tokens), np.maximum(vision_index, 0)[..., None], axis=1)[
        vision_index >= 0
    ]


def test_padding_windows_change_nothing(small_case, rows_of):
    one, many = (
        rows_of(small_case.config, small_case.samples, [[1, 2, 3]], extra_windows=extra)
        for extra in (0, 4)
    )
    assert many.images.patches.shape[1] == one.images.patches.shape[1] + 4
    np.testing.assert_allclose(
        features(small_case, one.images, one.vision_index),
        features(small_case, many.images, many.vision_index),
        atol=1e-5,
    )


def test_what_is_in_padding_is_not_seen(small_case, rows_of):
    rows = rows_of(small_case.config, small_case.samples, [[2, 3]])
    noise = np.random.default_rng(0).standard_normal(rows.images.patches.shape)
    padding = rows.images.image_ids[..., None] < 0
    noisy = np.where(padding, 5 * noise, rows.images.patches).astype(np.float32)
    np.testing.assert_allclose(
        features(small_case, rows.images, rows.vision_index),
        features(small_case, rows.images.replace(patches=noisy), rows.vision_index),
        atol=1e-6,
    )


def test_row_without_images_is_finite(small_case, rows_of):
    rows = rows_of(small_case.config, small_case.samples, [[0], [3]])
    tokens = encode(small_case.model, small_case.params, rows.images)
    assert (rows.images.image_ids[0] == -1).all()
    assert np.isfinite(tokens).all()


def test_scanned_groups_are_the_blocks_in_turn(small_case, rows_of):
    """Stacked parameters, taken apart and applied block by block, compute the same."""
    config, run = small_case.config.vision, small_case.model.runtime
    images = rows_of(small_case.config, small_case.samples, [[1, 2]]).images
    stacks = small_case.params["vision"]["groups"]
    given = axial_rotary(images.positions, config), images.image_ids, images.part_ids
    shape = (*images.image_ids.shape, config.hidden_size)
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    groups = scanned(VisionGroup, config.depth // config.period, inputs=3)(config, run)
    expected, _ = jax.jit(groups.apply)({"params": stacks}, x, *given)
    blocks = {full: jax.jit(VisionBlock(config, run, full).apply) for full in (False, True)}
    for i in range(config.depth):
        group, place = divmod(i, config.period)
        full = place == config.period - 1
        stack, at = (stacks["full"], (group,)) if full else (stacks["windowed"], (group, place))
        params = jax.tree.map(lambda leaf, at=at: leaf[at], stack)
        x, _ = blocks[full]({"params": params}, x, *given)
    np.testing.assert_allclose(x, expected, atol=1e-4)


def test_axial_rotary(small_case):
    """Row angles in the first half of the frequencies, column angles in the second."""
    cos, sin = axial_rotary(jnp.array([[[[3, 5]]]]), small_case.config.vision)
    angles = np.array([3, 3 / 100, 5, 5 / 100])
    np.testing.assert_allclose(cos[0, 0, 0], np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(sin[0, 0, 0], np.sin(angles), atol=1e-6)
