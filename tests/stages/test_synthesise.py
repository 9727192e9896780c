"""The stage that makes the data: what it asks of data that is there already."""

import shutil
from pathlib import Path

import pytest

from morer1_jax.config.binding import read_config
from morer1_jax.config.settings import settings
from morer1_jax.errors import DataError
from morer1_jax.run.setup import open_setup
from morer1_jax.stages.synthesise import run_synthesise

TINY = Path(__file__).parents[1] / "configs" / "tiny.py"


def test_reasoning_is_asked_for_only_by_a_tokenizer_that_is_to_be_trained(
    small_world, small_tokenizer, tmp_path
):
    folder = tmp_path / "data"
    shutil.copytree(small_world, folder)
    (folder / "reasoning.jsonl").unlink()
    config = read_config(TINY)
    config.data.folder = str(folder)
    setup = open_setup(settings(config), tmp_path / "run")
    with pytest.raises(DataError, match="SFT learns from written reasoning"):
        run_synthesise(setup)
    shutil.copytree(small_tokenizer.name_or_path, setup.tokenizer)
    run_synthesise(setup)
