"""One-token decoding: the cache of keys and values, and how a new token attends to it.

The prompt's keys and values are held once and read once for all samples of the prompt (where few
samples are left, each has a copy); each sample owns those of its completion. Heads lead and keys
lie with their tokens last, values with their tokens first, so that both products read memory in
order and nothing is transposed in the loop.
Axes: l layers, b prompts, g samples of a prompt, n samples of all, s prompt, t completion, h query
heads, k key-value heads, r = h/k, e head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from morer1_jax.model.attention import HIDDEN_SCORE, scaled_scores
from morer1_jax.model.products import einsum
from morer1_jax.model.sharding import Layout
from morer1_jax.model.slots import Places, taken

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
    k: Float[Array, "*l n k e t"]
    v: Float[Array, "*l n k t e"]
    layer: Int[Array, ""] | None = None

    def written(
        self, k: Float[Array, "n k e"], v: Float[Array, "n k e"], index: Int[Array, ""]
    ) -> LayerKV:
        """Returns a copy with a token's keys and values at place `index` of the current layer."""
        lead = () if self.layer is None else (self.layer,)
        new_k, new_v = k[..., None], v[..., None, :]
        if lead:
            new_k, new_v = new_k[None], new_v[None]
        write = jax.lax.dynamic_update_slice
        return self.replace(
            k=write(self.k, new_k.astype(self.k.dtype), (*lead, 0, 0, 0, index)),
            v=write(self.v, new_v.astype(self.v.dtype), (*lead, 0, 0, index, 0)),
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
        places: of the samples that have slots; None where the samples of each prompt follow one
            another, as many as those of every other.
    """

    layers: LayerKV | tuple[LayerKV, ...]
    prompt_mask: Bool[Array, "b s"]
    index: Int[Array, ""]
    places: Places | None = None

    def grown(self, length: int) -> KVCache:
        """Returns a copy with room for completions of `length` tokens."""

        # Keys have their tokens last, values next to last.
        def pad(layer: LayerKV) -> LayerKV:
            added = length - layer.k.shape[-1]
            keys = [(0, 0)] * (layer.k.ndim - 1) + [(0, added)]
            values = [*keys[:-2], keys[-1], keys[-2]]
            return layer.replace(k=jnp.pad(layer.k, keys), v=jnp.pad(layer.v, values))

        return self._mapped(pad)

    def narrowed(self, slots: Int[Array, "p m"], layout: Layout) -> KVCache:
        """Returns a copy that keeps some of the slots.

        Prompts stay where they are, each read once for all its samples, until there are no more
        slots than prompts: then each slot gets a copy of its own.

        Args:
            slots: those that are kept, of each part of the mesh's rows; see `model.slots`.
            layout: of rows and heads on the mesh.
        """
        parts, rows = len(slots), len(self.prompt_mask)
        if self.places is None:
            k = jax.tree.leaves(self.layers, is_leaf=_is_layer)[0].k
            sample, samples = slots, k.shape[-4] // parts
        else:
            sample = jnp.take_along_axis(self.places.sample, slots, axis=1)
            samples = self.places.slot.shape[1]
        prompt = sample // (samples * parts // rows)
        own_prompts = slots.size <= rows

        def kept(x: Array, index: Array) -> Array:
            axis = x.ndim - 4  # after that of layers
            return layout.rows(taken(x, index, axis), heads=axis + 1, axis=axis)

        def of_layer(layer: LayerKV) -> LayerKV:
            layer = layer.replace(k=kept(layer.k, slots), v=kept(layer.v, slots))
            if not own_prompts:
                return layer
            return layer.replace(
                prompt_k=kept(layer.prompt_k, prompt), prompt_v=kept(layer.prompt_v, prompt)
            )

        return self._mapped(of_layer).replace(
            prompt_mask=taken(self.prompt_mask, prompt) if own_prompts else self.prompt_mask,
            places=None if own_prompts else Places.of(sample, samples),
        )

    def _mapped(self, change: Callable[[LayerKV], LayerKV]) -> KVCache:
        return self.replace(layers=jax.tree.map(change, self.layers, is_leaf=_is_layer))


def _is_layer(x: Any) -> bool:
    return isinstance(x, LayerKV)


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
        room, rows = (*leading, b * group, heads), len(leading)
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
        places: as in `KVCache`; where there are any, b counts slots, and g is 1.
    """

    prompt_mask: Bool[Array, "rows s"]
    index: Int[Array, ""]
    places: Places | None = None

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
        kv_heads, e = k.shape[-2:]
        # Written first, so that the token sees itself.
        cache = cache.written(k.reshape(-1, kv_heads, e), v.reshape(-1, kv_heads, e), self.index)
        prompt_k, prompt_v, own_k, own_v = cache.current(q.dtype)
        queries = q.reshape(-1, kv_heads, q.shape[2] // kv_heads, e)
        to_prompt = scaled_scores("bkgre,bkes->bkgrs", self._by_prompt(queries), prompt_k)
        to_own = scaled_scores("nkre,nket->nkrt", queries, own_k)
        to_prompt = jnp.where(self.prompt_mask[:, None, None, None], to_prompt, HIDDEN_SCORE)
        to_own = jnp.where(jnp.arange(own_k.shape[-1]) <= self.index, to_own, HIDDEN_SCORE)
        # One softmax over both, whose scores are never joined in memory.
        largest = jnp.maximum(
            self._by_sample(jnp.max(to_prompt, axis=-1, keepdims=True)),
            jnp.max(to_own, axis=-1, keepdims=True),
        )
        to_prompt = jnp.exp(to_prompt - self._by_prompt(largest))
        to_own = jnp.exp(to_own - largest)
        total = self._by_sample(jnp.sum(to_prompt, -1, keepdims=True))
        total += jnp.sum(to_own, -1, keepdims=True)
        out = self._by_sample(_weighted_values("bkgrs,bkse->bkgre", to_prompt, prompt_v))
        out += _weighted_values("nkrt,nkte->nkre", to_own, own_v)
        return (out / total).astype(q.dtype).reshape(q.shape), cache.following()

    def _by_prompt(self, x: Float[Array, "n k r y"]) -> Float[Array, "rows k g r y"]:
        """Returns what each sample has, prompt by prompt."""
        x = x if self.places is None else self.places.by_sample(x)
        return jnp.moveaxis(x.reshape(len(self.prompt_mask), -1, *x.shape[1:]), 1, 2)

    def _by_sample(self, x: Float[Array, "rows k g r y"]) -> Float[Array, "n k r y"]:
        """Undoes `_by_prompt`."""
        x = jnp.moveaxis(x, 2, 1)
        x = x.reshape(-1, *x.shape[2:])
        return x if self.places is None else self.places.by_slot(x)


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
