"""Log-probabilities of given tokens, without the logits of a whole sequence.

`[batch, length, vocabulary]` logits are the largest array there would be. They are made for a few
places at a time, forward and again backward, and only what is asked for is kept of them. Axes: b
rows, n places of a chunk, d model, v vocabulary.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int

from morer1_jax.model.products import einsum

# Stands for -inf in logits: its exponential is exactly 0, yet 0 times it is 0 and not NaN,
# so a masked-out position whose target is not allowed leaves loss and gradient finite.
DISALLOWED = -1e30

Numbers = tuple[Float[Array, "*b"], Float[Array, "*b"]]


def token_logprobs(
    hidden: Float[Array, "b s d"],
    head: Float[Array, "v d"],
    targets: Int[Array, "b s"],
    *,
    counted: Bool[Array, "b s"] | None = None,
    allowed: Bool[Array, " v"] | None = None,
    temperature: float | Float[Array, ""] = 1.0,
    chunk: int = 128,
) -> Numbers:
    """Float32 log-probability of each target and entropy of its distribution, in nats.

    Worked out `chunk` places at a time, forward and backward. Places that are not `counted`
    (prompts, padding; by default all are) get 0 for both, and no logits but to fill the last chunk.
    Logits are divided by `temperature`, then ids that are not `allowed` are left out of the
    distribution; the log-probability of such a target is about -1e30, finite so that a mask can
    take it out. There is a gradient by `hidden` and `head`, none by `temperature`.
    """
    b, s, _ = hidden.shape
    chunk = min(chunk, s)
    if counted is None:
        counted = jnp.ones((b, s), bool)
    if allowed is None:
        allowed = jnp.ones(head.shape[0], bool)
    # What counts goes first in each row, so that only the first chunks have work.
    order = jnp.argsort(~counted, axis=1, stable=True)
    hidden = jnp.take_along_axis(hidden, order[..., None], axis=1)
    targets, some = (jnp.take_along_axis(x, order, axis=1) for x in (targets, counted))

    def chunked(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, -s % chunk), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(b, -1, chunk, *x.shape[2:]), 1, 0)

    temperature = jnp.asarray(temperature, jnp.float32)
    results = _chunks_numbers(
        chunked(hidden), head, chunked(targets), chunked(some), allowed, temperature
    )
    back = jnp.argsort(order, axis=1)
    logprob, entropy = (
        jnp.take_along_axis(jnp.moveaxis(x, 0, 1).reshape(b, -1)[:, :s], back, axis=1)
        for x in results
    )
    return jnp.where(counted, logprob, 0.0), jnp.where(counted, entropy, 0.0)


@jax.custom_vjp
def _chunks_numbers(
    hidden: Float[Array, "chunks b n d"],
    head: Float[Array, "v d"],
    targets: Int[Array, "chunks b n"],
    some: Bool[Array, "chunks b n"],
    allowed: Bool[Array, " v"],
    temperature: Float[Array, ""],
) -> tuple[Float[Array, "chunks b n"], Float[Array, "chunks b n"]]:
    """Log-probabilities and entropies; chunks without a place that counts are passed over.

    Its gradient is written out, since it is short: with logits l, probabilities p, log-normaliser
    z and entropy H, log p(y) has the gradient 1[i = y] - p_i by l_i, and H has -p_i (l_i - z + H).
    Logits are made once more, z and H are kept.
    """
    logprob, entropy, _ = _chunks_forward(hidden, head, targets, some, allowed, temperature)
    return logprob, entropy


def _chunks_forward(
    hidden: Array, head: Array, targets: Array, some: Array, allowed: Array, temperature: Array
) -> tuple[Array, Array, Array]:
    """Log-probabilities, entropies and log-normalisers."""

    def numbers(hidden: Array, targets: Array) -> tuple[Array, Array, Array]:
        logits = _logits(hidden, head, allowed, temperature)
        largest = jnp.max(logits, axis=-1)
        weights = jnp.exp(logits - largest[..., None])
        total = jnp.sum(weights, axis=-1)
        normaliser = largest + jnp.log(total)
        # Ids that are left out have weight 0 and a finite logit.
        entropy = normaliser - jnp.sum(weights * logits, axis=-1) / total
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return chosen - normaliser, entropy, normaliser

    def nothing(hidden: Array, targets: Array) -> tuple[Array, Array, Array]:
        return (jnp.zeros(targets.shape, jnp.float32),) * 3

    return jax.lax.map(
        lambda part: jax.lax.cond(jnp.any(part[2]), numbers, nothing, *part[:2]),
        (hidden, targets, some),
    )


def _forward(*primals: Any) -> tuple[Numbers, tuple[Any, ...]]:
    hidden, head, targets, some, allowed, temperature = (x.value for x in primals)
    logprob, entropy, normaliser = _chunks_forward(
        hidden, head, targets, some, allowed, temperature
    )
    # A head that does not train needs no gradient, the costliest of all; None says so.
    trains = jnp.zeros(()) if primals[1].perturbed else None
    saved = (hidden, head, targets, some, allowed, temperature, entropy, normaliser, trains)
    return (logprob, entropy), saved


def _backward(saved: tuple[Any, ...], cotangents: tuple[Any, Any]) -> tuple[Any, ...]:
    hidden, head, targets, some, allowed, temperature, entropy, normaliser, trains = saved
    ids = jnp.arange(head.shape[0])
    by_logprob, by_entropy = (
        None if isinstance(x, SymbolicZero) else x.astype(jnp.float32) for x in cotangents
    )

    def gradients(total: Array | None, part: dict[str, Array]) -> tuple[Array | None, Array]:
        hidden = part["hidden"]
        logits = _logits(hidden, head, allowed, temperature)
        logprobs = logits - part["normaliser"][..., None]
        share = jnp.exp(logprobs)
        by_logits = jnp.zeros_like(logits)
        if by_logprob is not None:
            given = part["by_logprob"][..., None]
            target = (ids == part["targets"][..., None]) & allowed
            by_logits += jnp.where(target, given, 0.0) - share * given
        if by_entropy is not None:
            by_logits -= (
                share * part["by_entropy"][..., None] * (logprobs + part["entropy"][..., None])
            )
        by_logits = (by_logits / temperature).astype(hidden.dtype)
        by_hidden = einsum("bnv,vd->bnd", by_logits, head.astype(hidden.dtype))
        if total is not None:
            # The transpose of what is wanted: states are cheaper to turn than logits.
            total += einsum("bnd,bnv->dv", hidden, by_logits, preferred_element_type=jnp.float32)
        return total, by_hidden

    def nothing(total: Array | None, part: dict[str, Array]) -> tuple[Array | None, Array]:
        return total, jnp.zeros_like(part["hidden"])

    parts = {
        "hidden": hidden,
        "targets": targets,
        "some": some,
        "entropy": entropy,
        "normaliser": normaliser,
        "by_logprob": by_logprob,
        "by_entropy": by_entropy,
    }
    total = None if trains is None else jnp.zeros(head.shape[::-1], jnp.float32)
    total, by_hidden = jax.lax.scan(
        lambda total, part: jax.lax.cond(jnp.any(part["some"]), gradients, nothing, total, part),
        total,
        parts,
    )
    by_head = None if total is None else total.T.astype(head.dtype)
    return by_hidden, by_head, None, None, None, None


_chunks_numbers.defvjp(_forward, _backward, symbolic_zeros=True)


def _logits(
    hidden: Float[Array, "b n d"],
    head: Float[Array, "v d"],
    allowed: Bool[Array, " v"],
    temperature: Float[Array, ""],
) -> Float[Array, "b n v"]:
    return jnp.where(allowed, plain_logits(hidden, head) / temperature, DISALLOWED)


def plain_logits(hidden: Float[Array, "*b d"], head: Float[Array, "v d"]) -> Float[Array, "*b v"]:
    """Float32 logits of every id."""
    return einsum(
        "...d,vd->...v", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32
    )
