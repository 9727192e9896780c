"""What makes the configs of Qwen2.5-VL fit a topology."""

from pathlib import Path

import pytest

from morer1_jax.config.binding import flatten, read_config
from morer1_jax.config.settings import settings
from morer1_jax.config.topologies import PRESETS
from morer1_jax.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"


def read(model, stage, *topology):
    return read_config(CONFIGS / f"qwen2_5_vl_{model}_{stage}.py", *topology)


@pytest.mark.parametrize(("model", "topology"), [(m, t) for m in PRESETS for t in PRESETS[m]])
def test_every_topology_has_its_values_and_no_other_s(model, topology):
    found = {stage: flatten(read(model, stage, topology)) for stage in ("sft", "grpo")}
    for flat in found.values():
        assert {key: flat[key] for key in PRESETS[model][topology]} == PRESETS[model][topology]
    # GRPO goes on in SFT's workdir: nothing differs but the stages.
    assert {key for key in found["sft"] if found["sft"][key] != found["grpo"][key]} == {"stages"}
    # What no preset names is as without one.
    base = flatten(read(model, "sft", next(iter(PRESETS[model]))))
    named = PRESETS[model][topology].keys() | PRESETS[model][next(iter(PRESETS[model]))].keys()
    assert {key for key in base if base[key] != found["sft"][key]} <= named
    settings(read(model, "grpo", topology))


@pytest.mark.parametrize(("model", "default"), [("3b", "v5e:4x4"), ("7b", "v6e:4x4")])
def test_a_config_without_a_topology_has_one(model, default):
    assert flatten(read(model, "sft")) == flatten(read(model, "sft", default))


def test_an_unknown_topology_is_one_line():
    with pytest.raises(
        ConfigError, match=r"^topology: expected one of v5e:2x4, .*, found 'v7:1'; choose the"
    ):
        read("3b", "grpo", "v7:1")
