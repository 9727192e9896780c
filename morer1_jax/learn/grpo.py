"""Group Relative Policy Optimization: the objective and its update.

For a completion o_i of a group, with advantage A_i and ratio r_t = π(o_t) / π_old(o_t)
(DeepSeekMath, arXiv 2402.03300, equation 3; the separate upper clip is DAPO's, arXiv 2503.14476,
section 3.1):

    l_t = -w_t min(r_t A_i, clip(r_t, 1 - low, 1 + high) A_i) + beta KL_t
    KL_t = π_ref(o_t) / π(o_t) - log(π_ref(o_t) / π(o_t)) - 1

where w_t, which has no gradient, corrects for the sampler's rounding (`importance_cap`; else 1),
and the loss is a weighted sum of l_t over the batch's tokens, by the weights that `Normalisation`
chooses. In the first update on a rollout π_old is π itself, so the ratio is exactly 1 and no pass
is spent on it. Axes: b prompts, g completions of a prompt, t tokens of a completion, v vocabulary.
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
from morer1_jax.bounds import above, at_least, check_bounds, one_of
from morer1_jax.learn.accumulate import accumulate, add, add_gradients
from morer1_jax.learn.state import TrainState, apply_gradients
from morer1_jax.learn.trainable import join
from morer1_jax.model.layers import Params
from morer1_jax.model.scorer import ScoreConfig, group_logprobs
from morer1_jax.model.vlm import Qwen25VL

Metrics = dict[str, Array]
Normalisation = Literal["sequence", "token", "constant"]


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Settings of the objective.

    Attributes:
        clip_low: the ratio is clipped from 1 - clip_low on.
        clip_high: the ratio is clipped up to 1 + clip_high.
        beta: weight of the KL to the reference; at 0 no reference is held or scored.
        normalisation: a token's weight. "sequence": 1 / (its completion's tokens × completions),
            GRPO's. "token": 1 / tokens of the batch, DAPO's. "constant": 1 / (completions × length
            limit), Dr. GRPO's (arXiv 2503.20783). Groups whose rewards are all equal count in the
            denominators: dropping them would raise the step on the rest.
        importance_cap: upper bound of π_old / π_sampler, by which a token's policy term, not its
            KL, is weighted (truncated importance sampling); it corrects for a sampler that rounds
            differently. None: no weight.
        mask_truncated: whether completions cut off at the length limit are left out of the loss.

    Raises:
        FieldError: a field is out of its bounds.
    """

    clip_low: float = at_least(0, 0.2)
    clip_high: float = at_least(0, 0.28)
    beta: float = at_least(0, 0.0)
    normalisation: Normalisation = one_of(Normalisation, "token")
    importance_cap: float | None = above(0, 2.0)
    mask_truncated: bool = False

    def __post_init__(self) -> None:
        check_bounds(self)


