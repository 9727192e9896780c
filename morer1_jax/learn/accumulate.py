"""Gradient accumulation: a sum over micro-batches that equals the whole batch's gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def add(total: PyTree, part: PyTree) -> PyTree:
    """Leaf by leaf."""
    return jax.tree.map(jnp.add, total, part)


def accumulate(
    gradients: Callable[[PyTree], PyTree],
    batch: PyTree,
    micro_batches: int,
    combine: Callable[[PyTree, PyTree], PyTree] = add,
) -> PyTree:
    """Sums `gradients(part)` over equal parts of a batch, one part's activations at a time.

    What is summed must be a plain sum over rows: a loss is divided by its normaliser over the
    whole batch beforehand, so that 1 part and 8 parts give the same.

    Args:
      gradients: maps a part to a tree of sums (loss, gradients, metrics).
      batch: a tree of arrays with rows leading.
      micro_batches: number of parts; must divide the rows.
      combine: joins the total so far, from zeros, with a part's.

    Raises:
      ValueError: it does not.
    """
    if micro_batches == 1:
        return gradients(batch)
    rows = jax.tree.leaves(batch)[0].shape[0]
    if micro_batches < 1 or rows % micro_batches:
        raise ValueError(f"micro_batches: {micro_batches} does not divide the batch of {rows} rows")
    # Rows i, i + m, i + 2m, … form part i: each device keeps the rows it holds.
    parts = jax.tree.map(
        lambda x: jnp.swapaxes(x.reshape(rows // micro_batches, micro_batches, *x.shape[1:]), 0, 1),
        batch,
    )
    shapes = jax.eval_shape(gradients, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def step(total: PyTree, part: PyTree) -> tuple[PyTree, None]:
        return combine(total, gradients(part)), None

    return jax.lax.scan(step, zeros, parts)[0]
