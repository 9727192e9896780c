"""A run's stages: by its config, its training targets and its device."""

import jax
import pytest

from morer1_jax.config.settings import DataSettings, SamplingSettings, Settings
from morer1_jax.data.shapes import SampleSize
from morer1_jax.errors import FieldError
from morer1_jax.model.config import Runtime
from morer1_jax.rollout.config import Stage, format_stages
from morer1_jax.rollout.plan import planned_stages
from morer1_jax.run.placed import place
from morer1_jax.run.slots import decode_stages, step_cost


def sizes(targets):
    return [SampleSize(20, target, 4) for target in targets]


@pytest.fixture(scope="module")
def placed(tiny):
    return place(tiny.CONFIG, Runtime(), tiny.mesh(data=2, fsdp=2, tensor=1))


def test_by_the_config(placed):
    given = sizes([5, 9]), 64, 128
    data = DataSettings(completion_length=128)
    whole = Settings(data=data, sampling=SamplingSettings("whole"))
    assert decode_stages(placed, whole, *given) == ()
    text = "1.0:32,0.5:64,0.125:128"
    settings = Settings(data=data, sampling=SamplingSettings(text))
    stages = decode_stages(placed, settings, *given)
    assert stages == (Stage(1.0, 32), Stage(0.5, 64), Stage(0.125, 128))
    assert format_stages(stages) == text
    # A baseline's answers are a label long.
    assert decode_stages(placed, settings, sizes([3]), 64, 12) == ()


def test_by_the_targets_of_facts_that_have_one(placed):
    targets = list(range(120, 820))
    stages = decode_stages(placed, Settings(), sizes([*targets, 0, 0, 0]), 256, 1024)
    # A quarter of the samples on each of four devices.
    assert stages == planned_stages(targets, 64, 1024, step_cost(placed), 3e9, 128)
    assert len(stages) > 2
    assert decode_stages(placed, Settings(), sizes([0, 0]), 256, 128) == ()


def test_the_cost_of_a_token(tiny, placed):
    cost, text = step_cost(placed), tiny.CONFIG.text
    language = {k: v for k, v in placed.sampling.like.items() if k in ("language", "head")}
    assert cost.weights == sum(leaf.size * 4 for leaf in jax.tree.leaves(language))
    assert cost.token == 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 4
    # Products with each weight of a matrix, on a CPU.
    matrices = sum(leaf.size for leaf in jax.tree.leaves(language) if leaf.ndim > 1)
    assert 0.9 * matrices < cost.slot * 13 / 2 < 1.1 * matrices


@pytest.mark.parametrize("text", ["", "fast", "1", "1:x", "0:3", "1:0", "1:8;0.5:16"])
def test_nonsense_is_refused(text):
    with pytest.raises(FieldError, match=r"stages.*as 1:256,0.5:512,0.2:1024"):
        SamplingSettings(text)


@pytest.mark.parametrize("text", ["1:256,0.5:512", "0.5:1024", "1:512,0.2:256", "1:8,0.5:2048"])
def test_stages_of_another_length_are_refused_with_the_config(text):
    with pytest.raises(FieldError, match=r"sampling\.stages.* end with the 1024 tokens"):
        Settings(sampling=SamplingSettings(text))