@struct.dataclass
class GroupBatch:
    """The rollout that an update learns from; rows are prompts.

    Attributes:
        prompts: with images or their features.
        tokens: int32 ids of the completions.
        mask: True for a completion's tokens, end-of-turn among them; nothing is read elsewhere.
        weights: float32, each token's share of the loss; 0 where it does not count.
        advantages: float32, each completion's.
        sampler: float32 log-probabilities with which the tokens were sampled.
        old: float32 log-probabilities under the parameters before the first update on this rollout;
            None in that first update.
        reference: float32 log-probabilities under the reference; None where beta is 0.
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
    """Returns each token's share of the loss over the whole global batch, float32.

    Args:
        mask: True for a completion's tokens.
        ended: False for completions cut off at the length limit.
    """
    in_loss = ended | (not config.mask_truncated)
    counted = (mask & in_loss[..., None]).astype(jnp.float32)
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
    """Returns l_t of each token, and diagnostics of it.

    Args:
        new: log-probabilities under the parameters that train.
        old: under those before the first update; the caller stops its gradient.
        sampler: those the tokens were sampled with; the caller stops its gradient.
        reference: under the reference, if beta is above 0.

    Returns:
        Losses, and by name whether the ratio was clipped (`clip_low`, `clip_high`) and, with a
        reference, `kl`.
    """
    # The clipped objective.
    advantage = advantages[..., None]
    ratio = jnp.exp(new - old)
    clipped = jnp.clip(ratio, 1.0 - config.clip_low, 1.0 + config.clip_high)
    losses = -jnp.minimum(ratio * advantage, clipped * advantage)
    # w_t: truncated importance sampling.
    if config.importance_cap is not None:
        losses = losses * jnp.minimum(jnp.exp(old - sampler), config.importance_cap)
    diagnostics = {
        # Only where the clip takes the gradient away, as in TRL.
        "clip_low": (ratio < 1.0 - config.clip_low) & (advantage < 0),
        "clip_high": (ratio > 1.0 + config.clip_high) & (advantage > 0),
    }
    if reference is not None:
        log_ratio = reference - new
        diagnostics["kl"] = jnp.exp(log_ratio) - log_ratio - 1.0
        losses = losses + config.beta * diagnostics["kl"]
    return losses, diagnostics


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
    """Returns the gradients of the whole batch's loss with respect to `params`, and TRL's metrics.

    Args:
        params: the trainable parameters.
        allowed: ids that can be sampled.
        frozen: the model's other parameters; see `learn.trainable`.
    """

    def micro_gradients(
        model: Qwen25VL, micro_batch: GroupBatch, so_far: Params | None
    ) -> tuple[Params, Metrics]:
        def loss(params: Params, running: Params) -> tuple[Array, Metrics]:
            new, entropy = group_logprobs(
                model,
                join(params, frozen or {}),
                micro_batch.prompts,
                micro_batch.tokens,
                micro_batch.mask,
                allowed,
                score,
                running,
            )
            # Places beyond a completion's end hold no token: their numbers, which can be so large
            # that a ratio of them is infinite, are kept out of losses and metrics.
            new, old, reference, sampler = (
                None if x is None else jnp.where(micro_batch.mask, x, 0.0)
                for x in (new, micro_batch.old, micro_batch.reference, micro_batch.sampler)
            )
            # In the first update on a rollout the old parameters are the new ones.
            old = jax.lax.stop_gradient(new) if old is None else old
            losses, diagnostics = token_losses(
                new, old, sampler, reference, micro_batch.advantages, config
            )
            # Sums over tokens, which micro-batches add up; `_means` divides them.
            difference = old - sampler
            counted = (micro_batch.weights > 0).astype(jnp.float32)
            sums = {
                "loss": jnp.sum(losses * micro_batch.weights),
                "tokens": jnp.sum(counted),
                "entropy": jnp.sum(entropy * counted),
                "difference": jnp.sum(jnp.abs(difference) * counted),
                **{name: jnp.sum(value * counted) for name, value in diagnostics.items()},
                "difference_max": jnp.max(jnp.abs(difference) * counted),
            }
            return sums["loss"], jax.lax.stop_gradient(sums)

        return add_gradients(loss, params, so_far, model)

    grads, sums = accumulate(micro_gradients, model, params, batch, micro_batches, _combine)
    return grads, _means(sums)


def _combine(total: Metrics, sums: Metrics) -> Metrics:
    """Adds a micro-batch's sums to the total, but takes the maximum of `difference_max`."""
    largest = jnp.maximum(total["difference_max"], sums["difference_max"])
    return add(total, sums) | {"difference_max": largest}


def combined_metrics(updates: Sequence[Metrics]) -> Metrics:
    """Returns the means of a rollout's updates; maxima of maxima, the sum of `skipped_updates`."""

    def combined(name: str) -> Array:
        values = jnp.stack([metrics[name] for metrics in updates])
        if name == "skipped_updates":
            return jnp.sum(values)
        is_maximum = name == "not_finite" or name.endswith("/max")
        return jnp.max(values, axis=0) if is_maximum else jnp.mean(values)

    return {name: combined(name) for name in updates[0]}


def _means(sums: Metrics) -> Metrics:
    """Divides sums over tokens by their number, under TRL's names."""
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
    """Returns one optimizer update, `update(state, frozen, batch, allowed) -> (state, metrics)`.

    `state.step` counts rollouts, so the caller raises it after the last update on one. An update on
    numbers that are not finite is skipped (see `apply_gradients`). The metric `not_finite`, int32
    [b], is `prompts.fact` of each group with such numbers (see `not_finite_groups`), else -1.
    """

    def update(
        state: TrainState, frozen: Params, batch: GroupBatch, allowed: Bool[Array, " v"]
    ) -> tuple[TrainState, Metrics]:
        grads, metrics = grpo_gradients(
            model, state.params, batch, allowed, config, score, micro_batches, frozen
        )
        not_finite = not_finite_groups(batch)
        sound = jnp.isfinite(metrics["loss"]) & ~jnp.any(not_finite)
        params, opt_state, norms = apply_gradients(state, grads, optimizer, sound)
        metrics |= norms | {"not_finite": jnp.where(not_finite, batch.prompts.fact, -1)}
        return state.replace(params=params, opt_state=opt_state), metrics

    return update


def not_finite_groups(batch: GroupBatch) -> Bool[Array, " b"]:
    """Returns which groups have an advantage or a token's log-probability that is not finite.

    The loss alone does not show it: the clip and the importance weight's cap hide infinite ratios.
    """
    not_finite = jnp.any(~jnp.isfinite(batch.advantages), axis=-1)
    for logprobs in (batch.sampler, batch.old, batch.reference):
        if logprobs is not None:
            not_finite |= jnp.any(~jnp.isfinite(logprobs) & batch.mask, axis=(-2, -1))
    return not_finite
