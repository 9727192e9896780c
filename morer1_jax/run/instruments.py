"""Instruments of the train loop: what each step took and did, logged once the next one has begun.

The host runs ahead of the device. So a step is logged while the next one keeps the device busy,
phases are timed by a thread that waits for them, and a skipped update is looked for some steps
later.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import monitoring

from morer1_jax.config.settings import LoopSettings
from morer1_jax.errors import NotFiniteError
from morer1_jax.progress import progress
from morer1_jax.run.checkpoint import Checkpointer
from morer1_jax.run.finite import PATIENCE, SKIPPED, SkippedUpdates, check_scores
from morer1_jax.run.hooks import Hooks, Metrics, Validation
from morer1_jax.run.log import MetricLog
from morer1_jax.run.throughput import Work, throughput

# What JAX calls the event; its duration is the compiler's, or the persistent cache's.
_COMPILATION = "/jax/core/compile/backend_compile_duration"


class Instruments:
    """Times, counts and logs the steps of a training and shows its progress; a context manager.

    Metrics have the step's own numbers, and `step_time`: seconds a step since the last record,
    validation and saving left out; `time/…`, what of it each of the step's programs took, and
    `time/host` what none of them did; what was done in that time, as `throughput` has it;
    `compilations` of steps so far; `skipped_updates`, all since the last record.

    Args:
      name: of the training, for messages.
      hooks: the training's.
      settings: how long it is, and how often it logs.
      log: takes the metrics of every `log_every`-th step, and of the last.
      checkpoints: whose newest is named when a training must end.
      start: steps done before.
      extra: what `extra` gave for the checkpoint that training goes on from.

    Attributes:
      bar: the progress bar.
      skipped: counts skipped updates.
    """

    def __init__(
        self,
        name: str,
        hooks: Hooks,
        settings: LoopSettings,
        log: MetricLog,
        checkpoints: Checkpointer,
        start: int,
        extra: Mapping[str, Any],
    ) -> None:
        self._name, self._hooks, self._settings, self._log = name, hooks, settings, log
        self.bar = progress(desc=name, total=settings.steps, initial=start)
        self.skipped = SkippedUpdates(
            name,
            settings.steps,
            checkpoints.latest,
            self.bar.write,
            extra,
            updates=hooks.updates,
            dtype=hooks.dtype,
        )
        self._watch, self._compilations = StopWatch(start), CompileWatch()
        self._work, self._logged = Work(0.0, 0.0), start
        self._pending: tuple[int, Any, Metrics] | None = None
        self._contexts = contextlib.ExitStack()

    def __enter__(self) -> Instruments:
        for context in (contextlib.closing(self._log), self.bar, self._compilations):
            self._contexts.enter_context(context)
        self._contexts.enter_context(self._hooks.timer)
        self._watch.go_on()
        return self

    def __exit__(self, *error: Any) -> None:
        self._contexts.__exit__(*error)

    @contextlib.contextmanager
    def step(self, step: int, batch: Any) -> Iterator[None]:
        """Watches the start of a step's programs."""
        self._hooks.timer.step(step)
        with self._compilations.step(batch) as again:
            yield
        if again:
            self.bar.write(
                f"{self._name} step {step}: compiled again for a batch of shapes that were seen "
                f"before ({sum(again):.1f} s); every step should compile once a shape"
            )

    def add(self, step: int, batch: Any, metrics: Metrics) -> None:
        """Takes the metrics of a step that was started, and settles the one before it."""
        self.settle()
        self._pending = step, batch, metrics
        self.skipped.add(step, metrics)

    @contextlib.contextmanager
    def pause(self, step: int, state: Any) -> Iterator[None]:
        """Waits until the state of a step is computed; what is done meanwhile is not timed.

        Raises:
          NotFiniteError: too many updates in a row were skipped.
        """
        self.settle()
        jax.block_until_ready(state)
        self._watch.pause()
        self.skipped.read(step)
        self.skipped.check()
        yield
        self._watch.go_on()

    def settle(self) -> None:
        """Counts the pending step's work, and logs it if it is due.

        Raises:
          NotFiniteError: its numbers are not finite, or too many updates in a row were skipped.
        """
        if self._pending is None:
            return
        step, batch, metrics = self._pending
        self._pending = None
        try:
            self._work += self._hooks.work(batch, metrics)
        except NotFiniteError as error:
            # Of numbers that are not finite the step before may be the cause.
            self.skipped.read(step)
            self.skipped.check()
            raise NotFiniteError(f"{self._name} step {step}: {error}") from None
        if step % self._settings.log_every and step != self._settings.steps:
            # The host is hardly ever further ahead than this, so that it does not wait here.
            self.skipped.read(step - PATIENCE)
            self.skipped.check()
            return
        jax.block_until_ready(metrics)
        self.skipped.read(step)
        self._write(step, metrics)
        self.skipped.check()

    def log_validation(self, step: int, validation: Validation) -> float:
        """Logs a validation's scores; returns the one that decides.

        Raises:
          NotFiniteError: a score is not finite.
        """
        scores, decisive = validation.scores, validation.decisive
        self._log.write(step, {f"validation/{k}": v for k, v in scores.items()}, kind="valid")
        check_scores(self._name, step, scores)
        return float(scores[decisive])

    def _write(self, step: int, metrics: Metrics) -> None:
        steps, seconds = step - self._logged, self._watch.seconds_a_step(step)
        phases = {name: spent / steps for name, spent in self._hooks.timer.take(step).items()}
        phases["host"] = max(0.0, seconds - sum(phases.values()))
        self._log.write(
            step,
            {
                **{name: value for name, value in metrics.items() if np.ndim(value) == 0},
                "step_time": seconds,
                **{f"time/{name}": spent for name, spent in phases.items()},
                **throughput(self._work, seconds * steps),
                "compilations": self._compilations.count,
                SKIPPED: self.skipped.take(),
            },
        )
        shown = {name: f"{float(metrics[name]):.3g}" for name in self._hooks.shown}
        self.bar.set_postfix(shown, refresh=False)
        self._work, self._logged = Work(0.0, 0.0), step


