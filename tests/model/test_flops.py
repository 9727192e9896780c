"""The formulas equal a count of what the model's own program multiplies."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

from morer1_jax.batch import FeatureBatch, VisionBatch
from morer1_jax.model import flops
from morer1_jax.model.attention import masked_attention
from morer1_jax.model.vision import VisionInputs


def products(jaxpr):
    """FLOPs of the products of matrices in a program, loops counted as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            ((inner, _), (rows, _)) = equation.params["dimension_numbers"]
            left, right = (v.aval.shape for v in equation.invars)
            shared = math.prod(left[axis] for axis in (*inner, *rows))
            total += 2 * math.prod(left) * math.prod(right) // shared
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        total += times * sum(products(inner) for inner in jaxprs_in_params(equation.params))
    return total


def dense(q, k, v, cache):
    """Every token sees every other, so that the program leaves no pair out."""
    n = q.shape[1]
    return masked_attention(q, k, v, jnp.ones((1, n, n), bool)), cache


def test_text(case):
    n, text = 7, case.config.text
    tokens, positions = jnp.zeros((1, n), jnp.int32), jnp.zeros((3, 1, n), jnp.int32)

    def run(params):
        def all_logits(module):
            return module.logits(module.forward(module.embed(tokens), positions, dense))

        return case.model.apply({"params": params}, method=all_logits)

    counted = products(jax.make_jaxpr(run)(case.params).jaxpr)
    assert flops.text_flops(text, tokens=n, pairs=n * n, logits=n) == counted


def test_vision(case):
    """Two windows of one image, both whole, so that no slot is padding."""
    vision = case.config.vision
    p = vision.window_patches
    images = VisionInputs(
        patches=jnp.zeros((1, 2, p, vision.patch_dim)),
        positions=jnp.zeros((1, 2, p, 2), jnp.int32),
        image_ids=jnp.zeros((1, 2, p), jnp.int32),
        part_ids=jnp.zeros((1, 2, p), jnp.int32),
    )

    def run(params):
        return case.model.apply({"params": params}, images, method="encode_images")

    counted = products(jax.make_jaxpr(run)(case.params).jaxpr)
    expected = flops.vision_flops(
        vision, patches=2 * p, window_pairs=2 * p**2, image_pairs=(2 * p) ** 2
    )
    assert expected == counted


def test_a_batch_counts_its_images_and_no_padding(case):
    """Two rows: an image of 5 and 2 slots in its windows beside one of 3 slots; and no image."""
    vision = case.config.vision
    image_ids = np.array([[[0, 0, 0, 0, 0, -1], [0, 0, 1, 1, 1, -1]], np.full((2, 6), -1)])
    part_ids = np.array([[[0, 0, 0, 0, 0, -1], [1, 1, 2, 2, 2, -1]], np.full((2, 6), -1)])
    patches = np.zeros((2, 2, 6, vision.frame_dim), np.uint8)
    positions, statistic = np.zeros((2, 2, 6, 2), np.int32), np.ones((2, 3), np.float32)
    images = VisionBatch(patches, positions, image_ids, part_ids, statistic, statistic)
    expected = flops.vision_flops(vision, patches=10, window_pairs=25 + 4 + 9, image_pairs=49 + 9)
    assert flops.batch_vision_flops(vision, images) == expected
    assert flops.batch_vision_flops(vision, FeatureBatch(np.zeros((2, 3, 4)))) == 0


def test_a_row_counts_its_padding(case):
    """A row of whole windows, but for logits, the merger and the pairs within windows."""
    config, n, slots = case.config, 12, 3
    text, vision = config.text, config.vision
    patches = slots * vision.window_patches
    attention = flops.vision_flops(vision, 0, window_pairs=0, image_pairs=patches**2)
    assert flops.row_flops(config, n, slots) == (
        flops.text_flops(text, tokens=n, pairs=n * n / 2, logits=0)
        + patches * flops.patch_flops(vision)
        + attention
    )


def test_known_sizes():
    """Of the published 3B: 2 FLOPs a parameter of its linear maps."""
    text = flops.TextConfig(
        vocab_size=151_936,
        hidden_size=2048,
        intermediate_size=11_008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        mrope_section=(16, 24, 24),
    )
    np.testing.assert_allclose(flops.linear_flops(text), 2 * 2.774e9, rtol=1e-3)
