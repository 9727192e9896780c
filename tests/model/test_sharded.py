"""Kernels over a mesh compute what one device computes, each device its own rows and heads."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from morer1_jax.model.attention import XLA
from morer1_jax.model.config import Runtime
from morer1_jax.model.cudnn import CuDNN
from morer1_jax.model.sharded import ShardedKernels, in_copy
from morer1_jax.model.sharding import Layout
from morer1_jax.model.splash import Splash

ROWS = ("data", "fsdp")
B, S, H, K, E = 4, 40, 4, 2, 8


KERNELS = {"splash": Splash(interpret=True), "cudnn": CuDNN("xla")}
MESHES = {
    "rows and heads": (
        {"data": 2, "fsdp": 2, "tensor": 2},
        P(ROWS, None, "tensor"),
        (1, H // 2, K // 2),
    ),
    "repeated heads": ({"data": 1, "fsdp": 2, "tensor": 4}, P(ROWS), (B // 2, 1, 1)),
}
# Daily each pair of a mesh, a pattern and a kernel.
DAILY = (
    ("rows and heads", "causal", "splash"),
    ("rows and heads", "shared_prefix", "cudnn"),
    ("repeated heads", "causal", "cudnn"),
    ("repeated heads", "shared_prefix", "splash"),
)


def numbers(pattern):
    """Queries, keys and values; what else the pattern is given; the weights of a sum."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((B, S, heads, E)).astype(np.float32) for heads in (H, K, K)]
    weights = rng.standard_normal(arrays[0].shape).astype(np.float32)
    given = [np.sort(rng.integers(1, 4, (B, S)), axis=1)]
    if pattern == "shared_prefix":
        given = [np.ones((B, 16), bool), np.ones((B, 3, 8), bool)]
    return arrays, given, weights


def value_and_gradients(kernels, pattern, arrays, layout):
    _, given, weights = numbers(pattern)

    def total(arrays):
        out = getattr(kernels, pattern)(*layout.heads(*arrays), *given)
        return jnp.sum(out * weights), out

    return jax.jit(jax.grad(total, has_aux=True))(arrays)


@functools.cache
def expected(pattern):
    return value_and_gradients(XLA(), pattern, numbers(pattern)[0], Layout())


@pytest.mark.parametrize(
    ("axes", "pattern", "kernels"),
    [
        pytest.param(*case, marks=() if case in DAILY else pytest.mark.soak, id="-".join(case))
        for case in itertools.product(MESHES, ("causal", "shared_prefix"), KERNELS)
    ],
)
def test_a_mesh_changes_nothing(tiny, axes, pattern, kernels):
    """Values and gradients, also where key-value heads are repeated."""
    (axes, split, part), kernels = MESHES[axes], KERNELS[kernels]
    mesh = tiny.mesh(**axes)
    seen = []

    class Watched:
        """Notes what shapes a device works on."""

        def __getattr__(self, name):
            def run(q, k, *rest):
                seen.append((q.shape[0], q.shape[2], k.shape[2]))
                return getattr(kernels, name)(q, k, *rest)

            return run

    placed = jax.device_put(numbers(pattern)[0], NamedSharding(mesh, split))
    sharded = ShardedKernels(Watched(), Layout(mesh))
    ours = value_and_gradients(sharded, pattern, placed, Layout(mesh))
    assert set(seen) == {part}
    for got, wanted in zip(*map(jax.tree.leaves, (ours, expected(pattern))), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_axes_that_a_mesh_does_not_have_split_nothing(tiny):
    mesh = tiny.mesh(data=8, fsdp=1, tensor=1)
    q, k = (jnp.ones((8, 4, heads, 8)) for heads in (2, 1))
    kernels = ShardedKernels(XLA(), Layout(mesh))
    out = jax.jit(kernels.causal)(q, k, k, jnp.ones((8, 4), jnp.int32))
    np.testing.assert_allclose(out, 1.0)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("pattern", ["causal", "shared_prefix"])
def test_each_copy_of_the_parameters_by_itself_changes_nothing(tiny, pattern, kernels):
    """Values and gradients where a copy's devices see its own rows alone, as in training."""
    layout = Layout(tiny.mesh(data=2, fsdp=2, tensor=2))
    own = in_copy(Runtime(kernels=ShardedKernels(KERNELS[kernels], layout), layout=layout))
    arrays, given, weights = numbers(pattern)

    def of_copy(batch):
        arrays, given, weights = batch

        def total(arrays):
            out = getattr(own.kernels, pattern)(*own.layout.heads(*arrays), *given)
            return jnp.sum(out * weights), out

        return jax.grad(total, has_aux=True)(arrays)

    ours = jax.jit(functools.partial(layout.on_copies, of_copy))((arrays, given, weights))
    for got, wanted in zip(*map(jax.tree.leaves, (ours, expected(pattern))), strict=True):
        np.testing.assert_allclose(np.reshape(got, wanted.shape), wanted, atol=1e-5)
