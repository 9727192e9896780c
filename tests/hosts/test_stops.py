"""Runs that are told to stop by SIGTERM, at each kind of moment."""

import json
import signal

import pytest
from runs import STEPS, Started, check_same, records

# Seconds in which a tiny run must have saved and ended; hosts that are taken away give 30.
GIVEN = 30.0
LAST = "report"
# Moments as `doomed.py` has them, and the process that is told.
STOPS = {
    "opening": (1, ("open", 1, 0.0)),
    "restoring": (0, ("restore", 1, 0.0)),
    "step of SFT": (1, ("update", 4, 0.0)),
    "saving": (0, ("save", 2, 0.0)),
    "validation": (0, ("validate", 1, 0.1)),
    "rating": (1, ("rate", 1, 0.2)),
    "rollout": (0, ("rollout", 1, 0.0)),
    "update of GRPO": (1, ("update", 1, 0.0)),
    "evaluation": (0, ("evaluate", 1, 0.1)),
    # Nothing is left to go on with: it ends as if it had not been told.
    LAST: (1, ("report", 1, 0.0)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of all runs, which share their programs."""
    return tmp_path_factory.mktemp("stops")


@pytest.fixture(scope="module", params=[1], ids=["alone"])
def reference(folder, request):
    """Number of processes, and the workdir of a run on so many that is left in peace."""
    workdir = folder / f"peace-{request.param}"
    Started(folder, workdir, request.param, 2).end([0] * request.param)
    return request.param, workdir


@pytest.mark.soak
def test_a_run_told_to_stop_in_every_phase_saves_and_ends_in_time(folder, reference):
    """One run after another goes on with the same workdir, and is stopped at the next moment."""
    count, expected = reference
    workdir, seconds = folder / f"stopped-{count}", {}
    for phase, (told, moment) in STOPS.items():
        told = min(told, count - 1)
        run = Started(folder, workdir, count, 2, fates={told: (*moment, signal.SIGTERM)})
        seconds[phase] = run.end([0 if phase == LAST else 75] * count)
        assert ("the same command goes on" in run.logs[told].read_text()) == (phase != LAST), phase
        assert seconds[phase] < GIVEN, (phase, seconds)
    print(json.dumps(seconds, indent=1))
    check_same(workdir, expected)
    assert len(records(workdir)) > sum(STEPS.values())
