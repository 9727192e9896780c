"""Rewards and group advantages, computed on the device from a rollout and what its automaton read.

Reward = weighted sum of format (the tags and six steps are there), effort (the steps are long
enough) and accuracy (the label is right), as in MORE-R1 (arXiv 2603.09478). The paper's weights and
the shape of its length part are not public: those here are ours. Axes: b prompts, g samples of a
prompt.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from morer1_jax.bounds import at_least, check_bounds
from morer1_jax.errors import FieldError
from morer1_jax.rollout.sampler import Rollout

REWARD_PARTS = ("format", "effort", "accuracy")


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """Weights of the reward's parts, and the effort's ramp.

    Attributes:
        effort_from: bytes of reasoning, white space apart, up to which the effort part is 0.
        effort_to: bytes of reasoning from which on the effort part is 1; it is linear between.

    Raises:
        FieldError: a field is out of its bounds, or `effort_to` is not above `effort_from`.
    """

    format: float = at_least(0, 0.2)
    effort: float = at_least(0, 0.2)
    accuracy: float = at_least(0, 1.0)
    effort_from: int = at_least(0, 0)
    effort_to: int = at_least(1, 200)

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.effort_to <= self.effort_from:
            raise FieldError(
                "effort_to",
                f"expected above effort_from = {self.effort_from}, found {self.effort_to}",
            )


def reward_parts(
    rollout: Rollout, gold: Int[Array, " b"], config: RewardConfig
) -> dict[str, Float[Array, "b g"]]:
    """Returns the parts before weighting, float32 from 0 to 1, by their names in `REWARD_PARTS`.

    Args:
        gold: int32, the right label's id of each prompt.
    """
    span = config.effort_to - config.effort_from
    return {
        "format": rollout.format.astype(jnp.float32),
        "effort": jnp.clip((rollout.effort - config.effort_from) / span, 0.0, 1.0),
        "accuracy": (rollout.answer == gold[:, None]).astype(jnp.float32),
    }


def total_reward(
    parts: dict[str, Float[Array, "b g"]], config: RewardConfig
) -> Float[Array, "b g"]:
    """Returns the weighted sum of the parts."""
    return sum(getattr(config, name) * parts[name] for name in REWARD_PARTS)


def advantages(
    reward: Float[Array, "b g"], scale: Literal["group", "batch", "none"], eps: float = 1e-4
) -> tuple[Float[Array, "b g"], Bool[Array, " b"]]:
    """Returns each sample's reward less its group's mean, divided by a standard deviation.

    Args:
        reward: float32.
        scale: whose deviation: the group's own (GRPO, arXiv 2402.03300, section 4.1.1), the
            batch's, or none (Dr. GRPO, arXiv 2503.20783).
        eps: added to the deviation.

    Returns:
        Advantages, exactly 0 in a group whose rewards are all equal; and which groups those are.

    Raises:
        ValueError: `scale` is unknown.
    """
    all_equal = jnp.all(reward == reward[:, :1], axis=1)
    # A mean of equal numbers can differ from them in the last bit.
    centred = jnp.where(all_equal[:, None], 0.0, reward - jnp.mean(reward, axis=1, keepdims=True))
    if scale == "group":
        centred = centred / (deviation(reward, axis=1)[:, None] + eps)
    elif scale == "batch":
        centred = centred / (deviation(reward) + eps)
    elif scale != "none":
        raise ValueError(f"scale_rewards: expected 'group', 'batch' or 'none', found {scale!r}")
    return centred, all_equal


def deviation(values: Float[Array, "b g"], axis: int | None = None) -> Array:
    """Returns the sample standard deviation, which TRL takes too; 0 of a single number."""
    count = values.size if axis is None else values.shape[axis]
    return jnp.std(values, axis=axis, ddof=min(1, count - 1))
