"""The trainer's log-probabilities: of whole sequences, and of groups beside their prompt.

One forward pass serves SFT, old and reference log-probabilities and the GRPO update, so that these
differ in their parameters only. Axes: b rows, s sequence, g completions of a prompt, t tokens of a
completion, d model, v vocabulary.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from morer1_jax.batch import EncodedBatch, FeatureBatch, PromptBatch, SequenceBatch
from morer1_jax.bounds import above, at_least, check_bounds
from morer1_jax.model.attention import PackedCausal, SharedPrefix
from morer1_jax.model.layers import Params
from morer1_jax.model.running import SUMS
from morer1_jax.model.sharding import Layout
from morer1_jax.model.vision import VisionInputs
from morer1_jax.model.vlm import Qwen25VL


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """How log-probabilities are computed.

    Attributes:
        temperature: logits are divided by it before normalisation; the sampler's own.
        chunk: places of a device's rows whose logits exist at once; at least one of each row.

    Raises:
        FieldError: a field is out of its bounds.
    """

    temperature: float = above(0, 1.0)
    chunk: int = at_least(1, 1024)

    def __post_init__(self) -> None:
        check_bounds(self)

    def of_row(self, rows: int, layout: Layout) -> int:
        """Returns how many of each row's places are a chunk of a batch of so many rows."""
        places = max(self.chunk // (rows // layout.parts(rows)), 1)
        # Whole tiles of a matrix unit's operands, where there is more than one.
        return places - places % 8 if places > 8 else places


def embed_prompts(module: Qwen25VL, batch: PromptBatch | SequenceBatch) -> Float[Array, "b s d"]:
    """Embeds tokens, with the images' features in their places; runs inside `model.apply`.

    Images are encoded here, as far as the batch's are not yet.
    """
    if isinstance(batch.vision, EncodedBatch):
        images = module.merge_patches(batch.vision.hidden)
        return module.embed(batch.tokens, images, batch.vision_index)
    # The features of a frozen tower, computed before training.
    if isinstance(batch.vision, FeatureBatch):
        return module.embed(batch.tokens, batch.vision.features, batch.vision_index)
    if batch.vision.patches.shape[1] == 0:  # A shape without slots for images.
        return module.embed(batch.tokens)
    images = VisionInputs.of(batch.vision, module.config.vision.temporal_patch_size)
    return module.embed(batch.tokens, module.encode_images(images), batch.vision_index)


def sequence_logprobs(
    model: Qwen25VL,
    params: Params,
    batch: SequenceBatch,
    config: ScoreConfig,
    sums: Params | None = None,
) -> tuple[Float[Array, "b s"], Float[Array, "b s"]]:
    """Returns each target's log-probability and its distribution's entropy.

    Both are float32 in nats, 0 where a target has no weight.

    Args:
        sums: of parameters' gradients, to which a backward pass adds; see `model.running`.
    """

    def run(module: Qwen25VL) -> tuple[Array, Array]:
        x = embed_prompts(module, batch)
        positions = jnp.moveaxis(batch.positions, 1, 0)
        attend = PackedCausal(batch.segment_ids, model.runtime.kernels)
        hidden = module.forward(x, positions, attend)
        counted = batch.weights > 0
        chunk = config.of_row(len(hidden), model.runtime.layout)
        return module.logprobs(hidden, batch.targets, counted=counted, chunk=chunk)

    return model.apply({"params": params, SUMS: sums or {}}, method=run)


def group_logprobs(
    model: Qwen25VL,
    params: Params,
    prompts: PromptBatch,
    completions: Int[Array, "b g t"],
    mask: Bool[Array, "b g t"],
    allowed: Bool[Array, " v"],
    config: ScoreConfig,
    sums: Params | None = None,
) -> tuple[Float[Array, "b g t"], Float[Array, "b g t"]]:
    """Returns each completion token's log-probability and its distribution's entropy.

    Both are float32 in nats, 0 where `mask` is False. The prompt, its images too, runs once for its
    group: the row is `[prompt | completion 1 | … | completion g]`, exact in value and gradient
    (Prefix Grouper, arXiv 2506.05433).

    Args:
        params: the whole tree.
        completions: int32 ids of the sampled tokens; any id may stand where `mask` is False.
        mask: True for the tokens of a completion, end-of-turn among them.
        allowed: ids that can be sampled; the rest are left out of the distribution.
        sums: of parameters' gradients, to which a backward pass adds; see `model.running`.
    """
    b, g, t = completions.shape
    s = prompts.tokens.shape[1]

    def run(module: Qwen25VL) -> tuple[Array, Array]:
        # The row, and its positions: each completion goes on from the prompt's last.
        embedded = module.embed(completions.reshape(b, g * t))
        x = jnp.concatenate([embed_prompts(module, prompts), embedded], axis=1)
        own_positions = prompts.next_position[:, None, None] + jnp.arange(t)
        own_positions = jnp.broadcast_to(own_positions, (b, g, t)).reshape(b, g * t)
        own_positions = jnp.broadcast_to(own_positions, (3, b, g * t))
        prompt_positions = jnp.moveaxis(prompts.positions, 1, 0)
        positions = jnp.concatenate([prompt_positions, own_positions], axis=2)
        attend = SharedPrefix(prompts.mask, mask, model.runtime.kernels)
        hidden = module.forward(x, positions, attend)
        # A token is predicted from the one before it; the first, from the prompt's last.
        last = last_valid(hidden[:, :s], prompts.mask)
        last = jnp.broadcast_to(last[:, None, None], (b, g, 1, last.shape[-1]))
        own = hidden[:, s:].reshape(b, g, t, -1)
        predicting = jnp.concatenate([last, own[:, :, :-1]], axis=2)
        return module.logprobs(
            predicting.reshape(b, g * t, -1),
            completions.reshape(b, g * t),
            counted=mask.reshape(b, g * t),
            allowed=allowed,
            temperature=config.temperature,
            chunk=config.of_row(b, model.runtime.layout),
        )

    logps, entropy = model.apply({"params": params, SUMS: sums or {}}, method=run)
    return logps.reshape(b, g, t), entropy.reshape(b, g, t)


def last_valid(hidden: Float[Array, "b s d"], mask: Bool[Array, "b s"]) -> Float[Array, "b d"]:
    """Returns the hidden state at each row's last valid token."""
    s = mask.shape[1]
    last = s - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
