"""Embeddings looked up on a mesh are those of the whole table, and so are their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from morer1_jax.cost.hlo import parse
from morer1_jax.cost.program import cost_of
from morer1_jax.model.embedding import embed_tokens
from morer1_jax.model.sharding import Layout, partition_spec
from morer1_jax.run.mesh import batch_sharding, make_mesh

V, D, ROWS, LENGTH = 64, 16, 16, 6


def placed(axes):
    mesh = make_mesh(axes, jax.devices()[: int(np.prod(list(axes.values())))])
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.standard_normal((V, D)), jnp.float32)
    table = jax.device_put(table, NamedSharding(mesh, partition_spec(mesh, "embedding", (V, D))))
    tokens = jax.device_put(rng.integers(0, V, (ROWS, LENGTH)), batch_sharding(mesh))
    weights = jnp.asarray(rng.standard_normal((ROWS, LENGTH, D)), jnp.float32)
    return Layout(mesh), table, tokens, weights


MESHES = [
    {"data": 1, "fsdp": 1, "tensor": 1},
    {"data": 8, "fsdp": 1, "tensor": 1},
    {"data": 1, "fsdp": 8, "tensor": 1},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 1, "fsdp": 2, "tensor": 4},
    {"data": 2, "tensor": 4},  # as of sampling
]


@pytest.mark.parametrize("axes", MESHES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_and_gradients_are_the_whole_tables(axes, dtype):
    layout, table, tokens, weights = placed(axes)

    def total(table, embed):
        x = embed(table)
        return jnp.sum(x.astype(jnp.float32) * weights), x

    def run(embed):
        return jax.jit(jax.value_and_grad(lambda table: total(table, embed), has_aux=True))(table)

    (_, x), gradient = run(lambda table: embed_tokens(table, tokens, dtype, layout))
    (_, plain), plain_gradient = run(lambda table: table[tokens].astype(dtype))
    assert x.dtype == dtype
    np.testing.assert_array_equal(x, plain)
    assert x.sharding.is_equivalent_to(batch_sharding(layout.mesh), 3)
    assert gradient.sharding.is_equivalent_to(table.sharding, 2)
    largest = float(jnp.max(jnp.abs(plain_gradient)))
    np.testing.assert_allclose(gradient, plain_gradient, atol=1e-6 * largest)


def test_devices_exchange_what_they_keep_and_no_more():
    """However many parts of the rows have a whole table each."""
    layout, table, tokens, _ = placed({"data": 2, "fsdp": 4, "tensor": 1})
    run = jax.jit(lambda *given: embed_tokens(*given, "float32", layout)).lower(table, tokens)
    transfers = cost_of(parse(run.compile().as_text()), 8).transfers
    sent = sorted((one.kind, one.bytes) for one in transfers if one.bytes)
    own = ROWS // 8 * LENGTH
    assert sent == [("all-gather", 3 * own * 4), ("all-to-all", 3 / 4 * own * D * 4)]


def test_rows_that_do_not_divide_are_refused():
    layout, table, _, _ = placed({"data": 1, "fsdp": 8, "tensor": 1})
    with pytest.raises(ValueError, match="rows: expected a multiple of the 8 parts"):
        embed_tokens(table, jnp.zeros((4, 2), jnp.int32), "float32", layout)
