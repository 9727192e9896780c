"""Gradient accumulation: a sum over micro-batches that equals the whole batch's gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from morer1_jax.model.parts import split_rows

PyTree = Any


def add(total: PyTree, summand: PyTree) -> PyTree:
    """Adds two trees leaf by leaf."""
    return jax.tree.map(jnp.add, total, summand)


def accumulate(
    gradients: Callable[[PyTree], PyTree],
    batch: PyTree,
    micro_batches: int,
    combine: Callable[[PyTree, PyTree], PyTree] = add,
) -> PyTree:
    """Sums `gradients(micro_batch)` over micro-batches of equal size, one after another.

    Only one's activations are in memory. What is summed must be a plain sum over rows: a loss is
    divided beforehand by its normaliser over the whole batch, so that 1 and 8 micro-batches give
    the same.

    Args:
        gradients: maps a micro-batch to a tree of sums (loss, gradients, metrics).
        batch: a tree of arrays with rows leading.
        combine: joins the total so far, from zeros, with a micro-batch's sums.

    Raises:
        ValueError: `micro_batches` does not divide the rows.
    """
    if micro_batches == 1:
        return gradients(batch)
    stacked = split_rows(batch, micro_batches)
    shapes = jax.eval_shape(gradients, jax.tree.map(lambda x: x[0], stacked))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def step(total: PyTree, micro_batch: PyTree) -> tuple[PyTree, None]:
        return combine(total, gradients(micro_batch)), None

    return jax.lax.scan(step, zeros, stacked)[0]
