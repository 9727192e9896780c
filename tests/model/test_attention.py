"""Every pattern, by every kernel, equals plain attention under the dense mask it stands for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from morer1_jax.model.attention import XLA, PackedCausal, SharedPrefix
from morer1_jax.model.cudnn import CuDNN
from morer1_jax.model.splash import Splash

HEADS, KV_HEADS, SIZE = 6, 3, 4
KERNELS = {"xla": XLA(), "splash": Splash(interpret=True), "cudnn": CuDNN("xla")}


@pytest.fixture(params=KERNELS)
def kernels(request):
    return KERNELS[request.param]


def plain(q, k, v, visible):
    """Attention one query head at a time, keys repeated, hidden places dropped exactly."""
    repeat = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, repeat, axis=2), jnp.repeat(v, repeat, axis=2)
    scores = jnp.einsum("bshd,buhd->bhsu", q, k) / np.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhsu,buhd->bshd", weights, v)


def draw(rows, length, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(rows, length, heads, SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


@functools.cache
def by_pattern():
    """Compiled `(qkv, pattern, weights) -> (gradients of the weighted sum by qkv, output)`."""

    def value(qkv, pattern, weights):
        out, cache = pattern(*qkv, None)
        assert cache is None
        return jnp.sum(out * weights), out

    return jax.jit(jax.grad(value, has_aux=True))


@functools.cache
def by_mask():
    """The same of plain attention: `(qkv, visible, weights)`."""

    def value(qkv, visible, weights):
        out = plain(*qkv, visible)
        return jnp.sum(out * weights), out

    return jax.jit(jax.grad(value, has_aux=True))


def assert_same_values_and_gradients(pattern, qkv, visible, counted):
    """Of the outputs at the places that count, and of a random linear function of them."""
    weights = np.random.default_rng(9).standard_normal(qkv[0].shape) * counted[..., None, None]
    ours, out = by_pattern()(qkv, pattern, weights)
    # Places that do not count may see all: NaN there would spoil the gradients elsewhere.
    theirs, expected = by_mask()(qkv, visible | ~counted[..., None], weights)
    out, expected = np.asarray(out), np.asarray(expected)
    np.testing.assert_allclose(out[counted], expected[counted], atol=2e-6)
    for got, wanted in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_packed_causal(kernels):
    segments = np.array([[1, 1, 1, 2, 2, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1], [0] * 8])
    visible = (segments[:, :, None] == segments[:, None]) & np.tri(8, dtype=bool)
    pattern = PackedCausal(jnp.asarray(segments), kernels)
    assert_same_values_and_gradients(pattern, draw(3, 8), visible, segments > 0)
    # Padding is finite and sees padding only.
    assert_same_values_and_gradients(pattern, draw(3, 8), visible, segments == 0)


def test_packed_causal_of_many_blocks(kernels):
    """Longer than a kernel's block and no multiple of it; a segment ends within a block."""
    segments = np.repeat([[1, 2, 0], [1, 1, 2]], [190, 100, 10], axis=1)
    visible = (segments[:, :, None] == segments[:, None]) & np.tri(300, dtype=bool)
    pattern = PackedCausal(jnp.asarray(segments), kernels)
    assert_same_values_and_gradients(pattern, draw(2, 300), visible, segments > 0)


def test_full(kernels):
    """Images in a row, each seen whole by its own patches; -1 is padding."""
    images = np.repeat([[0, 1, -1], [0, 0, 1]], [70, 80, 10], axis=1)
    visible = images[:, :, None] == images[:, None]

    def pattern(q, k, v, cache):
        return kernels.full(q, k, v, jnp.asarray(images)), cache

    pattern = jax.tree_util.Partial(pattern)
    assert_same_values_and_gradients(pattern, draw(2, 160), visible, images >= 0)


PROMPTS = {
    "whole": np.array([[1, 1, 1, 1, 1]] * 2),
    "padded on the right": np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]),
    "padded on the left": np.array([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]]),
}


@pytest.mark.parametrize("prompt", PROMPTS)
def test_shared_prefix(prompt, kernels):
    """Completions of unequal length, one of them empty, against the dense (s+gt)² mask."""
    prompt = PROMPTS[prompt].astype(bool)
    lengths = np.array([[4, 2, 0], [1, 4, 3]])
    completion = np.arange(4) < lengths[..., None]
    valid = np.concatenate([prompt, completion.reshape(2, -1)], axis=1)
    owner = np.repeat([0, 1, 2, 3], [5, 4, 4, 4])
    mine = (owner[:, None] == owner) | (owner == 0)
    visible = mine & np.tri(17, dtype=bool) & valid[:, None]
    pattern = SharedPrefix(jnp.asarray(prompt), jnp.asarray(completion), kernels)
    assert_same_values_and_gradients(pattern, draw(2, 17), visible, valid)
    assert np.isfinite(by_pattern()(draw(2, 17), pattern, np.ones((2, 17, HEADS, SIZE)))[1]).all()


def test_shared_prefix_of_many_blocks(kernels):
    """The prompt and the completions begin and end within blocks."""
    prompt = np.arange(150) < np.array([[150], [90]])
    completion = np.arange(60) < np.array([[60, 0, 31], [1, 59, 60]])[..., None]
    valid = np.concatenate([prompt, completion.reshape(2, -1)], axis=1)
    owner = np.repeat([0, 1, 2, 3], [150, 60, 60, 60])
    mine = (owner[:, None] == owner) | (owner == 0)
    visible = mine & np.tri(330, dtype=bool) & valid[:, None]
    pattern = SharedPrefix(jnp.asarray(prompt), jnp.asarray(completion), kernels)
    assert_same_values_and_gradients(pattern, draw(2, 330), visible, valid)


def test_shared_prefix_without_any_valid_token_is_finite(kernels):
    pattern = SharedPrefix(jnp.zeros((1, 3), bool), jnp.zeros((1, 2, 2), bool), kernels)
    gradients, _ = by_pattern()(draw(1, 7), pattern, 1.0)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_half_precision_keeps_softmax_in_float32(kernels):
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in draw(1, 300))
    pattern = PackedCausal(jnp.ones((1, 300), jnp.int32), kernels)
    out, _ = jax.jit(lambda *qkv: pattern(*qkv, None))(q * 0, k, jnp.ones_like(v))
    # 300 equal weights; a bfloat16 sum of them would be far from 1.
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), 1, atol=4e-3)
