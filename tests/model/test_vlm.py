"""The verbs agree with each other: one forward pass, whatever it is used for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from morer1_jax.model.attention import PackedCausal, SharedPrefix
from morer1_jax.model.config import Runtime
from morer1_jax.model.decoding import init_cache, separate_layers
from morer1_jax.model.vlm import Qwen25VL, init_params


def verb(case, name, *args, params=None, **kwargs):
    return case.model.apply({"params": params or case.params}, *args, method=name, **kwargs)


@functools.cache
def compiled(model):
    """Compiled `(params, arguments) -> hidden states`."""
    return jax.jit(lambda params, arguments: model.apply({"params": params}, *arguments))


def hidden_states(case, rows, **changes):
    arguments = dataclasses.replace(rows, **changes).arguments()
    return np.asarray(compiled(case.model)(case.params, arguments))


def test_amount_and_side_of_padding_change_nothing(small_case, rows_of):
    """Not even on the left, where a row's samples then start later."""
    place = [[3, 0], [1, 2]]
    short, long = (
        rows_of(small_case.config, small_case.samples, place, extra=extra) for extra in (0, 9)
    )
    expected = hidden_states(small_case, short)[short.segment_ids > 0]
    right = hidden_states(small_case, long)
    np.testing.assert_allclose(right[long.segment_ids > 0], expected, atol=2e-5)
    shifted = {
        name: np.roll(getattr(long, name), 9, axis=-1)
        for name in ("tokens", "positions", "segment_ids", "vision_index")
    }
    left = hidden_states(small_case, long, **shifted)
    np.testing.assert_allclose(left[shifted["segment_ids"] > 0], expected, atol=2e-5)


