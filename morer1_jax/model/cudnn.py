"""Attention over whole sequences on NVIDIA's GPUs: cuDNN's fused kernel.

The kernel keeps no scores, but takes masks as a bias of each query and key, which all heads share.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from morer1_jax.model.attention import Keys, Queries, causal_mask, same_segment
from morer1_jax.model.rotary import Rotary, rotate

# Head sizes that cuDNN computes: multiples of the first, up to the second.
HEAD_MULTIPLE, HEAD_MAX = 8, 128


@dataclasses.dataclass(frozen=True)
class CuDNN:
    """`attention.Kernels` by `jax.nn.dot_product_attention`, for queries of 16 bits.

    Attributes:
        implementation: "xla" computes the same masks and products on any platform, for tests.
    """

    implementation: Literal["cudnn", "xla"] = "cudnn"

    def rotate(self, x: Float[Array, "*s h e"], rotary: Rotary) -> Float[Array, "*s h e"]:
        """Rotates half by half."""
        return rotate(x, rotary)

    def causal(self, q: Queries, k: Keys, v: Keys, segment_ids: Int[Array, "b s"]) -> Queries:
        """Attends under the segments' mask and the kernel's own causal one."""
        return self._attend(q, k, v, same_segment(segment_ids, segment_ids), causal=True)

    def full(self, q: Queries, k: Keys, v: Keys, segment_ids: Int[Array, "b s"]) -> Queries:
        """Attends under the segments' mask."""
        return self._attend(q, k, v, same_segment(segment_ids, segment_ids))

    def shared_prefix(
        self,
        q: Queries,
        k: Keys,
        v: Keys,
        prompt_mask: Bool[Array, "b p"],
        completion_mask: Bool[Array, "b g t"],
    ) -> Queries:
        """Attends from completions as rows of their own, beside the prompt's keys and values.

        One kernel runs over both, not two that are merged: the log-sum-exp that a merge needs has
        no gradient in cuDNN. The prompt's keys are repeated in memory, but not its scores.
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
        """Runs the kernel over even lengths, the only ones its gradient takes under a mask."""
        length = q.shape[1]
        query_padding, key_padding = ((0, n % 2) for n in visible.shape[1:])
        q, k, v = (
            jnp.pad(x, [(0, 0), padding, (0, 0), (0, 0)])
            for x, padding in ((q, query_padding), (k, key_padding), (v, key_padding))
        )
        visible = jnp.pad(visible, [(0, 0), (0, 0), key_padding])
        # A query of the padding sees every key, so that its softmax has a term.
        visible = jnp.pad(visible, [(0, 0), query_padding, (0, 0)], constant_values=True)
        out = jax.nn.dot_product_attention(
            q, k, v, mask=visible[:, None], is_causal=causal, implementation=self.implementation
        )
        return out[:, :length]
