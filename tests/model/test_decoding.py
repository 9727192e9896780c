"""A token at a time equals whole sequences, and the cache is written where it should be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from morer1_jax.model.attention import SharedPrefix
from morer1_jax.model.decoding import Cached, LayerKV, init_cache, separate_layers

HEADS, KV_HEADS, SIZE = 6, 3, 4
LAYERS, B, G, S, T = 2, 2, 3, 4, 5


def draw(seed):
    rng = np.random.default_rng(seed)
    shapes = [(B, S + G * T, heads, SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def own(x):
    return x[:, S:].reshape(B, G, T, -1, SIZE)


@pytest.mark.parametrize("stacked", [True, False])
def test_cached_equals_shared_prefix_token_by_token(stacked):
    """At each of two layers, whose keys must not mix, in a cache that grows on the way."""
    prompt = np.array([[1, 1, 1, 0], [1, 1, 1, 1]], bool)
    shared = SharedPrefix(jnp.asarray(prompt), jnp.ones((B, G, T), bool))
    rows = [draw(seed) for seed in range(LAYERS)]
    expected = [own(shared(*row, None)[0]) for row in rows]
    apart = tuple((row[1][:, :S], row[2][:, :S]) for row in rows)
    prompt_kv = tuple(map(jnp.stack, zip(*apart, strict=True))) if stacked else apart
    cache = init_cache(prompt_kv, jnp.asarray(prompt), group=G, length=3)
    step = jax.jit(lambda attend, *inputs: attend(*inputs))
    for index in range(T):
        if index == 3:
            cache = cache.grown(T + 2)
        attend = Cached(cache.prompt_mask, jnp.asarray(index))
        layers = [] if stacked else list(cache.layers)
        held = cache.layers.replace(layer=jnp.zeros((), jnp.int32)) if stacked else None
        for layer, row in enumerate(rows):
            q, k, v = (own(x)[:, :, index] for x in row)
            if stacked:
                out, held = step(attend, q, k, v, held)
            else:
                out, layers[layer] = step(attend, q, k, v, layers[layer])
            np.testing.assert_allclose(out, expected[layer][:, :, index], atol=2e-6)
        if stacked:
            assert int(held.layer) == LAYERS
        cache = cache.replace(layers=held if stacked else tuple(layers))
    for held in [cache.layers] if stacked else cache.layers:
        np.testing.assert_array_equal(held.k[..., T:], 0.0)
        np.testing.assert_array_equal(held.v[..., T:, :], 0.0)


def test_what_is_beyond_the_index_is_not_seen():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((B, G, h, SIZE)), jnp.float32) for h in (6, 3))
    prompt = jnp.asarray(rng.standard_normal((1, B, S, KV_HEADS, SIZE)), jnp.float32)
    mask = jnp.ones((B, S), bool)
    (fresh,) = init_cache(((prompt[0],) * 2,), mask, group=G, length=T).layers
    stale = fresh.replace(k=fresh.k + 7.0, v=fresh.v + 7.0)
    outs = [Cached(mask, jnp.asarray(0))(q, k, k, layer)[0] for layer in (fresh, stale)]
    np.testing.assert_array_equal(*outs)


def test_prompt_and_completion_of_half_precision_keep_softmax_in_float32():
    q = jnp.zeros((1, 1, 1, SIZE), jnp.bfloat16)
    ones = jnp.ones((1, 299, 1, SIZE), jnp.bfloat16)
    cache = init_cache(((ones, ones),), jnp.ones((1, 299), bool), group=1, length=1)
    out, _ = Cached(cache.prompt_mask, cache.index)(q, q + 1, q + 1, cache.layers[0])
    # 300 equal weights; a bfloat16 sum of them would be far from 1.
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), 1, atol=4e-3)


def test_layers_apart_are_those_that_were_stacked():
    stacked = {"q": jnp.arange(6.0).reshape(3, 2)}
    params = {"embedding": 1, "language": {"layers": stacked, "norm": 2}}
    apart = separate_layers(params)
    assert apart["embedding"] == 1
    assert sorted(apart["language"]) == ["layer_0", "layer_1", "layer_2", "norm"]
    np.testing.assert_array_equal(apart["language"]["layer_2"]["q"], [4.0, 5.0])
    assert sorted(params["language"]) == ["layers", "norm"]


def test_an_empty_cache():
    kv = (jnp.ones((2, 1, 3, 1, 4)),) * 2
    cache = init_cache(kv, jnp.ones((1, 3), bool), group=5, length=8)
    assert isinstance(cache.layers, LayerKV)
    assert cache.layers.k.shape == (2, 5, 1, 4, 8)
    assert cache.layers.v.shape == (2, 5, 1, 8, 4)
    assert int(cache.index) == 0
