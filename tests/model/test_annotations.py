"""Shapes and dtypes written on the model's public functions are those that pass through them."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest


@pytest.fixture
def parts(checked, small_case, rows_of):
    """A model and its inputs, made of the checked modules' own classes."""
    config = checked.config.ModelConfig.from_hf(small_case.config.to_hf())
    model = checked.vlm.Qwen25VL(config, checked.config.Runtime())
    rows = rows_of(small_case.config, small_case.samples, [[3, 0], [1, 2]])
    images = checked.vision.VisionInputs(
        *map(
            jnp.asarray,
            (
                rows.images.patches,
                rows.images.positions,
                rows.images.image_ids,
                rows.images.part_ids,
            ),
        )
    )
    attend = checked.attention.PackedCausal(jnp.asarray(rows.segment_ids))
    arrays = map(jnp.asarray, (rows.tokens, rows.positions, rows.vision_index))
    return model, images, attend, *arrays


def run(model, name, params, *args, **kwargs):
    """A verb under tracing: shapes and dtypes are checked, nothing is computed."""
    call = functools.partial(model.apply, method=name, **kwargs)
    return jax.eval_shape(lambda params, args: call({"params": params}, *args), params, args)


def test_every_verb(checked, parts, small_case):
    model, images, attend, tokens, positions, index = parts
    params = small_case.params
    b, s = tokens.shape
    hidden = run(model, "__call__", params, tokens, positions, attend, images, index)
    assert hidden.shape == (b, s, 24)
    seen = run(model, "encode_images", params, images)
    x = run(model, "embed", params, tokens, seen, index)
    assert run(model, "logits", params, hidden).shape == (b, s, 101)
    logprob, entropy = run(model, "logprobs", params, hidden, tokens, chunk=7)
    assert logprob.shape == entropy.shape == (b, s)
    _, kv = run(model, "forward", params, x, positions, attend, keep_kv=True)
    kv = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), kv)
    cache = checked.decoding.init_cache(kv, jnp.ones((b, s), bool), group=3, length=5)
    hidden = jax.eval_shape(
        # The cache alone would come back full of shapes, which its own annotations refuse.
        lambda *args: model.apply({"params": params}, *args, cache, method="decode")[0],
        jax.ShapeDtypeStruct((b, 3, 24), jnp.float32),
        jax.ShapeDtypeStruct((b, 3), jnp.int32),
    )
    assert hidden.shape == (b, 3, 24)
    made = jax.eval_shape(lambda key: checked.vlm.init_params(model, key), jax.random.key(0))
    assert jax.tree.structure(made) == jax.tree.structure(params)
    with pytest.raises(jaxtyping.TypeCheckError):
        run(model, "embed", params, tokens, seen, index[:, 1:])
    with pytest.raises(jaxtyping.TypeCheckError):
        run(model, "forward", params, x, positions[:2], attend)


def test_images_of_a_batch(checked, tiny):
    batch, frames = tiny.prompts().vision, tiny.CONFIG.vision.temporal_patch_size
    batch = jax.tree.map(jnp.asarray, batch)
    images = checked.vision.VisionInputs.of(batch, frames)
    assert images.patches.shape[-1] == tiny.CONFIG.vision.patch_dim
    with pytest.raises(jaxtyping.TypeCheckError):
        checked.vision.VisionInputs.of(batch._replace(patches=images.patches), frames)
    with pytest.raises(jaxtyping.TypeCheckError):
        checked.vision.VisionInputs.of(batch._replace(mean=batch.mean[:1]), frames)


def test_every_pattern(checked):
    attention = checked.attention
    q, k = jnp.zeros((2, 7, 6, 4)), jnp.zeros((2, 7, 3, 4))
    keys = jnp.zeros((1, 2, 3, 3, 4))
    mask = jnp.ones((2, 3), bool)
    calls = (
        (attention.PackedCausal(jnp.ones((2, 7), jnp.int32)), None),
        (attention.SharedPrefix(mask, jnp.ones((2, 2, 2), bool)), None),
        (
            checked.decoding.Cached(mask, jnp.asarray(1)),
            checked.decoding.init_cache((keys, keys), mask, group=7, length=4).layers,
        ),
    )
    for pattern, cache in calls:
        out, _ = jax.jit(lambda pattern, *args: pattern(*args))(pattern, q, k, k, cache)
        assert out.shape == q.shape
        with pytest.raises(jaxtyping.TypeCheckError):
            pattern(q, k[:1], k, cache)


def test_names(checked, small_case):
    config = checked.config.ModelConfig.from_hf(small_case.config.to_hf())
    written = checked.names.to_hf(small_case.params, config)
    params = checked.names.from_hf(written, config)
    jax.tree.map(np.testing.assert_array_equal, params, small_case.params)
    with pytest.raises(jaxtyping.TypeCheckError):
        checked.names.to_hf(small_case.params, small_case.config)
