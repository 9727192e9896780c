"""Serves our side: the same programs that training runs.

python -m bench.ours --folder=model --preset=small
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from bench.cases import PRESETS, Example, Preset
from bench.ours_model import Ours
from bench.ours_sampling import SampleTask, TailTask, trips
from bench.task import Numbers, Task, arguments, process_peak, serve
from morer1_jax.batch import PromptBatch, SequenceBatch
from morer1_jax.config.settings import GRPOSettings
from morer1_jax.data.collate import Collator
from morer1_jax.data.curriculum import MixConfig
from morer1_jax.data.rows import plan_rows
from morer1_jax.learn.grpo import (
    GroupBatch,
    LossConfig,
    grpo_gradients,
    make_grpo_update,
    token_weights,
)
from morer1_jax.learn.sft import make_sft_step, sft_gradients
from morer1_jax.learn.state import OptimizerConfig
from morer1_jax.model.scorer import ScoreConfig, group_logprobs
from morer1_jax.model.sharding import Layout
from morer1_jax.rollout.config import SampleConfig
from morer1_jax.rollout.reward import RewardConfig
from morer1_jax.run.memory import keep_freed_memory
from morer1_jax.run.phases import PhaseTimer
from morer1_jax.run.shapes import row_cost
from morer1_jax.stages.grpo_step import Programs, make_grpo_step, make_programs, parts_of

_SCORE = ScoreConfig(chunk=512)


class SFTTask:
    """One step of SFT on `examples`, in micro-batches."""

    def __init__(self, side: Ours, examples: list[Example], micro_batches: int = 1) -> None:
        self._side, self._micro_batches = side, micro_batches
        samples = [side.reader.read(example.prompt, example.target) for example in examples]
        sizes = [side.reader.size_of(sample) for sample in samples]
        # Packed as a run of such samples would pack them.
        cost = row_cost(side.model.config)
        plan = plan_rows([sizes], cost, multiple=micro_batches)
        shape, places = plan.rows(sizes)
        rows = [[samples[i] for i in row] for row in places]
        batch = Collator.of(side.reader).sequences(rows, shape)
        self.batch: SequenceBatch = jax.device_put(batch)
        step = make_sft_step(side.model, side.optimizer, _SCORE, micro_batches)
        self._step = jax.jit(step, donate_argnums=0)

    @property
    def flops(self) -> float | None:
        """See `task.Task`."""
        targets = int(jnp.max(jnp.sum(self.batch.weights > 0, axis=1)))
        rows = len(self.batch.tokens) // self._micro_batches
        trips = [_chunks(_SCORE, rows, targets)] * 2
        arguments = self._side.like_state(), {}, self.batch
        return self._side.flops(self._step, *arguments, trips=trips)

    def numbers(self) -> Numbers:
        side = self._side
        gradients = jax.jit(lambda p, batch: sft_gradients(side.model, p, batch, _SCORE))
        grads, metrics = gradients(side.loaded.params, self.batch)
        return {"loss": float(metrics["loss"]), "grad_norm": float(_norm(grads))}

    def prepare(self) -> None:
        self._state = self._side.state()
        self.run()

    def run(self) -> None:
        self._state, metrics = self._step(self._state, {}, self.batch)
        jax.block_until_ready((self._state, metrics))


class GRPOTask:
    """One step of GRPO with KL: rollout, reference, update."""

    def __init__(self, side: Ours, prompt: int) -> None:
        self._side, self._length = side, prompt
        self.prompts = side.prompts(prompt)
        self.settings = grpo_settings(side.preset)

    @property
    def flops(self) -> float | None:
        side, programs = self._side, self._programs()
        params, policy = side.loaded.params, side.policy
        own = policy.placed.sampling.like
        encoded = side.encoded(self.prompts)
        arguments = own, encoded, policy.grammar, policy.allowed, jnp.int32(0)
        scored, _ = jax.eval_shape(programs.rollout, *arguments)
        # Shapes alone count: all arrays of a float32 for each token have the log-probabilities'.
        completions = scored.rollout
        per_token = completions.logprobs
        batch = GroupBatch(
            prompts=self.prompts,
            tokens=completions.tokens,
            mask=completions.mask,
            weights=per_token,
            advantages=scored.advantages,
            sampler=per_token,
            reference=per_token,
        )
        parts = (
            side.tower_flops(self.prompts),
            side.flops(programs.rollout, *arguments, trips=trips(side.preset.completion)),
            side.flops(
                programs.score,
                params,
                self.prompts,
                completions.tokens,
                completions.mask,
                policy.allowed,
                trips=_group_chunks(side.preset, parts_of(policy.placed, self.settings)[1]),
            ),
            side.flops(
                programs.update,
                side.like_state(),
                {},
                batch,
                policy.allowed,
                trips=_group_chunks(side.preset, side.preset.micro_batches) * 2,
            ),
        )
        return None if None in parts else sum(parts)

    def numbers(self) -> Numbers:
        """Returns an update's numbers on TRL's rollout, if it is in the folder, or a random one."""
        side = self._side
        tokens, advantages = side.inputs.rollout(side.preset.group)
        path = side.folder / f"rollouts-{self._length}.npz"
        if path.exists():
            trl_rollout = np.load(path)
            tokens = trl_rollout["completion_ids"].reshape(*advantages.shape, -1)
            advantages = trl_rollout["advantages"].reshape(advantages.shape)
        loss = self.settings.loss
        batch = _group_batch(self.prompts, tokens, advantages, loss)
        return _update_numbers(side, batch, loss)

    def prepare(self) -> None:
        self._state = self._side.state()
        self._step = make_grpo_step(
            self._programs(),
            self._side.policy,
            self.settings,
            {},
            self._side.loaded.params,
            # Entered, as in a run; its thread ends with the process.
            PhaseTimer().__enter__(),
        )
        self._number = 0
        self.run()

    def _programs(self) -> Programs:
        side = self._side
        return make_programs(
            side.policy.placed,
            self.settings,
            side.optimizer,
            SampleConfig(
                group=side.preset.group, length=side.preset.completion, temperature=1.0, ends=()
            ),
            score_config=_group_score(side.preset),
            seed=0,
        )

    def run(self) -> None:
        self._number += 1
        self._state, metrics, scored = self._step(self._state, self.prompts, self._number)
        jax.block_until_ready((self._state, metrics, scored))


class UpdateTask:
    """One update on random completions, `group` for each prompt."""

    def __init__(self, side: Ours, prompt: int, group: int) -> None:
        self._side = side
        # Without a reference, and on-policy.
        self._config = LossConfig(beta=0.0, importance_cap=None)
        rollout = side.inputs.rollout(group)
        self.batch = _group_batch(side.prompts(prompt), *rollout, self._config)
        preset, score = side.preset, _group_score(side.preset)
        update = make_grpo_update(
            side.model, side.optimizer, self._config, score, preset.micro_batches
        )
        self._update = jax.jit(update, donate_argnums=0)

    @property
    def flops(self) -> float | None:
        side = self._side
        arguments = side.like_state(), {}, self.batch, side.policy.allowed
        trips = _group_chunks(side.preset, side.preset.micro_batches, self.batch.tokens.shape[1])
        return side.flops(self._update, *arguments, trips=trips * 2)

    def numbers(self) -> Numbers:
        return _update_numbers(self._side, self.batch, self._config)

    def prepare(self) -> None:
        self._state = self._side.state()
        self.run()

    def run(self) -> None:
        allowed = self._side.policy.allowed
        self._state, metrics = self._update(self._state, {}, self.batch, allowed)
        jax.block_until_ready((self._state, metrics))


_TASKS: dict[str, Callable[..., Task]] = {
    "sft": lambda side: SFTTask(side, side.inputs.examples()),
    "sft_mixed": lambda side: SFTTask(side, side.inputs.mixed(), micro_batches=2),
    "first": functools.partial(SampleTask, length=1),
    "sample": SampleTask,
    "tail": TailTask,
    "grpo": GRPOTask,
    "update": UpdateTask,
}


def _chunks(config: ScoreConfig, rows: int, counted: int) -> int:
    """Returns the chunks of logits of so many rows, each with so many places that count."""
    return math.ceil(counted / config.of_row(rows, Layout()))


def _group_chunks(preset: Preset, parts: int, group: int | None = None) -> list[int]:
    """Returns the chunks of logits of one of the parts that a batch of groups goes in."""
    counted = (group or preset.group) * preset.completion
    return [_chunks(_group_score(preset), preset.batch // parts, counted)]


def grpo_settings(preset: Preset) -> GRPOSettings:
    """Returns the settings of a GRPO step with KL at the preset's sizes."""
    return GRPOSettings(
        steps=1,
        prompts=preset.batch,
        group=preset.group,
        updates=1,
        micro_batches=preset.micro_batches,
        temperature=1.0,
        scale_rewards="group",
        mixing=False,
        eval_every=1,
        eval_facts=1,
        save_every=1,
        log_every=1,
        rollouts_every=1,
        keep_checkpoints=1,
        mix=MixConfig(),
        reward=RewardConfig(),
        loss=LossConfig(beta=0.04, importance_cap=None),
        optimizer=OptimizerConfig(lr=1e-6),
    )


