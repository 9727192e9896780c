"""The table of stages: every name is in it, and each stage says what it takes."""

from pathlib import Path

import pytest

from morer1_jax.config.binding import read_config
from morer1_jax.config.settings import settings
from morer1_jax.errors import ConfigError
from morer1_jax.report import tables
from morer1_jax.report.tables import NAMES
from morer1_jax.stages.table import BY_NAME, STAGES, stages_to_run

TINY = Path(__file__).parents[1] / "configs" / "tiny.py"


@pytest.fixture
def config():
    return read_config(TINY)


def test_the_configs_stages_are_rows_in_its_order(config):
    config.stages = "sft,evaluate,rate"
    assert [stage.name for stage in stages_to_run(settings(config))] == ["sft", "evaluate", "rate"]


@pytest.mark.parametrize(("stages", "found"), [("sft,gpro", "'gpro'"), ("", "''")])
def test_an_unknown_stage_is_named_with_those_there_are(config, stages, found):
    config.stages = stages
    names = "synthesise, sft, baselines, rate, grpo, control, evaluate"
    with pytest.raises(ConfigError) as error:
        stages_to_run(settings(config))
    assert str(error.value) == (
        f"config.stages: expected names of {names}, separated by commas, found {found}"
    )


def test_what_a_stage_needs_comes_before_it(config):
    for begin in ("sft", "checkpoint"):
        for steps in (None, 3):
            config.rate.begin, config.control.steps = begin, steps
            before = set()
            for stage in STAGES:
                assert before.issuperset(stage.needs(settings(config)))
                before.add(stage.name)


def test_a_control_of_a_fixed_length_needs_no_ratings(config):
    config.control.steps = None
    assert BY_NAME["control"].needs(settings(config)) == ("sft", "rate", "grpo")
    config.control.steps = 3
    assert BY_NAME["control"].needs(settings(config)) == ("sft",)


def test_ratings_from_a_file_show_no_image(config):
    assert BY_NAME["rate"].reads_images(settings(config))
    config.rate.file = "ratings.jsonl"
    assert not BY_NAME["rate"].reads_images(settings(config))


def test_whatever_is_scored_has_a_title():
    scored = [name for stage in STAGES for name in stage.scores]
    # A study's own ablation, which no stage makes.
    assert {*scored, "no_mixing"} == NAMES.keys()
    assert set(BY_NAME["baselines"].scores) == {*tables.BLIND}
    assert {name for stage in STAGES if stage.rank for name in stage.scores} >= {*tables.FINAL}


def test_models_have_different_ranks(config):
    ranks = [stage.rank for stage in STAGES if stage.rank]
    assert len(set(ranks)) == len(ranks) == 3
    # A model has been trained and is scored.
    for stage in STAGES:
        if stage.rank:
            assert stage.training(settings(config))
            assert stage.name in stage.scores
