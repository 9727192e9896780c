"""The train loop: batches in, steps, logs, validation, checkpoints; the same for SFT and GRPO."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from morer1_jax.data.loader import WorkerKind, load_ahead
from morer1_jax.learn.state import TrainState
from morer1_jax.run.checkpoint import Checkpointer
from morer1_jax.run.log import MetricLog, progress

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
      step: `(state, batch, step) -> (state, metrics)`, metrics possibly still being computed.
      validate: `params -> metrics`; its `micro_f1` decides which checkpoint is the best.
      resume: told the step training is taken up at, before anything is written.
      shown: metrics to show beside the progress bar.
    """

    batch: Callable[[int], Any]
    step: Callable[[TrainState, Any, int], tuple[TrainState, Metrics]]
    validate: Callable[[Any], Metrics]
    resume: Callable[[int | None], None] = lambda step: None
    shown: tuple[str, ...] = ("loss",)


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
) -> Checkpointer:
    """Trains to `config.steps`, from the newest whole checkpoint if there is one.

    Checkpoints are in `workdir/name/checkpoints`, the best parameters by validation beside them;
    metrics go to `workdir/metrics.jsonl`, with `step_time`: seconds a step since the last record,
    validation and saving left out. A run that is killed and started again ends with the same
    parameters, and with every logged step in the log once.

    Args:
      begin: makes the state that training starts from; not called if there is a checkpoint, so
        that no state is held beside the one restored.
      like: the state's shapes, dtypes and shardings.
      workers, kind: what prepares the batches; see `load_ahead`.

    Returns:
      The checkpointer, which knows the best parameters.
    """
    checkpoints = Checkpointer(workdir / name / "checkpoints", keep=config.keep_checkpoints)
    log = MetricLog(workdir, name)
    start = checkpoints.latest()
    log.resume_at(start)
    hooks.resume(start)
    state = begin() if start is None else checkpoints.restore(start, like)[0]
    start = start or 0
    batches = load_ahead(hooks.batch, start, config.steps, workers=workers, kind=kind)
    bar = progress(desc=name, total=config.steps, initial=start)
    pending: tuple[int, Metrics] | None = None
    watch = _StopWatch(start)

    def write_pending() -> None:
        """Logs the step before: the next one keeps the device busy while it is waited for."""
        nonlocal pending
        if pending is not None:
            step, metrics = pending
            jax.block_until_ready(metrics)
            log.write(step, {**metrics, "step_time": watch.seconds_a_step(step)})
            shown = {k: f"{float(metrics[k]):.3g}" for k in hooks.shown}
            bar.set_postfix(shown, refresh=False)
        pending = None

    with contextlib.closing(log), contextlib.closing(batches), bar:
        watch.go_on()
        for step in range(start + 1, config.steps + 1):
            state, metrics = hooks.step(state, next(batches), step - 1)
            write_pending()
            last = step == config.steps
            if step % config.log_every == 0 or last:
                pending = (step, metrics)
            validate = step % config.eval_every == 0 or last
            save = step % config.save_every == 0 or last
            if validate or save:
                write_pending()
                jax.block_until_ready(state)
                watch.pause()
            if validate:
                scores = hooks.validate(state.params)
                log.write(step, {f"validation/{k}": v for k, v in scores.items()}, kind="valid")
                checkpoints.save_best(step, state.params, float(scores["micro_f1"]))
                bar.write(f"{name} step {step}: validation micro F1 {scores['micro_f1']:.1f}")
            if save:
                log.sync()
                checkpoints.save(step, state)
            if validate or save:
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
