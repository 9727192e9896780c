"""What a run writes at most, and a disk that has not as much."""

import json
import shutil
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from morer1_jax.run import disk
from morer1_jax.run.checkpoint import Checkpointer
from morer1_jax.run.config import ConfigError, read_config
from morer1_jax.run.features import features_shape
from morer1_jax.run.job import Job
from morer1_jax.run.settings import settings

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(small_world):
    config = read_config(ROOT / "tests" / "configs" / "tiny.py")
    config.data.folder = str(small_world)
    config.mesh.update(data=2, fsdp=1, tensor=4)
    return config


def sizes(job):
    """Bytes of a state and of the best parameters, counted by hand."""
    best = disk.tree_bytes(job.like[0])
    optimizer = job.settings.sft.optimizer.build(1)
    state = sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(job.like_state(optimizer))
    )
    # AdamW's two moments, and three counters.
    assert state == 3 * best + 3 * 4
    return state, best


def needed(job, *names):
    return disk.needed_bytes(job, names) - disk._OTHERS


def test_what_is_new_is_whole_before_what_is_old_goes(config, tmp_path):
    config.grpo.optimizer.schedule = config.sft.optimizer.schedule = "constant"
    job = Job(settings(config), tmp_path)
    state, best = sizes(job)
    assert needed(job, "sft") == 3 * state + best
    # SFT's states go once rating has begun, its best stays.
    assert needed(job, "sft", "rate", "grpo", "evaluate") == best + 3 * state + best
    # One after the other, of a save each: the second beside the best of the first.
    assert needed(job, "baselines") == best + state + 2 * best
    assert needed(job, "evaluate") == 0


def test_fewer_checkpoints_take_less(config, tmp_path):
    config.sft.keep_checkpoints = 1
    state, best = sizes(job := Job(settings(config), tmp_path))
    assert needed(job, "sft") == 2 * state + best
    config.sft.update(steps=40, save_every=100)
    job = Job(settings(config), tmp_path)
    assert needed(job, "sft") == state + 2 * best


def test_what_is_there_already_and_will_be_replaced_counts(config, tmp_path):
    job = Job(settings(config), tmp_path)
    alone = needed(job, "grpo")
    (folder := tmp_path / "grpo" / "checkpoints" / "step_00000002").mkdir(parents=True)
    (folder / "x").write_bytes(bytes(1000))
    assert needed(job, "grpo") == alone - 1000


def test_a_finished_stages_states_are_room(config, tmp_path):
    """They go before anything is written."""
    job = Job(settings(config), tmp_path)
    state, best = sizes(job)
    (folder := tmp_path / "sft" / "checkpoints" / "step_00000002").mkdir(parents=True)
    (folder / "x").write_bytes(bytes(5 * state))
    Checkpointer(tmp_path / "sft" / "checkpoints").save_best(2, {"w": jnp.ones(1)}, 1.0)
    there = disk.bytes_in(tmp_path / "sft")
    assert needed(job, "rate", "grpo") == max(0, best + 3 * state + best - there)


def test_kept_features_are_counted(config, tmp_path):
    config.tune.update(vision=0.0, merger=0.0)
    plain = needed(Job(settings(config), tmp_path), "sft")
    config.data.keep_features = True
    job = Job(settings(config), tmp_path)
    shape, dtype = features_shape(job)
    assert shape[1] == config.model.text.hidden_size
    assert needed(job, "sft") - plain == shape[0] * shape[1] * np.dtype(dtype).itemsize > 10_000


def test_7b_grpo_is_counted_as_large_as_it_is(tmp_path, small_world):
    """Parameters and both moments in float32, tower frozen; two checkpoints, a third, the best."""
    config = read_config(ROOT / "configs" / "qwen2_5_vl_7b_grpo.py")
    config.model.path = None
    config.data.update(folder=str(small_world), vocabulary=1024)
    job = Job(settings(config), tmp_path)
    trained = disk.tree_bytes(job.like[0])
    assert 30.0e9 < trained < 31.5e9
    assert needed(job, "grpo") == pytest.approx(10 * trained, rel=1e-6)


def test_too_little_room_is_named_before_the_first_step(config, tmp_path, monkeypatch):
    job = Job(settings(config), tmp_path / "run")
    most = disk.needed_bytes(job, ["sft"])

    def free(count):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=count))

    free(most)
    disk.check_room(job, ["sft"])
    free(most - 1)
    with pytest.raises(ConfigError) as error:
        disk.check_room(job, ["sft"])
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'run'}: {most / 1e6:,.1f} MB more will be written at ")
    assert message.endswith("; lower sft.keep_checkpoints, make room, or name another --workdir")
    assert "\n" not in message


def test_what_is_written_is_what_was_counted(config, tmp_path):
    """By states as a training saves them: orbax adds little and compresses little."""
    job = Job(settings(config), tmp_path)
    state = job.new_state(job.init_params(0), job.settings.sft.optimizer.build(1))
    checkpoints = Checkpointer(tmp_path / "sft" / "checkpoints")
    checkpoints.save(1, state)
    counted, _ = sizes(job)
    # Moments are zeros yet, which take no room.
    written = disk.bytes_in(checkpoints.folder)
    manifest = (checkpoints.folder / "step_00000001" / "manifest.json").stat().st_size
    assert counted / 4 < written - manifest < counted
    assert json.loads((checkpoints.folder / "step_00000001" / "manifest.json").read_text())