class Profiler:
    """Traces some steps for TensorBoard or Perfetto; a context manager.

    Args:
      name: of the training, for messages.
      folder: where the trace is written.
      steps: the first and the last step of the trace; () for none.
      start: steps done before; a trace of steps that were begun before has what is left of them.
      last: the training's last step, with which a trace ends.
    """

    def __init__(
        self, name: str, folder: Path, steps: Sequence[int], *, start: int, last: int
    ) -> None:
        self._name, self._folder = name, folder
        first, until = steps or (0, -1)
        self._first, self._last = max(first, start + 1), min(until, last)
        self._tracing = False

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *_: object) -> None:
        if self._tracing:
            jax.profiler.stop_trace()

    def before(self, step: int, instruments: Instruments, state: Any) -> None:
        """Begins the trace if this step is its first, once all before it are computed."""
        if step == self._first <= self._last:
            instruments.settle()
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self._tracing = True

    def after(self, step: int, instruments: Instruments, results: Any) -> None:
        """Ends the trace if this step is its last, once that is computed."""
        if self._tracing and step == self._last:
            jax.block_until_ready(results)
            jax.profiler.stop_trace()
            self._tracing = False
            instruments.bar.write(f"{self._name}: trace of steps to {step} in {self._folder}")


class CompileWatch:
    """Counts what steps compile; a context manager.

    Attributes:
      count: programs compiled inside `step` so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._seconds: list[float] | None = None
        self._seen: set[Any] = set()

    def __enter__(self) -> CompileWatch:
        monitoring.register_event_duration_secs_listener(self._heard)
        return self

    def __exit__(self, *_: object) -> None:
        monitoring.unregister_event_duration_listener(self._heard)

    def _heard(self, event: str, seconds: float, **_: Any) -> None:
        if event == _COMPILATION and self._seconds is not None:
            self.count += 1
            self._seconds.append(seconds)

    @contextlib.contextmanager
    def step(self, batch: Any) -> Iterator[list[float]]:
        """Records the compilations of one step.

        Yields:
          A list which, once the step is over, has the seconds of each compilation of a step whose
          batch had shapes that were seen before.
        """
        shapes = tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(batch))
        again: list[float] = []
        self._seconds = []
        try:
            yield again
        finally:
            if shapes in self._seen:
                again += self._seconds
            self._seen.add(shapes)
            self._seconds = None


class StopWatch:
    """Seconds a step, where steps are computed while the host is ahead of them.

    Only what was waited for has a time, so it is asked for once a step is known to be computed.
    """

    def __init__(self, step: int) -> None:
        self._step = step
        self._seconds = 0.0
        self._since: float | None = None

    def go_on(self) -> None:
        """Counts from now on."""
        self._since = time.perf_counter()

    def pause(self) -> None:
        """Stops counting; every step so far is computed."""
        if self._since is not None:
            self._seconds += time.perf_counter() - self._since
        self._since = None

    def seconds_a_step(self, step: int) -> float:
        """Returns the mean since the last call; `step` has just been computed."""
        running = self._since is not None
        self.pause()
        mean = self._seconds / (step - self._step)
        self._step, self._seconds = step, 0.0
        if running:
            self.go_on()
        return mean
