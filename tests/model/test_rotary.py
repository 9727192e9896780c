"""Rotation of queries and keys by their positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from morer1_jax.model.rotary import rotate, rotate_by_product


def draw(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


def test_rotate_turns_pairs_by_their_angle():
    x = draw(2, 3, 4, 6)
    angles = draw(2, 3, 3)
    turned = rotate(x, (jnp.cos(angles), jnp.sin(angles)))
    pairs = np.asarray(x[..., :3] + 1j * x[..., 3:]) * np.exp(1j * np.asarray(angles))[:, :, None]
    np.testing.assert_allclose(turned[..., :3], pairs.real, atol=1e-6)
    np.testing.assert_allclose(turned[..., 3:], pairs.imag, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rotation_by_a_product_is_that_by_halves(dtype):
    """Bit for bit but for a fused multiplication, and so are gradients."""
    x, angles = draw(2, 3, 4, 6).astype(dtype), draw(2, 3, 3)
    rotary = jnp.cos(angles), jnp.sin(angles)
    by_halves = rotate(x, rotary)
    assert by_halves.dtype == x.dtype
    near = {"atol": 1e-6 if dtype == "float32" else 2e-2}
    as_float = lambda x: np.asarray(x, np.float32)  # noqa: E731
    by_product = rotate_by_product(x, rotary)
    np.testing.assert_allclose(as_float(by_product), as_float(by_halves), **near)
    pulled = [
        jax.vjp(lambda x, turn=turn: turn(x, rotary), x)[1](2 * x)[0]
        for turn in (rotate_by_product, rotate)
    ]
    np.testing.assert_allclose(*map(as_float, pulled), **near)
