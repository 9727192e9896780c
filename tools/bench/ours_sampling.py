"""Samples with our model: completions of one length, and of unequal ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.cases import COMPARED
from bench.ours_model import Ours
from bench.task import Numbers
from morer1_jax.batch import PromptBatch
from morer1_jax.config.settings import DataSettings, SamplingSettings
from morer1_jax.rollout.config import SampleConfig, Stage, cache_lengths
from morer1_jax.rollout.plan import planned_stages
from morer1_jax.rollout.sampler import Rollout, sample, sample_keys
from morer1_jax.run.slots import step_cost


class SampleTask:
    """Samples a group of completions for each prompt.

    Args:
        prompt: length in tokens.
        length: of a completion, in tokens; None: the preset's.
    """

    def __init__(self, side: Ours, prompt: int, length: int | None = None) -> None:
        self._side = side
        self.prompts = side.prompts(prompt)
        self._length = side.preset.completion if length is None else length
        self._run = self._sampler()

    @property
    def flops(self) -> float | None:
        side = self._side
        params = side.policy.placed.sampling.like
        arguments = params, side.encoded(self.prompts), side.policy.allowed, jnp.int32(0)
        parts = (
            side.tower_flops(self.prompts),
            side.flops(self._run, *arguments, trips=trips(self._length)),
        )
        return None if None in parts else sum(parts)

    def _sampler(self, **changes: Any) -> Callable[..., Any]:
        side, preset = self._side, self._side.preset
        options = {"group": preset.group, "length": self._length, "temperature": 1.0, "ends": ()}
        config = SampleConfig(**(options | changes))
        grammar = side.policy.grammar

        def run(params: Any, prompts: PromptBatch, allowed: jax.Array, step: jax.Array) -> Any:
            keys = sample_keys(0, step, prompts.fact, config.group)
            return sample(
                side.policy.placed.sampling.model, params, prompts, grammar, allowed, keys, config
            )

        return jax.jit(run)

    def numbers(self) -> Numbers:
        drawn = self._likeliest(length=32)
        return {"tokens": drawn.tokens[:, 0].tolist()}

    def _likeliest(self, **changes: Any) -> Rollout:
        """Returns the likeliest completion of each prompt, sampled with these changes."""
        side = self._side
        greedy = self._sampler(group=1, temperature=0.0, **changes)
        allowed = side.policy.allowed.at[side.policy.special.end_of_turn].set(False)
        params = side.policy.placed.sampling.params(side.loaded.params)
        return greedy(params, side.encoded(self.prompts), allowed, jnp.int32(0))

    def prepare(self) -> None:
        self._step = 0
        self.run()

    def run(self) -> None:
        self._step += 1
        side = self._side
        allowed, step = side.policy.allowed, jnp.int32(self._step)
        # As in a run, which encodes the images and moves the parameters once a rollout.
        params = side.policy.placed.sampling.params(side.loaded.params)
        encoded = side.encoded(self.prompts)
        jax.block_until_ready(self._run(params, encoded, allowed, step))


class TailTask(SampleTask):
    """Samples completions of unequal length, by stages for such lengths.

    Args:
        prompt: length in tokens.
    """

    flops: float | None = None  # How often loops turn follows from what is drawn.

    def __init__(self, side: Ours, prompt: int) -> None:
        self._side, tail, group = side, side.preset.tail, side.preset.group
        self.prompts, self._length = side.prompts(prompt, tail.batch), tail.limit
        placed, special = side.policy.placed, side.policy.special
        ids = set(np.flatnonzero(side.policy.allowed).tolist()) - {special.end_of_turn}
        self._ends = tuple(tail.ends(ids))
        # As a run plans them whose training targets are as long.
        stages = planned_stages(
            tail.lengths(4096),
            tail.batch * group,
            tail.limit,
            step_cost(placed),
            1e9 * SamplingSettings().cache,
            DataSettings().round_to,
        )
        self._run = self._sampler(ends=self._ends, stages=stages)

    def numbers(self) -> Numbers:
        """Returns the likeliest completions, some of which end, with and without a slot."""
        limit = COMPARED
        stages = (Stage(1.0, limit // 4), Stage(0.9, limit // 2), Stage(0.8, limit))
        drawn = self._likeliest(length=limit, ends=self._ends, stages=stages)
        pairs = zip(drawn.tokens[:, 0], drawn.mask[:, 0], strict=True)
        return {"tokens": [tokens[mask].tolist() for tokens, mask in pairs]}


def trips(length: int) -> list[int]:
    """Returns the number of tokens that each of the sampler's loops samples.

    No completion ends early, and the first token is sampled before the loops.
    """
    ends = cache_lengths(length)
    return [end - start for start, end in zip((1, *ends), ends, strict=False)]
