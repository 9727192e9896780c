"""What works around XLA on a CPU gives the same numbers, and there the program it is meant to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from morer1_jax.model.cpu import cos_sin, linear_product
from morer1_jax.model.layers import rotate


def draw(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize(
    ("x", "kernel", "axes"),
    [((5, 3), (3, 4), 1), ((2, 5, 3), (3, 2, 4), 1), ((2, 5, 3, 2), (3, 2, 4), 2)],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_of_a_linear_product_is_jaxs_own(x, kernel, axes, dtype):
    x, kernel = draw(*x).astype(dtype), draw(*kernel).astype(dtype)
    dims = ((tuple(range(x.ndim - axes, x.ndim)), tuple(range(axes))), ((), ()))

    def gradients(product):
        def value(x, kernel):
            return jnp.sum(jnp.sin(product(x, kernel, dims).astype(jnp.float32)))

        return jax.value_and_grad(value, (0, 1))(x, kernel)

    ours, theirs = gradients(linear_product), gradients(jax.lax.dot_general)
    bound = 1e-5 if dtype == "float32" else 2e-2
    for got, wanted in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert got.dtype == wanted.dtype
        got, wanted = np.asarray(got, np.float32), np.asarray(wanted, np.float32)
        np.testing.assert_allclose(got, wanted, atol=bound * np.abs(wanted).max())


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
