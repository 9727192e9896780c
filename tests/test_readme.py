"""The paths, rooms and config keys that README names are there."""

import re
import tomllib
from pathlib import Path

import pytest

from morer1_jax.config.settings import default_config

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def text():
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_path_is_there(text):
    paths = set(re.findall(r"(?<![\w/.])(?:tests|tools|configs|morer1_jax)/[\w/]+(?:\.\w+)?", text))
    assert len(paths) > 20
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_every_file_of_the_package_is_there(text):
    """Sentences name them from the package on."""
    paths = set(re.findall(r"`((?!runs/)[a-z_]+/[\w/]+\.(?:py|html)|[a-z_]+\.py)`", text))
    assert len(paths) > 20
    places = ROOT, ROOT / "morer1_jax"
    assert [p for p in sorted(paths) if not any((at / p).exists() for at in places)] == []


def test_the_rooms_are_those_whose_order_is_checked(text):
    rooms = re.findall(r"^  (\w+)/ ", text, re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = project["tool"]["importlinter"]["contracts"][0]["layers"]
    assert rooms == [layer for layer in reversed(layers) if (ROOT / "morer1_jax" / layer).is_dir()]


def test_every_config_key_is_there(text):
    keys = set(re.findall(r"--config\.([a-z_.]*[a-z_])", text))
    assert len(keys) > 10
    config = default_config()
    for key in sorted(keys):
        node = config
        for name in key.split("."):
            assert name in node, key
            node = node[name]
