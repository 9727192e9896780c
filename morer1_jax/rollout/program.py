"""Sample, reward and advantage as one compiled program."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from morer1_jax.batch import PromptBatch
from morer1_jax.data.grammar import GrammarTables
from morer1_jax.model.layers import Params
from morer1_jax.model.parts import map_rows
from morer1_jax.model.vlm import Qwen25VL
from morer1_jax.rollout.config import SampleConfig
from morer1_jax.rollout.reward import (
    REWARD_PARTS,
    RewardConfig,
    advantages,
    deviation,
    reward_parts,
    total_reward,
)
from morer1_jax.rollout.sampler import Rollout, sample, sample_keys

Metrics = dict[str, Array]


@struct.dataclass
class ScoredRollout:
    """A rollout with its rewards.

    Attributes:
        fact: int32, the key of each row's noise, which is its fact's; see `PromptBatch`.
        reward_parts: the reward's parts before weighting, float32, by name.
        reward: float32, their weighted sum.
        advantages: float32, each reward relative to its group.
    """

    fact: Int[Array, " b"]
    rollout: Rollout
    reward_parts: dict[str, Float[Array, "b g"]]
    reward: Float[Array, "b g"]
    advantages: Float[Array, "b g"]


def make_rollout(
    model: Qwen25VL,
    config: SampleConfig,
    reward: RewardConfig,
    scale_rewards: str,
    seed: int,
    parts: int = 1,
) -> Callable[..., tuple[ScoredRollout, Metrics]]:
    """Returns `rollout(params, prompts, grammar, allowed, step) -> (scored, metrics)`, to jit.

    The metrics carry TRL's names: `reward`, `reward_std`, `frac_reward_zero_std`,
    `rewards/{part}/{mean,std}`, `completions/{mean,min,max}_length`, `completions/clipped_ratio`;
    beside them `completions/begun_again_ratio`, of samples that found no slot in a stage.

    Args:
        scale_rewards: whose deviation advantages are divided by; see `reward.advantages`.
        seed: of the sampling noise, together with `step`.
        parts: of the prompts that are sampled one after another.
    """

    def rollout(
        params: Params,
        prompts: PromptBatch,
        grammar: GrammarTables,
        allowed: Bool[Array, " v"],
        step: Int[Array, ""],
    ) -> tuple[ScoredRollout, Metrics]:
        keys = sample_keys(seed, step, prompts.fact, config.group)

        def of_part(part: tuple[PromptBatch, Key[Array, "b g"]]) -> Rollout:
            prompts, keys = part
            return sample(model, params, prompts, grammar, allowed, keys, config)

        samples = map_rows(of_part, (prompts, keys), parts)
        by_part = reward_parts(samples, prompts.gold, reward)
        total = total_reward(by_part, reward)
        advantage, all_equal = advantages(total, scale_rewards)
        scored = ScoredRollout(prompts.fact, samples, by_part, total, advantage)
        return scored, rollout_metrics(scored, all_equal)

    return rollout


def rollout_metrics(scored: ScoredRollout, all_equal: Bool[Array, " b"]) -> Metrics:
    """Returns means over the batch; `reward_std` is the mean of the groups' standard deviations.

    All are numbers but `completions/lengths`, [b, g].

    Args:
        all_equal: which groups' rewards are all equal.
    """
    lengths = jnp.sum(scored.rollout.mask, axis=-1)
    begun_again = scored.rollout.attempts > 1
    metrics = {
        "reward": jnp.mean(scored.reward),
        "reward_std": jnp.mean(deviation(scored.reward, axis=1)),
        "frac_reward_zero_std": jnp.mean(all_equal.astype(jnp.float32)),
        "completions/lengths": lengths,
        "completions/mean_length": jnp.mean(lengths.astype(jnp.float32)),
        "completions/min_length": jnp.min(lengths),
        "completions/max_length": jnp.max(lengths),
        "completions/clipped_ratio": jnp.mean((~scored.rollout.ended).astype(jnp.float32)),
        "completions/begun_again_ratio": jnp.mean(begun_again.astype(jnp.float32)),
        "completions/unreadable_ratio": jnp.mean((scored.rollout.answer < 0).astype(jnp.float32)),
    }
    for name in REWARD_PARTS:
        metrics[f"rewards/{name}/mean"] = jnp.mean(scored.reward_parts[name])
        metrics[f"rewards/{name}/std"] = deviation(scored.reward_parts[name])
    return metrics
