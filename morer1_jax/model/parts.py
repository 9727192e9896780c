"""Rows of a batch in parts, one after another, so that only one part's activations exist at once.

Rows i, i + m, i + 2m, … of m parts form part i. A mesh splits rows into contiguous blocks, so that
no row changes its device as long as each block has a multiple of m rows. Where an array of a batch
has fewer rows than others, as rows of images that several rows of tokens share, those that share
one count as one row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from morer1_jax.model.sharding import Layout

PyTree = Any

# Tokens or patches that a device runs at once without a backward pass: enough to fill its matrix
# units.
_AT_ONCE = 8192


def fitting_parts(layout: Layout, rows: int, length: int) -> int:
    """Returns in how many parts rows are run without a backward pass, so that each fits.

    Args:
        length: tokens or patches of a row.
    """
    on_device = rows // layout.parts(rows)
    fitting = (
        parts
        for parts in range(1, on_device + 1)
        if on_device % parts == 0 and on_device // parts * length <= _AT_ONCE
    )
    return next(fitting, on_device)


def split_rows(batch: PyTree, parts: int) -> PyTree:
    """Returns a batch's parts on a new leading axis: [rows, …] becomes [parts, rows / parts, …].

    Raises:
        ValueError: `parts` does not divide the rows, of those that share one of them.
    """
    rows = _shared_rows(batch)
    if parts < 1 or rows % parts:
        raise ValueError(f"parts: expected a divisor of the batch's {rows} rows, found {parts}")

    def split(x: jax.Array) -> jax.Array:
        sharing = x.shape[0] // rows
        apart = jnp.swapaxes(x.reshape(rows // parts, parts, sharing, *x.shape[1:]), 0, 1)
        return apart.reshape(parts, rows // parts * sharing, *x.shape[1:])

    return jax.tree.map(split, batch)


def join_rows(stacked: PyTree, rows: int) -> PyTree:
    """Undoes `split_rows`, of a batch whose array with fewest rows had `rows`."""

    def joined(x: jax.Array) -> jax.Array:
        parts, of_part = x.shape[:2]
        apart = x.reshape(parts, rows // parts, of_part * parts // rows, *x.shape[2:])
        return jnp.swapaxes(apart, 0, 1).reshape(parts * of_part, *x.shape[2:])

    return jax.tree.map(joined, stacked)


def map_rows(function: Callable[[PyTree], PyTree], batch: PyTree, parts: int) -> PyTree:
    """Computes `function(batch)` part by part.

    Args:
        function: maps a batch to a tree of arrays with the batch's rows leading; what it returns
            for a row depends on no other row, but those that share an array's row with it.
    """
    if parts == 1:
        return function(batch)
    return join_rows(jax.lax.map(function, split_rows(batch, parts)), _shared_rows(batch))


def _shared_rows(batch: PyTree) -> int:
    """Returns the rows of a batch, those that share one counted as one."""
    return min(x.shape[0] for x in jax.tree.leaves(batch))
