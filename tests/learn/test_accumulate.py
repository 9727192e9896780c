"""Sums over micro-batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from morer1_jax.learn.accumulate import accumulate, add

BATCH = {"x": jnp.arange(24.0).reshape(8, 3), "empty": jnp.zeros((8, 0, 2)), "none": None}


def sums(part):
    return {"rows": jnp.float32(part["x"].shape[0]), "x": jnp.sum(part["x"] ** 2, axis=0)}


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_parts_sum_to_the_whole(parts):
    total = accumulate(sums, BATCH, parts)
    np.testing.assert_allclose(total["x"], np.sum(np.arange(24.0).reshape(8, 3) ** 2, axis=0))
    assert total["rows"] == 8


def test_a_part_takes_rows_from_all_over_the_batch():
    """With rows split over devices in order, every device has work in every part."""
    mine = []
    accumulate(
        lambda part: jax.debug.callback(mine.append, part["x"][:, 0], ordered=True) or sums(part),
        BATCH,
        2,
    )
    jax.effects_barrier()
    np.testing.assert_array_equal(mine, [[0, 6, 12, 18], [3, 9, 15, 21]])


def test_parts_may_be_joined_otherwise():
    def combine(total, part):
        return add(total, part) | {"x": jnp.maximum(total["x"], part["x"])}

    total = accumulate(lambda part: sums(part) | {"x": part["x"].max(0)}, BATCH, 4, combine)
    assert total["rows"] == 8
    np.testing.assert_array_equal(total["x"], [21, 22, 23])


@pytest.mark.parametrize("parts", [0, 3, 16, -1])
def test_parts_must_divide_the_batch(parts):
    with pytest.raises(ValueError, match=f"parts: expected .* 8 rows, found {parts}"):
        accumulate(sums, BATCH, parts)
