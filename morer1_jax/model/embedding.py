"""Looks the embeddings of tokens up, in a table that a mesh splits.

Each device has some columns of the table, of all ids or of some, and some rows of the batch. It
looks up its columns for the rows of every device that it shares them with, and these exchange what
they found. Left to the compiler, devices would come by whole arrays of activations instead.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from morer1_jax.model.sharding import Layout, partition_spec


def embed_tokens(
    table: Float[Array, "v d"], tokens: Int[Array, "*b"], dtype: str, layout: Layout
) -> Float[Array, "*b d"]:
    """Returns each token's row of the table in `dtype`; gradients are summed in the table's dtype.

    Args:
        tokens: ids of the table, split by rows; what stands for another is not defined.
        layout: of rows and table on the mesh.

    Raises:
        ValueError: the mesh does not divide the rows.
    """
    if layout.mesh is None:
        return jnp.take(table, tokens, axis=0).astype(dtype)
    layout.parts(len(tokens))
    ids, columns = partition_spec(layout.mesh, "embedding", table.shape)

    def of_device(table: Array, tokens: Array) -> Array:
        if columns is not None:
            tokens = jax.lax.all_gather(tokens, columns, tiled=True)
        if ids is None:
            found = jnp.take(table, tokens, axis=0).astype(dtype)
        else:
            # Zeros stand for ids of other devices, so that the sum is exact.
            place = tokens - jax.lax.axis_index(ids) * len(table)
            own = (place >= 0) & (place < len(table))
            found = jnp.take(table, jnp.where(own, place, 0), axis=0).astype(dtype)
            found = jax.lax.psum(jnp.where(own[..., None], found, 0), ids)
        if columns is None:
            return found
        return jax.lax.all_to_all(found, columns, 0, found.ndim - 1, tiled=True)

    rows = P(layout.row_axes)
    run = layout.on_devices(of_device, (P(ids, columns), rows), rows)
    return run(table, tokens)
