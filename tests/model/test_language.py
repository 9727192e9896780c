import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from morer1_jax.model.attention import PackedCausal
from morer1_jax.model.config import Runtime, TextConfig
from morer1_jax.model.decoding import Cached, init_cache
from morer1_jax.model.language import Decoder, multimodal_rotary


def test_each_frequency_follows_its_axis(small_case):
    positions = jnp.array([[[2]], [[30]], [[400]]])
    cos, sin = multimodal_rotary(positions, small_case.config.text)
    # Sections (1, 1, 2) of the four frequencies 10000^(-i/4).
    angles = np.array([2, 30 / 10, 400 / 100, 400 / 1000])
    np.testing.assert_allclose(cos[0, 0], np.cos(angles), atol=1e-5)
    np.testing.assert_allclose(sin[0, 0], np.sin(angles), atol=1e-5)


def inputs(config, length=9):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, length, config.hidden_size)), jnp.float32)
    positions = jnp.asarray(rng.integers(0, 20, (3, 2, length)), jnp.int32)
    return x, positions, PackedCausal(jnp.ones((2, length), jnp.int32))


def value_and_gradient(case, runtime):
    """Of a fixed linear function of the hidden states, in all parameters of the decoder."""
    x, positions, attend = inputs(case.config.text)
    decoder = Decoder(case.config.text, runtime)
    weights = np.random.default_rng(1).standard_normal(x.shape)

    def value(params):
        return jnp.sum(decoder.apply({"params": params}, x, positions, attend)[0] * weights)

    step = jax.value_and_grad(value)
    params = case.params["language"]
    return str(jax.make_jaxpr(step)(params)), jax.jit(step)(params)


@pytest.mark.parametrize(
    ("runtime", "rematerialises"),
    [
        (Runtime(scan_unroll=2), False),
        (Runtime(scan_unroll=99), False),
        (Runtime(remat="full"), True),
        (Runtime(remat="dots", scan_unroll=99), True),
    ],
)
def test_unrolling_and_rematerialisation_change_nothing(small_case, runtime, rematerialises):
    jaxpr, (value, gradient) = value_and_gradient(small_case, runtime)
    _, (expected, expected_gradient) = value_and_gradient(small_case, Runtime())
    assert ("remat" in jaxpr or "checkpoint" in jaxpr) == rematerialises
    layers = small_case.config.text.num_hidden_layers
    unroll = min(runtime.scan_unroll, layers // 2 if rematerialises else layers)
    assert f"unroll={unroll}" in jaxpr
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for got, wanted in zip(*map(jax.tree.leaves, (gradient, expected_gradient)), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5 * float(np.abs(wanted).max()))


SIZEABLE = TextConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    mrope_section=(4, 2, 2),
    rope_theta=1e4,
)


@pytest.mark.parametrize("unroll", [1, 4])
def test_what_each_policy_keeps_and_computes_again(weighed, unroll):
    """A layer has seven products with weights, and its attention four, two to each of two blocks
    of queries. Backward each takes two more."""
    x, positions, attend = inputs(SIZEABLE, length=256)

    def weigh(remat):
        decoder = Decoder(SIZEABLE, Runtime(remat=remat, scan_unroll=unroll))
        shapes = jax.eval_shape(
            lambda key: decoder.init(key, x, positions, attend), jax.random.key(0)
        )
        params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01), shapes["params"])

        def value(params, x):
            return jnp.sum(jnp.sin(decoder.apply({"params": params}, x, positions, attend)[0]))

        return weighed(jax.value_and_grad(value), params, x)

    (products, memory, results) = zip(*map(weigh, ("none", "dots", "full")), strict=True)
    # But for the last, which nothing of the backward pass reads.
    assert products == (33, 33 + 4, 33 + 4 + 6)
    none, dots, full = memory
    assert full < dots < none
    assert full < 0.6 * none
    for got in results[1:]:
        for ours, wanted in zip(*map(jax.tree.leaves, (got, results[0])), strict=True):
            np.testing.assert_allclose(ours, wanted, atol=1e-5 * float(np.abs(wanted).max()))


@pytest.mark.parametrize(("layers", "unroll"), [(1, 1), (1, 8), (2, 1), (3, 8)])
def test_recomputed_layers_without_a_loop_are_not_merged_with_the_first(weighed, layers, unroll):
    """XLA takes a loop of one step apart; a barrier then keeps it from merging the two."""
    config = dataclasses.replace(SIZEABLE, num_hidden_layers=layers)
    x, positions, attend = inputs(config)
    decoder = Decoder(config, Runtime(remat="full", scan_unroll=unroll))
    params = jax.eval_shape(lambda key: decoder.init(key, x, positions, attend), jax.random.key(0))

    def value(params):
        return jnp.sum(decoder.apply(params, x, positions, attend)[0])

    text = jax.jit(jax.grad(value)).trace(params).lower(lowering_platforms=("tpu",)).as_text()
    assert ("optimization_barrier" in text) == (layers == 1)
    assert text.count("stablehlo.while") == 2


def test_decoding_carries_the_whole_cache(small_case):
    """No output of the scan over layers is stacked, and every layer writes its own slice."""
    text = small_case.config.text
    layers, kv = text.num_hidden_layers, (text.num_key_value_heads, text.head_dim)
    keys, mask = jnp.zeros((layers, 2, 3, *kv)), jnp.ones((2, 3), bool)
    x, positions, _ = inputs(text)
    cache = init_cache((keys, keys), mask, group=9, length=4)
    decoder = Decoder(text, Runtime())

    def step(cache):
        attend = Cached(mask, jnp.asarray(2))
        params = {"params": small_case.params["language"]}
        return decoder.apply(params, x, positions, attend, cache=cache)[1]

    scans = [e for e in jax.make_jaxpr(step)(cache.layers).eqns if e.primitive.name == "scan"]
    assert [len(scan.outvars) for scan in scans] == [scans[0].params["num_carry"]]
    after = step(cache.layers)
    assert int(after.layer) == layers
    written = np.abs(after.k).sum((1, 2, 3, 4)) > 0
    np.testing.assert_array_equal(written, np.arange(4)[None] == np.full((layers, 1), 2))
