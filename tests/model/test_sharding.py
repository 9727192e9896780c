"""Which axes of the mesh split which array, inside of programs and out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from morer1_jax.cost.hlo import parse
from morer1_jax.cost.program import cost_of
from morer1_jax.model.attention import PackedCausal
from morer1_jax.model.decoding import Cached, init_cache
from morer1_jax.model.sharding import Layout, partition_spec, scatter_sum, torus_sides
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
    assert placed(Layout(mesh(fsdp=4)), "rows", jnp.ones((8, 3))) == P("fsdp")


def test_a_kernel_is_gathered_but_for_its_heads():
    layout, kernel = Layout(MESH), jnp.arange(8.0 * 4 * 2).reshape(8, 4, 2)
    assert placed(layout, "gathered", "q/kernel", kernel) == P(None, "tensor")
    assert placed(layout, "gathered", "norm/scale", jnp.ones(8)) == P()


def of_head(layout, parts):
    """The sum of gradients [parts, 8, 16] of a head [16, 8], turned."""
    heads = None if layout.head_dimension("head", (16, 8)) is None else 2
    return layout.summed("head", (16, 8), lambda own: jnp.sum(own, axis=0), [parts], [heads], 1)


@pytest.mark.parametrize(
    ("path", "shape", "dimension"),
    [("q/kernel", (8, 4, 2), 1), ("mlp/down/kernel", (8, 4), 0), ("k/kernel", (8, 3, 2), None)],
)
def test_which_axis_of_a_parameter_is_split_as_heads_are(path, shape, dimension):
    assert Layout(MESH).head_dimension(path, shape) == dimension
    assert Layout(mesh(fsdp=4)).head_dimension(path, shape) is None
    assert Layout().head_dimension(path, shape) is None


@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4}, {"data": 8}])
@pytest.mark.parametrize("sums", ["float32", "bfloat16"])
def test_parts_are_summed_where_the_sum_lies(axes, sums):
    """Of a head [16, 8] turned; over `fsdp` no device receives more than its share."""
    layout, rng = Layout(mesh(**axes), sums), np.random.default_rng(0)
    count = layout.parts(8)
    parts = jnp.asarray(rng.integers(-9, 9, (count, 8, 16)), jnp.float32)
    split = layout.rows(parts, heads=2)
    run = jax.jit(lambda x: of_head(layout, x)).lower(split).compile()
    summed = run(split)
    np.testing.assert_array_equal(summed, np.sum(parts, axis=0))
    fsdp, tensor = (name if name in axes else None for name in ("fsdp", "tensor"))
    assert summed.sharding.is_equivalent_to(NamedSharding(layout.mesh, P(fsdp, tensor)), 2)
    transfers = cost_of(parse(run.as_text()), layout.mesh.size).transfers
    sent = sorted((one.kind, one.bytes) for one in transfers if one.bytes)
    own = 8 * 16 * jnp.dtype(sums).itemsize / axes.get("tensor", 1)
    data, shares = axes.get("data", 1), axes.get("fsdp", 1)
    expected = [("all-reduce", 2 * own / shares * (data - 1) / data)] if data > 1 else []
    expected += [("reduce-scatter", own * (shares - 1) / shares)] if shares > 1 else []
    if sums == "float32":  # A CPU sums bfloat16 in float32.
        assert sent == expected
    np.testing.assert_array_equal(of_head(Layout(), parts), np.sum(parts, axis=0))


@pytest.mark.parametrize(
    ("devices", "sides"), [(1, (1, 1)), (7, (1, 7)), (8, (2, 4)), (64, (8, 8))]
)
def test_sides_of_a_torus(devices, sides):
    assert torus_sides(devices) == sides


@pytest.mark.parametrize("factors", [(1, 8), (2, 4), (4, 2)])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_sum_is_scattered_in_steps(factors, axis):
    """Of eight devices each has the share of its number, as of a sum in one step."""
    arrays = np.random.default_rng(0).integers(-9, 9, (8, 16, 24)).astype(np.float32)
    run = jax.shard_map(
        lambda x: scatter_sum(x[0], "fsdp", axis, factors),
        mesh=mesh(fsdp=8),
        in_specs=P("fsdp"),
        out_specs=P(*(None,) * axis, "fsdp"),
    )
    np.testing.assert_array_equal(jax.jit(run)(arrays), np.sum(arrays, axis=0))


def test_sums_of_copies_are_scattered_among_a_copys_own_devices():
    """Mapped over one axis of the mesh, where each device has one copy, and over an axis of two."""
    arrays = np.random.default_rng(0).integers(-9, 9, (2, 2, 4, 16, 24)).astype(np.float32)
    devices = mesh(data=2, fsdp=4)

    def of_copy(x):
        run = jax.shard_map(
            lambda x: scatter_sum(x[0], "fsdp", 0, (2, 2)),
            mesh=devices,
            in_specs=P("fsdp"),
            out_specs=P("fsdp"),
        )
        return jax.vmap(run)(x)

    out = jax.jit(jax.vmap(of_copy, spmd_axis_name="data"))(arrays)
    np.testing.assert_array_equal(out, np.sum(arrays, axis=2))


@pytest.mark.parametrize("sums", ["float32", "bfloat16"])
def test_copies_are_summed_in_the_dtype_of_sums(sums):
    """Nothing is converted in between, so that devices send numbers of that dtype."""
    gradients = jnp.asarray([[1.0, 2.0], [3.0, 4.0]])
    layout = Layout(sums=sums)
    np.testing.assert_array_equal(layout.summed_over_copies(gradients), [4, 6])
    jaxpr = jax.make_jaxpr(layout.summed_over_copies)(gradients)
    (added,) = (eqn for eqn in jaxpr.eqns if eqn.primitive.name.startswith("reduce"))
    assert added.invars[0].aval.dtype == added.outvars[0].aval.dtype == jnp.dtype(sums)


def test_parts_of_the_rows():
    assert Layout(MESH).parts(8) == 4
    assert Layout().parts(7) == 1


def test_rows_that_every_device_would_compute_are_refused():
    message = "rows: expected a multiple of the 4 parts that the mesh splits them into, found 6"
    with pytest.raises(ValueError, match=message):
        Layout(MESH).parts(6)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(Layout(MESH).rows, jnp.ones((6, 4)))


# (query heads, key-value heads, devices that heads are split over, key-value heads of a device)
HEADS = [(4, 4, 4, 1), (4, 2, 4, 1), (8, 2, 4, 1), (6, 2, 3, 2), (12, 4, 6, 2), (8, 4, 2, 2)]


def attended(q, k, v, layout):
    """Whole sequences, then one more token of two samples, whose cache holds these."""
    q, k, v = layout.heads(q, k, v)
    mask = jnp.ones(q.shape[:2], jnp.int32)
    out, _ = PackedCausal(mask)(q, k, v)
    cache = init_cache((k, v), mask > 0, group=2, length=4, layout=layout).layers
    last = (x[:, -2:] for x in (q, k, v))
    token, cache = Cached(mask > 0, jnp.int32(1))(*last, cache.replace(layer=None))
    return out, token, cache


@pytest.mark.parametrize(("heads", "kv_heads", "tensor", "own"), HEADS)
def test_each_device_attends_with_its_own_heads_alone(heads, kv_heads, tensor, own):
    """Whether these divide or not: no query, key or value moves, in values as on one device."""
    rng, layout = np.random.default_rng(0), Layout(mesh(fsdp=1, tensor=tensor))
    q, k, v = (
        rng.standard_normal((2, 6, n, 8)).astype(np.float32) for n in (heads, kv_heads, kv_heads)
    )
    split, whole = (NamedSharding(layout.mesh, P(None, None, axis)) for axis in ("tensor", None))

    def run(q, k, v):
        return attended(q, k, v, layout)

    run = jax.jit(run, in_shardings=(split, whole, whole), out_shardings=(split, split, None))
    compiled = run.lower(q, k, v).compile()
    assert cost_of(parse(compiled.as_text()), tensor).transfers == []
    *ours, cache = compiled(*jax.device_put((q, k, v), (split, whole, whole)))
    *expected, _ = attended(q, k, v, Layout())
    for got, wanted in zip(ours, expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-6)
    # Of the cache too a device holds no more.
    for x in (cache.prompt_k, cache.prompt_v, cache.k, cache.v):
        assert {shard.data.shape[1] for shard in x.addressable_shards} == {own}


@pytest.mark.parametrize(("heads", "kv_heads", "tensor"), [(4, 2, 4), (6, 2, 3)])
def test_of_repeated_heads_only_keys_and_values_gradients_are_sent(heads, kv_heads, tensor):
    """Sums over the queries of each, once; the queries' own gradients stay where they are."""
    rng, layout = np.random.default_rng(0), Layout(mesh(fsdp=1, tensor=tensor))
    q, k, v = (
        rng.standard_normal((2, 6, n, 8)).astype(np.float32) for n in (heads, kv_heads, kv_heads)
    )
    split, whole = (NamedSharding(layout.mesh, P(None, None, axis)) for axis in ("tensor", None))

    def gradients(layout):
        def total(q, k, v):
            return jnp.sum(jnp.sin(attended(q, k, v, layout)[0]))

        return jax.grad(total, (0, 1, 2))

    placement = split, whole, whole
    run = jax.jit(gradients(layout), in_shardings=placement, out_shardings=placement)
    compiled = run.lower(q, k, v).compile()
    cost = cost_of(parse(compiled.as_text()), tensor)
    assert 0 < cost.bytes <= 2 * (k.nbytes + v.nbytes)
    ours = compiled(*jax.device_put((q, k, v), placement))
    for got, wanted in zip(ours, gradients(Layout())(q, k, v), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_on_one_device_nothing_is_said():
    layout, x = Layout(), jnp.ones((8, 4))
    for method, arguments in (("rows", ()), ("gathered", ("q/kernel",))):
        assert getattr(layout, method)(*arguments, x) is x
