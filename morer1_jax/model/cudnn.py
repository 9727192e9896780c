"""Attention over whole sequences on NVIDIA's GPUs: cuDNN's fused kernel.

It keeps no scores, but the masks go to it as a bias of each query and key, which all heads share.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from morer1_jax.model.attention import Keys, Queries, causal_mask, same

# What cuDNN computes: multiples of so many elements of a head, and at most so many.
HEAD_MULTIPLE, HEAD_MOST = 8, 128


@dataclasses.dataclass(frozen=True)
class CuDNN:
    """`attention.Kernels` by `jax.nn.dot_product_attention`; queries of 16 bits alone.

    Attributes:
      implementation: "xla" computes the same masks and products anywhere, for tests.
    """

    implementation: Literal["cudnn", "xla"] = "cudnn"

    def causal(self, q: Queries, k: Keys, v: Keys, segment_ids: Int[Array, "b s"]) -> Queries:
        return self._attend(q, k, v, same(segment_ids, segment_ids), causal=True)

    def full(self, q: Queries, k: Keys, v: Keys, segment_ids: Int[Array, "b s"]) -> Queries:
        return self._attend(q, k, v, same(segment_ids, segment_ids))

    def shared_prefix(
        self,
        q: Queries,
        k: Keys,
        v: Keys,
        prompt_mask: Bool[Array, "b p"],
        completion_mask: Bool[Array, "b g t"],
    ) -> Queries:
        """The completions as rows by themselves, each beside the prompt's keys and values.

        One kernel over both, not two merged: the log-sum-exp that a merge needs has no gradient
        there. The prompt's keys are repeated in memory, but no score of the prompt is.
        """
        p = prompt_mask.shape[1]
        b, g, t = completion_mask.shape
        prompt = self.causal(q[:, :p], k[:, :p], v[:, :p], prompt_mask.astype(jnp.int32))

        def beside(x: Array) -> Array:
            own = x[:, p:].reshape(b, g, t, *x.shape[2:])
            shared = jnp.broadcast_to(x[:, None, :p], (b, g, p, *x.shape[2:]))
            return jnp.concatenate([shared, own], axis=2).reshape(b * g, p + t, *x.shape[2:])

        sees_prompt = jnp.broadcast_to(prompt_mask[:, None, None], (b, g, t, p))
        # A token sees itself even where it is padding, so that every softmax has a term.
        sees_own = causal_mask(t) & (completion_mask[:, :, None, :] | jnp.eye(t, dtype=bool))
        visible = jnp.concatenate([sees_prompt, sees_own], axis=3).reshape(b * g, t, p + t)
        queries = q[:, p:].reshape(b * g, t, *q.shape[2:])
        out = self._attend(queries, beside(k), beside(v), visible)
        return jnp.concatenate([prompt, out.reshape(b, g * t, *q.shape[2:])], axis=1)

    def _attend(
        self,
        q: Queries,
        k: Keys,
        v: Keys,
        visible: Bool[Array, "b s u"],
        causal: bool = False,
    ) -> Queries:
        """The kernel; its gradient under a mask takes even lengths alone."""
        length, odd = q.shape[1], [(0, n % 2) for n in visible.shape[1:]]
        q, k, v = (
            jnp.pad(x, [(0, 0), more, (0, 0), (0, 0)])
            for x, more in ((q, odd[0]), (k, odd[1]), (v, odd[1]))
        )
        visible = jnp.pad(visible, [(0, 0), (0, 0), odd[1]])
        # A query that is added sees something, so that its softmax has a term.
        visible = jnp.pad(visible, [(0, 0), odd[0], (0, 0)], constant_values=True)
        out = jax.nn.dot_product_attention(
            q, k, v, mask=visible[:, None], is_causal=causal, implementation=self.implementation
        )
        return out[:, :length]
