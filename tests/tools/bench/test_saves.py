"""What a save adds to steps is counted beyond the copy, and the steps train what is saved."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from bench.saves import Round, computing, figures, make_state
from morer1_jax.run import checkpoint

TOOL = str(Path(__file__).parents[3] / "tools" / "bench_saves.py")


def test_the_state_is_as_large_as_asked_and_a_step_changes_all_of_it():
    state = make_state(10_000)
    before = jax.device_get(state)
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == 10_000
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == pytest.approx(30_000, abs=9)
    after = jax.device_get(computing(computing(state)))
    assert after.step == 2
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert np.isfinite(new).all()
        assert np.mean(old != new) > 0.99


def test_what_a_save_adds_is_beyond_the_copy():
    measured = {
        "alone": [Round([1.0, 1.0], 0.0, 2.0), Round([1.0, 3.0], 0.0, 4.0)],
        "copy": [Round([1.0, 1.0], 0.5, 2.5), Round([1.0, 1.0], 0.7, 2.7)],
        "save": [Round([1.0, 1.5], 0.6, 3.1), Round([1.0, 1.0], 0.8, 3.1)],
    }
    assert figures(measured) == {
        "alone_median_step": 1.0,
        "copy_median_step": 1.0,
        "save_median_step": 1.0,
        "alone_mean_step": 1.5,
        "copy_mean_step": 1.3,
        "save_mean_step": 1.55,
        "copy_blocks": 0.6,
        "save_blocks": 0.7,
        "added_percent": 20.0,  # 0.3 s of a step's 1 s, then 0.2 s of 2 s.
        "added_least": 10.0,
        "added_most": 30.0,
    }


def test_saves_that_are_timed_are_those_of_training(command, tmp_path, monkeypatch):
    saved, write = [], checkpoint.write_manifest

    def written(folder, body, digests):
        saved.append(body["step"])
        write(folder, body, digests)

    monkeypatch.setattr(checkpoint, "write_manifest", written)
    ask = ("--parameters=1e4", "--every=2", "--rounds=2", "--wait=0.01")
    out, _ = command(TOOL, *ask, f"--json={tmp_path / 'saves.json'}", code=0)
    results = json.loads((tmp_path / "saves.json").read_text())
    assert list(results) == ["computing", "waiting"]
    assert saved == [1, 2, 3] * 2  # One of each is not measured.
    for name, found in results.items():
        assert f"{name}: alone_median_step {found['alone_median_step']}, " in out
        assert 0 < found["save_blocks"] <= found["written_after"]
    assert results["waiting"]["alone_median_step"] >= 0.01
    assert [path.name for path in tmp_path.iterdir()] == ["saves.json"]


def test_no_rounds_are_refused(command):
    _, err = command(TOOL, "--rounds=0", code=2)
    assert "--rounds=0" in err
