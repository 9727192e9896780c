"""The SFT stage, which also trains the blind baselines and the control that goes on with SFT."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from morer1_jax.batch import SequenceBatch
from morer1_jax.data.curriculum import Pool
from morer1_jax.data.encoder import Encoder
from morer1_jax.data.feed import SequenceFeed
from morer1_jax.learn.sft import make_sft_step
from morer1_jax.learn.state import OptimizerConfig, TrainState
from morer1_jax.model.layers import Params
from morer1_jax.run.batch_sampler import greedy_sampler, validator
from morer1_jax.run.checkpoint import Checkpointer
from morer1_jax.run.job import Job
from morer1_jax.run.loop import Hooks, LoopConfig, train
from morer1_jax.run.mesh import shardings_of, this_host
from morer1_jax.run.phases import PhaseTimer
from morer1_jax.run.shapes import sequence_plan
from morer1_jax.run.throughput import Passes, sequence_work


def train_sft(
    job: Job,
    name: str,
    *,
    encoder: Encoder,
    targets: Mapping[str, str],
    params: Callable[[], Params],
    optimizer: OptimizerConfig,
    loop: LoopConfig,
    batch: int,
    micro_batches: int,
    eval_facts: int,
    stream: int,
) -> Checkpointer:
    """Trains on targets, validating by greedy answers.

    Args:
      name: of the stage's folder and of its metrics.
      targets: what the assistant says, by training fact's id.
      params: makes those that train as they are at the start; not called where training goes on.
      stream: tells this training's shuffles from another's of the same run.

    Returns:
      The checkpointer, which knows the best parameters by validation micro F1.
    """
    facts = [fact for fact in job.facts["train"] if fact.id in targets]
    pool = Pool("training", np.arange(len(facts)), (job.settings.seed, 10, stream))
    draw = functools.partial(pool.batch, size=batch)
    needs = encoder.needs(facts, job.sizes, targets)
    plan = sequence_plan(job, needs, draw, loop.steps, micro_batches)
    policy = job.policy
    transform = optimizer.build(loop.steps, job.parts)
    like = job.like_state(transform)
    shardings = shardings_of(like)
    # Plain cross-entropy: the temperature is that of GRPO's sampling.
    score = dataclasses.replace(job.score, temperature=1.0)
    step = jax.jit(
        make_sft_step(policy.model, transform, score, micro_batches),
        in_shardings=(shardings, shardings_of(job.frozen), policy.rows),
        out_shardings=(shardings, policy.replicated),
        donate_argnums=0,
    )

    sampler, passes, timer = greedy_sampler(job, encoder), Passes.of(job.parts), PhaseTimer()

    def train_step(state: TrainState, arrays: SequenceBatch, _: int):
        state, metrics = step(state, job.frozen, policy.put(arrays))
        timer.phase("update", metrics)
        return state, metrics

    hooks = Hooks(
        batch=SequenceFeed(encoder, facts, targets, draw, this_host(), needs, plan),
        step=train_step,
        validate=validator(sampler, job, job.facts["valid"][:eval_facts]),
        work=lambda arrays, _: sequence_work(policy.model.config, passes, arrays),
        timer=timer,
        dtype=policy.model.runtime.dtype,
    )
    return train(
        name,
        job.workdir,
        lambda: job.new_state(params(), transform),
        like,
        hooks,
        loop,
        **job.loading,
        profile=job.settings.profile.steps,
    )


def run_sft(job: Job) -> None:
    """The stage `sft`: written reasoning, from scratch."""
    sft = job.settings.sft
    train_sft(
        job,
        "sft",
        encoder=job.encoder,
        targets=job.reasoning,
        params=lambda: job.init_params(0),
        optimizer=sft.optimizer,
        loop=loop_config(sft),
        batch=sft.batch,
        micro_batches=sft.micro_batches,
        eval_facts=sft.eval_facts,
        stream=0,
    )


def loop_config(stage: Any, steps: int | None = None) -> LoopConfig:
    """The loop's part of a stage's settings."""
    return LoopConfig(
        steps=stage.steps if steps is None else steps,
        eval_every=stage.eval_every,
        save_every=stage.save_every,
        log_every=stage.log_every,
        keep_checkpoints=stage.keep_checkpoints,
    )
