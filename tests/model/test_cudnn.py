"""cuDNN's own kernel against XLA's products; its masks are in test_attention.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from morer1_jax.model.attention import XLA
from morer1_jax.model.cudnn import CuDNN


def _gpus():
    try:
        return jax.devices("cuda")
    except RuntimeError:
        return []


@pytest.mark.skipif(not _gpus(), reason="cuDNN needs an NVIDIA GPU")
@pytest.mark.parametrize("pattern", ["causal", "full", "shared_prefix"])
def test_the_same_numbers_on_a_gpu(pattern):
    """Values and gradients to what bfloat16 can hold, of odd lengths."""
    rng = np.random.default_rng(0)
    shapes = [(2, 498, heads, 128) for heads in (4, 2, 2)]
    arrays = [jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes]
    prompt = np.arange(201) < np.array([[201], [150]])
    completion = np.arange(99) < np.array([[99, 0, 50], [1, 98, 7]])[..., None]
    valid = np.concatenate([prompt, completion.reshape(2, -1)], axis=1)
    given = (prompt, completion) if pattern == "shared_prefix" else (valid.astype(np.int32),)
    weights = rng.standard_normal(shapes[0]) * valid[..., None, None]

    def run(kernels, arrays):
        def total(arrays):
            out = getattr(kernels, pattern)(*arrays, *map(jnp.asarray, given))
            return jnp.sum(out * weights), jnp.where(valid[..., None, None], out, 0)

        return jax.grad(total, has_aux=True)(arrays)

    run = jax.jit(run, static_argnums=0)
    with jax.default_device(_gpus()[0]):
        ours = run(CuDNN(), arrays)
    expected = run(XLA(), [x.astype(jnp.float32) for x in arrays])
    for got, wanted in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        got, wanted = np.asarray(got, np.float32), np.asarray(wanted)
        np.testing.assert_allclose(got, wanted, atol=2e-2 * np.abs(wanted).max())
