"""The main job: synthesise, SFT, baselines, rate, GRPO, evaluate.

    python -m morer1_jax.train --config=configs/demo.py

`--config.stages=sft` runs one stage alone; a stage whose output is whole is not run again, and one
that was killed goes on from its last checkpoint. Any other key is set the same way.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from morer1_jax.cli import run_main
from morer1_jax.config.binding import FILE as CONFIG_FILE
from morer1_jax.config.binding import load
from morer1_jax.config.settings import settings
from morer1_jax.errors import ConfigError
from morer1_jax.files import atomic_write, check_writable, remove
from morer1_jax.paths import local_path
from morer1_jax.processes import check_alone
from morer1_jax.report.report import write_report
from morer1_jax.run.batch_sampler import greedy_sampler
from morer1_jax.run.cache import use_program_cache
from morer1_jax.run.checkpoint import Checkpointer
from morer1_jax.run.job import Job
from morer1_jax.run.lock import hold
from morer1_jax.run.memory import keep_freed_memory
from morer1_jax.run.trial import check_saves
from morer1_jax.stages import binding
from morer1_jax.stages.baselines import run_baselines
from morer1_jax.stages.control import run_control
from morer1_jax.stages.disk import check_room
from morer1_jax.stages.evaluate import evaluate, read_scores
from morer1_jax.stages.grpo import run_grpo
from morer1_jax.stages.marker import MARKER, Stage
from morer1_jax.stages.rate import check_given, run_rate
from morer1_jax.stages.sft import run_sft
from morer1_jax.task import metrics
from morer1_jax.world.synthesise import synthesise

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run's config, a Python file.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run writes everything; by default runs/ and the config's name."
)

# What a run has in its workdir before the first step; the config first, which binds it.
_BEGUN = (CONFIG_FILE, "data.json", "tokenizer", "synthesise", "data")


def best_params(job: Job, stage: str) -> Any:
    """The best parameters of a stage, by validation: those that train."""
    return Checkpointer(job.workdir / stage / "checkpoints").restore_best(job.like[0])[0]


def first_params(job: Job) -> Any:
    """What is rated, and what GRPO begins with: those that train.

    Raises:
      ConfigError: there is no such thing.
    """
    if job.settings.rate.begin == "sft":
        return best_params(job, "sft")
    if job.checkpoint is None:
        raise ConfigError("config.rate.begin: 'checkpoint' found, but config.model.path names none")
    return job.init_params(0)


def run_synthesise(job: Job) -> None:
    """Writes the synthetic dataset, unless the config points to one; trains the tokenizer."""
    if job.settings.data.folder is None and not job.data.exists():
        synthesise(job.data, job.settings.world, job.settings.seed)
    print(f"tokenizer: {len(job.tokenizer)} tokens")


def run_evaluate(job: Job) -> None:
    """Scores whatever models the workdir has, prints the table, writes the report page."""
    sampler = greedy_sampler(job, job.encoder)
    for stage in ("sft", "control", "grpo"):
        if (job.workdir / stage / MARKER).exists():
            evaluate(job, stage, job.whole(best_params(job, stage)), sampler)
    scores = read_scores(job.workdir)
    print(metrics.format_table(scores))
    print(f"report: {write_report(job.workdir, job.data)}")


def train(config: Any, workdir: Path) -> None:
    """Runs the config's stages in a workdir.

    Raises:
      ConfigError, DataError, OSError: what the user can put right, in one line. What is found
        before the first step leaves the workdir as it was, so that another config may follow.
    """
    check_alone()
    workdir = local_path(workdir, "--workdir")
    job = Job(settings(config), workdir)
    check_writable(workdir, folder=True)
    job.checkpoint  # noqa: B018  (looked at before anything is written)
    with hold(workdir, folder=True):
        _train(config, job)


def _train(config: Any, job: Job) -> None:
    """Runs the config's stages in a workdir that is this process's."""
    workdir = job.workdir

    def stage_of(name: str) -> Stage:
        return binding.stage_of(config, workdir, name)

    def done(name: str) -> bool:
        return name != "evaluate" and stage_of(name).done()

    runners: dict[str, Callable[[], Any]] = {
        "synthesise": lambda: run_synthesise(job),
        "sft": lambda: run_sft(job),
        "baselines": lambda: run_baselines(job),
        "rate": lambda: run_rate(job, job.whole(first_params(job))),
        "grpo": lambda: run_grpo(job, lambda: first_params(job)),
        "control": lambda: run_control(
            job, lambda: best_params(job, "sft"), stage_of("rate").results()["seconds"]
        ),
        "evaluate": lambda: run_evaluate(job),
    }

    def run(name: str) -> None:
        if done(name):
            print(f"stage {name}: done before")
            return
        print(f"stage {name}", flush=True)
        before = time.perf_counter()
        runners[name]()
        seconds = time.perf_counter() - before
        stage_of(name).finish({"seconds": round(seconds, 1)})
        print(f"stage {name}: {seconds:.0f} s", flush=True)

    names = job.settings.stages.split(",")
    first = list(itertools.takewhile(lambda name: name == "synthesise", names))
    rest = names[len(first) :]
    with _start(workdir):
        binding.upgrade_markers(config, workdir)
        bound = functools.partial(binding.why_bound, config, workdir)
        load(config, workdir, write=jax.process_index() == 0, bound=bound)
        binding.check_steps(config, workdir)
        _check_order(job, done)
        for name in first:
            run(name)
        to_run = [name for name in rest if not done(name)]
        if to_run:
            if "rate" in to_run:
                check_given(job)
            job.check()
            check_room(job, config, to_run)
            check_saves(workdir)
    # What nothing brings back goes once nothing refuses the command any more.
    binding.drop_states(config, workdir, goes_on=to_run)
    for name in rest:
        run(name)
        binding.drop_states(config, workdir)


@contextlib.contextmanager
def _start(workdir: Path) -> Iterator[None]:
    """If the block fails or is interrupted, what it made of a run is gone, and nothing else.

    Otherwise the command could not be corrected: the workdir would belong to the one that failed.
    What binds the workdir is as it was before.
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
        with contextlib.suppress(OSError):  # Of a full disk; then what it has is as good.
            for path, text in before.items():
                if path.read_bytes() != text:
                    atomic_write(path, text)
        raise


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """What would end the process at once ends the block in order, as Ctrl-C does."""

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


