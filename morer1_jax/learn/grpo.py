"""Group Relative Policy Optimization: the objective and its update.

For a completion o_i of a group, with advantage A_i and ratio r_t = π(o_t) / π_old(o_t)
(DeepSeekMath, arXiv 2402.03300, equation 3; the separate upper clip is DAPO's, arXiv 2503.14476,
section 3.1):

    l_t = -w_t min(r_t A_i, clip(r_t, 1 - low, 1 + high) A_i) + beta KL_t
    KL_t = π_ref(o_t) / π(o_t) - log(π_ref(o_t) / π(o_t)) - 1

where w_t, which has no gradient, makes up for the sampler's rounding (`importance_cap`; else 1),
and the loss is a weighted sum of l_t over the batch's tokens; the weights are the choice of
`Normalisation`. In the first update on a rollout π_old is π itself, so the ratio is exactly 1 and
no pass is spent on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from morer1_jax.batch import PromptBatch
from morer1_jax.learn.accumulate import accumulate, add
from morer1_jax.learn.state import TrainState, apply_gradients
from morer1_jax.learn.trainable import join
from morer1_jax.model.scorer import Params, ScoreConfig, group_logprobs
from morer1_jax.model.vlm import Qwen25VL

Metrics = dict[str, Array]
Normalisation = Literal["sequence", "token", "constant"]


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The objective.

    Attributes:
      clip_low, clip_high: the ratio's clip range is [1 - clip_low, 1 + clip_high].
      beta: weight of the KL to the reference; at 0 no reference is held or scored.
      normalisation: what a token weighs. "sequence": 1 / (its completion's tokens × completions),
        GRPO's. "token": 1 / tokens of the batch, DAPO's. "constant": 1 / (completions × length
        limit), Dr. GRPO's (arXiv 2503.20783). Groups whose rewards are all equal count in the
        denominators: dropping them would raise the step on the rest.
      importance_cap: a token's policy term, not its KL, is weighted by π_old / π_sampler, at most
        this (truncated importance sampling), which makes up for a sampler that rounds differently;
        None: not.
      mask_truncated: leave completions that were cut off out of the loss.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    beta: float = 0.0
    normalisation: Normalisation = "token"
    importance_cap: float | None = 2.0
    mask_truncated: bool = False

    def __post_init__(self) -> None:
        if self.normalisation not in ("sequence", "token", "constant"):
            raise ValueError(
                f"grpo.normalisation: {self.normalisation!r} found, 'sequence', 'token' or "
                "'constant' expected"
            )
        if self.importance_cap is not None and self.importance_cap <= 0:
            raise ValueError(
                f"importance_cap: {self.importance_cap} found, above 0 expected, or None"
            )


@struct.dataclass
class GroupBatch:
    """What an update reads; rows are prompts.

    Attributes:
      weights: float32, each token's share of the loss; 0 where it does not count.
      sampler: log-probabilities the tokens were drawn with. Of these and those below only the
        numbers at places that `mask` shows are read.
      old: log-probabilities under the parameters before the first update on this rollout; None in
        that first update.
      reference: log-probabilities under the reference; None where beta is 0.
    """

    prompts: PromptBatch
    tokens: Int[Array, "b g t"]
    mask: Bool[Array, "b g t"]
    weights: Float[Array, "b g t"]
    advantages: Float[Array, "b g"]
    sampler: Float[Array, "b g t"]
    old: Float[Array, "b g t"] | None = None
    reference: Float[Array, "b g t"] | None = None


def token_weights(
    mask: Bool[Array, "b g t"], ended: Bool[Array, "b g"], config: LossConfig
) -> Float[Array, "b g t"]:
    """Each token's share of the loss over the whole global batch; all 0 if nothing counts."""
    kept = ended | (not config.mask_truncated)
    counted = (mask & kept[..., None]).astype(jnp.float32)
    b, g, t = mask.shape
    if config.normalisation == "token":
        return counted / jnp.maximum(jnp.sum(counted), 1.0)
    if config.normalisation == "constant":
        return counted / (b * g * t)
    return counted / jnp.maximum(jnp.sum(counted, axis=-1, keepdims=True), 1.0) / (b * g)


def token_losses(
    new: Float[Array, "b g t"],
    old: Float[Array, "b g t"],
    sampler: Float[Array, "b g t"],
    reference: Float[Array, "b g t"] | None,
    advantages: Float[Array, "b g"],
    config: LossConfig,
) -> tuple[Float[Array, "b g t"], Metrics]:
    """l_t of each token, and what happened to it: `clip_low`, `clip_high`, `kl` if asked.

    No gradient is to come by `old` and `sampler`.
    """
    advantage = advantages[..., None]
    ratio = jnp.exp(new - old)
    clipped = jnp.clip(ratio, 1.0 - config.clip_low, 1.0 + config.clip_high)
    losses = -jnp.minimum(ratio * advantage, clipped * advantage)
    if config.importance_cap is not None:
        losses = losses * jnp.minimum(jnp.exp(old - sampler), config.importance_cap)
    seen = {
        "clip_low": (ratio < 1.0 - config.clip_low) & (advantage < 0),
        "clip_high": (ratio > 1.0 + config.clip_high) & (advantage > 0),
    }
    if reference is not None:
        log_ratio = reference - new
        seen["kl"] = jnp.exp(log_ratio) - log_ratio - 1.0
        losses = losses + config.beta * seen["kl"]
    return losses, seen


