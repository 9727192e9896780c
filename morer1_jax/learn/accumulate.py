"""Gradient accumulation: a sum over micro-batches that equals the whole batch's gradient."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from morer1_jax.learn.trainable import join, select
from morer1_jax.model.layers import Params
from morer1_jax.model.parts import split_rows
from morer1_jax.model.sharded import in_copy
from morer1_jax.model.vlm import Qwen25VL

PyTree = Any
Loss = Callable[[Params, Params], tuple[jax.Array, PyTree]]
Gradients = Callable[[Qwen25VL, PyTree, Params | None], tuple[Params, PyTree]]
Combine = Callable[[PyTree, PyTree], PyTree]


def add(total: PyTree, summand: PyTree) -> PyTree:
    """Adds two trees leaf by leaf."""
    return jax.tree.map(jnp.add, total, summand)


def accumulate(
    gradients: Gradients,
    model: Qwen25VL,
    params: Params,
    batch: PyTree,
    micro_batches: int,
    combine: Combine = add,
) -> tuple[Params, PyTree]:
    """Sums gradients and metrics over micro-batches of equal size, one after another.

    Only one's activations are in memory. What is summed must be a plain sum over rows: a loss is
    divided beforehand by its normaliser over the whole batch, so that 1 and 8 micro-batches give
    the same. Where copies of the parameters are `apart`, each sums the gradients of its own rows,
    and these sums are added up once, after the last micro-batch.

    Args:
        gradients: `gradients(model, micro_batch, total)` returns the total plus the micro-batch's
            gradients, and its metrics; without a total the gradients alone.
        model: as `gradients` needs it; its layout says what a mesh's devices hold.
        params: whose gradients are summed.
        batch: a tree of arrays with rows leading.
        combine: joins the metrics so far, from zeros, with a micro-batch's.

    Raises:
        ValueError: `micro_batches` does not divide the rows.
    """
    if micro_batches == 1:
        return gradients(model, batch, None)

    def of_rows(model: Qwen25VL, batch: PyTree) -> tuple[Params, PyTree]:
        run = functools.partial(gradients, model)
        return _in_turn(run, params, split_rows(batch, micro_batches), combine)

    layout = model.runtime.layout
    if not layout.apart:
        return of_rows(model, batch)
    own = model.clone(runtime=in_copy(model.runtime))
    sums, metrics = layout.on_copies(functools.partial(of_rows, own), batch)
    metrics = jax.tree.map(layout.whole, metrics)
    of_copies = (jax.tree.map(operator.itemgetter(i), metrics) for i in range(layout.copies))
    return jax.tree.map(layout.summed_over_copies, sums), functools.reduce(combine, of_copies)


def _in_turn(
    gradients: Callable[[PyTree, Params | None], tuple[Params, PyTree]],
    params: Params,
    stacked: PyTree,
    combine: Combine,
) -> tuple[Params, PyTree]:
    """Sums gradients and metrics over the leading axis of `stacked`."""
    first = jax.tree.map(lambda x: x[0], stacked)
    shapes = params, jax.eval_shape(lambda part: gradients(part, None)[1], first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def step(
        state: tuple[Params, PyTree], micro_batch: PyTree
    ) -> tuple[tuple[Params, PyTree], None]:
        total, metrics = state
        total, own = gradients(micro_batch, total)
        return (total, combine(metrics, own)), None

    return jax.lax.scan(step, zeros, stacked)[0]


def add_gradients(
    loss: Loss, params: Params, total: Params | None, model: Qwen25VL
) -> tuple[Params, PyTree]:
    """Adds a loss's gradients to a total.

    Where the decoder's layers are rematerialised in full, theirs are added in the backward pass
    itself (`model.running`), so that no second array of their size exists.

    Args:
        loss: `loss(params, sums) -> (value, what else it returns)`; `sums` go with the parameters
            to the model.
        params: the trainable parameters.
        total: None: there is none yet, and the gradients alone are returned.

    Returns:
        The new total, and what else the loss returns.
    """
    if total is None:
        (_, rest), grads = jax.value_and_grad(loss, has_aux=True)(params, {})
        return grads, rest

    def in_place(path: tuple[str, ...]) -> bool:
        # XLA would merge a single layer's second run with its first and save no memory.
        repeats = model.runtime.remat == "full" and model.config.text.num_hidden_layers > 1
        return repeats and path[:2] == ("language", "layers")

    layers = select(params, in_place)

    def own_loss(apart: Params, sums: Params) -> tuple[jax.Array, PyTree]:
        return loss(join(apart, layers), sums)

    apart, so_far = (select(tree, lambda path: not in_place(path)) for tree in (params, total))
    run = jax.value_and_grad(own_loss, argnums=(0, 1), has_aux=True)
    (_, rest), (grads, sums) = run(apart, select(total, in_place))
    return join(add(so_far, grads), sums), rest
