"""The demo's fixed shapes hold whatever world its seed draws."""

import runpy
from pathlib import Path

import pytest

from morer1_jax.config.settings import settings
from morer1_jax.run.job import Job
from morer1_jax.world.synthesise import synthesise

DEMO = Path(__file__).parents[1] / "configs" / "demo.py"


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(5))
def test_every_fact_of_the_demo_fits_its_buckets(tmp_path, seed):
    config = runpy.run_path(str(DEMO))["get_config"]()
    config.seed = seed
    job = Job(settings(config), tmp_path)
    synthesise(job.data, job.settings.world, seed)
    job.check()
