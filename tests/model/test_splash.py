"""Splash attention's static mask and its programs; its numbers are in test_attention.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from morer1_jax.model import splash
from morer1_jax.model.splash import Splash


def test_compiles_for_a_tpu():
    """Values and gradients of every pattern, in bfloat16, down to the kernels' own code."""
    shapes = [(2, 384, heads, 128) for heads in (4, 2, 2)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    ids = jax.ShapeDtypeStruct((2, 384), jnp.int32)
    masks = [jax.ShapeDtypeStruct(shape, bool) for shape in ((2, 128), (2, 4, 64))]
    kernels = Splash()
    for attend, given in (
        (kernels.causal, [ids]),
        (kernels.full, [ids]),
        (kernels.shared_prefix, masks),
    ):

        def total(arrays, given, attend=attend):
            return jnp.sum(attend(*arrays, *given).astype(jnp.float32))

        traced = jax.jit(jax.grad(total)).trace(arrays, given)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
        # Forward, and the gradients by queries and by keys and values.
        assert text.count("tpu_custom_call") >= 3


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
    with pytest.raises(ValueError, match=r"expected at most .* 255 completions, found .* 256;"):
        splash._SharedPrefixMask(1, 256, 1, 257)


@pytest.mark.parametrize(
    ("mask", "blocks"),
    [
        (splash.splash.CausalMask((1536, 1536)), (6, 9)),
        (splash.splash.FullMask((1024, 1024)), (4, 4)),
        # A prompt of one block; completions of one and a half, which end within a block.
        (splash._SharedPrefixMask(512, 2, 768, 2048), (1 + 2 + 3 + 3, 16)),
    ],
)
def test_blocks_that_a_mask_leaves(mask, blocks):
    """The kernel's name says them, from which `cost/kernels.py` counts its FLOPs."""
    assert splash._count_blocks(mask, 512) == blocks


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
