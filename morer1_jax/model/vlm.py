"""Qwen2.5-VL as a few verbs, used alike by training, scoring, sampling and prediction.

    encode_images → embed → forward → logprobs            training, scoring
    encode_images → embed → forward(keep_kv) → init_cache → (logits, embed, decode)*   sampling

Where the tower's blocks have run before, by themselves, `merge_patches` stands for `encode_images`.
Every verb is a method for `model.apply({"params": params}, ..., method=...)`; there is no
hidden state, and `model.running` says what else may stand beside the parameters.  Axes: b batch,
s sequence, g samples of one prompt, m image tokens, d model, v vocabulary, l layers, k key-value
heads, e head size, t completion.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from morer1_jax.model.attention import XLA, PackedCausal, Pattern
from morer1_jax.model.config import LoRA, ModelConfig, Runtime
from morer1_jax.model.decoding import Cached, KVCache, LayerKV
from morer1_jax.model.embedding import embed_tokens
from morer1_jax.model.language import Decoder
from morer1_jax.model.logprobs import plain_logits, token_logprobs
from morer1_jax.model.sharding import Layout
from morer1_jax.model.vision import VisionInputs, VisionTower, is_merger


class Qwen25VL(nn.Module):
    """The whole model; the module's docstring says how its verbs go together."""

    config: ModelConfig
    runtime: Runtime = Runtime()
    lora: LoRA | None = None

    def setup(self) -> None:
        """Makes embedding, head, tower and decoder."""
        text = self.config.text
        table = (text.vocab_size, text.hidden_size)
        init = nn.initializers.normal(text.initializer_range)
        self.embedding = self.param("embedding", init, table, self.runtime.param_dtype)
        if not self.config.tie_word_embeddings:
            self.head = self.param("head", init, table, self.runtime.param_dtype)
        self.vision = VisionTower(self.config.vision, self.runtime)
        self.language = Decoder(text, self.runtime, self.lora)

    def __call__(
        self,
        tokens: Int[Array, "b s"],
        positions: Int[Array, "3 b s"],
        attend: Pattern,
        images: VisionInputs | None = None,
        vision_index: Int[Array, "b s"] | None = None,
    ) -> Float[Array, "b s d"]:
        """Runs a whole forward pass to hidden states; without images the last two are None."""
        vision_tokens = None if images is None else self.encode_images(images)
        return self.forward(self.embed(tokens, vision_tokens, vision_index), positions, attend)

    def encode_images(self, images: VisionInputs) -> Float[Array, "b m d"]:
        """Returns the image tokens of each row in slot order, m = windows · slots / merge²."""
        return self.vision(images)

    def merge_patches(self, hidden: Float[Array, "b n e"]) -> Float[Array, "b m d"]:
        """Returns the image tokens of each row from what the tower's blocks give for its slots."""
        return self.vision(hidden)

    def embed(
        self,
        tokens: Int[Array, "b s"],
        vision_tokens: Float[Array, "r m d"] | None = None,
        vision_index: Int[Array, "b s"] | None = None,
    ) -> Float[Array, "b s d"]:
        """Embeds tokens; where `vision_index` is not -1, takes that image token in their place.

        Args:
            vision_tokens: of r rows of images, each shared by b / r consecutive rows of tokens.
        """
        x = embed_tokens(self.embedding, tokens, self.runtime.dtype, self.runtime.layout)
        if vision_tokens is None:
            return x
        # Where there is no image token, any is gathered and then left out.
        place = jnp.maximum(vision_index, 0).reshape(len(vision_tokens), -1, 1)
        vision = jnp.take_along_axis(vision_tokens, place, axis=1).astype(x.dtype)
        return jnp.where(vision_index[..., None] >= 0, vision.reshape(x.shape), x)

    def forward(
        self,
        x: Float[Array, "b s d"],
        positions: Int[Array, "3 b s"],
        attend: Pattern,
        keep_kv: bool = False,
    ) -> Any:
        """Returns hidden states [b s d] after the final norm; with `keep_kv` all layers' KV too."""
        hidden, _, kv = self.language(x, positions, attend, keep_kv=keep_kv)
        return (hidden, kv) if keep_kv else hidden

    def decode(
        self, x: Float[Array, "b g d"], positions: Int[Array, "b g"], cache: KVCache
    ) -> tuple[Float[Array, "b g d"], KVCache]:
        """Runs one more token of each sample.

        Args:
            positions: int32, of the tokens; text, so the same on all three axes.
            cache: of the tokens before.

        Returns:
            The tokens' hidden states, and the cache with their keys and values.
        """
        attend = Cached(cache.prompt_mask, cache.index, cache.places)
        axes = jnp.broadcast_to(positions, (3, *positions.shape))
        hidden, layers, _ = self.language(x, axes, attend, cache=cache.layers)
        # The scan has counted the stack's layer up; the next token begins at the first one.
        if isinstance(layers, LayerKV):
            layers = layers.replace(layer=jnp.zeros((), jnp.int32))
        return hidden, cache.replace(layers=layers, index=cache.index + 1)

    def logits(self, hidden: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """Returns float32 logits; for a token or a few a row, never for whole long sequences."""
        return plain_logits(hidden, self._head())

    def logprobs(
        self,
        hidden: Float[Array, "b s d"],
        targets: Int[Array, "b s"],
        *,
        counted: Bool[Array, "b s"] | None = None,
        allowed: Bool[Array, " v"] | None = None,
        temperature: float | Float[Array, ""] = 1.0,
        chunk: int = 128,
    ) -> tuple[Float[Array, "b s"], Float[Array, "b s"]]:
        """Returns log-probabilities and entropies; see `model.logprobs.token_logprobs`."""
        return token_logprobs(
            hidden,
            self._head(),
            targets,
            counted=counted,
            allowed=allowed,
            temperature=temperature,
            chunk=chunk,
            layout=self.runtime.layout,
        )

    def _head(self) -> Float[Array, "v d"]:
        return self.embedding if self.config.tie_word_embeddings else self.head


def init_params(model: Qwen25VL, key: PRNGKeyArray) -> dict[str, Any]:
    """Returns parameters from scratch.

    Matrices are normal with the config's `initializer_range` as standard deviation, biases zero,
    scales of norms one.
    """
    # One row, which no mesh splits, runs through the model for the parameters' shapes alone.
    runtime = dataclasses.replace(model.runtime, kernels=XLA(), layout=Layout())
    model = model.clone(runtime=runtime)
    vision = model.config.vision
    slots = (1, 1, vision.window_patches)
    images = VisionInputs(
        patches=jnp.zeros((*slots, vision.patch_dim)),
        positions=jnp.zeros((*slots, 2), jnp.int32),
        image_ids=jnp.zeros(slots, jnp.int32),
        part_ids=jnp.zeros(slots, jnp.int32),
    )
    token = jnp.zeros((1, 1), jnp.int32)
    positions = jnp.zeros((3, 1, 1), jnp.int32)
    return model.init(key, token, positions, PackedCausal(token), images, token)["params"]


def split_tower(params: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the tower's blocks of a tree of parameters, and all the rest, its merger too."""
    vision = params.get("vision", {})
    merger = {name: branch for name, branch in vision.items() if is_merger(name)}
    tower = {name: branch for name, branch in vision.items() if not is_merger(name)}
    return {"vision": tower}, params | ({"vision": merger} if vision else {})


def for_products(params: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Returns parameters in the dtype that their products are computed in.

    Products cast them anyway. Scales of norms, whose products are in float32, stay as they are.

    Args:
        params: arrays, or shapes with shardings; what has the dtype is not copied.
    """

    def ready(path: jax.tree_util.KeyPath, leaf: Any) -> Any:
        if path[-1].key == "scale" or leaf.dtype == jnp.dtype(dtype):
            return leaf
        is_shape = isinstance(leaf, jax.ShapeDtypeStruct)
        return leaf.update(dtype=jnp.dtype(dtype)) if is_shape else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(ready, params)