def grpo_gradients(
    model: Qwen25VL,
    params: Params,
    batch: GroupBatch,
    allowed: Bool[Array, " v"],
    config: LossConfig,
    score: ScoreConfig,
    micro_batches: int = 1,
    frozen: Params | None = None,
) -> tuple[Params, Metrics]:
    """Gradients by `params` of the loss over the whole batch, and metrics under TRL's names.

    Args:
      frozen: the model's other parameters; see `learn.trainable`.
    """

    def part_gradients(part: GroupBatch) -> tuple[Params, Metrics]:
        def loss(params: Params) -> tuple[Array, Metrics]:
            whole = join(params, frozen or {})
            new, entropy = group_logprobs(
                model, whole, part.prompts, part.tokens, part.mask, allowed, score
            )
            # Places beyond a completion's end hold no token: their numbers, which can be so large
            # that a ratio of them is infinite, are kept out of everything.
            new, old, reference, sampler = (
                None if x is None else jnp.where(part.mask, x, 0.0)
                for x in (new, part.old, part.reference, part.sampler)
            )
            old = jax.lax.stop_gradient(new) if old is None else old
            losses, seen = token_losses(new, old, sampler, reference, part.advantages, config)
            drift = old - sampler
            counted = (part.weights > 0).astype(jnp.float32)
            sums = {
                "loss": jnp.sum(losses * part.weights),
                "tokens": jnp.sum(counted),
                "entropy": jnp.sum(entropy * counted),
                "difference": jnp.sum(jnp.abs(drift) * counted),
                **{name: jnp.sum(value * counted) for name, value in seen.items()},
                "difference_max": jnp.max(jnp.abs(drift) * counted),
            }
            return sums["loss"], jax.lax.stop_gradient(sums)

        (_, sums), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return grads, sums

    grads, sums = accumulate(part_gradients, batch, micro_batches, _combine)
    return grads, _means(sums)


def _combine(total: tuple[Params, Metrics], part: tuple[Params, Metrics]) -> tuple[Params, Metrics]:
    grads, sums = add(total, part)
    largest = jnp.maximum(total[1]["difference_max"], part[1]["difference_max"])
    return grads, sums | {"difference_max": largest}


def combined_metrics(updates: Sequence[Metrics]) -> Metrics:
    """Those of several updates as of one: means, of what is a greatest value the greatest, and of
    `skipped_updates` the sum."""

    def combined(name: str) -> Array:
        values = jnp.stack([metrics[name] for metrics in updates])
        if name == "skipped_updates":
            return jnp.sum(values)
        greatest = name == "not_finite" or name.endswith("/max")
        return jnp.max(values, axis=0) if greatest else jnp.mean(values)

    return {name: combined(name) for name in updates[0]}


def _means(sums: Metrics) -> Metrics:
    tokens = jnp.maximum(sums["tokens"], 1.0)
    low, high = sums["clip_low"] / tokens, sums["clip_high"] / tokens
    return {
        "loss": sums["loss"],
        "entropy": sums["entropy"] / tokens,
        **({"kl": sums["kl"] / tokens} if "kl" in sums else {}),
        "clip_ratio/low_mean": low,
        "clip_ratio/high_mean": high,
        "clip_ratio/region_mean": low + high,
        "sampling/sampling_logp_difference/mean": sums["difference"] / tokens,
        "sampling/sampling_logp_difference/max": sums["difference_max"],
    }


def make_grpo_update(
    model: Qwen25VL,
    optimizer: optax.GradientTransformation,
    config: LossConfig,
    score: ScoreConfig,
    micro_batches: int = 1,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """One optimizer update: `update(state, frozen, batch, allowed) -> (state, metrics)`.

    `state.step` counts rollouts, so the caller raises it after the last update on one. An update on
    numbers that are not finite is skipped (see `apply_gradients`); `not_finite`, int32 [b], is
    `prompts.fact` of each group that has such, by `not_finite_groups`, and -1 of the others.
    """

    def update(
        state: TrainState, frozen: Params, batch: GroupBatch, allowed: Bool[Array, " v"]
    ) -> tuple[TrainState, Metrics]:
        grads, metrics = grpo_gradients(
            model, state.params, batch, allowed, config, score, micro_batches, frozen
        )
        bad = not_finite_groups(batch)
        sound = jnp.isfinite(metrics["loss"]) & ~jnp.any(bad)
        params, opt_state, seen = apply_gradients(state, grads, optimizer, sound)
        seen["not_finite"] = jnp.where(bad, batch.prompts.fact, -1)
        return state.replace(params=params, opt_state=opt_state), metrics | seen

    return update


def not_finite_groups(batch: GroupBatch) -> Bool[Array, " b"]:
    """Whether a group has an advantage, or a completion's token a log-probability, not finite.

    The loss alone does not tell: the clip and the importance weight's cap hide an infinite ratio.
    """
    bad = jnp.any(~jnp.isfinite(batch.advantages), axis=-1)
    for logprobs in (batch.sampler, batch.old, batch.reference):
        if logprobs is not None:
            bad |= jnp.any(~jnp.isfinite(logprobs) & batch.mask, axis=(-2, -1))
    return bad
