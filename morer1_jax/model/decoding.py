"""One-token decoding: the cache of keys and values, and how a new token attends to it.

The prompt's keys and values are held once and read once for all samples of the prompt; each sample
owns those of its completion. Heads lead and keys lie with their tokens last, values with their
tokens first, so that both products read memory in order and nothing is transposed in the loop.
Axes: l layers, b batch, g samples of a prompt, s prompt, t completion, h query heads, k key-value
heads, r = h/k, e head size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from morer1_jax.model.attention import HIDDEN_SCORE, scaled_scores
from morer1_jax.model.products import einsum
from morer1_jax.model.sharding import Layout

KV = tuple[Float[Array, "*l b s k e"], Float[Array, "*l b s k e"]]
"""Keys (rotated) and values of a sequence, of one layer or of all layers stacked."""


@struct.dataclass
class LayerKV:
    """Keys and values of one layer, or of all layers stacked.

    Stacked, they stay whole in the carry of the scan over layers, so that each layer writes one
    token's slice in place; as a scan's input and output they would be copied every token.

    Attributes:
        prompt_k: keys of the prompts, rotated.
        k: keys of the completions, rotated; zero, like `v`, where no token has been written.
        layer: int32, the current layer of the stack; None where there is one layer.
    """

    prompt_k: Float[Array, "*l b k e s"]
    prompt_v: Float[Array, "*l b k s e"]
    k: Float[Array, "*l b k g e t"]
    v: Float[Array, "*l b k g t e"]
    layer: Int[Array, ""] | None = None

    def written(
        self, k: Float[Array, "b k g e"], v: Float[Array, "b k g e"], index: Int[Array, ""]
    ) -> LayerKV:
        """Returns a copy with a token's keys and values at place `index` of the current layer."""
        lead = () if self.layer is None else (self.layer,)
        new_k, new_v = k[..., None], v[..., None, :]
        if lead:
            new_k, new_v = new_k[None], new_v[None]
        write = jax.lax.dynamic_update_slice
        return self.replace(
            k=write(self.k, new_k.astype(self.k.dtype), (*lead, 0, 0, 0, 0, index)),
            v=write(self.v, new_v.astype(self.v.dtype), (*lead, 0, 0, 0, index, 0)),
        )

    def current(self, dtype: jnp.dtype) -> tuple[Array, Array, Array, Array]:
        """Returns (prompt_k, prompt_v, k, v) of the current layer, cast to `dtype`."""
        arrays = (self.prompt_k, self.prompt_v, self.k, self.v)
        if self.layer is not None:
            arrays = (jax.lax.dynamic_index_in_dim(x, self.layer, keepdims=False) for x in arrays)
        return tuple(x.astype(dtype) for x in arrays)

    def following(self) -> LayerKV:
        """Returns a copy whose current layer is the next one."""
        return self if self.layer is None else self.replace(layer=self.layer + 1)


@struct.dataclass
class KVCache:
    """Keys and values of the prompts and of the completions so far.

    Attributes:
        layers: stacked, or one entry a layer.
        index: int32, the completion place that the next token is written to, the same for every
            sample.
    """

    layers: LayerKV | tuple[LayerKV, ...]
    prompt_mask: Bool[Array, "b s"]
    index: Int[Array, ""]

    def grown(self, length: int) -> KVCache:
        """Returns a copy with room for completions of `length` tokens."""

        # Keys have their tokens last, values next to last.
        def pad(layer: LayerKV) -> LayerKV:
            added = length - layer.k.shape[-1]
            keys = [(0, 0)] * (layer.k.ndim - 1) + [(0, added)]
            values = [*keys[:-2], keys[-1], keys[-2]]
            return layer.replace(k=jnp.pad(layer.k, keys), v=jnp.pad(layer.v, values))

        is_layer = lambda x: isinstance(x, LayerKV)  # noqa: E731
        return self.replace(layers=jax.tree.map(pad, self.layers, is_leaf=is_layer))


