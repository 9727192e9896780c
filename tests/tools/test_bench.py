"""The benchmark's command: what it needs is looked for first, and what it has measured is kept."""

import json
from pathlib import Path

import pytest

from bench.turns import SideError, Timing

BENCH = str(Path(__file__).parents[2] / "tools" / "bench.py")
TASKS = ("sft", "first/128", "sample/128")
ASK = (BENCH, "--preset=tiny", f"--tasks={','.join(TASKS)}", "--forms=default", "--rounds=2")


@pytest.fixture
def sides(monkeypatch):
    """Sides that are no processes: what is measured, in order, and the tasks that fail."""
    pytest.importorskip("torch")
    measured, failing = [], {}

    class Side:
        def __init__(self, name, module, arguments):
            self.name = name

        def close(self):
            pass

    def take_turns(tasks, rounds, tolerance):
        _, task = tasks["ours"]
        measured.append(task)
        if task in failing:
            raise failing[task]
        return {name: Timing(1.0, [2.0] * rounds, 10, None) for name in tasks}

    monkeypatch.setattr("bench.compare.Worker", Side)
    monkeypatch.setattr("bench.compare.take_turns", take_turns)
    monkeypatch.setattr("bench.model.write_model", lambda preset, folder: None)
    return measured, failing


def saved(out):
    return sorted(json.loads((out / "bench.json").read_text())["tasks"])


def test_a_task_that_fails_does_not_lose_the_others(sides, command, tmp_path):
    measured, failing = sides
    failing["first/128"] = SideError("generate, default ended at 'run' by SIGKILL:\nits last words")
    ask = (*ASK, f"--out={tmp_path}")
    out, err = command(*ask, code=2)
    assert "first/128 failed: generate, default ended at 'run' by SIGKILL:\nits last words" in err
    assert "error: 1 of 3 tasks failed, as said above: first/128; put that right and start" in err
    assert out.count("### ") == 2
    assert measured == list(TASKS)
    assert saved(tmp_path) == ["sample/128", "sft"]
    failing.clear()
    measured.clear()
    command(*ask, code=0)
    assert measured == ["first/128"]
    assert saved(tmp_path) == sorted(TASKS)
    assert (tmp_path / "bench.md").read_text().count("### ") == 3
    # One that has come to its end is measured anew.
    measured.clear()
    command(*ask, code=0)
    assert measured == list(TASKS)


def test_one_that_was_cut_off_goes_on_unless_it_is_another(sides, command, tmp_path):
    measured, failing = sides
    failing["sample/128"] = KeyboardInterrupt()
    ask = (*ASK, f"--out={tmp_path}")
    command(*ask, code=130)
    assert saved(tmp_path) == ["first/128", "sft"]
    failing.clear()
    measured.clear()
    command(*ask[:-2], "--rounds=3", ask[-1], code=0)
    assert measured == list(TASKS)


def test_without_trl_the_rest_is_measured_and_said_as_of_what(sides, command):
    """Versions are told of what is installed; TRL is no part of these tasks."""
    out, _ = command(*ASK, code=0)
    assert out.count("2 rounds, 20") == 3
    assert ", jax " in out
