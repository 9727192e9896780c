"""Runs the main job: synthesise, SFT, baselines, rate, GRPO, evaluate.

    python -m morer1_jax.train --config=configs/demo.py

`--config.stages=sft` runs one stage alone; a stage whose output is whole is not run again, and one
that was killed goes on from its last checkpoint. Any other key is set the same way.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from morer1_jax.cli import run_main
from morer1_jax.config.binding import FILE as CONFIG_FILE
from morer1_jax.config.binding import bind
from morer1_jax.config.schema import to_tree
from morer1_jax.config.settings import settings
from morer1_jax.errors import ConfigError
from morer1_jax.files import atomic_write, check_writable, remove
from morer1_jax.paths import local_path
from morer1_jax.processes import check_alone
from morer1_jax.run.cache import use_program_cache
from morer1_jax.run.lock import hold
from morer1_jax.run.memory import keep_freed_memory
from morer1_jax.run.setup import Run, Setup, open_run, open_setup, with_features
from morer1_jax.run.trial import check_saves
from morer1_jax.stages.disk import check_room
from morer1_jax.stages.marker import MARKER
from morer1_jax.stages.table import BY_NAME, STAGES, Stage, stages_to_run
from morer1_jax.stages.workdir import WorkdirStatus

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run's config, a Python file.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run writes everything; by default runs/ and the config's name."
)

# Files and folders of a workdir before the first step; the config, which binds it, comes first.
_BEGUN = (CONFIG_FILE, "data.json", "tokenizer", "synthesise", "data")


def train(config: Any, workdir: Path) -> None:
    """Runs the config's stages in a workdir.

    Raises:
        ConfigError, DataError, OSError: what the user can put right, in one line. What is found
            before the first step leaves the workdir as it was, so that another config may follow.
    """
    check_alone()
    workdir = local_path(workdir, "--workdir")
    run_settings = settings(config)
    stages = stages_to_run(run_settings)
    check_writable(workdir, folder=True)
    setup = open_setup(run_settings, workdir)
    with hold(workdir, folder=True):
        _train(setup, stages)


def _train(setup: Setup, stages: Sequence[Stage]) -> None:
    """Runs stages in a workdir that this process has locked."""
    workdir, status = setup.workdir, WorkdirStatus.of(setup.settings, setup.workdir)

    # Find all errors before a step is spent; that may need the data to be made first.
    with _start(workdir):
        tree, writes = to_tree(setup.settings), jax.process_index() == 0
        bind(tree, workdir, write=writes, bound=status.why_bound)
        status.check_steps()
        _check_order(setup, status, stages)
        first = list(itertools.takewhile(lambda stage: stage.makes_data, stages))
        rest = stages[len(first) :]
        for stage in first:
            _run_stage(stage, setup, status)
        unfinished = [stage for stage in rest if not status.done(stage)]
        run = _open(setup, status, stages, unfinished) if unfinished else None
    # Delete states only once nothing can refuse the command any more.
    status.drop_states(goes_on=[stage.name for stage in unfinished])

    # Run the stages.
    if run is not None and any(stage.reads_images(setup.settings) for stage in unfinished):
        run = with_features(run)
    for stage in rest:
        _run_stage(stage, setup if stage.makes_data else run, status)
        status.drop_states()


def _open(
    setup: Setup, status: WorkdirStatus, stages: Sequence[Stage], unfinished: Sequence[Stage]
) -> Run:
    """Opens what the stages share; checks what they read, and the room for what they write."""
    settings = setup.settings
    run = open_run(
        setup,
        reasoning_needed=any(stage.reads_reasoning(settings) for stage in stages),
        blind_views=[view for stage in stages for view in stage.blind_views],
    )
    for stage in unfinished:
        stage.check(run)
    check_room(run, status, unfinished)
    check_saves(setup.workdir)
    return run


def _run_stage(stage: Stage, run: Setup | Run | None, status: WorkdirStatus) -> None:
    """Runs a stage unless it is done, and marks it as done with the seconds it took."""
    if status.done(stage):
        print(f"stage {stage.name}: done before")
        return
    print(f"stage {stage.name}", flush=True)
    before = time.perf_counter()
    stage.run(run)
    seconds = time.perf_counter() - before
    status.finish(stage, {"seconds": round(seconds, 1)})
    print(f"stage {stage.name}: {seconds:.0f} s", flush=True)


@contextlib.contextmanager
def _start(workdir: Path) -> Iterator[None]:
    """Undoes what the block made in the workdir if it fails or is interrupted, and nothing else.

    Otherwise the command could not be corrected, since the workdir would be bound to the config of
    the one that failed.
    """
    new = [workdir / name for name in _BEGUN if not (workdir / name).exists()]
    binds = [
        path for path in (workdir / CONFIG_FILE, *workdir.glob(f"*/{MARKER}")) if path.exists()
    ]
    before = {path: path.read_bytes() for path in binds}
    try:
        with _ended_by_signals():
            yield
    except BaseException:
        for path in new:
            remove(path)
        with contextlib.suppress(OSError):  # On a full disk the new text stays, which is valid.
            for path, text in before.items():
                if path.read_bytes() != text:
                    atomic_write(path, text)
        raise


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Turns SIGTERM and SIGHUP into `SystemExit`, so that they end the block as Ctrl-C does."""

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    main = threading.current_thread() is threading.main_thread()
    numbers = [
        number
        for number in (signal.SIGTERM, signal.SIGHUP)
        if main and signal.getsignal(number) == signal.SIG_DFL  # Not if nohup ignores it.
    ]
    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _check_order(setup: Setup, status: WorkdirStatus, stages: Sequence[Stage]) -> None:
    """Checks that what each stage needs is done, or made by a stage before it.

    Raises:
        ConfigError: a stage comes before another that it needs.
    """
    has_data = setup.settings.data.folder is not None or setup.data.exists()
    for place, stage in enumerate(stages):
        if stage.makes_data or status.done(stage):
            continue
        before = [earlier.name for earlier in stages[:place]]
        needed = [] if has_data else [maker.name for maker in STAGES if maker.makes_data]
        needed += stage.needs(setup.settings)
        missing = [name for name in needed if name not in before and not status.done(BY_NAME[name])]
        if not missing:
            continue
        ways = f"--config.stages={','.join([*missing, stage.name])} runs them in order"
        if "synthesise" in missing:
            ways += "; for data of your own, --config.data.folder=…"
        if "sft" in missing:
            ways += (
                "; to begin with an SFT model's folder, --config.model.path=… "
                "--config.rate.begin=checkpoint"
            )
        raise ConfigError(
            f"config.stages: expected {' and '.join(missing)} before {stage.name}, found neither "
            f"named nor done in {setup.workdir}; {ways}"
        )


def main(argv: list[str]) -> None:
    """Runs the command line."""
    del argv
    keep_freed_memory()
    use_program_cache()
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    workdir = f"runs/{name}" if _WORKDIR.value is None else _WORKDIR.value
    train(_CONFIG.value, local_path(workdir, "--workdir"))


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    run_main(main, interrupted="interrupted; the same command goes on from the last checkpoint")