def test_exchanged_images_change_the_result(small_case, rows_of):
    """Also of two images with one grid, where nothing but the pixels tells them apart."""
    sample = small_case.samples[1]
    patches = np.concatenate([sample.patches, -sample.patches])
    twice = dataclasses.replace(
        sample,
        tokens=np.concatenate([sample.tokens, sample.tokens]),
        grids=sample.grids * 2,
        patches=patches,
    )
    exchanged = dataclasses.replace(twice, patches=np.roll(patches, len(patches) // 2, axis=0))
    one, other = (
        hidden_states(small_case, rows_of(small_case.config, [s], [[0]]))
        for s in (twice, exchanged)
    )
    text = np.flatnonzero(twice.tokens != small_case.config.image_token_id)
    after = text[text > len(sample.tokens)]
    assert np.abs(one - other)[0, after].max(-1).min() > 0.01
    # Text before the first image cannot tell.
    np.testing.assert_allclose(one[0, :5], other[0, :5], atol=1e-6)


@pytest.fixture(scope="module")
def group(small_case, rows_of):
    """Two prompts with images, padded, and three completions each, one of them empty."""
    prompts = rows_of(small_case.config, small_case.samples, [[1], [2]])
    lengths = np.array([[4, 2, 0], [1, 4, 3]])
    tokens = np.random.default_rng(3).integers(0, 91, (2, 3, 4))
    valid = prompts.segment_ids == 1
    following = np.where(valid, prompts.positions.max(0), -1).max(1) + 1
    return prompts, valid, tokens, np.arange(4) < lengths[..., None], following


def together(case, params, group):
    """Hidden states [b g t d] of the completions beside their shared prompt."""
    prompts, valid, tokens, mask, following = group
    b, g, t = tokens.shape
    images = verb(case, "encode_images", prompts.images, params=params)
    index = np.pad(prompts.vision_index, ((0, 0), (0, g * t)), constant_values=-1)
    row = np.concatenate([prompts.tokens, tokens.reshape(b, -1)], axis=1)
    x = verb(case, "embed", row, images, index, params=params)
    own = following[:, None] + np.tile(np.arange(t), g)
    positions = np.concatenate([prompts.positions, np.broadcast_to(own, (3, b, g * t))], axis=2)
    attend = SharedPrefix(jnp.asarray(valid), jnp.asarray(mask))
    hidden = verb(case, "forward", x, positions, attend, params=params)
    return hidden[:, -g * t :].reshape(b, g, t, -1)


def separately(case, params, group):
    """The same from b·g rows of [prompt | completion], the prompt run for each."""
    prompts, valid, tokens, mask, following = group
    b, g, t = tokens.shape
    images, index, ids, valid, following, starts = jax.tree.map(
        lambda leaf: np.repeat(leaf, g, axis=0),
        (prompts.images, prompts.vision_index, prompts.tokens, valid, following,
         np.moveaxis(prompts.positions, 1, 0)),
    )  # fmt: skip
    images = verb(case, "encode_images", images, params=params)
    index = np.pad(index, ((0, 0), (0, t)), constant_values=-1)
    row = np.concatenate([ids, tokens.reshape(b * g, t)], axis=1)
    x = verb(case, "embed", row, images, index, params=params)
    own = np.broadcast_to(following[:, None] + np.arange(t), (3, b * g, t))
    positions = np.concatenate([np.moveaxis(starts, 0, 1), own], axis=2)
    segments = np.concatenate([valid, mask.reshape(b * g, t)], axis=1).astype(np.int32)
    hidden = verb(case, "forward", x, positions, PackedCausal(segments), params=params)
    return hidden[:, -t:].reshape(b, g, t, -1)


@pytest.fixture(scope="module")
def of_group(small_case, group):
    """`of_group(way)`: hidden states, and the gradient of a linear function of those that count."""
    mask = group[3]
    weights = np.random.default_rng(4).standard_normal((*mask.shape, 24)) * mask[..., None]

    @functools.cache
    def run(way):
        def value(params):
            hidden = way(small_case, params, group)
            return jnp.sum(hidden * weights), hidden

        gradient, hidden = jax.jit(jax.grad(value, has_aux=True))(small_case.params)
        return np.asarray(hidden), gradient

    return run


def test_shared_prefix_equals_each_sequence_by_itself(group, of_group):
    """In value, and in the gradient of every parameter, the vision tower's too."""
    mask = group[3]
    (hidden, gradient), (expected, expected_gradient) = map(of_group, (together, separately))
    np.testing.assert_allclose(hidden[mask], expected[mask], atol=2e-5)
    for got, wanted in zip(*map(jax.tree.leaves, (gradient, expected_gradient)), strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-5 * float(np.abs(wanted).max()))


def test_decode_equals_forward(small_case, group, of_group):
    """Layers in a loop, and one after the other."""
    prompts, valid, tokens, mask, following = group
    case = small_case

    @jax.jit
    def decode_all(params):
        images = verb(case, "encode_images", prompts.images, params=params)
        x = verb(case, "embed", prompts.tokens, images, prompts.vision_index, params=params)
        attend = PackedCausal(jnp.asarray(valid.astype(np.int32)))

        def decode(unroll):
            apart = separate_layers(params) if unroll else params
            _, kv = verb(case, "forward", x, prompts.positions, attend, keep_kv=True, params=apart)
            assert isinstance(kv[0], tuple) == unroll
            cache = init_cache(kv, jnp.asarray(valid), group=3, length=6)

            def step(cache, t):
                x = verb(case, "embed", jnp.asarray(tokens)[:, :, t], params=params)
                positions = jnp.broadcast_to(following[:, None] + t, tokens.shape[:2])
                hidden, cache = verb(case, "decode", x, positions, cache, params=apart)
                return cache, hidden

            cache, hidden = jax.lax.scan(step, cache, jnp.arange(4))
            return cache.index, jnp.moveaxis(hidden, 0, 2)

        return [decode(unroll) for unroll in (False, True)]

    expected, _ = of_group(together)
    for index, hidden in decode_all(case.params):
        np.testing.assert_allclose(np.asarray(hidden)[mask], expected[mask], atol=2e-5)
        assert int(index) == 4


def test_bfloat16(small_case, rows_of):
    runtime = Runtime(param_dtype="bfloat16", dtype="bfloat16")
    params = jax.tree.map(lambda leaf: np.asarray(leaf, jnp.bfloat16), small_case.params)
    half = dataclasses.replace(
        small_case, model=Qwen25VL(small_case.config, runtime), params=params
    )
    rows = rows_of(small_case.config, small_case.samples, [[3, 0], [1, 2]], extra=0)
    hidden = compiled(half.model)(params, rows.arguments())
    assert hidden.dtype == jnp.bfloat16
    valid = rows.segment_ids > 0
    exact = hidden_states(small_case, rows)[valid]
    error = np.linalg.norm(np.asarray(hidden, np.float32)[valid] - exact) / np.linalg.norm(exact)
    assert error < 0.1

    @jax.jit
    def numbers(params, hidden):
        return verb(half, "logprobs", hidden, rows.tokens, params=params), verb(
            half, "logits", hidden, params=params
        )

    assert {x.dtype for x in jax.tree.leaves(numbers(params, hidden))} == {jnp.dtype("float32")}


def test_initialisation(small_case):
    model = Qwen25VL(small_case.config, Runtime(param_dtype="bfloat16"))
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    drawn = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        assert leaf.dtype == jnp.bfloat16
        if path[-1].key in ("bias", "scale"):
            np.testing.assert_array_equal(leaf, float(path[-1].key == "scale"))
        else:
            drawn.append(np.asarray(leaf, np.float32).ravel())
            assert 0.7 < drawn[-1].std() / 0.02 < 1.3
    kernel = params["language"]["layers"]["q"]["kernel"]
    assert not np.array_equal(kernel[0], kernel[1])
