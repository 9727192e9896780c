"""Runs that are told to stop by SIGTERM, at each kind of moment."""

import json
import signal

import pytest
from runs import Started, check_same, records

# Seconds in which a tiny run must have saved and ended; hosts that are taken away give 30.
GIVEN = 30.0
LAST = "report"
# Several processes look for the signal once a second, in which tiny ones would be in another phase.
HELD = 2.5
# The process that is told, and when; see `doomed.py`.
STOPS = {
    "opening": (1, {"moment": "open"}),
    "restoring": (0, {"moment": "restore"}),
    "step of SFT": (1, {"moment": "update", "times": 3, "held": HELD}),
    "validation": (0, {"moment": "validate", "delay": 0.1, "held": HELD}),
    "rating": (1, {"moment": "rate", "delay": 0.2, "held": HELD}),
    "rollout": (0, {"moment": "rollout", "held": HELD}),
    "update of GRPO": (1, {"moment": "update", "held": HELD}),
    "saving": (0, {"moment": "save"}),
    "evaluation": (0, {"moment": "evaluate", "delay": 0.1, "held": HELD}),
    # Nothing is left to go on with: it ends as if it had not been told.
    LAST: (0, {"moment": "report"}),
}
# So many that the run is in GRPO for three phases.
STEPS = {"sft": 8, "grpo": 7}
MORE = ["--config.grpo.steps=7"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of all runs, which share their programs."""
    return tmp_path_factory.mktemp("stops")


@pytest.fixture(scope="module", params=[1, 2], ids=["alone", "two"])
def reference(folder, request):
    """Number of processes, and the workdir of a run on so many that is left in peace."""
    workdir = folder / f"peace-{request.param}"
    Started(folder, workdir, request.param, 2, MORE).end([0] * request.param)
    return request.param, workdir


@pytest.mark.soak
def test_a_run_told_to_stop_in_every_phase_saves_and_ends_in_time(folder, reference):
    """One run after another goes on with the same workdir, and is stopped at the next moment."""
    count, expected = reference
    workdir, seconds = folder / f"stopped-{count}", {}
    for phase, (told, moment) in STOPS.items():
        told = min(told, count - 1)
        fates = {told: {**moment, "number": signal.SIGTERM}}
        run = Started(folder, workdir, count, 2, MORE, fates=fates)
        seconds[phase] = run.end([0 if phase == LAST else 75] * count)
        assert run.moments[told].exists(), phase
        assert ("the same command goes on" in run.logs[told].read_text()) == (phase != LAST), phase
        assert seconds[phase] < GIVEN, (phase, seconds)
    print(json.dumps(seconds, indent=1))
    check_same(workdir, expected, STEPS)
    assert len(records(workdir)) > sum(STEPS.values())
