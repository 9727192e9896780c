"""Sums over micro-batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from morer1_jax.learn.accumulate import accumulate, add

WEIGHTS = {"w": jnp.zeros((3, 2))}
BATCH = {"x": jnp.arange(24.0).reshape(8, 3), "empty": jnp.zeros((8, 0, 2)), "none": None}


def sums(part, total):
    """A sum of the weights' shape, added to its total, and two for the metrics."""
    own = {"w": jnp.stack([jnp.sum(part["x"], axis=0)] * 2, axis=1)}
    metrics = {"rows": jnp.float32(part["x"].shape[0]), "x": jnp.sum(part["x"] ** 2, axis=0)}
    return own if total is None else add(total, own), metrics


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_parts_sum_to_the_whole(parts):
    grads, metrics = accumulate(sums, WEIGHTS, BATCH, parts)
    x = np.arange(24.0).reshape(8, 3)
    np.testing.assert_allclose(grads["w"], np.stack([np.sum(x, axis=0)] * 2, axis=1))
    np.testing.assert_allclose(metrics["x"], np.sum(x**2, axis=0))
    assert metrics["rows"] == 8


def test_a_part_takes_rows_from_all_over_the_batch():
    """With rows split over devices in order, every device has work in every part."""
    mine = []

    def seen(part, total):
        jax.debug.callback(mine.append, part["x"][:, 0], ordered=True)
        return sums(part, total)

    accumulate(seen, WEIGHTS, BATCH, 2)
    jax.effects_barrier()
    np.testing.assert_array_equal(mine, [[0, 6, 12, 18], [3, 9, 15, 21]])


def test_parts_may_be_joined_otherwise():
    def combine(total, part):
        return add(total, part) | {"x": jnp.maximum(total["x"], part["x"])}

    def largest(part, total):
        grads, metrics = sums(part, total)
        return grads, metrics | {"x": part["x"].max(0)}

    _, metrics = accumulate(largest, WEIGHTS, BATCH, 4, combine)
    assert metrics["rows"] == 8
    np.testing.assert_array_equal(metrics["x"], [21, 22, 23])


@pytest.mark.parametrize("parts", [0, 3, 16, -1])
def test_parts_must_divide_the_batch(parts):
    with pytest.raises(ValueError, match=f"parts: expected .* 8 rows, found {parts}"):
        accumulate(sums, WEIGHTS, BATCH, parts)
