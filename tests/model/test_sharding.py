"""Which axes of the mesh split which array, inside of programs and out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from morer1_jax.model.sharding import Layout, partition_spec
from morer1_jax.run.mesh import make_mesh


def mesh(**axes):
    return make_mesh(axes, jax.devices()[: int(np.prod(list(axes.values())))])


MESH = mesh(data=2, fsdp=2, tensor=2)
ROWS = ("data", "fsdp")


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("language/layers/q/kernel", (3, 6, 5, 8), P(None, "fsdp", None, None)),
        ("language/layers/q/kernel", (3, 5, 4, 8), P(None, None, "tensor", None)),
        ("language/layers/mlp/down/kernel", (3, 5, 5), P(None, None, None)),
        ("head_norm", (4,), P(None)),
        ("step", (), P()),
    ],
)
def test_an_axis_that_does_not_divide_is_replicated(path, shape, expected):
    assert partition_spec(MESH, path, shape) == expected


def test_an_axis_the_mesh_lacks_is_not_used():
    assert partition_spec(mesh(data=8), "embedding", (8, 8)) == P(None, None)


def test_a_parameter_with_too_few_axes_is_an_error():
    with pytest.raises(ValueError, match="layers/q/kernel: expected 3 axes by its rule, found 2"):
        partition_spec(MESH, "layers/q/kernel", (4, 4))


def placed(layout, method, *arguments):
    """The split of what a method of a layout returns, and its value."""
    out = jax.jit(lambda x: getattr(layout, method)(*arguments[:-1], x))(arguments[-1])
    np.testing.assert_array_equal(out, arguments[-1])
    return out.sharding.spec


def test_rows_are_split_over_all_axes_but_the_heads():
    layout = Layout(MESH)
    assert placed(layout, "rows", jnp.ones((8, 3))) == P(ROWS)
    out = jax.jit(lambda x: layout.rows(x, heads=2))(jnp.ones((4, 3, 6)))
    assert out.sharding.spec == P(ROWS, None, "tensor")
    # An axis of heads that does not divide is whole.
    out = jax.jit(lambda x: layout.rows(x, heads=2))(jnp.ones((4, 3, 5)))
    assert out.sharding.spec == P(ROWS)
    assert placed(Layout(mesh(fsdp=4)), "rows", jnp.ones((8, 3))) == P("fsdp")


def test_a_kernel_is_gathered_but_for_its_heads_and_split_again():
    layout, kernel = Layout(MESH), jnp.arange(8.0 * 4 * 2).reshape(8, 4, 2)
    assert placed(layout, "gathered", "q/kernel", kernel) == P(None, "tensor")
    assert placed(layout, "split", "q/kernel", kernel) == P("fsdp", "tensor")
    # Stacked over layers too.
    stacked = jnp.stack([kernel] * 3)
    assert placed(layout, "split", "q/kernel", stacked) == P(None, "fsdp", "tensor")
    assert placed(layout, "gathered", "norm/scale", jnp.ones(8)) == P()


def test_parts_of_the_rows():
    assert Layout(MESH).parts(8) == 4
    assert Layout(MESH).parts(6) == 1
    assert Layout().parts(8) == 1


def test_on_one_device_nothing_is_said():
    layout, x = Layout(), jnp.ones((8, 4))
    for method, arguments in (("rows", ()), ("gathered", ("q/kernel",)), ("split", ("head",))):
        assert getattr(layout, method)(*arguments, x) is x
