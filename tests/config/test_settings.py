"""The config's keys: all that the demo has, and no others, each checked by name."""

import copy
import json
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from morer1_jax.config.binding import flatten, matches, read_config
from morer1_jax.config.schema import to_tree
from morer1_jax.config.settings import Settings, default_config, settings
from morer1_jax.errors import ConfigError

ROOT = Path(__file__).parents[2]


def config_of(path) -> ConfigDict:
    return read_config(ROOT / path)


@pytest.fixture
def config():
    """A plain dict, which unlike a ConfigDict takes any value."""
    return config_of("configs/demo.py").to_dict()


def put(config, key, value):
    *branches, leaf = key.split(".")
    for branch in branches:
        config = config[branch]
    config[leaf] = value


def get(built, key):
    for name in key.split("."):
        built = getattr(built, name)
    return built


CONFIGS = [f"configs/{path.name}" for path in sorted((ROOT / "configs").glob("*.py"))]


@pytest.mark.parametrize("path", [*CONFIGS, "tests/configs/tiny.py"])
def test_every_key_of_a_config_arrives_where_it_is_read(path):
    config = config_of(path)
    built = settings(config)
    assert isinstance(built, Settings)
    for key, value in flatten(config).items():
        found = get(built, key)
        assert (list(found) if isinstance(found, tuple) else found) == value, key
        # A whole number of the wrong kind is no harm, but True is not 1.
        assert type(found) is tuple or isinstance(found, bool) == isinstance(value, bool), key


def test_a_parsed_json_is_as_good_as_a_config_dict(config):
    parsed = json.loads(json.dumps(config))
    assert settings(parsed) == settings(config) == settings(ConfigDict(config))


def test_each_key_that_is_missing_has_its_default(config):
    default = flatten(to_tree(Settings()))
    # Sizes that must fit each other are left together.
    together = ("model", "grpo.reward.effort_from", "grpo.prompts", "grpo.micro_batches", "runtime")
    for key in [key for key in flatten(config) if not matches(key, together)]:
        lacking = copy.deepcopy(config)
        *branches, leaf = key.split(".")
        node = lacking
        for branch in branches:
            node = node[branch]
        del node[leaf]
        built = flatten(to_tree(settings(lacking)))
        assert built == {**flatten(config), key: default[key]}


def test_each_key_that_is_missing_from_a_whole_config_is_named(config):
    assert settings(config, whole=True) == settings(config)
    for key in flatten(config):
        lacking = copy.deepcopy(config)
        *branches, leaf = key.split(".")
        node = lacking
        for branch in branches:
            node = node[branch]
        del node[leaf]
        try:
            settings(lacking)
        except ConfigError:
            continue  # Its default does not fit the others.
        with pytest.raises(ConfigError, match=rf"^config\.{key}: the key is missing$"):
            settings(lacking, whole=True)


def test_every_key_of_the_defaults_can_be_set_on_a_command_line():
    config = default_config()
    assert settings(config) == Settings()
    for key in ("data.folder", "model.path", "rate.file"):
        config.update_from_flattened_dict({key: "a path"})
    config.update_from_flattened_dict({"control.steps": 3, "model.text.vocab_size": None})
    with pytest.raises(TypeError):
        config.control.steps = "three"
    assert settings(config).control.steps == 3


@pytest.mark.parametrize("key", ["sft.steps_", "nonsense", "world.castt", "sft.optimizer.lrr"])
def test_an_unknown_key_is_named(config, key):
    put(config, key, 1)
    with pytest.raises(ConfigError, match=rf"^config\.{key}: unknown key") as error:
        settings(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("wrong", ["text", True, None, [1], {"a": 1}])
def test_each_value_of_another_type_is_named(config, wrong):
    paths = ("data.folder", "data.reasoning", "model.path", "rate.file")
    optional = (*paths, "model.text.vocab_size", "grpo.loss.importance_cap")
    for path in paths:
        put(config, path, "a path")
    put(config, "model.text.vocab_size", 1024)
    for key, value in flatten(config).items():
        if type(wrong) is type(value) or (wrong is None and key in optional):
            continue
        changed = copy.deepcopy(config)
        put(changed, key, wrong)
        with pytest.raises(ConfigError, match=rf"^config\.{key}(\.|: )") as error:
            settings(changed)
        assert "\n" not in str(error.value)


RANGES = [
    ("seed", -1),
    ("world.cast", 1),
    ("world.cast", 9),
    ("world.train", 0),
    ("world.fit", 1.5),
    ("world.written", 1.5),
    ("world.noise", -1.0),
    ("data.vocabulary", 100),
    ("data.min_pixels", 10**9),
    ("data.prompt_length", 0),
    ("data.crop_margin", -0.5),
    ("data.workers", 0),
    ("model.text.mrope_section", (4, 6)),
    ("model.text.mrope_section", ("a", 6, 6)),
    ("model.text.hidden_size", 127),
    ("model.vision.fullatt_block_indexes", (7,)),
    ("model.vision.fullatt_block_indexes", (0.5,)),
    ("runtime.dtype", "float8"),
    ("runtime.dtype", "float16"),
    ("runtime.param_dtype", "bfloat16"),
    ("runtime.remat", "some"),
    ("sft.steps", 0),
    ("sft.micro_batches", 0),
    ("profile.steps", (3,)),
    ("profile.steps", (5, 3)),
    ("data.round_to", 0),
    ("data.shapes", 0),
    ("sft.optimizer.schedule", "square"),
    ("sft.optimizer.clip_norm", -1.0),
    ("rate.easy_from", 0.0),
    ("rate.easy_from", 1.5),
    ("rate.never", "keep"),
    ("rate.samples", 0),
    ("grpo.group", 1),
    ("grpo.temperature", 0.0),
    ("grpo.micro_batches", 7),
    ("grpo.scale_rewards", "all"),
    ("grpo.mix.start", 1.5),
    ("grpo.mix.until", 0),
    ("grpo.mix.shape", "square"),
    ("grpo.reward.effort_to", 1),
    ("grpo.loss.normalisation", "batch"),
    ("grpo.loss.importance_cap", -1.0),
]


@pytest.mark.parametrize(("key", "value"), RANGES)
def test_a_value_out_of_range_is_named(config, key, value):
    put(config, key, value)
    with pytest.raises(ConfigError, match=rf"^config(\.|: ){key}: ") as error:
        settings(config)
    assert "\n" not in str(error.value)
