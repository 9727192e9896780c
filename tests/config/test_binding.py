import json
import os

import pytest
from ml_collections import ConfigDict

from morer1_jax.config.binding import bind, flatten, identity
from morer1_jax.errors import ConfigError


def base():
    return ConfigDict(
        {
            "seed": 1,
            "mesh": {"data": -1, "fsdp": 1},
            "data": {"workers": 2, "path": "x", "sizes": (1, 2)},
            "sft": {"lr": 1e-5, "save_every": 10, "warm": True, "limit": None},
        }
    )


def changed(**values):
    config = base()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in values.items()})
    return config


def test_flatten_gives_what_json_gives_back():
    flat = flatten(base())
    assert flat == json.loads(json.dumps(flat))
    assert flat["data.sizes"] == [1, 2]
    assert list(flat) == sorted(flat)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {1}])
def test_a_value_json_cannot_hold_is_named(value):
    with pytest.raises(ConfigError, match=r"config\.sft\.lr: expected a value that JSON"):
        flatten({"sft": {"lr": value}})


def test_identity_leaves_out_what_may_change():
    assert set(identity(base())) == {
        "seed",
        "data.path",
        "data.sizes",
        "sft.lr",
        "sft.warm",
        "sft.limit",
    }
    assert set(identity(base(), ["sft", "seed"])) == {"seed", "sft.lr", "sft.warm", "sft.limit"}


def test_a_workdir_remembers_its_config(tmp_path):
    bind(base(), tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    assert json.loads(path.read_text())["sft"]["lr"] == 1e-5
    before = path.stat().st_mtime_ns
    bind(base(), tmp_path / "run")
    assert path.stat().st_mtime_ns == before
    assert os.listdir(path.parent) == ["config.json"]


def test_operational_keys_may_change_and_are_updated(tmp_path):
    bind(base(), tmp_path)
    now = changed(mesh__data=4, data__workers=8, sft__save_every=5)
    bind(now, tmp_path, write=False)
    assert flatten(json.loads((tmp_path / "config.json").read_text())) == flatten(base())
    bind(now, tmp_path)
    assert flatten(json.loads((tmp_path / "config.json").read_text())) == flatten(now)


def test_identity_keys_may_not_change(tmp_path):
    bind(base(), tmp_path)
    now = changed(seed=2, sft__lr=2e-5, sft__warm=False, mesh__data=4)
    del now.data.path
    now.data.file = "y"
    kept = (tmp_path / "config.json").read_bytes()
    with pytest.raises(ConfigError) as error:
        bind(now, tmp_path)
    message = str(error.value)
    assert "\n" not in message
    assert "seed: expected 2, found 1" in message
    assert "sft.lr: expected 2e-05, found 1e-05" in message
    assert "sft.warm: expected false, found true" in message
    assert 'data.path: expected absent, found "x"' in message
    assert 'data.file: expected "y", found absent' in message
    assert "new --workdir" in message
    assert "mesh" not in message
    assert (tmp_path / "config.json").read_bytes() == kept


def test_a_workdir_of_a_version_without_a_key_goes_on(tmp_path):
    """As long as the key says what that version did; then it is kept, and binds."""
    old = {"runtime": {"dtype": "float32"}, "sft": {"optimizer": {"lr": 1.0}}}
    bind(old, tmp_path)
    new = {
        "runtime": {"dtype": "float32", "gradient_sums": "float32"},
        "sft": {"optimizer": {"lr": 1.0, "moments": "float32"}},
    }
    other = {**new, "sft": {"optimizer": {"lr": 1.0, "moments": "bfloat16"}}}
    found = r'sft\.optimizer\.moments: expected "bfloat16", found "float32"'
    with pytest.raises(ConfigError, match=found):
        bind(other, tmp_path)
    bind(new, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == new
    with pytest.raises(ConfigError, match=found):
        bind(other, tmp_path)


def test_true_is_not_one(tmp_path):
    bind({"flag": True}, tmp_path)
    with pytest.raises(ConfigError, match="flag: expected 1, found true"):
        bind({"flag": 1}, tmp_path)


@pytest.mark.parametrize("text", ["", "[1]", '{"seed": '])
def test_a_damaged_config_file_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json: .*new --workdir") as error:
        bind(base(), tmp_path)
    assert "\n" not in str(error.value)
