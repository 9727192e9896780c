"""Linear maps: their gradients are JAX's own, and on a mesh nothing but rounding changes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from morer1_jax.model.config import LoRA, Runtime
from morer1_jax.model.linear import Linear, linear_product
from morer1_jax.model.sharding import Layout, partition_spec
from morer1_jax.run.mesh import make_mesh


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def gradients(product, x, kernel):
    def value(x, kernel):
        return jnp.sum(jnp.sin(product(x, kernel).astype(jnp.float32)))

    return jax.jit(jax.value_and_grad(value, (0, 1)))(x, kernel)


@pytest.mark.parametrize(
    ("x", "kernel", "axes"),
    [
        ((5, 3), (3, 4), (1,)),
        ((2, 5, 3), (3, 2, 4), (2,)),
        ((2, 5, 3, 2), (3, 2, 4), (2, 3)),
        ((2, 3, 5), (3, 4), (1,)),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_is_jaxs_own(x, kernel, axes, dtype):
    x, kernel = draw(*x).astype(dtype), draw(*kernel)
    dims = ((axes, tuple(range(len(axes)))), ((), ()))
    ours = gradients(lambda x, kernel: linear_product(x, kernel, axes, Layout(), "k"), x, kernel)
    theirs = gradients(
        lambda x, kernel: jax.lax.dot_general(x, kernel.astype(x.dtype), dims), x, kernel
    )
    bound = 1e-5 if dtype == "float32" else 2e-2
    for got, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert got.dtype == expected.dtype
        got, expected = np.asarray(got, np.float32), np.asarray(expected, np.float32)
        np.testing.assert_allclose(got, expected, atol=bound * np.abs(expected).max())


def test_a_kernels_gradient_is_not_rounded_to_the_activations_dtype():
    """Against float64: bfloat16 would be off by two thousandths."""
    x, kernel = draw(64, 8).astype(jnp.bfloat16), draw(8, 4)
    gradient = jax.grad(
        lambda kernel: jnp.sum(linear_product(x, kernel, (1,), Layout(), "k").astype(jnp.float32))
    )(kernel)
    exact = np.asarray(x, np.float64).sum(0)[:, None] * np.ones((1, 4))
    assert gradient.dtype == jnp.float32
    np.testing.assert_allclose(gradient, exact, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize("path", ["down/kernel", "o/kernel", "q/kernel"])
def test_the_smaller_operand_of_a_gradient_is_transposed(path):
    """On a mesh; the gradient is the same, and split as its kernel."""
    contracted = {"o/kernel": (4, 8), "q/kernel": (32,)}.get(path, (32,))
    features = (2, 4) if path == "q/kernel" else (8,)
    x, kernel = draw(16, 40, *contracted), draw(*contracted, *features)
    axes = tuple(range(2, x.ndim))
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})

    def run(layout):
        return lambda x, kernel: linear_product(x, kernel, axes, layout, path)

    expected = gradients(run(Layout()), x, kernel)
    split = NamedSharding(mesh, partition_spec(mesh, path, kernel.shape))
    given = (
        jax.device_put(x, NamedSharding(mesh, P(("data", "fsdp")))),
        jax.device_put(kernel, split),
    )
    value, (of_x, of_kernel) = gradients(run(Layout(mesh)), *given)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    wanted = np.asarray(expected[1][1])
    np.testing.assert_allclose(of_kernel, wanted, atol=1e-5 * np.abs(wanted).max())
    np.testing.assert_allclose(of_x, expected[1][0], atol=1e-5)
    assert of_kernel.sharding.is_equivalent_to(split, kernel.ndim)
    lowered = jax.jit(jax.grad(lambda *a: jnp.sum(run(Layout(mesh))(*a)), 1)).lower(*given)
    assert "optimization_barrier" in lowered.as_text()


@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 8}], ids=str)
@pytest.mark.parametrize("lora", [None, LoRA(rank=2, alpha=4.0)], ids=["plain", "adapter"])
def test_a_mesh_changes_nothing_but_rounding(axes, lora):
    mesh, x = make_mesh(axes), draw(8, 5, 16)
    make = functools.partial(Linear, (8, 3), (-1,), std=0.3, bias=True, lora=lora, name="q")
    params = make(Runtime()).init(jax.random.key(0), x)["params"]
    # An adapter's second matrix is zero at first, which would hide the first one's gradient.
    params = {name: draw(*leaf.shape, seed=len(name)) for name, leaf in params.items()}

    def run(layout):
        def value(params, x):
            return jnp.sum(jnp.sin(make(Runtime(layout=layout)).apply({"params": params}, x)))

        return jax.jit(jax.value_and_grad(value, (0, 1)))

    expected = run(Layout())(params, x)
    split = {
        name: NamedSharding(mesh, partition_spec(mesh, f"q/{name}", leaf.shape))
        for name, leaf in params.items()
    }
    given = jax.device_put(params, split), x
    value, (of_params, of_x) = run(Layout(mesh))(*given)
    for got, wanted in zip(
        jax.tree.leaves((value, (of_params, of_x))), jax.tree.leaves(expected), strict=True
    ):
        wanted = np.asarray(wanted)
        np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())
    # A kernel's gradient lies as the kernel does.
    assert of_params["kernel"].sharding.is_equivalent_to(split["kernel"], 3)
    # Gradients summed in bfloat16 are rounded by it, and no other number is.
    rounded, (of_params, of_x_again) = run(Layout(mesh, "bfloat16"))(*given)
    assert rounded == value
    np.testing.assert_array_equal(of_x_again, of_x)
    exact = np.asarray(expected[1][0]["kernel"])
    error = np.abs(of_params["kernel"] - exact).max() / np.abs(exact).max()
    assert 1e-4 < error < 2e-2
    assert of_params["kernel"].dtype == jnp.float32
