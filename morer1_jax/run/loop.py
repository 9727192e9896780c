"""The train loop of SFT and GRPO: batches, steps, logs, validation, checkpoints."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from morer1_jax.config.settings import LoopSettings
from morer1_jax.data.loader import WorkerKind, load_ahead
from morer1_jax.errors import Stopped
from morer1_jax.hosts import group
from morer1_jax.hosts.stop import stopping
from morer1_jax.learn.state import TrainState
from morer1_jax.run.checkpoint import Checkpointer
from morer1_jax.run.hooks import Hooks
from morer1_jax.run.instruments import Instruments, Profiler
from morer1_jax.run.log import MetricLog
from morer1_jax.run.shelf import UNVALIDATED
from morer1_jax.run.store import Store


def train(
    name: str,
    store: Store,
    hooks: Hooks,
    settings: LoopSettings,
    *,
    workers: int = 1,
    kind: WorkerKind = "thread",
    profile: Sequence[int] = (),
) -> Checkpointer:
    """Trains to `settings.steps`, from the newest whole checkpoint if there is one.

    Checkpoints are in `name/checkpoints` of the workdir, the best parameters by validation beside
    them; metrics go to its `metrics.jsonl`, see `Instruments`. A run that is killed and started
    again ends with the same parameters, and with every logged step in the log once. While updates
    are skipped in a row nothing is saved, except at the end.

    Args:
        workers, kind: number and kind of the workers that prepare batches; see `load_ahead`.
        profile: the first and the last step of a trace for TensorBoard or Perfetto, written into
            `profile/name`, of several processes each into a folder of its own; () for none.

    Returns:
        The checkpointer, which knows the best parameters.

    Raises:
        NotFiniteError: too many updates in a row were skipped, or a score is not finite.
        Stopped: the run was told to stop; the state is saved.
    """
    checkpoints, log, start, state, extra = _resumed(name, store, hooks, settings)

    # Run step after step; the host waits for the device only to validate or to save.
    steps = settings.steps
    batches = load_ahead(hooks.batch, start, steps, workers=workers, kind=kind)
    instruments = Instruments(name, hooks, settings, log, checkpoints, start, extra)
    profiler = Profiler(name, _traces(store, name), profile, start=start, last=steps)
    validate = functools.partial(_validate, name, hooks, instruments, checkpoints)
    save_due = False
    with contextlib.closing(batches), instruments, profiler, checkpoints:
        if extra.get(UNVALIDATED):
            with instruments.pause(start, state):
                validate(start, state)
        for step in range(start + 1, steps + 1):
            profiler.before(step, instruments, state)
            batch = next(batches)
            checkpoints.check()
            with instruments.step(step, batch):
                state, metrics = hooks.step(state, batch, step - 1)
            instruments.add(step, batch, metrics)
            profiler.after(step, instruments, (state, metrics))

            last, stop = step == steps, stopping()
            validation_due = last or step % settings.eval_every == 0
            save_due = save_due or last or step % settings.save_every == 0 or stop
            if validation_due or save_due:
                with instruments.pause(step, state):
                    if validation_due and not stop:
                        try:
                            validate(step, state)
                        except Stopped:
                            save_due = stop = True
                    if save_due and (last or not instruments.skipped.row):
                        log.sync()
                        later = {UNVALIDATED: True} if validation_due and stop else {}
                        checkpoints.save(step, state, instruments.skipped.extra() | later)
                        save_due = False
            instruments.bar.update()
            if stop:
                raise _stopped(name, checkpoints)
    return checkpoints


def _validate(
    name: str,
    hooks: Hooks,
    instruments: Instruments,
    checkpoints: Checkpointer,
    step: int,
    state: TrainState,
) -> None:
    """Scores the parameters, and saves them if they are the best."""
    validation = hooks.validate(state.params)
    value = instruments.log_validation(step, validation)
    checkpoints.save_best(step, state.params, value)
    shown = f"validation {validation.decisive} {value:.1f}"
    instruments.bar.write(f"{name} step {step}: {shown}")


def _stopped(name: str, checkpoints: Checkpointer) -> Stopped:
    checkpoints.wait()
    latest = checkpoints.latest()
    saved = "not saved yet" if latest is None else f"saved as of step {latest}"
    return Stopped(f"stopped by SIGTERM: {name} is {saved}")


def _traces(store: Store, name: str) -> Path:
    """Returns the folder of this process's traces."""
    folder = store.folder / "profile" / name
    return folder / f"process_{group.index()}" if group.count() > 1 else folder


def _resumed(
    name: str, store: Store, hooks: Hooks, settings: LoopSettings
) -> tuple[Checkpointer, MetricLog, int, TrainState, Mapping[str, Any]]:
    """Restores the newest state, and drops the records of later steps from the logs.

    Returns:
        Checkpoints and log; the steps that are done, the state after them, and its `extra`.
    """
    checkpoints = Checkpointer(
        store.checkpoints(name),
        keep=settings.keep_checkpoints,
        background=True,
        before_whole=store.publish,
    )
    log, restored = MetricLog(store.folder, name), checkpoints.restore_newest(hooks.like)
    if restored is None:
        log.resume_at(None)
        hooks.resume(None)
        return checkpoints, log, 0, hooks.begin(), {}
    step, state, extra = restored
    print(f"{name}: goes on from step {step}, as saved in {checkpoints.folder}")
    log.resume_at(step, again=("valid",) if extra.get(UNVALIDATED) else ())
    hooks.resume(step)
    return checkpoints, log, step, state, extra
