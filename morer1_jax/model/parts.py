"""Rows of a batch in parts, one after another, so that only one part's activations exist at once.

Rows i, i + m, i + 2m, … of m parts form part i. A mesh splits rows into contiguous blocks, so that
no row changes its device as long as each block has a multiple of m rows.
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
        ValueError: `parts` does not divide the rows.
    """
    rows = jax.tree.leaves(batch)[0].shape[0]
    if parts < 1 or rows % parts:
        raise ValueError(f"parts: expected a divisor of the batch's {rows} rows, found {parts}")
    return jax.tree.map(
        lambda x: jnp.swapaxes(x.reshape(rows // parts, parts, *x.shape[1:]), 0, 1), batch
    )


def join_rows(stacked: PyTree) -> PyTree:
    """Undoes `split_rows`."""

    def joined(x: jax.Array) -> jax.Array:
        parts, rows = x.shape[:2]
        return jnp.swapaxes(x, 0, 1).reshape(parts * rows, *x.shape[2:])

    return jax.tree.map(joined, stacked)


def map_rows(function: Callable[[PyTree], PyTree], batch: PyTree, parts: int) -> PyTree:
    """Computes `function(batch)` part by part.

    Args:
        function: maps a batch to a tree of arrays with the batch's rows leading; what it returns
            for a row depends on no other row.
    """
    if parts == 1:
        return function(batch)
    return join_rows(jax.lax.map(function, split_rows(batch, parts)))