def init_cache(
    prompt_kv: KV | tuple[KV, ...],
    prompt_mask: Bool[Array, "b s"],
    *,
    group: int,
    length: int,
    layout: Layout | None = None,
) -> KVCache:
    """Returns a cache that holds the prompts and no token of their completions.

    Args:
        prompt_kv: of `forward(..., keep_kv=True)` for the prompts; the cache's layers are stacked
            or apart as these are.
        group: samples of each prompt, g.
        length: tokens of each completion that there is room for, t.
        layout: of rows and heads on the mesh; None: one device.
    """

    def of_layers(k: Array, v: Array) -> LayerKV:
        *leading, b, _, heads, size = k.shape
        room, rows = (*leading, b, heads, group), len(leading)
        layers = LayerKV(
            prompt_k=jnp.moveaxis(k, -3, -1),
            prompt_v=jnp.moveaxis(v, -3, -2),
            k=jnp.zeros((*room, size, length), k.dtype),
            v=jnp.zeros((*room, length, size), v.dtype),
        )
        place = layout or Layout()
        return jax.tree.map(lambda x: place.rows(x, heads=rows + 1, axis=rows), layers)

    if isinstance(prompt_kv[0], tuple):
        layers: LayerKV | tuple[LayerKV, ...] = tuple(of_layers(*kv) for kv in prompt_kv)
    else:
        layers = of_layers(*prompt_kv).replace(layer=jnp.zeros((), jnp.int32))
    return KVCache(layers, prompt_mask, jnp.zeros((), jnp.int32))


@struct.dataclass
class Cached:
    """The pattern of one new token of each of g samples; `q`, `k`, `v` carry g in place of s.

    Attributes:
        index: int32, the token's place in its completion.
    """

    prompt_mask: Bool[Array, "b s"]
    index: Int[Array, ""]

    def __call__(
        self,
        q: Float[Array, "b g h e"],
        k: Float[Array, "b g k e"],
        v: Float[Array, "b g k e"],
        cache: LayerKV,
    ) -> tuple[Float[Array, "b g h e"], LayerKV]:
        """Writes the token's keys and values at `index`, then attends from it.

        It sees the valid tokens of the prompt, and its own completion up to and including itself.
        """
        b, g, _, e = q.shape
        kv_heads = k.shape[-2]
        # Written first, so that the token sees itself.
        cache = cache.written(jnp.moveaxis(k, 2, 1), jnp.moveaxis(v, 2, 1), self.index)
        prompt_k, prompt_v, own_k, own_v = cache.current(q.dtype)
        queries = jnp.moveaxis(q.reshape(b, g, kv_heads, -1, e), 2, 1)
        to_prompt = scaled_scores("bkgre,bkes->bkgrs", queries, prompt_k)
        to_own = scaled_scores("bkgre,bkget->bkgrt", queries, own_k)
        to_prompt = jnp.where(self.prompt_mask[:, None, None, None], to_prompt, HIDDEN_SCORE)
        to_own = jnp.where(jnp.arange(own_k.shape[-1]) <= self.index, to_own, HIDDEN_SCORE)
        # One softmax over both, whose scores are never joined in memory.
        largest = jnp.maximum(
            jnp.max(to_prompt, axis=-1, keepdims=True), jnp.max(to_own, axis=-1, keepdims=True)
        )
        to_prompt, to_own = jnp.exp(to_prompt - largest), jnp.exp(to_own - largest)
        total = jnp.sum(to_prompt, -1, keepdims=True) + jnp.sum(to_own, -1, keepdims=True)
        out = _weighted_values("bkgrs,bkse->bkgre", to_prompt, prompt_v)
        out += _weighted_values("bkgrt,bkgte->bkgre", to_own, own_v)
        out = (out / total).astype(q.dtype)
        return jnp.moveaxis(out, 1, 2).reshape(q.shape), cache.following()


def _weighted_values(axes: str, weights: Array, v: Array) -> Array:
    return einsum(axes, weights.astype(v.dtype), v, preferred_element_type=jnp.float32)


def separate_layers(params: dict) -> dict:
    """Returns a model's parameters with the decoder's layers apart, for decoding without a scan.

    Call it once, outside the loop over tokens: inside it a layer's slice of stacked kernels would
    be copied every token.

    Args:
        params: the whole tree; a leaf of the stacked layers may be a tuple, an entry for each.
    """
    is_tuple = lambda x: isinstance(x, tuple)  # noqa: E731
    language = dict(params["language"])
    stacked = language.pop("layers")
    for i in range(len(jax.tree.leaves(stacked, is_leaf=is_tuple)[0])):
        language[f"layer_{i}"] = jax.tree.map(lambda x, i=i: x[i], stacked, is_leaf=is_tuple)
    return {**params, "language": language}
