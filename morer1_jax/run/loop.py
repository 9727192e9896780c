"""The train loop: batches in, steps, logs, validation, checkpoints; the same for SFT and GRPO."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from morer1_jax.data.loader import WorkerKind, load_ahead
from morer1_jax.errors import NotFiniteError
from morer1_jax.learn.state import TrainState
from morer1_jax.progress import progress
from morer1_jax.run.checkpoint import Checkpointer
from morer1_jax.run.compiles import CompileWatch
from morer1_jax.run.finite import PATIENCE, SKIPPED, SkippedUpdates, check_scores
from morer1_jax.run.log import MetricLog
from morer1_jax.run.phases import PhaseTimer
from morer1_jax.run.throughput import Work, throughput

Metrics = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long to train, and how often to do what; all counted in steps."""

    steps: int
    eval_every: int
    save_every: int
    log_every: int
    keep_checkpoints: int


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What one kind of training does.

    Attributes:
      batch: the arrays of a step, host side; a pure function of the step, which worker processes
        are sent a copy of.
      step: `(state, batch, step) -> (state, metrics)`, metrics possibly still being computed;
        those that are arrays with axes are for `work` and are not logged.
      work: `(batch, metrics) -> Work`, asked of each step once the next one has begun; its
        `NotFiniteError` gets the step's name.
      validate: `params -> metrics`; its `micro_f1` decides which checkpoint is the best.
      timer: that `step` tells what it starts.
      resume: told the step training is taken up at, before anything is written.
      shown: metrics to show beside the progress bar.
      updates: of a step, each of which may be skipped.
      dtype: that a step computes in.
    """

    batch: Callable[[int], Any]
    step: Callable[[TrainState, Any, int], tuple[TrainState, Metrics]]
    validate: Callable[[Any], Metrics]
    work: Callable[[Any, Metrics], Work]
    timer: PhaseTimer
    resume: Callable[[int | None], None] = lambda step: None
    shown: tuple[str, ...] = ("loss",)
    updates: int = 1
    dtype: str = "float32"


def train(
    name: str,
    workdir: Path,
    begin: Callable[[], TrainState],
    like: TrainState,
    hooks: Hooks,
    config: LoopConfig,
    *,
    workers: int = 1,
    kind: WorkerKind = "thread",
    profile: Sequence[int] = (),
) -> Checkpointer:
    """Trains to `config.steps`, from the newest whole checkpoint if there is one.

    Checkpoints are in `workdir/name/checkpoints`, the best parameters by validation beside them;
    metrics go to `workdir/metrics.jsonl`, with `step_time`: seconds a step since the last record,
    validation and saving left out; `time/…`, what of it each of the step's programs took, and
    `time/host` what none of them did; what was done in that time, as `throughput` has it; and
    `compilations` of steps so far; `skipped_updates`, all since the last record. A run that is
    killed and started again ends with the same parameters, and with every logged step in the log
    once. While updates are skipped in a row nothing is saved, except at the end.

    Args:
      begin: makes the state that training starts from; not called if there is a checkpoint, so
        that no state is held beside the one restored.
      like: the state's shapes, dtypes and shardings.
      workers, kind: what prepares the batches; see `load_ahead`.
      profile: the first and the last step that a trace is written of, into
        `workdir/profile/name`, for TensorBoard or Perfetto.

    Returns:
      The checkpointer, which knows the best parameters.

    Raises:
      NotFiniteError: too many updates in a row were skipped, or a score is not finite.
    """
    checkpoints = Checkpointer(workdir / name / "checkpoints", keep=config.keep_checkpoints)
    log = MetricLog(workdir, name)
    start = checkpoints.latest()
    log.resume_at(start)
    hooks.resume(start)
    state, extra = (begin(), {}) if start is None else checkpoints.restore(start, like)
    start = start or 0
    batches = load_ahead(hooks.batch, start, config.steps, workers=workers, kind=kind)
    bar = progress(desc=name, total=config.steps, initial=start)
    pending: tuple[int, Any, Metrics] | None = None
    watch, compiles = _StopWatch(start), CompileWatch()
    done, counted = Work(0.0, 0.0), start
    tracing = due = False
    skipped = SkippedUpdates(
        name,
        config.steps,
        checkpoints.latest,
        bar.write,
        extra,
        updates=hooks.updates,
        dtype=hooks.dtype,
    )

    def settle() -> None:
        """Logs the step before: the next one keeps the device busy while it is waited for."""
        nonlocal pending, done, counted
        if pending is None:
            return
        step, batch, metrics = pending
        pending = None
        try:
            done += hooks.work(batch, metrics)
        except NotFiniteError as error:
            # Of numbers that are not finite the step before may be the cause.
            skipped.read(step)
            skipped.check()
            raise NotFiniteError(f"{name} step {step}: {error}") from None
        if step % config.log_every and step != config.steps:
            # The host is hardly ever further ahead than this, so that it does not wait here.
            skipped.read(step - PATIENCE)
            skipped.check()
            return
        jax.block_until_ready(metrics)
        skipped.read(step)
        seconds = watch.seconds_a_step(step)
        scalars = {name: value for name, value in metrics.items() if np.ndim(value) == 0}
        steps = step - counted
        phases = {name: spent / steps for name, spent in hooks.timer.take(step).items()}
        phases["host"] = max(0.0, seconds - sum(phases.values()))
        log.write(
            step,
            {
                **scalars,
                "step_time": seconds,
                **{f"time/{name}": spent for name, spent in phases.items()},
                **throughput(done, seconds * steps),
                "compilations": compiles.count,
                SKIPPED: skipped.take(),
            },
        )
        skipped.check()
        bar.set_postfix({k: f"{float(metrics[k]):.3g}" for k in hooks.shown}, refresh=False)
        done, counted = Work(0.0, 0.0), step

    with contextlib.closing(log), contextlib.closing(batches), bar, compiles, hooks.timer:
        watch.go_on()
        for step in range(start + 1, config.steps + 1):
            if profile and step == max(profile[0], start + 1) <= profile[1]:
                settle()
                jax.block_until_ready(state)
                jax.profiler.start_trace(workdir / "profile" / name, create_perfetto_trace=True)
                tracing = True
            batch = next(batches)
            hooks.timer.step(step)
            with compiles.step(batch) as again:
                state, metrics = hooks.step(state, batch, step - 1)
            if again:
                bar.write(
                    f"{name} step {step}: compiled again for a batch of shapes that were seen "
                    f"before ({sum(again):.1f} s); every step should compile once a shape"
                )
            settle()
            pending = (step, batch, metrics)
            skipped.add(step, metrics)
            last = step == config.steps
            if tracing and (last or step == profile[1]):
                jax.block_until_ready((state, metrics))
                jax.profiler.stop_trace()
                tracing = False
                bar.write(f"{name}: trace of steps to {step} in {workdir / 'profile' / name}")
            validate = step % config.eval_every == 0 or last
            due = due or step % config.save_every == 0 or last
            if stop := validate or due:
                settle()
                jax.block_until_ready(state)
                watch.pause()
                skipped.read(step)
                skipped.check()
            if validate:
                scores = hooks.validate(state.params)
                log.write(step, {f"validation/{k}": v for k, v in scores.items()}, kind="valid")
                check_scores(name, step, scores)
                checkpoints.save_best(step, state.params, float(scores["micro_f1"]))
                bar.write(f"{name} step {step}: validation micro F1 {scores['micro_f1']:.1f}")
            if due and (last or not skipped.row):
                log.sync()
                checkpoints.save(step, state, skipped.extra())
                due = False
            if stop:
                watch.go_on()
            bar.update()
    return checkpoints


class _StopWatch:
    """Seconds a step, where steps are computed while the host is ahead of them.

    Only what was waited for has a time, so it is asked for once a step is known to be computed.
    """

    def __init__(self, step: int) -> None:
        self._step = step
        self._seconds = 0.0
        self._since: float | None = None

    def go_on(self) -> None:
        self._since = time.perf_counter()

    def pause(self) -> None:
        """Stops counting; every step so far is computed."""
        if self._since is not None:
            self._seconds += time.perf_counter() - self._since
        self._since = None

    def seconds_a_step(self, step: int) -> float:
        """The mean since it was last asked for; `step` is computed just now."""
        running = self._since is not None
        self.pause()
        mean = self._seconds / (step - self._step)
        self._step, self._seconds = step, 0.0
        if running:
            self.go_on()
        return mean