def _check_order(job: Job, done: Callable[[str], bool]) -> None:
    """Finds out whether what each stage works with is there, or made by a stage before it.

    Raises:
      ConfigError: it is not.
    """
    names = job.settings.stages.split(",")
    for place, name in enumerate(names):
        needed = [] if name == "synthesise" or done(name) else _needed(job, name)
        missing = [n for n in needed if n not in names[:place] and not done(n)]
        if not missing:
            continue
        ways = f"--config.stages={','.join([*missing, name])} runs them in order"
        if "synthesise" in missing:
            ways += "; for data of your own, --config.data.folder=…"
        if "sft" in missing:
            ways += (
                "; to begin with an SFT model's folder, --config.model.path=… "
                "--config.rate.begin=checkpoint"
            )
        raise ConfigError(
            f"config.stages: {name} found, which goes on from {' and '.join(missing)}, not done in "
            f"{job.workdir}; {ways}"
        )


def _needed(job: Job, name: str) -> list[str]:
    """The stages whose output a stage takes."""
    config = job.settings
    data = [] if config.data.folder or job.data.exists() else ["synthesise"]
    sft = ["sft"] if config.rate.begin == "sft" or name == "control" else []
    grpo = ["grpo"] if config.control.steps is None else []
    stages = {"rate": sft, "grpo": [*sft, "rate"], "control": [*sft, "rate", *grpo]}
    return data + stages.get(name, [])


def main(argv: list[str]) -> None:
    """The command line's entry."""
    del argv
    keep_freed_memory()
    use_program_cache()
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    workdir = f"runs/{name}" if _WORKDIR.value is None else _WORKDIR.value
    train(_CONFIG.value, local_path(workdir, "--workdir"))


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    run_main(main, interrupted="interrupted; the same command goes on from the last checkpoint")
