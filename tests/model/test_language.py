import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from morer1_jax.model.attention import PackedCausal
from morer1_jax.model.config import LORA_TARGETS, LoRA, Runtime, TextConfig
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

    params = case.params["language"]
    traced = jax.jit(jax.value_and_grad(value)).trace(params)
    return str(traced.jaxpr), traced.lower().compile()(params)


@pytest.fixture(scope="module")
def plain(small_case):
    """`plain()`: value and gradient as they are without unrolling and rematerialisation."""
    return functools.cache(lambda: value_and_gradient(small_case, Runtime())[1])


@pytest.mark.parametrize(
    ("runtime", "rematerialises"),
    [
        (Runtime(scan_unroll=2), False),
        (Runtime(scan_unroll=99), False),
        (Runtime(remat="full"), True),
        (Runtime(remat="dots"), True),
    ],
)
def test_unrolling_and_rematerialisation_change_nothing(small_case, plain, runtime, rematerialises):
    jaxpr, (value, gradient) = value_and_gradient(small_case, runtime)
    expected, expected_gradient = plain()
    assert ("remat" in jaxpr or "checkpoint" in jaxpr) == rematerialises
    layers = small_case.config.text.num_hidden_layers
    assert f"unroll={min(runtime.scan_unroll, layers)}" in jaxpr
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for got, wanted in zip(*map(jax.tree.leaves, (gradient, expected_gradient)), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5 * float(np.abs(wanted).max()))


SIZEABLE = TextConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    mrope_section=(4, 2, 2),
    rope_theta=1e4,
)


def gradient(config, runtime, lora=None):
    """Of a function of the hidden states: the function, and those parameters and x that it is
    taken in."""
    x, positions, attend = inputs(config, length=128)
    decoder = Decoder(config, runtime, lora)
    shapes = jax.eval_shape(lambda key: decoder.init(key, x, positions, attend), jax.random.key(0))
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01), shapes["params"])

    def value(params, x):
        return jnp.sum(jnp.sin(decoder.apply({"params": params}, x, positions, attend)[0]))

    return jax.value_and_grad(value, (0, 1)), params, x


def test_what_each_policy_keeps_and_computes_again(weighed):
    """A layer has seven products with weights and two of its attention, whose queries are one
    block. Backward each takes two more. Memory is that of programs as they are run: how well
    loops are compiled does not change it."""
    jax.config.update("jax_disable_most_optimizations", False)
    (products, memory, results) = zip(
        *(weighed(*gradient(SIZEABLE, Runtime(remat=kind))) for kind in ("none", "dots", "full")),
        strict=True,
    )
    # But for the last, which nothing of the backward pass reads.
    assert products == (27, 27 + 2, 27 + 2 + 6)
    none, dots, full = memory
    # Of 28.1 MiB 8.6 and 3.9; layers that stand outside of the loop would keep all they have.
    assert full < 0.17 * none
    assert 2 * full < dots < 0.35 * none
    for got in results[1:]:
        for ours, wanted in zip(*map(jax.tree.leaves, (got, results[0])), strict=True):
            np.testing.assert_allclose(ours, wanted, atol=1e-5 * float(np.abs(wanted).max()))


def stacked(scan):
    """The shapes of what a scan puts out step by step, in place of carrying it on."""
    steps = zip(scan.outvars, scan.params["jaxpr"].out_avals, strict=True)
    return [var.aval.shape for var, each in steps if var.aval.ndim > each.ndim]


@pytest.mark.parametrize(("remat", "arrays"), [("dots", 7), ("full", 1)])
def test_an_adapted_product_is_kept_once(remat, arrays):
    """A layer keeps its input and, of linear maps, what is read again: all but the last's."""

    def kept(lora):
        function, *args = gradient(SIZEABLE, Runtime(remat=remat), lora)
        jaxpr = jax.make_jaxpr(function)(*args)
        forward = next(e for e in jaxpr.eqns if e.primitive.name == "scan")
        return stacked(forward)

    plain = kept(None)
    assert len(plain) == arrays
    assert sorted(kept(LoRA(4, 1.0, LORA_TARGETS))) == sorted(plain)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_layer_alone_is_not_merged_with_what_computes_it_again(layers):
    """XLA takes a loop of one step apart; a barrier then keeps it from merging the two."""
    config = dataclasses.replace(SIZEABLE, num_hidden_layers=layers)
    function, *args = gradient(config, Runtime(remat="full"))
    text = jax.jit(function).trace(*args).lower(lowering_platforms=("tpu",)).as_text()
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
    assert [stacked(scan) for scan in scans] == [[]]
    after = jax.jit(step)(cache.layers)
    assert int(after.layer) == layers
    written = np.abs(after.k).sum((1, 2, 3)) > 0
    np.testing.assert_array_equal(written, np.arange(4)[None] == np.full((layers, 1), 2))
