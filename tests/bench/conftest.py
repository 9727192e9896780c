"""A model of the smallest preset, as the benchmark writes it."""

import pytest

from morer1_jax.bench.cases import PRESETS
from morer1_jax.bench.model import write_model


@pytest.fixture(scope="session")
def preset():
    return PRESETS["tiny"]


@pytest.fixture(scope="session")
def folder(preset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "model"
    write_model(preset, folder)
    return folder
