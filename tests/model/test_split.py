"""Kernels over a mesh compute what one device computes, each device its own part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from morer1_jax.model.attention import XLA
from morer1_jax.model.cudnn import CuDNN
from morer1_jax.model.splash import Splash
from morer1_jax.model.split import Split

ROWS = ("data", "fsdp")
B, S, H, K, E = 4, 40, 4, 2, 8


@pytest.mark.parametrize("kernels", [Splash(interpret=True), CuDNN("xla")], ids=["splash", "cudnn"])
@pytest.mark.parametrize("pattern", ["causal", "shared_prefix"])
@pytest.mark.parametrize(
    ("axes", "split", "part"),
    [
        ({"data": 2, "fsdp": 2, "tensor": 2}, P(ROWS, None, "tensor"), (1, H // 2, K // 2)),
        ({"data": 1, "fsdp": 2, "tensor": 4}, P(ROWS), (B // 2, 1, 1)),
        ({"data": 1, "fsdp": 1, "tensor": 8}, P(), (B, H, K)),
        ({"data": 8, "fsdp": 1, "tensor": 1}, P(), (B, H, K)),
    ],
    ids=["rows and heads", "repeated heads", "more devices than heads", "more devices than rows"],
)
def test_a_mesh_changes_nothing(tiny, axes, split, part, pattern, kernels):
    """Values and gradients where rows and heads lie on devices, and where they do not divide."""
    mesh = tiny.mesh(**axes)
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((B, S, heads, E)).astype(np.float32) for heads in (H, K, K)]
    weights = rng.standard_normal(arrays[0].shape).astype(np.float32)
    given = [np.sort(rng.integers(1, 4, (B, S)), axis=1)]
    if pattern == "shared_prefix":
        given = [np.ones((B, 16), bool), np.ones((B, 3, 8), bool)]
    seen = []

    class Watched:
        """Notes what shapes a device works on."""

        def __getattr__(self, name):
            def run(q, k, *rest):
                seen.append((q.shape[0], q.shape[2], k.shape[2]))
                return getattr(kernels, name)(q, k, *rest)

            return run

    def run(kernels, arrays, given):
        def total(arrays):
            out = getattr(kernels, pattern)(*arrays, *given)
            return jnp.sum(out * weights), out

        return jax.grad(total, has_aux=True)(arrays)

    placed = jax.device_put(arrays, NamedSharding(mesh, split))
    run = jax.jit(run, static_argnums=0)
    ours = run(Split(Watched(), mesh, ROWS, "tensor"), placed, given)
    assert set(seen) == {part}
    expected = run(XLA(), arrays, given)
    for got, wanted in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_axes_that_a_mesh_does_not_have_split_nothing(tiny):
    mesh = tiny.mesh(data=8, fsdp=1, tensor=1)
    q, k = (jnp.ones((8, 4, heads, 8)) for heads in (2, 1))
    out = Split(XLA(), mesh, ("data",), None).causal(q, k, k, jnp.ones((8, 4), jnp.int32))
    np.testing.assert_allclose(out, 1.0)
