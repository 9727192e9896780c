"""Times, counts and logs the steps of the train loop, each once the next one has begun.

The host runs ahead of the device. So a step is logged while the next one keeps the device busy, a
thread waits for phases to time them, and skipped updates are looked for some steps later.
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
from morer1_jax.hosts import group
from morer1_jax.progress import progress
from morer1_jax.run.checkpoint import Checkpointer
from morer1_jax.run.finite import PATIENCE, SKIPPED, SkippedUpdates, check_scores
from morer1_jax.run.hooks import Hooks, Metrics, Validation
from morer1_jax.run.log import MetricLog
from morer1_jax.run.throughput import Work, throughput

# JAX's name of the event, whose duration is the compiler's or the persistent cache's.
_COMPILATION = "/jax/core/compile/backend_compile_duration"


class Instruments:
    """Times, counts and logs the steps of a training and shows its progress; a context manager.

    A record has the step's own metrics and, of the steps since the last record:
    `step_time`, mean seconds of a step, without validation and saving; `time/<program>`, the part
    of it that each of the step's programs took, and `time/host`, the rest; the rates of
    `throughput`; `skipped_updates`, their number. `compilations` counts those of all steps so far.

    Args:
        name: of the training, for messages.
        log: gets the metrics of every `log_every`-th step, and of the last.
        checkpoints: errors that end the training name the newest of them.
        start: number of steps done before.
        extra: result of `SkippedUpdates.extra` in the checkpoint that training goes on from.

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
        """Warns if the block, which starts a step's programs, compiles a known shape again."""
        self._hooks.timer.step(step)
        with self._compilations.step(batch) as repeated_seconds:
            yield
        if repeated_seconds:
            self.bar.write(
                f"{self._name} step {step}: compiled again for a batch of shapes that were seen "
                f"before ({sum(repeated_seconds):.1f} s); every step should compile once a shape"
            )

    def add(self, step: int, batch: Any, metrics: Metrics) -> None:
        """Adds a step that was started, and settles the one before it."""
        self.settle()
        self._pending = step, batch, metrics
        self.skipped.add(step, metrics)

    @contextlib.contextmanager
    def pause(self, step: int, state: Any) -> Iterator[None]:
        """Waits until the state of a step is computed; the time of the block is not counted.

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
            # The cause may be the step before, whose error then comes first.
            self.skipped.read(step)
            self.skipped.check()
            raise NotFiniteError(f"{self._name} step {step}: {error}") from None
        if step % self._settings.log_every and step != self._settings.steps:
            # A step this far back is nearly always computed, so that the host does not wait.
            self.skipped.read(step - PATIENCE)
            self.skipped.check()
            return
        jax.block_until_ready(metrics)
        self.skipped.read(step)
        self._write(step, metrics)
        self.skipped.check()

    def log_validation(self, step: int, validation: Validation) -> float:
        """Logs a validation's scores and returns the decisive one.

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
        # Every process counts its own rows, and times its own programs.
        of_all = group.to_first(f"{self._name} step {step}", [phases, list(self._work)])
        if of_all is not None:
            self._log_step(step, metrics, seconds, of_all)
        self._work, self._logged = Work(0.0, 0.0), step

    def _log_step(
        self, step: int, metrics: Metrics, seconds: float, of_all: Sequence[Sequence[Any]]
    ) -> None:
        """Writes a record of a step.

        Args:
            seconds: mean of a step since the last record.
            of_all: the seconds of phases, and the work of all steps since then, of each process.
        """
        steps = step - self._logged
        phases = [phases for phases, _ in of_all]
        work = sum((Work(*work) for _, work in of_all), Work(0.0, 0.0))
        self._log.write(
            step,
            {
                **{name: value for name, value in metrics.items() if np.ndim(value) == 0},
                "step_time": seconds,
                **slowest(phases),
                **throughput(work, seconds * steps),
                "compilations": self._compilations.count,
                SKIPPED: self.skipped.take(),
            },
        )
        shown = {name: f"{float(metrics[name]):.3g}" for name in self._hooks.shown}
        self.bar.set_postfix(shown, refresh=False)


def slowest(phases: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Returns `time/<phase>`, the seconds of the slowest process.

    Where there are several, `time/<phase>/process` is its number: all wait for a process that is
    slow on its host (`host`), so that the programs of the others take longer.

    Args:
        phases: of each process, seconds by phase.
    """
    result: dict[str, float] = {}
    for name in dict.fromkeys(name for of_process in phases for name in of_process):
        seconds = [of_process.get(name, 0.0) for of_process in phases]
        result[f"time/{name}"] = max(seconds)
        if len(phases) > 1:
            result[f"time/{name}/process"] = seconds.index(max(seconds))
    return result


class Profiler:
    """Traces some steps for TensorBoard or Perfetto; a context manager.

    Args:
        name: of the training, for messages.
        folder: where the trace is written.
        steps: the first and the last step of the trace; () for none.
        start: number of steps done before, which the trace leaves out.
        last: the training's last step, with which the trace ends at the latest.
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
        self._known_shapes: set[Any] = set()

    def __enter__(self) -> CompileWatch:
        monitoring.register_event_duration_secs_listener(self._record)
        return self

    def __exit__(self, *_: object) -> None:
        monitoring.unregister_event_duration_listener(self._record)

    def _record(self, event: str, seconds: float, **_: Any) -> None:
        if event == _COMPILATION and self._seconds is not None:
            self.count += 1
            self._seconds.append(seconds)

    @contextlib.contextmanager
    def step(self, batch: Any) -> Iterator[list[float]]:
        """Records the compilations of one step.

        Yields:
            A list that at the end has the seconds of each compilation, if an earlier step's batch
            had the same shapes.
        """
        shapes = tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(batch))
        repeated_seconds: list[float] = []
        self._seconds = []
        try:
            yield repeated_seconds
        finally:
            if shapes in self._known_shapes:
                repeated_seconds += self._seconds
            self._known_shapes.add(shapes)
            self._seconds = None


class StopWatch:
    """Measures the mean seconds of a step while the host runs ahead of the device.

    Call its methods only once the step is known to be computed.
    """

    def __init__(self, step: int) -> None:
        self._step = step
        self._seconds = 0.0
        self._since: float | None = None

    def go_on(self) -> None:
        """Starts counting."""
        self._since = time.perf_counter()

    def pause(self) -> None:
        """Stops counting; all steps so far must be computed."""
        if self._since is not None:
            self._seconds += time.perf_counter() - self._since
        self._since = None

    def seconds_a_step(self, step: int) -> float:
        """Returns the mean since the last call; `step` must have just been computed."""
        running = self._since is not None
        self.pause()
        mean = self._seconds / (step - self._step)
        self._step, self._seconds = step, 0.0
        if running:
            self.go_on()
        return mean
