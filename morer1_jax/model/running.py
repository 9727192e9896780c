"""Runs a stack of layers whose gradients are added to sums of earlier ones, layer by layer.

The gradient of a scan over layers is a new array as large as all of their parameters, which is then
added to the sum over micro-batches: two such arrays exist at once. Here the backward pass takes the
sums and adds each layer's gradient to them in place, so that there is one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from morer1_jax.model.layers import Params

PyTree = Any

# The collection of a model's variables that holds the sums, at their parameters' paths.
SUMS = "sums"

Layer = Callable[[Params, jax.Array, PyTree], jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run_layers(
    layer: Layer, params: Params, sums: Params, x: jax.Array, inputs: PyTree
) -> jax.Array:
    """Returns `x` after all layers; each is run again in the backward pass, from its input.

    The "gradient" with respect to `sums` is these plus the gradients with respect to `params`;
    `params` themselves get none. A loss must run the layers exactly once, or sums count twice or
    are lost.

    Args:
        layer: `layer(params, x, inputs) -> x`, of one layer.
        params: of all layers, stacked on a leading axis.
        sums: of the gradients of parameters that train, a part of the tree; nothing reads them in
            the forward pass.
        inputs: a tree that every layer gets, without a gradient.
    """
    return jax.lax.scan(lambda x, params: (layer(params, x, inputs), None), x, params)[0]


def _forward(
    layer: Layer, params: Params, sums: Params, x: jax.Array, inputs: PyTree
) -> tuple[jax.Array, tuple[PyTree, ...]]:
    x, kept = jax.lax.scan(lambda x, params: (layer(params, x, inputs), x), x, params)
    return x, (params, sums, kept, inputs)


def _backward(
    layer: Layer, saved: tuple[PyTree, ...], cotangent: jax.Array
) -> tuple[None, Params, jax.Array, None]:
    params, sums, kept, inputs = saved
    count = len(kept)

    def turn(number: jax.Array, state: tuple[jax.Array, Params]) -> tuple[jax.Array, Params]:
        cotangent, sums = state
        place = count - 1 - number
        own, x = jax.tree.map(
            lambda whole: jax.lax.dynamic_index_in_dim(whole, place, keepdims=False), (params, kept)
        )
        trained = _like(own, sums)
        _, back = jax.vjp(lambda trained, x: layer(_with(own, trained), x, inputs), trained, x)
        gradients, cotangent = back(cotangent)

        def add(whole: jax.Array, gradient: jax.Array) -> jax.Array:
            total = jax.lax.dynamic_index_in_dim(whole, place, keepdims=False) + gradient
            return jax.lax.dynamic_update_index_in_dim(whole, total, place, 0)

        return cotangent, jax.tree.map(add, sums, gradients)

    cotangent, sums = jax.lax.fori_loop(0, count, turn, (cotangent, sums))
    return None, sums, cotangent, None


run_layers.defvjp(_forward, _backward)


def _like(params: Params, part: Params) -> Params:
    """Returns those parameters that a part of the tree has."""
    return {
        name: _like(params[name], branch) if isinstance(branch, dict) else params[name]
        for name, branch in part.items()
    }


def _with(params: Params, part: Params) -> Params:
    """Returns parameters with those of a part of the tree in their places."""
    return params | {
        name: _with(params[name], branch) if isinstance(branch, dict) else branch
        for name, branch in part.items()
    }
