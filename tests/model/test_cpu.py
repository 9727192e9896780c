"""What works around XLA on a CPU gives the same numbers, and there the program it is meant to."""

import jax
import jax.numpy as jnp
import numpy as np

from morer1_jax.model.cpu import cos_sin
from morer1_jax.model.rotary import rotate


def draw(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


def test_angles_are_computed_once():
    """However many layers turn by them; XLA on a CPU is tempted to do it for each head of each."""
    x, angles = draw(2, 8, 4, 16), draw(2, 8, 8)

    def run(x, angles):
        rotary = cos_sin(angles)
        for _ in range(4):
            x = rotate(x @ jnp.ones((16, 16)), rotary)
        return x

    assert jax.jit(run).lower(x, angles).compile().as_text().count(" cosine(") == 1
    cos, sin = jax.jit(cos_sin)(angles)
    np.testing.assert_allclose(cos, np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(sin, np.sin(angles), atol=1e-6)


def test_cos_sin_of_nothing():
    """As of a batch without photos."""
    cos, sin = jax.jit(cos_sin)(jnp.zeros((1, 0, 4, 8)))
    assert cos.shape == sin.shape == (1, 0, 4, 8)
