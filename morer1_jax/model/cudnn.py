"""Attention over whole sequences on NVIDIA's GPUs: cuDNN's fused kernel, which keeps no scores."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from morer1_jax.model.attention import Keys, Queries, causal_mask, same


@dataclasses.dataclass(frozen=True)
class CuDNN:
    """`attention.Kernels` by `jax.nn.dot_product_attention`; queries of 16 bits alone.

    Attributes:
      implementation: "xla" computes the same masks and products anywhere, for tests.
    """

    implementation: Literal["cudnn", "xla"] = "cudnn"

    def causal(self, q: Queries, k: Keys, v: Keys, segment_ids: Int[Array, "b s"]) -> Queries:
        return self._attend(q, k, v, mask=same(segment_ids, segment_ids)[:, None], is_causal=True)

    def full(self, q: Queries, k: Keys, v: Keys, segment_ids: Int[Array, "b s"]) -> Queries:
        return self._attend(q, k, v, mask=same(segment_ids, segment_ids)[:, None])

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
        s = prompt_mask.shape[1]
        b, g, t = completion_mask.shape
        prompt = self.causal(q[:, :s], k[:, :s], v[:, :s], prompt_mask.astype(jnp.int32))

        def beside(x: Array) -> Array:
            own = x[:, s:].reshape(b, g, t, *x.shape[2:])
            shared = jnp.broadcast_to(x[:, None, :s], (b, g, s, *x.shape[2:]))
            return jnp.concatenate([shared, own], axis=2).reshape(b * g, s + t, *x.shape[2:])

        sees_prompt = jnp.broadcast_to(prompt_mask[:, None, None], (b, g, t, s))
        # A token sees itself even where it is padding, so that every softmax has a term.
        sees_own = causal_mask(t) & (completion_mask[:, :, None, :] | jnp.eye(t, dtype=bool))
        mask = jnp.concatenate([sees_prompt, sees_own], axis=3).reshape(b * g, 1, t, s + t)
        queries = q[:, s:].reshape(b * g, t, *q.shape[2:])
        out = self._attend(queries, beside(k), beside(v), mask=mask)
        return jnp.concatenate([prompt, out.reshape(b, g * t, *q.shape[2:])], axis=1)

    @property
    def _attend(self) -> functools.partial:
        return functools.partial(jax.nn.dot_product_attention, implementation=self.implementation)
