"""Runs that are killed at random moments, dozens of times, are the run that never was."""

import contextlib
import random
import signal
import subprocess
import time

import pytest
from runs import Started, check_same, copy_of, logged

STEPS = {"sft": 90, "grpo": 24}
GIVEN = [
    "--config.stages=synthesise,sft,rate,grpo",
    *(f"--config.{stage}.steps={steps}" for stage, steps in STEPS.items()),
    "--config.sft.save_every=4",
    "--config.sft.eval_every=30",
    "--config.grpo.save_every=2",
    "--config.grpo.eval_every=8",
    "--config.rate.batch=4",
]
FILES = ("config.json", "data.json", "rate/ratings.jsonl", "rollouts.jsonl")
# Kills of a chain, in SFT and in GRPO.
IN_SFT, IN_GRPO = 9, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of all runs, which share their programs."""
    return tmp_path_factory.mktemp("random")


@pytest.fixture(scope="module")
def reference(folder):
    """The workdir of a run that is left in peace."""
    Started(folder, folder / "peace", 1, 2, given=GIVEN).end([0])
    return folder / "peace"


def changed(local, since):
    """Whether this start has written the log, which has the lines of the one before it."""
    path = local / "metrics.jsonl"
    return path.exists() and path.stat().st_mtime > since


def kill_often(folder, workdir, local, seed):
    """Starts a run again and again, and kills it at moments that it has not come to before.

    Args:
        local: the folder in which it works.
    """
    draw = random.Random(seed)
    moments = [("sft", 2 + 9 * number + draw.randint(0, 4)) for number in range(IN_SFT)]
    moments += [("grpo", 1 + 3 * number + draw.randint(0, 1)) for number in range(IN_GRPO - 1)]
    moments.append(("grpo", STEPS["grpo"] - 1))
    for stage, step in moments:
        began = time.time()
        run = Started(folder, workdir, 1, 2, given=GIVEN)
        run.until(lambda: changed(local, began) and logged(local, stage, step))  # noqa: B023
        # Into the step after it, a save, a validation, or the next stage's beginning.
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.processes[0].wait(draw.uniform(0, 0.6))
        run.processes[0].kill()
        run.end([-signal.SIGKILL])


@pytest.mark.soak
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_random_moments(folder, reference, seed):
    workdir = folder / f"killed-{seed}"
    kill_often(folder, workdir, workdir, seed)
    Started(folder, workdir, 1, 2, given=GIVEN).end([0])
    check_same(workdir, reference, STEPS, FILES)


@pytest.mark.soak
def test_killed_at_random_moments_with_the_workdir_in_a_bucket(
    folder, reference, bucket, monkeypatch
):
    cache, workdir = folder / "copies", f"{bucket}/random"
    monkeypatch.setenv("MORER1_WORKDIR_CACHE", str(cache))
    kill_often(folder, workdir, copy_of(workdir, cache), 3)
    Started(folder, workdir, 1, 2, given=GIVEN).end([0])
    check_same(workdir, reference, STEPS, FILES)
