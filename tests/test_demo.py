"""The demo's fixed shapes hold whatever world its seed draws."""

import runpy
from pathlib import Path

import pytest

from morer1_jax.config.settings import settings
from morer1_jax.run.setup import open_run, open_setup
from morer1_jax.stages.baselines import BLIND
from morer1_jax.world.synthesise import synthesise

DEMO = Path(__file__).parents[1] / "configs" / "demo.py"


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(5))
def test_every_fact_of_the_demo_fits_its_buckets(tmp_path, seed):
    config = runpy.run_path(str(DEMO))["get_config"]()
    config.seed = seed
    setup = open_setup(settings(config), tmp_path)
    synthesise(setup.data, setup.settings.world, seed)
    open_run(setup, reasoning_needed=True, blind_views=BLIND.values())
