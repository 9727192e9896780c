"""Supervised fine-tuning: next-token cross-entropy on the target, weighted by tokens.

The loss is the mean over the target tokens of the whole global batch (not a mean of rows' means),
so that neither packing nor micro-batches nor the mesh change it.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from morer1_jax.batch import SequenceBatch
from morer1_jax.learn.accumulate import accumulate, add_gradients
from morer1_jax.learn.state import TrainState, apply_gradients
from morer1_jax.learn.trainable import join
from morer1_jax.model.layers import Params
from morer1_jax.model.scorer import ScoreConfig, sequence_logprobs
from morer1_jax.model.vlm import Qwen25VL

Metrics = dict[str, Array]


def sft_sums(
    model: Qwen25VL,
    params: Params,
    batch: SequenceBatch,
    config: ScoreConfig,
    running: Params | None = None,
) -> dict[str, Array]:
    """Returns sums over the batch's target tokens: `loss` (cross-entropy), `entropy`, `tokens`.

    Args:
        running: sums of gradients, to which a backward pass adds; see `model.running`.
    """
    logps, entropy = sequence_logprobs(model, params, batch, config, running)
    return {
        "loss": -jnp.sum(logps * batch.weights),
        "entropy": jnp.sum(jax.lax.stop_gradient(entropy) * batch.weights),
        "tokens": jnp.sum(batch.weights),
    }


def sft_gradients(
    model: Qwen25VL,
    params: Params,
    batch: SequenceBatch,
    config: ScoreConfig,
    micro_batches: int = 1,
    frozen: Params | None = None,
) -> tuple[Params, Metrics]:
    """Returns the gradients of the mean loss with respect to `params`, and metrics.

    Args:
        params: the trainable parameters.
        frozen: the model's other parameters; see `learn.trainable`.

    Returns:
        Gradients, and the metrics `loss`, `entropy` and `target_tokens`.
    """
    # Summed over the whole batch beforehand, so that a micro-batch's loss is a plain sum.
    total = jnp.maximum(jnp.sum(batch.weights), 1.0)

    def micro_gradients(
        model: Qwen25VL, micro_batch: SequenceBatch, so_far: Params | None
    ) -> tuple[Params, dict[str, Array]]:
        def loss(params: Params, running: Params) -> tuple[Array, dict[str, Array]]:
            sums = sft_sums(model, join(params, frozen or {}), micro_batch, config, running)
            return sums["loss"] / total, sums

        return add_gradients(loss, params, so_far, model)

    grads, sums = accumulate(micro_gradients, model, params, batch, micro_batches)
    return grads, {
        "loss": sums["loss"] / total,
        "entropy": sums["entropy"] / total,
        "target_tokens": sums["tokens"],
    }


def make_sft_step(
    model: Qwen25VL,
    optimizer: optax.GradientTransformation,
    config: ScoreConfig,
    micro_batches: int = 1,
) -> Callable[[TrainState, Params, SequenceBatch], tuple[TrainState, Metrics]]:
    """Returns one update, `step(state, frozen, batch) -> (state, metrics)`, to be jitted.

    `state.step` counts batches, those whose update was skipped among them; see `apply_gradients`.
    """

    def step(state: TrainState, frozen: Params, batch: SequenceBatch) -> tuple[TrainState, Metrics]:
        grads, metrics = sft_gradients(model, state.params, batch, config, micro_batches, frozen)
        # `apply_gradients` checks the gradients themselves.
        sound = jnp.isfinite(metrics["loss"])
        params, opt_state, norms = apply_gradients(state, grads, optimizer, sound)
        return TrainState(state.step + 1, params, opt_state), metrics | norms

    return step
