"""Copies of a dataset are compared side by side, and only if they are copies."""

import shutil
from pathlib import Path

import pytest

from bench.sources import compare_folders
from morer1_jax.config.binding import read_config
from morer1_jax.config.settings import settings
from morer1_jax.data import more_tfds
from morer1_jax.errors import DataError

TINY = Path(__file__).parents[2] / "configs" / "tiny.py"


@pytest.fixture
def config(one_device):
    config = read_config(TINY)
    config.mesh.update(data=1, fsdp=1, tensor=-1)
    config.data.update(workers=1, worker_kind="thread")
    return settings(config)


def test_equal_copies_are_compared_and_others_are_not(config, small_world, tmp_path):
    more_tfds.build(small_world, tmp_path / "tfds")
    built = tmp_path / "tfds" / "more"
    shutil.copy(small_world / "reasoning.jsonl", built)
    folders = [str(small_world), str(built)]
    results = compare_folders(config, folders, tmp_path / "runs", turns=2, batches=2)
    assert list(results) == folders
    first, second = results.values()
    assert first["of_the_first"] == 1.0
    assert second["samples_per_second"] > 0 < second["open_seconds"]
    assert second["of_the_first"] == pytest.approx(
        second["samples_per_second"] / first["samples_per_second"], rel=0.02
    )
    other = shutil.copytree(small_world, tmp_path / "other")
    path = other / "reasoning.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[1:]))
    with pytest.raises(DataError, match=rf"^{other}: expected the batches of {small_world}, found"):
        compare_folders(config, [str(small_world), str(other)], tmp_path / "again")
