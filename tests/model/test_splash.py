"""Splash attention over a mesh, and its static mask; its numbers are in test_attention.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from morer1_jax.model import splash
from morer1_jax.model.attention import XLA
from morer1_jax.model.splash import Splash

ROWS = ("data", "fsdp")


@pytest.mark.parametrize(
    ("axes", "split"),
    [
        ({"data": 2, "fsdp": 2, "tensor": 2}, P(ROWS, None, "tensor")),
        ({"data": 1, "fsdp": 2, "tensor": 4}, P(ROWS)),
        ({"data": 8, "fsdp": 1, "tensor": 1}, P()),
    ],
    ids=["rows and heads", "more devices than heads", "more devices than rows"],
)
def test_a_mesh_changes_nothing(tiny, axes, split):
    """Values and gradients where rows and heads lie on devices, and where they do not divide."""
    mesh = tiny.mesh(**axes)
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((4, 40, heads, 8)).astype(np.float32) for heads in (4, 2, 2)]
    weights = rng.standard_normal(arrays[0].shape).astype(np.float32)
    ids = np.sort(rng.integers(1, 4, (4, 40)), axis=1)

    def run(kernels, arrays, ids):
        def total(arrays):
            out = kernels.causal(*arrays, ids)
            return jnp.sum(out * weights), out

        return jax.grad(total, has_aux=True)(arrays)

    placed = jax.device_put(arrays, NamedSharding(mesh, split))
    run = jax.jit(run, static_argnums=0)
    ours = run(Splash(mesh, ROWS, "tensor", interpret=True), placed, ids)
    expected = run(XLA(), arrays, ids)
    for got, wanted in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("sizes", [(3, 2, 4, 16), (128, 8, 64, 640), (5, 1, 1, 6)])
def test_shared_prefix_mask(sizes):
    prompt, _, completion, length = sizes
    mask = splash._SharedPrefixMask(*sizes)
    owner = np.concatenate([np.zeros(prompt, int), 1 + np.arange(length - prompt) // completion])
    expected = (owner[:, None] == owner) | (owner == 0)
    np.testing.assert_array_equal(mask[:, :], expected & np.tri(length, dtype=bool))
    np.testing.assert_array_equal(mask[2:5, 1:4], mask[:, :][2:5, 1:4])
    assert mask == splash._SharedPrefixMask(*sizes)


def test_rows_that_the_mask_cannot_number_are_refused():
    with pytest.raises(ValueError, match="256 completions found, at most"):
        splash._SharedPrefixMask(1, 256, 1, 257)


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (1, (128, 128)),
        (300, (128, 384)),
        (512, (512, 512)),
        (1200, (256, 1280)),
        (9728, (512, 9728)),
    ],
)
def test_blocks(length, expected):
    """The largest that costs little padding."""
    assert splash._blocks(length) == expected
