import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from morer1_jax.model.config import Runtime, VisionConfig
from morer1_jax.model.layers import scanned
from morer1_jax.model.vision import (
    VisionBlock,
    VisionGroup,
    VisionInputs,
    VisionTower,
    axial_rotary,
)


@functools.cache
def encode(model):
    """Compiled `(params, images) -> image tokens`."""
    return jax.jit(
        lambda params, images: model.apply({"params": params}, images, method="encode_images")
    )


def features(case, images, vision_index):
    tokens = encode(case.model)(case.params, images)
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
    rows = rows_of(small_case.config, small_case.samples, [[0], [2, 3]])
    noise = np.random.default_rng(0).standard_normal(rows.images.patches.shape)
    padding = rows.images.image_ids[..., None] < 0
    noisy = np.where(padding, 5 * noise, rows.images.patches).astype(np.float32)
    np.testing.assert_allclose(
        features(small_case, rows.images, rows.vision_index),
        features(small_case, rows.images.replace(patches=noisy), rows.vision_index),
        atol=1e-6,
    )


def test_levels_in_padding_are_not_seen(tiny):
    """The levels of a batch, of which no padding is 0 once they are normalised."""
    prompts = tiny.prompts()
    model, frames = tiny.model(), tiny.CONFIG.vision.temporal_patch_size

    def seen(patches):
        images = VisionInputs.of(prompts.vision._replace(patches=patches), frames)
        tokens = np.asarray(encode(model)(tiny.params(), images))
        assert np.isfinite(tokens).all()
        index = np.maximum(prompts.vision_index, 0)[..., None]
        return np.take_along_axis(tokens, index, axis=1)[prompts.vision_index >= 0]

    patches = prompts.vision.patches
    padding = prompts.vision.image_ids[..., None] < 0
    assert padding.any()
    noise = np.random.default_rng(0).integers(0, 256, patches.shape, np.uint8)
    expected = seen(patches)
    np.testing.assert_allclose(seen(np.where(padding, noise, patches)), expected, atol=1e-6)
    assert np.abs(seen(noise) - expected).max() > 0.1


def test_row_without_images_is_finite(small_case, rows_of):
    rows = rows_of(small_case.config, small_case.samples, [[0], [2, 3]])
    tokens = encode(small_case.model)(small_case.params, rows.images)
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


@pytest.mark.parametrize(
    ("depth", "full", "barriers", "remat"),
    [
        (4, (1, 3), 0, "dots"),
        (2, (1,), 2, "full"),
        (3, (2,), 1, "dots"),
        (2, (0, 1), 0, "full"),
        (2, (0,), 2, "dots"),
        (2, (0,), 2, "full"),
    ],
    ids=str,
)
def test_blocks_outside_of_a_loop_are_computed_again(depth, full, barriers, remat):
    """XLA takes a loop of one step apart, and would merge a block with what computes it again."""
    config = VisionConfig(
        depth=depth,
        hidden_size=16,
        intermediate_size=24,
        num_heads=2,
        out_hidden_size=32,
        fullatt_block_indexes=full,
        patch_size=2,
        window_size=8,
    )
    slots = (1, 3, config.window_patches)
    ids = jnp.zeros(slots, jnp.int32)
    patches = jnp.asarray(np.random.default_rng(0).standard_normal((*slots, config.patch_dim)))
    images = VisionInputs(patches, jnp.zeros((*slots, 2), jnp.int32), ids, ids)

    def program(remat):
        tower = VisionTower(config, Runtime(remat=remat))
        params = jax.eval_shape(lambda key: tower.init(key, images), jax.random.key(0))
        return params, jax.grad(lambda params: jnp.sum(jnp.sin(tower.apply(params, images))))

    params, gradient = program(remat)
    traced = jax.jit(gradient).trace(params)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("optimization_barrier") == barriers
    # A block has five products with weights, of which all but the last are read again, and two
    # of its attention, which always are computed again.
    again = {"none": 0, "dots": 2, "full": 2 + 4}
    plain, some = str(jax.make_jaxpr(program("none")[1])(params)), str(traced.jaxpr)
    blocks = min(2, config.period) if config.period else depth
    assert some.count("dot_general") - plain.count("dot_general") == again[remat] * blocks


def test_axial_rotary(small_case):
    """Row angles in the first half of the frequencies, column angles in the second."""
    cos, sin = axial_rotary(jnp.array([[[[3, 5]]]]), small_case.config.vision)
    angles = np.array([3, 3 / 100, 5, 5 / 100])
    np.testing.assert_allclose(cos[0, 0, 0], np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(sin[0, 0, 0], np.sin(angles), atol=1e-6)
