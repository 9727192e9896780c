"""Runs the main job: synthesise, SFT, baselines, rate, GRPO, evaluate.

    python -m morer1_jax.train --config=configs/demo.py

`--config.stages=sft` runs one stage alone; a stage whose output is whole is not run again, and one
that was killed goes on from its last checkpoint. Any other key is set the same way.

Several hosts run the same command, each in one process: on Cloud TPU, under Slurm, Open MPI and in
an indexed job of Kubernetes they find each other; elsewhere `--coordinator`, `--processes` and
`--process` say who they are.
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

from absl import flags
from ml_collections import config_flags

from morer1_jax.cli import run_main
from morer1_jax.config.binding import FILE as CONFIG_FILE
from morer1_jax.config.binding import bind, flatten
from morer1_jax.config.schema import to_tree
from morer1_jax.config.settings import settings
from morer1_jax.errors import ConfigError, Stopped
from morer1_jax.files import atomic_write, check_writable, remove
from morer1_jax.hosts import group
from morer1_jax.hosts.join import joined, undone
from morer1_jax.hosts.launch import BY_HAND, BY_LAUNCHER, find_place
from morer1_jax.hosts.stop import check_stop, stoppable
from morer1_jax.paths import any_path
from morer1_jax.run.cache import use_program_cache
from morer1_jax.run.memory import keep_freed_memory
from morer1_jax.run.setup import Run, Setup, open_run, open_setup, with_features
from morer1_jax.run.store import Store
from morer1_jax.run.trial import check_saves, check_shared
from morer1_jax.stages.ahead import compile_programs
from morer1_jax.stages.disk import check_room
from morer1_jax.stages.marker import MARKER
from morer1_jax.stages.table import BY_NAME, STAGES, Stage, stages_to_run
from morer1_jax.stages.workdir import WorkdirStatus

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run's config, a Python file.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run writes everything; by default runs/ and the config's name."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "Of several processes: host:port of the first; that port and the next must be free there.",
)
_PROCESSES = flags.DEFINE_integer(
    "processes", None, "Number of processes; 1: this one alone, whatever launched it."
)
_PROCESS = flags.DEFINE_integer("process", None, "The number of this process, from 0.")
_PATIENCE = flags.DEFINE_float(
    "join_seconds",
    None,
    f"Longest time that processes wait for each other at the start; by default {BY_HAND} with the "
    f"flags above, {BY_LAUNCHER} without.",
    lower_bound=1,
)

# Files and folders of a workdir before the first step; the config, which binds it, comes first.
_BEGUN = (CONFIG_FILE, "data.json", "tokenizer", "synthesise", "data")


def train(config: Any, workdir: Path) -> None:
    """Runs the config's stages in a workdir.

    Raises:
        ConfigError, DataError, OSError: what the user can put right, in one line. What is found
            before the first step leaves the workdir as it was, so that another config may follow.
    """
    workdir = any_path(workdir, "--workdir")
    run_settings = settings(config)
    stages = stages_to_run(run_settings)
    setup = open_setup(run_settings, workdir)
    store = setup.store
    group.by_first("writable", lambda: check_writable(store.folder, folder=True))
    with contextlib.ExitStack() as stack:
        # One run writes into a workdir at a time; of its processes the first answers for all.
        with _ended_by_signals():
            stack.enter_context(store.held())
        group.meet("workdir")
        check_shared(store)
        _train(setup, stages)
        group.meet("all is written")


def _train(setup: Setup, stages: Sequence[Stage]) -> None:
    """Runs stages in a workdir that this run has locked."""
    store, status = setup.store, WorkdirStatus.of(setup.settings, setup.store)

    # Find all errors before a step is spent; that may need the data to be made first.
    with _start(store):
        group.by_first("config", lambda: _bind(setup, status, stages))
        first = list(itertools.takewhile(lambda stage: stage.makes_data, stages))
        rest = stages[len(first) :]
        for stage in first:
            _run_stage(stage, setup, status)
            check_stop()
        unfinished = [stage for stage in rest if not _done(stage, status)]
        run = _open(setup, status, stages, unfinished) if unfinished else None
        check_stop()
    # Delete states only once nothing can refuse the command any more.
    goes_on = [stage.name for stage in unfinished]
    group.by_first("states", lambda: status.drop_states(goes_on=goes_on))

    # Run the stages. What they leave is in a bucket, too, however they end.
    with stoppable(), _published(store):
        group.by_first("start", store.publish)
        if run is not None and any(stage.reads_images(setup.settings) for stage in unfinished):
            run = with_features(run)
        waiting = list(unfinished)
        for stage in rest:
            waiting = _compile_ahead(run, waiting, status)
            _run_stage(stage, setup if stage.makes_data else run, status)
            group.by_first("states", status.drop_states)


@contextlib.contextmanager
def _published(store: Store) -> Iterator[None]:
    """Copies to the bucket, at the end of the block, what the run has in its local copy."""
    try:
        yield
    except BaseException:
        if group.is_first():
            with contextlib.suppress(Exception):  # The first error counts.
                store.publish()
        raise
    group.by_first("end", store.publish)


def _bind(setup: Setup, status: WorkdirStatus, stages: Sequence[Stage]) -> None:
    """Binds the workdir to the config, and checks that the stages can follow what is done."""
    bind(to_tree(setup.settings), setup.workdir, bound=status.why_bound)
    status.check_steps()
    _check_order(setup, status, stages)


def _done(stage: Stage, status: WorkdirStatus) -> bool:
    return group.of_first(f"{stage.name} is done", lambda: status.done(stage))


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
    if status.store.is_bucket:
        check_room(run, status, unfinished)
    else:
        group.by_first("room", lambda: check_room(run, status, unfinished))
    check_saves(setup.store.root, run.trainee.placed.replicated)
    return run


def _compile_ahead(run: Run | None, waiting: Sequence[Stage], status: WorkdirStatus) -> list[Stage]:
    """Compiles the programs of stages, if the config wants it; returns those whose turn is later.

    Later, because their batches' shapes depend on what another stage finds out.
    """
    threads = 0 if run is None else run.settings.compile.threads
    if not threads:
        return []
    known, later = [], []
    for stage in waiting:
        before = [BY_NAME[name] for name in stage.shaped_by(run.settings)]
        (known if all(_done(other, status) for other in before) else later).append(stage)
    programs = [program for stage in known for program in stage.programs(run)]
    if programs:
        compile_programs(programs, threads)
    return later


def _run_stage(stage: Stage, run: Setup | Run | None, status: WorkdirStatus) -> None:
    """Runs a stage unless it is done, and marks it as done with the seconds it took."""
    if _done(stage, status):
        print(f"stage {stage.name}: done before")
        return
    print(f"stage {stage.name}", flush=True)
    before = time.perf_counter()
    if stage.makes_data:
        group.by_first(stage.name, lambda: stage.run(run))
    else:
        stage.run(run)
    seconds = time.perf_counter() - before
    results = {"seconds": round(seconds, 1)}

    def finish() -> None:
        # In a bucket nothing of the stage may come after its marker.
        status.store.publish()
        status.finish(stage, results)
        status.store.publish()

    group.by_first(f"{stage.name} is whole", finish)
    print(f"stage {stage.name}: {seconds:.0f} s", flush=True)


@contextlib.contextmanager
def _start(store: Store) -> Iterator[None]:
    """Undoes what the block made in the workdir if it fails or is interrupted, and nothing else.

    Otherwise the command could not be corrected, since the workdir would be bound to the config of
    the one that failed. Of several processes the first has made it all.
    """
    if not group.is_first():
        yield
        return
    workdir = store.folder
    new = [workdir / name for name in _BEGUN if not (workdir / name).exists()]
    binds = [
        path for path in (workdir / CONFIG_FILE, *workdir.glob(f"*/{MARKER}")) if path.exists()
    ]
    before = {path: path.read_bytes() for path in binds}

    def undo() -> None:
        for path in new:
            remove(path)
        with contextlib.suppress(OSError):  # On a full disk the new text stays, which is valid.
            for path, text in before.items():
                if path.read_bytes() != text:
                    atomic_write(path, text)
        with contextlib.suppress(Exception):  # What is raised after it counts.
            store.publish()

    try:
        with _ended_by_signals(), undone(undo):
            yield
    except BaseException:
        undo()
        raise


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Turns SIGTERM into `Stopped`, SIGHUP into `SystemExit`: they end the block as Ctrl-C does.

    Of several processes JAX takes SIGTERM, and all end where they poll; see `hosts.stop`.
    """

    def end(number: int, frame: Any) -> None:
        if number == signal.SIGTERM:
            raise Stopped("stopped by SIGTERM before the first step")
        raise SystemExit(128 + number)

    main = threading.current_thread() is threading.main_thread() and group.count() == 1
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
    place = find_place(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value, _PATIENCE.value)
    same = {
        f"config.{key}": value for key, value in flatten(to_tree(settings(_CONFIG.value))).items()
    }
    with joined(place, same | {"--workdir": str(workdir)}):
        train(_CONFIG.value, any_path(workdir, "--workdir"))


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    run_main(main, interrupted="interrupted; the same command goes on from the last checkpoint")
