"""One step of GRPO, from prompts to new parameters: rollout, score, update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from morer1_jax.batch import PromptBatch
from morer1_jax.config.settings import GRPOSettings
from morer1_jax.data.grammar import GrammarTables
from morer1_jax.learn.grpo import GroupBatch, combined_metrics, make_grpo_update, token_weights
from morer1_jax.learn.state import TrainState
from morer1_jax.learn.trainable import join
from morer1_jax.model.layers import Params
from morer1_jax.model.parts import map_rows
from morer1_jax.model.scorer import ScoreConfig, group_logprobs
from morer1_jax.rollout.config import SampleConfig
from morer1_jax.rollout.program import ScoredRollout, make_rollout
from morer1_jax.run.mesh import like_on, program
from morer1_jax.run.phases import PhaseTimer
from morer1_jax.run.placed import Placed
from morer1_jax.run.policy import Policy
from morer1_jax.stages.ahead import encoded

GRPOStep = Callable[
    [TrainState, PromptBatch, int], tuple[TrainState, dict[str, Any], ScoredRollout]
]


class Programs(NamedTuple):
    """The compiled programs of a step.

    Attributes:
        rollout: `(params, prompts, grammar, allowed, step) -> (scored, metrics)`; see
            `make_rollout`.
        score: `(params, prompts, tokens, mask, allowed) -> logprobs`, float32 [b, g, t].
        weigh: `(mask, ended) -> weights`, each token's share of the loss.
        update: `(state, frozen, batch, allowed) -> (state, metrics)`; the state is donated.
        finish: `(step, metrics of each update) -> (step + 1, their means)`.
    """

    rollout: Callable[..., Any]
    score: Callable[..., Any]
    weigh: Callable[..., Any]
    update: Callable[..., Any]
    finish: Callable[..., Any]


def make_programs(
    placed: Placed,
    settings: GRPOSettings,
    transform: optax.GradientTransformation,
    sampling: SampleConfig,
    *,
    score_config: ScoreConfig,
    seed: int,
) -> Programs:
    """Returns the programs of a step, with the shardings of their arguments and results.

    Args:
        transform: the optimizer.
        sampling: of the rollout.
        seed: of the sampling noise.
    """
    # What the programs compute.
    model, loss = placed.model, settings.loss
    micro_batches, score_parts = parts_of(placed, settings)

    def score(
        params: Params, prompts: PromptBatch, tokens: jax.Array, mask: jax.Array, allowed: jax.Array
    ) -> jax.Array:
        def of_part(part: tuple[PromptBatch, jax.Array, jax.Array]) -> jax.Array:
            return group_logprobs(model, params, *part, allowed, score_config)[0]

        return map_rows(of_part, (prompts, tokens, mask), score_parts)

    # Compile them for the mesh.
    params, rows, whole = placed.param_shardings, placed.rows, placed.replicated
    like = placed.like_state(transform)
    return Programs(
        rollout=program(
            make_rollout(
                placed.sampling.model,
                sampling,
                settings.reward,
                settings.scale_rewards,
                seed,
                placed.micro_batches(settings.prompts, settings.rollout_parts),
            ),
            takes=(placed.sampling.like, rows, whole, whole, whole),
            gives=(rows, whole),
        ),
        score=program(score, takes=(params, rows, rows, rows, whole), gives=rows),
        # A program even for this: otherwise each operation is compiled by itself.
        weigh=program(
            lambda mask, ended: token_weights(mask, ended, loss), takes=(rows, rows), gives=rows
        ),
        update=program(
            make_grpo_update(model, transform, loss, score_config, micro_batches),
            takes=(like, placed.like_frozen, rows, whole),
            gives=(like, whole),
            donate=0,
        ),
        finish=jax.jit(
            lambda step, metrics: (step + 1, combined_metrics(metrics)),
            out_shardings=(like.step.sharding, whole),
        ),
    )


class Arguments(NamedTuple):
    """What the programs of a step take, as shapes with shardings.

    Attributes:
        rollout: of the one call.
        scores: of each call, that under the reference first.
        weigh: of the one call.
        updates: of the first update, and of those that follow on the same rollout.
        scored: what the rollout gives.
    """

    rollout: tuple[Any, ...]
    scores: list[tuple[Any, ...]]
    weigh: tuple[Any, ...]
    updates: list[tuple[Any, ...]]
    scored: ScoredRollout


def arguments_of(
    programs: Programs,
    placed: Placed,
    settings: GRPOSettings,
    transform: optax.GradientTransformation,
    prompts: PromptBatch,
    grammar: GrammarTables,
    allowed: jax.Array | jax.ShapeDtypeStruct,
) -> Arguments:
    """Returns what `make_grpo_step`'s step gives the programs for such prompts.

    Args:
        prompts: with images as the data has them.
    """
    rows, frozen = placed.rows, placed.like_frozen
    images = encoded(placed, prompts)
    # A number of the host, which lies nowhere: with a sharding it would be another argument.
    step = jax.ShapeDtypeStruct((), jnp.int32)
    rollout = (placed.sampling.given, images, grammar, allowed, step)
    scored: ScoredRollout = like_on(jax.eval_shape(programs.rollout, *rollout)[0], rows)
    drawn = scored.rollout
    prompts = prompts if placed.tower_trains else images
    # The reference, and the parameters that the rollout began with.
    scoring = [placed.like_reference] if settings.loss.beta else []
    scoring += [placed.like] if settings.updates > 1 else []
    given = (prompts, drawn.tokens, drawn.mask, allowed)
    weigh = (drawn.mask, drawn.ended)
    batch = GroupBatch(
        prompts=prompts,
        tokens=drawn.tokens,
        mask=drawn.mask,
        weights=like_on(jax.eval_shape(programs.weigh, *weigh), rows),
        advantages=scored.advantages,
        sampler=drawn.logprobs,
        reference=drawn.logprobs if settings.loss.beta else None,
    )
    batches = [batch, *([batch.replace(old=drawn.logprobs)] if settings.updates > 1 else [])]
    state = placed.like_state(transform)
    return Arguments(
        rollout=rollout,
        scores=[(join(params, frozen), *given) for params in scoring],
        weigh=weigh,
        updates=[(state, frozen, batch, allowed) for batch in batches],
        scored=scored,
    )


def parts_of(placed: Placed, settings: GRPOSettings) -> tuple[int, int]:
    """Returns in how many parts the prompts go through an update, and through scoring."""
    micro_batches = placed.micro_batches(settings.prompts, settings.micro_batches)
    # Without a backward pass four times the rows fit, and weights travel once a part.
    return micro_batches, placed.micro_batches(settings.prompts, -(-micro_batches // 4))


def make_grpo_step(
    programs: Programs,
    policy: Policy,
    settings: GRPOSettings,
    frozen: Params,
    reference: Params | None,
    timer: PhaseTimer,
) -> GRPOStep:
    """Returns the function `step(state, prompts, number)`: a rollout, then the updates on it.

    It returns the new state, metrics (those of updates are means over the rollout's updates, see
    `combined_metrics`) and the rollout with its rewards.

    Args:
        frozen: parameters that do not train.
        reference: trainable parameters of the policy that the KL is taken to; None where beta is 0.
        timer: notes the phases `rollout`, `score` and `update` as they are started.
    """

    def step(
        state: TrainState, prompts: PromptBatch, number: int
    ) -> tuple[TrainState, dict[str, Any], ScoredRollout]:
        # Rollout: completions with their rewards and advantages.
        placed, params = policy.placed, join(state.params, frozen)
        prompts = placed.put(prompts)
        encoded = placed.encode(params, prompts)
        params = placed.sampling.params(params)
        scored, metrics = programs.rollout(
            params, encoded, policy.grammar, policy.allowed, np.int32(number)
        )
        del params  # a second model's weights, which only the rollout needs
        # What a frozen tower gave holds for the reference and for the update too.
        prompts = prompts if placed.tower_trains else encoded
        timer.phase("rollout", scored.reward)
        completions = scored.rollout

        # Score: log-probabilities under the reference, and under the parameters that the rollout
        # began with. The first update needs none of these, since its own are equal to them.
        def logprobs(params: Params) -> jax.Array:
            result = programs.score(
                join(params, frozen), prompts, completions.tokens, completions.mask, policy.allowed
            )
            timer.phase("score", result)
            return result

        batch = GroupBatch(
            prompts=prompts,
            tokens=completions.tokens,
            mask=completions.mask,
            weights=programs.weigh(completions.mask, completions.ended),
            advantages=scored.advantages,
            sampler=completions.logprobs,
            reference=logprobs(reference) if settings.loss.beta else None,
        )
        old = logprobs(state.params) if settings.updates > 1 else None

        # Update, as often as the config says on the same rollout.
        metrics_of_updates = []
        for number_of_update in range(settings.updates):
            state, update_metrics = programs.update(
                state, frozen, batch.replace(old=old if number_of_update else None), policy.allowed
            )
            timer.phase("update", update_metrics)
            metrics_of_updates.append(update_metrics)
        steps, means = programs.finish(state.step, metrics_of_updates)
        return state.replace(step=steps), metrics | means, scored

    return step
