"""The trainer's own log-probabilities: of whole sequences, and of groups beside their prompt.

One forward pass serves SFT, old and reference log-probabilities and the GRPO update, so that they
can differ in their parameters only.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from morer1_jax.batch import FeatureBatch, PromptBatch, SequenceBatch, VisionBatch
from morer1_jax.model.attention import PackedCausal, SharedPrefix
from morer1_jax.model.vision import VisionInputs
from morer1_jax.model.vlm import Qwen25VL

Params = dict


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """How log-probabilities are taken; the sampler and the scorer share one.

    Attributes:
      temperature: logits are divided by it before normalisation.
      chunk: places of a sequence whose logits exist at once.
    """

    temperature: float = 1.0
    chunk: int = 128

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.chunk < 1:
            raise ValueError(
                f"temperature {self.temperature} and chunk {self.chunk}: above 0 and at least 1 "
                "expected"
            )


def vision_inputs(vision: VisionBatch) -> VisionInputs | None:
    """The batch's images as the tower takes them; None for a batch without any."""
    if vision.patches.shape[1] == 0:
        return None
    return VisionInputs(*vision)


def embed_prompts(module: Qwen25VL, batch: PromptBatch | SequenceBatch) -> Float[Array, "b s d"]:
    """Embeds tokens, with the images' features in their places; runs inside `model.apply`."""
    if isinstance(batch.vision, FeatureBatch):
        return module.embed(batch.tokens, batch.vision.features, batch.vision_index)
    images = vision_inputs(batch.vision)
    vision_tokens = None if images is None else module.encode_images(images)
    return module.embed(batch.tokens, vision_tokens, batch.vision_index)


def sequence_logprobs(
    model: Qwen25VL, params: Params, batch: SequenceBatch, config: ScoreConfig
) -> tuple[Float[Array, "b s"], Float[Array, "b s"]]:
    """Log-probability of each target that has a weight, and the entropy there; 0 elsewhere.

    Both float32, in nats.
    """

    def run(module: Qwen25VL) -> tuple[Array, Array]:
        x = embed_prompts(module, batch)
        positions = jnp.moveaxis(batch.positions, 1, 0)
        attend = PackedCausal(batch.segment_ids, model.runtime.kernels)
        hidden = module.forward(x, positions, attend)
        counted = batch.weights > 0
        return module.logprobs(hidden, batch.targets, counted=counted, chunk=config.chunk)

    return model.apply({"params": params}, method=run)


def group_logprobs(
    model: Qwen25VL,
    params: Params,
    prompts: PromptBatch,
    completions: Int[Array, "b g t"],
    mask: Bool[Array, "b g t"],
    allowed: Bool[Array, " v"],
    config: ScoreConfig,
) -> tuple[Float[Array, "b g t"], Float[Array, "b g t"]]:
    """Log-probability of each completion token given its prompt, and the entropy there.

    The prompt, its images too, runs once for its group: the row is
    `[prompt | completion 1 | … | completion G]`, exact in value and gradient (the method is
    Prefix Grouper's, arXiv 2506.05433).

    Args:
      completions: sampled ids; any id may stand where `mask` is False.
      mask: True for the tokens of a completion, end-of-turn among them.
      allowed: ids that can be sampled; the rest are left out of the distribution.

    Returns:
      Two float32 arrays in nats, 0 where `mask` is False.
    """
    b, g, t = completions.shape
    s = prompts.tokens.shape[1]

    def run(module: Qwen25VL) -> tuple[Array, Array]:
        answers = module.embed(completions.reshape(b, g * t))
        x = jnp.concatenate([embed_prompts(module, prompts), answers], axis=1)
        places = prompts.next_position[:, None, None] + jnp.arange(t)
        places = jnp.broadcast_to(places, (b, g, t)).reshape(b, g * t)
        places = jnp.broadcast_to(places, (3, b, g * t))
        positions = jnp.concatenate([jnp.moveaxis(prompts.positions, 1, 0), places], axis=2)
        attend = SharedPrefix(prompts.mask, mask, model.runtime.kernels)
        hidden = module.forward(x, positions, attend)
        # A token is predicted from the one before it; the first, from the prompt's last.
        last = last_valid(hidden[:, :s], prompts.mask)
        last = jnp.broadcast_to(last[:, None, None], (b, g, 1, last.shape[-1]))
        before = jnp.concatenate([last, hidden[:, s:].reshape(b, g, t, -1)[:, :, :-1]], axis=2)
        return module.logprobs(
            before.reshape(b, g * t, -1),
            completions.reshape(b, g * t),
            counted=mask.reshape(b, g * t),
            allowed=allowed,
            temperature=config.temperature,
            chunk=config.chunk,
        )

    logps, entropy = model.apply({"params": params}, method=run)
    return logps.reshape(b, g, t), entropy.reshape(b, g, t)


def last_valid(hidden: Float[Array, "b s d"], mask: Bool[Array, "b s"]) -> Float[Array, "b d"]:
    """The hidden state at each row's last valid token."""
    s = mask.shape[1]
    last = s - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
