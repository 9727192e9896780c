"""Rewards and group advantages, computed on the device from what the automaton read.

Reward = weighted sum of format (the tags and six steps are there), effort (the steps are long
enough) and accuracy (the label is right), as in MORE-R1 (arXiv 2603.09478). The weights and the
shape of the length part are not public: those here are ours.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from morer1_jax.rollout.sampler import Rollout

PARTS = ("format", "effort", "accuracy")


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """Weights of the parts, and the effort's ramp.

    Attributes:
      format, effort, accuracy: weights.
      effort_from, effort_to: bytes of reasoning (white space apart) at which the effort part
        leaves 0 and reaches 1; linear between.
    """

    format: float = 0.2
    effort: float = 0.2
    accuracy: float = 1.0
    effort_from: int = 0
    effort_to: int = 200

    def __post_init__(self) -> None:
        if self.effort_to <= self.effort_from:
            raise ValueError(
                f"reward.effort_to: {self.effort_to} found, more than effort_from = "
                f"{self.effort_from} expected"
            )


def reward_parts(
    rollout: Rollout, gold: Int[Array, " b"], config: RewardConfig
) -> dict[str, Float[Array, "b g"]]:
    """The parts before weighting, each 0 to 1, by their names in `PARTS`."""
    span = config.effort_to - config.effort_from
    return {
        "format": rollout.format.astype(jnp.float32),
        "effort": jnp.clip((rollout.effort - config.effort_from) / span, 0.0, 1.0),
        "accuracy": (rollout.answer == gold[:, None]).astype(jnp.float32),
    }


def total_reward(
    parts: dict[str, Float[Array, "b g"]], config: RewardConfig
) -> Float[Array, "b g"]:
    """The weighted sum of the parts."""
    return sum(getattr(config, name) * parts[name] for name in PARTS)


def advantages(
    reward: Float[Array, "b g"], scale: Literal["group", "batch", "none"], eps: float = 1e-4
) -> tuple[Float[Array, "b g"], Bool[Array, " b"]]:
    """Each sample's reward less its group's mean, divided by a standard deviation.

    Args:
      scale: by the group's own (GRPO, arXiv 2402.03300, section 4.1.1), the batch's, or not at all
        (Dr. GRPO, arXiv 2503.20783).
      eps: added to the deviation.

    Returns:
      Advantages, exactly 0 in a group whose rewards are all equal; and which groups those are.
    """
    equal = jnp.all(reward == reward[:, :1], axis=1)
    # A mean of equal numbers can differ from them in the last bit.
    centred = jnp.where(equal[:, None], 0.0, reward - jnp.mean(reward, axis=1, keepdims=True))
    if scale == "group":
        centred = centred / (deviation(reward, axis=1)[:, None] + eps)
    elif scale == "batch":
        centred = centred / (deviation(reward) + eps)
    elif scale != "none":
        raise ValueError(f"scale_rewards: {scale!r} found, 'group', 'batch' or 'none' expected")
    return centred, equal


def deviation(values: Float[Array, "b g"], axis: int | None = None) -> Array:
    """The sample standard deviation, as TRL takes it; 0 of a single number."""
    count = values.size if axis is None else values.shape[axis]
    return jnp.std(values, axis=axis, ddof=min(1, count - 1))
