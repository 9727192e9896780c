"""The decoder: grouped-query attention with M-RoPE and SwiGLU, scanned over layers.

One definition serves whole sequences and one-token decoding; they differ in the attention
pattern that is passed in and in what the scan carries (`morer1_jax.model.attention`).  Axes: b
batch, s sequence (g samples of one prompt when decoding), d model.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from morer1_jax.model.attention import Pattern
from morer1_jax.model.config import LoRA, Runtime, TextConfig
from morer1_jax.model.cpu import cos_sin
from morer1_jax.model.decoding import KV
from morer1_jax.model.layers import (
    Params,
    SwiGLU,
    dense,
    rematerialised,
    rms_norm,
    scanned,
)
from morer1_jax.model.rotary import Rotary
from morer1_jax.model.running import SUMS, run_layers


class DecoderLayer(nn.Module):
    """Pre-norm attention and SwiGLU, in the form that `layers.scanned` repeats."""

    config: TextConfig
    runtime: Runtime
    lora: LoRA | None
    keep_kv: bool

    @nn.compact
    def __call__(
        self, carry: tuple[Float[Array, "b s d"], Any], rotary: Rotary, attend: Pattern
    ) -> tuple[tuple[Float[Array, "b s d"], Any], tuple[Array, Array] | None]:
        """Returns the carry, (x, the attention pattern's cache), and (k, v) with `keep_kv`."""
        cfg, run, std = self.config, self.runtime, self.config.initializer_range
        x, cache = carry
        x = run.layout.rows(x)
        y = rms_norm(cfg.rms_norm_eps, run, name="input_norm")(x)
        # Keys are rotated before they are cached, since their positions never change.
        q_heads = (cfg.num_attention_heads, cfg.head_dim)
        kv_heads = (cfg.num_key_value_heads, cfg.head_dim)
        linear = functools.partial(dense, runtime=run, std=std, lora=self.lora)
        q = run.kernels.rotate(linear(q_heads, name="q", bias=True)(y), rotary)
        k = run.kernels.rotate(linear(kv_heads, name="k", bias=True)(y), rotary)
        v = linear(kv_heads, name="v", bias=True)(y)
        q, k, v = run.layout.heads(q, k, v)
        y, cache = attend(q, k, v, cache)
        x = x + linear(cfg.hidden_size, name="o", axis=(-2, -1))(y)
        sizes = (cfg.hidden_size, cfg.intermediate_size)
        mlp = SwiGLU(*sizes, std, run, lora=self.lora, name="mlp")
        x = x + mlp(rms_norm(cfg.rms_norm_eps, run, name="post_attention_norm")(x))
        x = run.layout.rows(x)
        return (x, cache), ((k, v) if self.keep_kv else None)


class Decoder(nn.Module):
    """The decoder's layers and its final norm."""

    config: TextConfig
    runtime: Runtime
    lora: LoRA | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b s d"],
        positions: Int[Array, "3 b s"],
        attend: Pattern,
        cache: Any = None,
        keep_kv: bool = False,
    ) -> tuple[Float[Array, "b s d"], Any, KV | tuple[KV, ...] | None]:
        """Runs all layers.

        Args:
            x: embeddings, in the runtime's dtype.
            positions: int32, of time, height and width (M-RoPE).
            cache: the pattern's, of all layers; a tuple with an entry for each where the layers'
                parameters are apart (`decoding.separate_layers`).
            keep_kv: whether to return keys and values.

        Returns:
            Hidden states after the final norm, the pattern's cache, and every layer's keys and
            values (stacked, or a tuple where the parameters are apart) or None.
        """
        cfg, run = self.config, self.runtime
        rotary = multimodal_rotary(positions, cfg)
        norm = rms_norm(cfg.rms_norm_eps, run, name="norm")
        # Layers apart, in a plain loop (`Runtime.decode_unroll`).
        if self.has_variable("params", "layer_0"):
            caches, kept = [], []
            for i in range(cfg.num_hidden_layers):
                layer = DecoderLayer(cfg, run, self.lora, keep_kv, name=f"layer_{i}")
                layer_cache = None if cache is None else cache[i]
                (x, layer_cache), kv = layer((x, layer_cache), rotary, attend)
                caches.append(layer_cache)
                kept.append(kv)
            return norm(x), tuple(caches), tuple(kept) if keep_kv else None
        # Sums of their gradients, to which the backward pass adds.
        if cache is None and not keep_kv and self.has_variable(SUMS, "layers"):
            layer = DecoderLayer(cfg, run, self.lora, keep_kv=False, parent=None)

            def one_layer(params: Params, x: Array, inputs: tuple[Rotary, Pattern]) -> Array:
                return layer.apply({"params": params}, (x, None), *inputs)[0][0]

            own = (self.get_variable(name, "layers") for name in ("params", SUMS))
            return norm(run_layers(one_layer, *own, x, (rotary, attend))), None, None
        # Decoding (with a cache) has no backward pass, so nothing is rematerialised there.
        layer, count, unroll = DecoderLayer, cfg.num_hidden_layers, 1
        if cache is None:
            unroll = run.scan_unroll
            layer = rematerialised(DecoderLayer, run, in_scan=count > 1)
        layers = scanned(layer, count, inputs=2, unroll=unroll)
        (x, cache), kv = layers(cfg, run, self.lora, keep_kv, name="layers")(
            (x, cache), rotary, attend
        )
        return norm(x), cache, kv


def multimodal_rotary(positions: Int[Array, "3 b s"], config: TextConfig) -> Rotary:
    """Returns M-RoPE's cosines and sines (Qwen2-VL, arXiv 2409.12191, 2.1).

    Each rotary frequency follows the position in time, in height or in width.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim
    frequencies = 1 / config.rope_theta**exponents
    # Which of the three positions each frequency follows.
    axis = np.repeat(np.arange(3), config.mrope_section)
    angles = jnp.moveaxis(positions[axis], 0, -1).astype(jnp.float32) * frequencies
    return cos_sin(angles)
