"""Attention patterns: which token attends to which.

A decoder layer computes queries, keys and values and hands them to a pattern,
`attend(q, k, v, cache) -> (out, cache)`; it does not know which one it got.  Axes: b batch,
s sequence, h query heads, k key-value heads, r = h/k query heads a key-value head, e head size,
g group (samples of one prompt), t completion.

    PackedCausal          SharedPrefix (G = 2)
      1 1 2 2 0             p p a a b b
    1 x                   p x
    1 x x                 p x x
    2     x               a x x x
    2     x x             a x x x x
    0         x           b x x     x
                          b x x     x x

A third, `Cached`, is in `model.decoding`: one token of each sample.

A pattern says which keys a query attends to ("sees"); its `Kernels` compute it.  `XLA`, here, runs
on every backend and is the reference that `model.splash` and `model.cudnn` are tested against.
Softmax is in float32 everywhere.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from morer1_jax.model.products import einsum
from morer1_jax.model.rotary import Rotary, rotate

# Finite, so that a token which sees nothing (padding) gets a finite output and no NaN.
HIDDEN_SCORE = -1e30
# Blocks of queries that a causal pattern is cut into: three save a third of the scores, six little
# more at twice the time to compile. Products of smaller blocks take longer than what they save.
_BLOCKS, _MIN_BLOCK = 3, 128

Queries = Float[Array, "b s h e"]
Keys = Float[Array, "b s k e"]


@runtime_checkable
class Kernels(Protocol):
    """How attention is computed on a platform; hashable, since it is a static argument of programs.

    Outputs at padding are finite; their values may differ between kernels.
    """

    def rotate(self, x: Float[Array, "*s h e"], rotary: Rotary) -> Float[Array, "*s h e"]:
        """Rotates queries or keys by their positions; see `rotary.rotate`."""
        ...

    def causal(self, q: Queries, k: Keys, v: Keys, segment_ids: Int[Array, "b s"]) -> Queries:
        """Attends from each token to itself and to earlier tokens of its own segment."""
        ...

    def full(self, q: Queries, k: Keys, v: Keys, segment_ids: Int[Array, "b s"]) -> Queries:
        """Attends from each token to every token of its own segment."""
        ...

    def shared_prefix(
        self,
        q: Queries,
        k: Keys,
        v: Keys,
        prompt_mask: Bool[Array, "b p"],
        completion_mask: Bool[Array, "b g t"],
    ) -> Queries:
        """Attends as `SharedPrefix` says; s = p + g·t."""
        ...


@dataclasses.dataclass(frozen=True)
class XLA:
    """`Kernels` of plain products and softmax, as the compiler fuses them."""

    def rotate(self, x: Float[Array, "*s h e"], rotary: Rotary) -> Float[Array, "*s h e"]:
        """Rotates half by half."""
        return rotate(x, rotary)

    def causal(self, q: Queries, k: Keys, v: Keys, segment_ids: Int[Array, "b s"]) -> Queries:
        """Attends in blocks of queries; see `causal_attention`."""
        causal = causal_mask(segment_ids.shape[1])

        def visible(queries: slice, keys: slice) -> Bool[Array, "b s u"]:
            of_segment = same_segment(segment_ids[:, queries], segment_ids[:, keys])
            return of_segment & causal[queries, keys]

        return causal_attention(q, k, v, visible)

    def full(self, q: Queries, k: Keys, v: Keys, segment_ids: Int[Array, "b s"]) -> Queries:
        """Attends under a dense mask."""
        return masked_attention(q, k, v, same_segment(segment_ids, segment_ids))

    def shared_prefix(
        self,
        q: Queries,
        k: Keys,
        v: Keys,
        prompt_mask: Bool[Array, "b p"],
        completion_mask: Bool[Array, "b g t"],
    ) -> Queries:
        """Attends to the prompt's keys, held once a group, and to the completion's own."""
        p = prompt_mask.shape[1]
        b, g, t = completion_mask.shape
        e = q.shape[-1]
        prompt_k, prompt_v = k[:, :p], v[:, :p]
        own_k, own_v = (x[:, p:].reshape(b, g, t, -1, e) for x in (k, v))
        # The prompt by itself. Causality alone hides padding on the right, but not on the left.
        causal = causal_mask(p)
        prompt_out = causal_attention(
            q[:, :p],
            prompt_k,
            prompt_v,
            lambda queries, keys: prompt_mask[:, None, keys] & causal[queries, keys],
        )

        # The completions. Heads lead, as in `masked_attention`.
        queries = _group_heads(q[:, p:].reshape(b, g, t, -1, e), own_k.shape[-2])
        queries = jnp.transpose(queries, (0, 3, 1, 4, 2, 5))
        prompt_k, prompt_v = _heads_first(prompt_k), _heads_first(prompt_v)
        own_k, own_v = (jnp.transpose(x, (0, 3, 1, 2, 4)) for x in (own_k, own_v))
        to_prompt = scaled_scores("bkgrte,bkpe->bkgrtp", queries, prompt_k)
        to_own = scaled_scores("bkgrte,bkgue->bkgrtu", queries, own_k)
        own_visible = completion_mask[:, :, None, :] & causal_mask(t)
        to_prompt = jnp.where(prompt_mask[:, None, None, None, None], to_prompt, HIDDEN_SCORE)
        to_own = jnp.where(own_visible[:, None, :, None], to_own, HIDDEN_SCORE)

        # Their outputs, from one softmax over both scores.
        weights = jax.nn.softmax(jnp.concatenate([to_prompt, to_own], axis=-1), axis=-1)
        weights = weights.astype(q.dtype)
        out = einsum("bkgrtp,bkpe->bkgrte", weights[..., :p], prompt_v)
        out += einsum("bkgrtu,bkgue->bkgrte", weights[..., p:], own_v)
        out = jnp.transpose(out, (0, 2, 4, 1, 3, 5)).reshape(b, g * t, *q.shape[2:])
        return jnp.concatenate([prompt_out, out], axis=1)


@runtime_checkable
class Pattern(Protocol):
    """An attention pattern as a decoder layer calls it."""

    def __call__(self, q: Queries, k: Keys, v: Keys, cache: Any) -> tuple[Queries, Any]:
        """Returns the attention's output, and the layer's cache with the new keys and values."""
        ...


@struct.dataclass
class PackedCausal:
    """Samples packed in a row: a token sees itself and earlier tokens of its own segment.

    Attributes:
        segment_ids: 0 is padding, which sees only padding and is seen by nothing else.
    """

    segment_ids: Int[Array, "b s"]
    kernels: Kernels = struct.field(pytree_node=False, default=XLA())

    def __call__(self, q: Queries, k: Keys, v: Keys, cache: Any = None) -> tuple[Queries, Any]:
        """Attends over whole rows; the cache passes through."""
        return self.kernels.causal(q, k, v, self.segment_ids), cache


@struct.dataclass
class SharedPrefix:
    """Rows of [prompt (p) | completion 1 (t) | … | completion g (t)], length p + g·t.

    Prompt tokens are causal among themselves; a completion's tokens see the whole valid prompt
    and their own completion causally.  Equals running each [prompt | completion] by itself,
    in value and gradient, without scores between completions.  Masks are True for valid tokens.
    """

    prompt_mask: Bool[Array, "b p"]
    completion_mask: Bool[Array, "b g t"]
    kernels: Kernels = struct.field(pytree_node=False, default=XLA())

    def __call__(self, q: Queries, k: Keys, v: Keys, cache: Any = None) -> tuple[Queries, Any]:
        """Attends over whole rows; the cache passes through."""
        out = self.kernels.shared_prefix(q, k, v, self.prompt_mask, self.completion_mask)
        return out, cache


def masked_attention(
    q: Float[Array, "b s h e"],
    k: Float[Array, "b u k e"],
    v: Float[Array, "b u k e"],
    visible: Bool[Array, "b s u"],
) -> Float[Array, "b s h e"]:
    """Computes grouped-query attention under a dense mask, without materialising repeated keys."""
    # Heads lead, so that both products are plain batches of matrices: on a CPU a quarter faster.
    q, k, v = _heads_first(_group_heads(q, k.shape[-2])), _heads_first(k), _heads_first(v)
    scores = scaled_scores("bkrse,bkue->bkrsu", q, k)
    scores = jnp.where(visible[:, None, None], scores, HIDDEN_SCORE)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    out = einsum("bkrsu,bkue->bkrse", weights, v)
    b, _, _, s, e = out.shape
    return jnp.moveaxis(out, 3, 1).reshape(b, s, -1, e)


def causal_attention(
    q: Queries, k: Keys, v: Keys, visible: Callable[[slice, slice], Bool[Array, "b s u"]]
) -> Queries:
    """Computes `masked_attention` where no token sees a later one.

    It runs by blocks of queries, each with the keys up to its end, so that most scores that a mask
    would hide are never computed.

    Args:
        visible: returns the mask between a block of queries and a block of keys, causality
            included.
    """
    length = q.shape[1]
    count = max(1, min(_BLOCKS, length // _MIN_BLOCK))
    edges = [round(i * length / count) for i in range(count + 1)]
    blocks = []
    for start, stop in itertools.pairwise(edges):
        queries, keys = slice(start, stop), slice(0, stop)
        mask = visible(queries, keys)
        blocks.append(masked_attention(q[:, queries], k[:, keys], v[:, keys], mask))
    return jnp.concatenate(blocks, axis=1)


def _heads_first(x: Float[Array, "b s *k e"]) -> Float[Array, "b *k s e"]:
    return jnp.moveaxis(x, 1, -2)


def _group_heads(q: Float[Array, "*s h e"], kv_heads: int) -> Float[Array, "*s k r e"]:
    return q.reshape(*q.shape[:-2], kv_heads, -1, q.shape[-1])


def scaled_scores(axes: str, q: Array, k: Array) -> Array:
    """Returns float32 products of queries and keys, divided by the root of `q`'s last axis."""
    scale = q.shape[-1] ** -0.5
    return einsum(axes, q, k, preferred_element_type=jnp.float32) * scale


def causal_mask(length: int) -> Bool[Array, "s s"]:
    """Returns which tokens (columns) a token (row) sees: itself and those before it."""
    return jnp.tril(jnp.ones((length, length), bool))


def same_segment(query_ids: Int[Array, "b s"], key_ids: Int[Array, "b u"]) -> Bool[Array, "b s u"]:
    """Returns which queries and keys are of one segment."""
    return query_ids[:, :, None] == key_ids[:, None, :]
