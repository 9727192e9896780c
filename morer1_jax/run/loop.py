"""The train loop of SFT and GRPO: batches, steps, logs, validation, checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from morer1_jax.config.settings import LoopSettings
from morer1_jax.data.loader import WorkerKind, load_ahead
from morer1_jax.run.checkpoint import Checkpointer
from morer1_jax.run.hooks import Hooks
from morer1_jax.run.instruments import Instruments, Profiler
from morer1_jax.run.log import MetricLog


def train(
    name: str,
    workdir: Path,
    hooks: Hooks,
    settings: LoopSettings,
    *,
    workers: int = 1,
    kind: WorkerKind = "thread",
    profile: Sequence[int] = (),
) -> Checkpointer:
    """Trains to `settings.steps`, from the newest whole checkpoint if there is one.

    Checkpoints are in `workdir/name/checkpoints`, the best parameters by validation beside them;
    metrics go to `workdir/metrics.jsonl`, see `Instruments`. A run that is killed and started again
    ends with the same parameters, and with every logged step in the log once. While updates are
    skipped in a row nothing is saved, except at the end.

    Args:
        workers, kind: number and kind of the workers that prepare batches; see `load_ahead`.
        profile: the first and the last step of a trace for TensorBoard or Perfetto, written into
            `workdir/profile/name`; () for none.

    Returns:
        The checkpointer, which knows the best parameters.

    Raises:
        NotFiniteError: too many updates in a row were skipped, or a score is not finite.
    """
    # Restore the newest state, and drop the records of later steps from the logs.
    checkpoints = Checkpointer(workdir / name / "checkpoints", keep=settings.keep_checkpoints)
    log, saved = MetricLog(workdir, name), checkpoints.latest()
    log.resume_at(saved)
    hooks.resume(saved)
    state, extra = (hooks.begin(), {}) if saved is None else checkpoints.restore(saved, hooks.like)
    start, steps = saved or 0, settings.steps

    # Run step after step; the host waits for the device only to validate or to save.
    batches = load_ahead(hooks.batch, start, steps, workers=workers, kind=kind)
    instruments = Instruments(name, hooks, settings, log, checkpoints, start, extra)
    profiler = Profiler(name, workdir / "profile" / name, profile, start=start, last=steps)
    save_due = False
    with contextlib.closing(batches), instruments, profiler:
        for step in range(start + 1, steps + 1):
            profiler.before(step, instruments, state)
            batch = next(batches)
            with instruments.step(step, batch):
                state, metrics = hooks.step(state, batch, step - 1)
            instruments.add(step, batch, metrics)
            profiler.after(step, instruments, (state, metrics))

            last = step == steps
            validation_due = last or step % settings.eval_every == 0
            save_due = save_due or last or step % settings.save_every == 0
            if validation_due or save_due:
                with instruments.pause(step, state):
                    if validation_due:
                        validation = hooks.validate(state.params)
                        value = instruments.log_validation(step, validation)
                        checkpoints.save_best(step, state.params, value)
                        shown = f"validation {validation.decisive} {value:.1f}"
                        instruments.bar.write(f"{name} step {step}: {shown}")
                    if save_due and (last or not instruments.skipped.row):
                        log.sync()
                        checkpoints.save(step, state, instruments.skipped.extra())
                        save_due = False
            instruments.bar.update()
    return checkpoints
