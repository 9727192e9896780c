"""Runs on several processes, of which one dies in each phase, and which go on on fewer."""

import shutil
import signal

import pytest
from processes import HOST
from runs import SOON, Started, check_close, check_same, records

DEVICES = 4
# Enough of SFT for the model to earn rewards that differ. Without them GRPO's gradients would be
# rounding errors alone, which its optimizer makes as large as any.
STEPS = {"sft": 60, "grpo": 3}
MORE = [
    "--config.sft.steps=60",
    "--config.sft.save_every=20",
    "--config.sft.eval_every=30",
    "--config.grpo.group=4",
]
# The process that dies in each phase, and when; see `doomed.py`.
KILLS = {
    "step": (3, {"moment": "update", "times": 25}),
    "rollout": (1, {"moment": "rollout", "times": 2}),
    "save": (2, {"moment": "save", "times": 2}),
    "whole": (0, {"moment": "saved", "times": 3}),
    "rating": (0, {"moment": "rate", "delay": 0.5}),
    "evaluation": (2, {"moment": "evaluate", "delay": 0.3}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of all runs, which share their programs."""
    return tmp_path_factory.mktemp("kills")


@pytest.fixture(scope="module")
def reference(folder):
    """The workdir of a run on four processes that is left in peace."""
    Started(folder, folder / "peace", 4, DEVICES, MORE).end([0] * 4)
    rewards = [r["reward_std"] for r in records(folder / "peace") if "reward_std" in r]
    assert len(rewards) == STEPS["grpo"]
    assert min(rewards) > 0
    return folder / "peace"


@pytest.mark.soak
@pytest.mark.parametrize("phase", KILLS)
def test_a_process_that_dies_ends_all_and_the_run_goes_on_on_any_number(folder, reference, phase):
    victim, moment = KILLS[phase]
    workdir = folder / phase
    fates = {victim: {**moment, "number": signal.SIGKILL}}
    run = Started(folder, workdir, 4, DEVICES, MORE, fates=fates)
    codes = [3] * 4
    codes[victim] = -signal.SIGKILL
    seconds = run.end(codes)
    print(f"{phase}: all ended {seconds:.1f} s after process {victim} died")
    assert seconds < SOON
    for number in set(range(4)) - {victim}:
        assert f"process {victim} of 4 on {HOST}" in run.logs[number].read_text()
    for count in (2, 1):
        copy = shutil.copytree(workdir, folder / f"{phase}-{count}")
        Started(folder, copy, count, DEVICES, MORE).end([0] * count)
        check_close(copy, reference, STEPS)
    Started(folder, workdir, 4, DEVICES, MORE).end([0] * 4)
    check_same(workdir, reference, STEPS)
