"""Log-probabilities of target tokens, without the logits of a whole sequence.

`[batch, length, vocabulary]` logits would be the largest array of all. They are computed for a few
places at a time, forward and again backward, and only log-probability and entropy are kept. Axes: b
rows, s places of a row, n places of a chunk, d model, v vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int

from morer1_jax.model.products import einsum
from morer1_jax.model.sharding import Layout

# Stands for -inf in logits: its exponential is exactly 0, yet 0 times it is 0 and not NaN, so that
# a masked position whose target is not allowed leaves loss and gradient finite.
DISALLOWED = -1e30
# Names the loops over chunks, which end where no more places count: estimates of a program's time
# must be told how many turns they take.
CHUNKS = "chunks_of_logits"

LogprobsAndEntropies = tuple[Float[Array, "*b"], Float[Array, "*b"]]


def token_logprobs(
    hidden: Float[Array, "b s d"],
    head: Float[Array, "v d"],
    targets: Int[Array, "b s"],
    *,
    counted: Bool[Array, "b s"] | None = None,
    allowed: Bool[Array, " v"] | None = None,
    temperature: float | Float[Array, ""] = 1.0,
    chunk: int = 128,
    layout: Layout | None = None,
) -> LogprobsAndEntropies:
    """Returns each target's log-probability and its distribution's entropy, float32 in nats.

    There is a gradient with respect to `hidden` and `head`, none with respect to `temperature`.

    Args:
        hidden: hidden states that predict the targets.
        head: the output embedding.
        counted: places to compute; the others (prompts, padding) get 0 for both numbers, and no
            logits but to fill the last chunk. None: all.
        allowed: ids that the distribution is over; None: all. The log-probability of another target
            is about -1e30, finite so that a mask can remove it.
        temperature: logits are divided by it, before ids are left out.
        chunk: places of each row whose logits exist at once, forward and backward.
        layout: of rows and head on the mesh; None: one device.
    """
    b, s, _ = hidden.shape
    chunk = min(chunk, s)
    if counted is None:
        counted = jnp.ones((b, s), bool)
    if allowed is None:
        allowed = jnp.ones(head.shape[0], bool)
    # Counted places go first in each row, so that only the first chunks have work.
    order = jnp.argsort(~counted, axis=1, stable=True)
    hidden = jnp.take_along_axis(hidden, order[..., None], axis=1)
    targets, counted_in_order = (jnp.take_along_axis(x, order, axis=1) for x in (targets, counted))

    def chunked(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, -s % chunk), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(b, -1, chunk, *x.shape[2:]), 1, 0)

    temperature = jnp.asarray(temperature, jnp.float32)
    results = _chunked_logprobs(
        chunked(hidden),
        head,
        chunked(targets),
        chunked(counted_in_order),
        allowed,
        temperature,
        layout or Layout(),
    )
    # Back in the order of the row.
    row_order = jnp.argsort(order, axis=1)
    logprob, entropy = (
        jnp.take_along_axis(jnp.moveaxis(x, 0, 1).reshape(b, -1)[:, :s], row_order, axis=1)
        for x in results
    )
    return jnp.where(counted, logprob, 0.0), jnp.where(counted, entropy, 0.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _chunked_logprobs(
    hidden: Float[Array, "chunks b n d"],
    head: Float[Array, "v d"],
    targets: Int[Array, "chunks b n"],
    counted: Bool[Array, "chunks b n"],
    allowed: Bool[Array, " v"],
    temperature: Float[Array, ""],
    layout: Layout,
) -> tuple[Float[Array, "chunks b n"], Float[Array, "chunks b n"]]:
    """Returns log-probabilities and entropies; chunks without a counted place are left out.

    The gradient is written out, since it is short: with logits l, probabilities p, log-normaliser
    z and entropy H, the derivative of log p(y) with respect to l_i is 1[i = y] - p_i, and that of H
    is -p_i (l_i - z + H). Logits are computed once more; z and H are saved. On a mesh the head is
    gathered once, forward and again backward; of its gradient each part of the rows has its own
    sum over chunks, and these are added up once.
    """
    head = _ready(head, hidden, layout)
    logprob, entropy, _ = _forward_chunks(
        hidden, head, targets, counted, allowed, temperature, layout
    )
    return logprob, entropy


def _forward_chunks(
    hidden: Array,
    head: Array,
    targets: Array,
    counted: Array,
    allowed: Array,
    temperature: Array,
    layout: Layout,
) -> tuple[Array, Array, Array]:
    """Returns log-probabilities, entropies and log-normalisers."""

    def compute(_: None, chunk: tuple[Array, Array]) -> tuple[None, tuple[Array, Array, Array]]:
        hidden, targets = chunk
        logits = _logits(hidden, head, allowed, temperature)
        largest = jnp.max(logits, axis=-1)
        weights = jnp.exp(logits - largest[..., None])
        total = jnp.sum(weights, axis=-1)
        normaliser = largest + jnp.log(total)
        # Ids that are not allowed have weight 0 and a finite logit.
        entropy = normaliser - jnp.sum(weights * logits, axis=-1) / total
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return None, (chosen - normaliser, entropy, normaliser)

    _, results = _over_chunks(compute, None, (hidden, targets), counted, layout)
    return results


def _over_chunks(
    step: Callable[[Any, Any], tuple[Any, Any]],
    total: Any,
    chunks: Any,
    counted: Bool[Array, "chunks b n"],
    layout: Layout,
) -> tuple[Any, Any]:
    """Runs `step(total, chunk) -> (total, results)` over the chunks with a counted place.

    These come first, so that a loop over them ends early.

    Args:
        chunks: tree of arrays [chunks, b, …].

    Returns:
        The last total, and the results of all chunks, [chunks, b, …]; 0 where none was computed.
    """
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), chunks)
    shapes = jax.eval_shape(step, total, one)[1]
    number = counted.shape[0]
    results = jax.tree.map(
        lambda x: layout.rows(jnp.zeros((number, *x.shape), x.dtype), axis=1), shapes
    )

    def turn(index: Array, state: tuple[Any, Any]) -> tuple[Any, Any]:
        total, results = state
        chunk = jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), chunks
        )
        total, result = step(total, chunk)
        results = jax.tree.map(
            lambda whole, x: jax.lax.dynamic_update_index_in_dim(whole, x, index, 0),
            results,
            result,
        )
        return total, results

    with jax.named_scope(CHUNKS):
        turns = layout.most(jnp.sum(jnp.any(counted, axis=(1, 2))))
        return jax.lax.fori_loop(0, turns, turn, (total, results))


def _ready(head: Array, hidden: Array, layout: Layout) -> Array:
    """Returns the head as products with hidden states need it."""
    return layout.gathered("head", head.astype(hidden.dtype))


def _forward(*arguments: Any) -> tuple[LogprobsAndEntropies, tuple[Any, ...]]:
    *primals, layout = arguments
    hidden, head, targets, counted, allowed, temperature = (x.value for x in primals)
    logprob, entropy, normaliser = _forward_chunks(
        hidden, _ready(head, hidden, layout), targets, counted, allowed, temperature, layout
    )
    # A frozen head needs no gradient, the costliest of all; None marks it.
    head_trains = jnp.zeros(()) if primals[1].perturbed else None
    saved = (hidden, head, targets, counted, allowed, temperature, entropy, normaliser, head_trains)
    return (logprob, entropy), saved


def _backward(
    layout: Layout, saved: tuple[Any, ...], cotangents: tuple[Any, Any]
) -> tuple[Any, ...]:
    hidden, head, targets, counted, allowed, temperature, entropy, normaliser, head_trains = saved
    ids, ready = jnp.arange(head.shape[0]), _ready(head, hidden, layout)
    rows = hidden.shape[1]
    parts = layout.parts(rows)
    # A result that is not differentiated has no cotangent (None), and costs no product.
    of_logprob, of_entropy = (
        None if isinstance(x, SymbolicZero) else x.astype(jnp.float32) for x in cotangents
    )

    # One chunk: the gradients of its logits, then of its hidden states and of the head.
    def compute(head_sum: Array | None, chunk: dict[str, Array]) -> tuple[Array | None, Array]:
        hidden = chunk["hidden"]
        logits = _logits(hidden, ready, allowed, temperature)
        logprobs = logits - chunk["normaliser"][..., None]
        probabilities = jnp.exp(logprobs)
        logits_grad = jnp.zeros_like(logits)
        if of_logprob is not None:
            cotangent = chunk["of_logprob"][..., None]
            is_target = (ids == chunk["targets"][..., None]) & allowed
            logits_grad += jnp.where(is_target, cotangent, 0.0) - probabilities * cotangent
        if of_entropy is not None:
            cotangent = chunk["of_entropy"][..., None]
            logits_grad -= probabilities * cotangent * (logprobs + chunk["entropy"][..., None])
        logits_grad = (logits_grad / temperature).astype(hidden.dtype)
        hidden_grad = einsum("bnv,vd->bnd", logits_grad, ready)
        if head_sum is not None:
            # The head's gradient transposed: hidden states are cheaper to transpose than logits.
            by_part = (x.reshape(parts, rows // parts, *x.shape[1:]) for x in (hidden, logits_grad))
            head_sum += einsum("pbnd,pbnv->pdv", *by_part, preferred_element_type=jnp.float32)
            head_sum = layout.rows(head_sum, heads=2)
        return head_sum, hidden_grad

    # All chunks in turn, with the head's gradient as their running sum.
    chunks = {
        "hidden": hidden,
        "targets": targets,
        "entropy": entropy,
        "normaliser": normaliser,
        "of_logprob": of_logprob,
        "of_entropy": of_entropy,
    }
    head_sum = None
    if head_trains is not None:
        head_sum = layout.rows(jnp.zeros((parts, *head.shape[::-1]), jnp.float32), heads=2)

    head_sum, hidden_grad = _over_chunks(compute, head_sum, chunks, counted, layout)
    head_grad = None
    if head_sum is not None:
        heads = None if layout.head_dimension("head", head.shape) is None else 2
        head_grad = layout.summed(
            "head", head.shape, lambda own: jnp.sum(own, axis=0), [head_sum], [heads], turned=1
        )
        head_grad = head_grad.T.astype(head.dtype)
    return hidden_grad, head_grad, None, None, None, None


_chunked_logprobs.defvjp(_forward, _backward, symbolic_zeros=True)


def _logits(
    hidden: Float[Array, "b n d"],
    head: Float[Array, "v d"],
    allowed: Bool[Array, " v"],
    temperature: Float[Array, ""],
) -> Float[Array, "b n v"]:
    return jnp.where(allowed, plain_logits(hidden, head) / temperature, DISALLOWED)


def plain_logits(hidden: Float[Array, "*b d"], head: Float[Array, "v d"]) -> Float[Array, "*b v"]:
    """Returns float32 logits of every id."""
    return einsum(
        "...d,vd->...v", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32
    )
