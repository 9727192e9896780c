"""The stage `sft`, whose training the blind baselines and the control use too."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import optax

from morer1_jax.batch import SequenceBatch
from morer1_jax.config.settings import SFTSettings
from morer1_jax.data.curriculum import Pool
from morer1_jax.data.feed import Draw, SequenceFeed
from morer1_jax.data.rows import RowPlan
from morer1_jax.data.sample import SampleReader
from morer1_jax.data.shapes import SampleSize
from morer1_jax.learn.sft import make_sft_step
from morer1_jax.learn.state import TrainState
from morer1_jax.model.layers import Params
from morer1_jax.model.scorer import ScoreConfig
from morer1_jax.run.batch_sampler import BatchSampler, validator
from morer1_jax.run.hooks import Hooks, Metrics
from morer1_jax.run.loop import train
from morer1_jax.run.mesh import like_on, program, this_host
from morer1_jax.run.phases import PhaseTimer
from morer1_jax.run.placed import Placed
from morer1_jax.run.setup import Run
from morer1_jax.run.shapes import sequence_plan
from morer1_jax.run.throughput import Passes, sequence_work
from morer1_jax.stages import largest
from morer1_jax.stages.ahead import Program, answers
from morer1_jax.task.fact import Fact


def run_sft(run: Run) -> None:
    """Trains on written reasoning, from the checkpoint or from scratch."""
    train_sft(
        run,
        "sft",
        run.settings.sft,
        targets=run.dataset.reasoning,
        params=lambda: run.trainee.init_params(0),
        stream=0,
    )


def sft_programs(run: Run) -> Iterator[Program]:
    """Yields the stage's programs, and prepares the run for it."""
    yield from programs_ahead(run, "sft", run.settings.sft, run.dataset.reasoning, stream=0)


def sft_program(
    placed: Placed, transform: optax.GradientTransformation, micro_batches: int, chunk: int
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Compiles a step, `(state, frozen, batch) -> (state, metrics)`, for the mesh.

    Args:
        transform: the optimizer.
        chunk: see `ScoreConfig`.
    """
    like = placed.like_state(transform)
    return program(
        make_sft_step(placed.model, transform, ScoreConfig(chunk=chunk), micro_batches),
        takes=(like, placed.like_frozen, placed.rows),
        gives=(like, placed.replicated),
        donate=0,
    )


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A training before it begins.

    Attributes:
        facts: those it learns from.
        draw: the indices of each step's facts.
        sizes: one a fact.
        plan: how a step's samples become rows.
        transform: the optimizer.
        step: from `sft_program`.
    """

    facts: Sequence[Fact]
    draw: Draw
    sizes: Sequence[SampleSize]
    plan: RowPlan
    transform: optax.GradientTransformation
    step: Callable[..., tuple[TrainState, Metrics]]


def _prepare(
    run: Run,
    settings: SFTSettings,
    targets: Mapping[str, str],
    stream: int,
    reader: SampleReader,
) -> Prepared:
    """Chooses the samples of each step and the rows they become, and makes the step's program."""
    placed, data = run.trainee.placed, run.settings.data
    facts = [fact for fact in run.dataset.splits["train"] if fact.id in targets]
    pool = Pool("training", np.arange(len(facts)), (run.settings.seed, 10, stream))
    draw = functools.partial(pool.batch, size=settings.batch)
    sizes = reader.sizes(facts, run.dataset.photo_sizes, targets)
    plan = sequence_plan(placed, data, sizes, draw, settings.steps, settings.micro_batches)
    # Plain cross-entropy: the temperature is that of GRPO's sampling.
    transform = settings.optimizer.build(settings.steps, placed.trainable)
    step = sft_program(placed, transform, settings.micro_batches, run.settings.score.chunk)
    return Prepared(facts, draw, sizes, plan, transform, step)


def programs_ahead(
    run: Run, name: str, settings: SFTSettings, targets: Mapping[str, str], *, stream: int
) -> Iterator[Program]:
    """Yields the programs of a training by `train_sft`, and prepares the run for it.

    Args:
        name, targets, stream: see `train_sft`.
    """
    placed, facts = run.trainee.placed, run.dataset.splits["valid"][: settings.eval_facts]
    ready = run.prepared[name] = _prepare(run, settings, targets, stream, run.reader)
    state = placed.like_state(ready.transform)
    for count, shape in ready.plan.levels:
        rows = largest.sequences(run.settings.data, placed.model, count, shape=shape)
        given = state, placed.like_frozen, like_on(rows, placed.rows)
        size = f"{count} rows of {shape.length}, {shape.slots} windows for {shape.sharing}"
        yield Program.of(f"{name} step, {size}", ready.step, *given)
    yield from answers(run, "greedy answers", run.greedy, facts)


def train_sft(
    run: Run,
    name: str,
    settings: SFTSettings,
    *,
    targets: Mapping[str, str],
    params: Callable[[], Params],
    stream: int,
    reader: SampleReader | None = None,
    sampler: BatchSampler | None = None,
) -> None:
    """Trains on targets, validates by greedy answers, and keeps the best parameters by micro F1.

    Args:
        name: of the stage's folder and of its metrics.
        targets: the assistant's text, by the training fact's id.
        params: makes the parameters that train, as at the start; not called where training goes on.
        stream: separates this training's shuffles from those of the run's other trainings.
        reader, sampler: what the model sees of a fact, and what validates; None: the run's.
    """
    trainee, placed = run.trainee, run.trainee.placed
    reader, sampler = reader or run.reader, sampler or run.greedy
    ready = run.prepared.pop(name, None) or _prepare(run, settings, targets, stream, reader)
    transform = ready.transform
    # Frozen parameters are loaded before a step is timed.
    frozen = trainee.frozen
    passes, timer, host = Passes.of(placed.trainable), PhaseTimer(), this_host(placed.mesh)

    def train_step(
        state: TrainState, batch: SequenceBatch, _: int
    ) -> tuple[TrainState, dict[str, Any]]:
        state, metrics = ready.step(state, frozen, placed.put(batch))
        timer.phase("update", metrics)
        return state, metrics

    hooks = Hooks(
        batch=SequenceFeed(reader, ready.facts, targets, ready.draw, host, ready.sizes, ready.plan),
        begin=lambda: trainee.new_state(params(), transform),
        like=placed.like_state(transform),
        step=train_step,
        validate=validator(sampler, trainee, run.dataset.splits["valid"][: settings.eval_facts]),
        work=lambda batch, _: sequence_work(placed.model.config, passes, host.counted_rows(batch)),
        timer=timer,
        dtype=placed.model.runtime.dtype,
    )
    train(name, run.store, hooks, settings, **run.loop_options)
