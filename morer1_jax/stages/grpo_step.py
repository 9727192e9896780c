"""One step of GRPO as compiled programs: rollout, score, update."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from morer1_jax.batch import PromptBatch
from morer1_jax.config.settings import GRPOSettings
from morer1_jax.learn.grpo import GroupBatch, combined_metrics, make_grpo_update, token_weights
from morer1_jax.learn.state import TrainState
from morer1_jax.learn.trainable import join
from morer1_jax.model.layers import Params
from morer1_jax.model.scorer import ScoreConfig, group_logprobs
from morer1_jax.rollout.program import Scored, make_rollout
from morer1_jax.rollout.sampler import SampleConfig
from morer1_jax.run.mesh import shardings_of
from morer1_jax.run.phases import PhaseTimer
from morer1_jax.run.policy import Policy


class GRPOStep:
    """A rollout and the updates on it: `step(state, prompts, number) -> (state, metrics, scored)`.

    The update's metrics are means over the rollout's updates (see `combined_metrics`).

    Args:
      like: the train state's shapes and shardings.
      transform: the optimizer.
      frozen: parameters that do not train.
      reference: those that the KL is taken to, of the parameters that train; None where beta is 0.
      score: how log-probabilities are taken.
      length: most tokens of a completion.
      seed: of the sampling noise.
      timer: told of `rollout`, `score` and `update` as they are started.
      end_of_turn: the id that ends a completion; None: the tokenizer's.
    """

    def __init__(
        self,
        policy: Policy,
        settings: GRPOSettings,
        like: TrainState,
        transform: Any,
        frozen: Params,
        reference: Params | None,
        *,
        score: ScoreConfig,
        length: int,
        seed: int,
        timer: PhaseTimer,
        end_of_turn: int | None = None,
    ) -> None:
        self._policy, self._settings = policy, settings
        self._frozen, self._reference, self._timer = frozen, reference, timer
        sampling = SampleConfig(
            group=settings.group,
            length=length,
            temperature=settings.temperature,
            end_of_turn=policy.special.end_of_turn if end_of_turn is None else end_of_turn,
        )
        model, rows, whole = policy.model, policy.rows, policy.replicated
        shardings = shardings_of(like)
        self.rollout = jax.jit(
            make_rollout(model, sampling, settings.reward, settings.scale_rewards, seed),
            in_shardings=(policy.param_shardings, rows, whole, whole, whole),
            out_shardings=(rows, whole),
        )
        self.score = jax.jit(
            lambda params, prompts, tokens, mask, allowed: group_logprobs(
                model, params, prompts, tokens, mask, allowed, score
            )[0],
            in_shardings=(policy.param_shardings, rows, rows, rows, whole),
            out_shardings=rows,
        )
        self.update = jax.jit(
            make_grpo_update(model, transform, settings.loss, score, settings.micro_batches),
            in_shardings=(shardings, shardings_of(frozen), rows, whole),
            out_shardings=(shardings, whole),
            donate_argnums=0,
        )
        self.weights = jax.jit(
            lambda mask, ended: token_weights(mask, ended, settings.loss), out_shardings=rows
        )
        # A program, though small: what is computed outside of one compiles operation by operation.
        self.finish = jax.jit(
            lambda step, learned: (step + 1, combined_metrics(learned)),
            out_shardings=(shardings.step, whole),
        )

    def __call__(
        self, state: TrainState, prompts: PromptBatch, number: int
    ) -> tuple[TrainState, dict[str, Any], Scored]:
        settings, policy = self._settings, self._policy
        prompts = policy.put(prompts)
        params = join(state.params, self._frozen)
        scored, metrics = self.rollout(
            params, prompts, policy.grammar, policy.allowed, np.int32(number)
        )
        self._timer.phase("rollout", scored.reward)
        drawn = scored.rollout
        asked = (prompts, drawn.tokens, drawn.mask, policy.allowed)
        reference = None
        if settings.loss.beta:
            reference = self._scored(self._reference, asked)
        batch = GroupBatch(
            prompts=prompts,
            tokens=drawn.tokens,
            mask=drawn.mask,
            weights=self.weights(drawn.mask, drawn.ended),
            advantages=scored.advantages,
            sampler=drawn.logprobs,
            reference=reference,
        )
        # The first update needs no old log-probabilities: they are its own. Later ones take those
        # of the parameters the rollout began with, so they are scored before the first.
        old = self._scored(state.params, asked) if settings.updates > 1 else None
        learned = []
        for update in range(settings.updates):
            state, seen = self.update(
                state, self._frozen, batch.replace(old=old if update else None), policy.allowed
            )
            self._timer.phase("update", seen)
            learned.append(seen)
        number_after, means = self.finish(state.step, learned)
        return state.replace(step=number_after), metrics | means, scored

    def _scored(self, params: Params, asked: tuple[Any, ...]) -> jax.Array:
        logprobs = self.score(join(params, self._frozen), *asked)
        self._timer.phase("score", logprobs)
        return logprobs