def _group_score(preset: Preset) -> ScoreConfig:
    return ScoreConfig(chunk=128 * preset.batch)


def _group_batch(
    prompts: PromptBatch,
    tokens: Int[np.ndarray, "b g t"],
    advantages: Float[np.ndarray, "b g"],
    loss: LossConfig,
) -> GroupBatch:
    """Returns the batch of a first update on completions of the full length."""
    mask = jnp.ones(tokens.shape, bool)
    return GroupBatch(
        prompts=prompts,
        tokens=jnp.asarray(tokens, jnp.int32),
        mask=mask,
        weights=token_weights(mask, jnp.ones(mask.shape[:2], bool), loss),
        advantages=jnp.asarray(advantages),
        sampler=jnp.zeros(tokens.shape),
    )


def _update_numbers(side: Ours, batch: GroupBatch, loss: LossConfig) -> Numbers:
    """Returns an update's numbers; every token may be sampled, as on PyTorch's side."""
    score, parts = _group_score(side.preset), side.preset.micro_batches
    allowed = jnp.ones_like(side.policy.allowed)

    def gradients(params: Any, batch: GroupBatch) -> Any:
        if loss.beta:
            reference, _ = group_logprobs(
                side.model, params, batch.prompts, batch.tokens, batch.mask, allowed, score
            )
            batch = batch.replace(reference=reference)
        return grpo_gradients(side.model, params, batch, allowed, loss, score, parts)

    grads, metrics = jax.jit(gradients)(side.loaded.params, batch)
    numbers = {name: float(metrics[name]) for name in ("loss", "entropy")}
    return numbers | {"grad_norm": float(_norm(grads))}


def _norm(grads: Any) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(grads)))


class Side:
    """Our side; see `task.Side`."""

    def __init__(self, folder: Path, preset: Preset) -> None:
        self._ours = Ours(folder, preset)

    def task(self, name: str) -> Task:
        kind, *sizes = name.split("/")
        return _TASKS[kind](self._ours, *map(int, sizes))

    def peak_bytes(self) -> int:
        if jax.default_backend() == "cpu":
            return process_peak()
        return jax.devices()[0].memory_stats()["peak_bytes_in_use"]


if __name__ == "__main__":
    keep_freed_memory()
    flags = arguments()
    serve(lambda: Side(flags.folder, PRESETS[flags.preset]))
