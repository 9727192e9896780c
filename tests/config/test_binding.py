import errno
import json
import os
import subprocess
import sys
import textwrap

import pytest
from absl import logging
from ml_collections import ConfigDict

from morer1_jax.cli import run_main
from morer1_jax.config.binding import Rule, check_config, flatten, identity, load
from morer1_jax.errors import ConfigError

CONFIG = """
from ml_collections import ConfigDict


def get_config(size="small"):
    return ConfigDict(
        dict(seed=1, size=size, learn=dict(lr=1e-5, steps=3, flag=True, clip=(0.2, 0.28)))
    )
"""
MAIN = """
from absl import flags
from ml_collections import config_flags

from morer1_jax.cli import run_main
from morer1_jax.errors import ConfigError, DataError

CONFIG = config_flags.DEFINE_config_file("config")
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run")
flags.mark_flag_as_required("config")


def main(argv):
    if WORKDIR.value == "config":
        raise ConfigError("config.learn.lr: too\\n high")
    if WORKDIR.value == "data":
        raise DataError("train.txt:3: no box")
    if WORKDIR.value == "bug":
        raise KeyError("a bug")
    print(argv[1:], CONFIG.value.to_dict())


if __name__ == "__main__":
    run_main(main)
"""


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
    with pytest.raises(ConfigError, match=r"config\.sft\.lr: .* found, a value that JSON"):
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
    load(base(), tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    assert json.loads(path.read_text())["sft"]["lr"] == 1e-5
    before = path.stat().st_mtime_ns
    load(base(), tmp_path / "run")
    assert path.stat().st_mtime_ns == before
    assert os.listdir(path.parent) == ["config.json"]


def test_operational_keys_may_change_and_are_updated(tmp_path):
    load(base(), tmp_path)
    now = changed(mesh__data=4, data__workers=8, sft__save_every=5)
    load(now, tmp_path, write=False)
    assert flatten(json.loads((tmp_path / "config.json").read_text())) == flatten(base())
    load(now, tmp_path)
    assert flatten(json.loads((tmp_path / "config.json").read_text())) == flatten(now)


def test_identity_keys_may_not_change(tmp_path):
    load(base(), tmp_path)
    now = changed(seed=2, sft__lr=2e-5, sft__warm=False, mesh__data=4)
    del now.data.path
    now.data.file = "y"
    kept = (tmp_path / "config.json").read_bytes()
    with pytest.raises(ConfigError) as error:
        load(now, tmp_path)
    message = str(error.value)
    assert "\n" not in message
    assert "seed: 1 there, 2 here" in message
    assert "sft.lr: 1e-05 there, 2e-05 here" in message
    assert "sft.warm: true there, false here" in message
    assert 'data.path: "x" there, absent here' in message
    assert 'data.file: absent there, "y" here' in message
    assert "new --workdir" in message
    assert "mesh" not in message
    assert (tmp_path / "config.json").read_bytes() == kept


def test_true_is_not_one(tmp_path):
    load({"flag": True}, tmp_path)
    with pytest.raises(ConfigError, match="flag: true there, 1 here"):
        load({"flag": 1}, tmp_path)


@pytest.mark.parametrize("text", ["", "[1]", '{"seed": '])
def test_a_damaged_config_file_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json: .*new --workdir") as error:
        load(base(), tmp_path)
    assert "\n" not in str(error.value)


RULES = {
    "seed": Rule(int, low=0),
    "mesh": Rule(dict),
    "data": Rule(dict),
    "sft.lr": Rule(float, low=0, high=1),
    "sft.save_every": Rule(int, low=1),
    "sft.warm": Rule(bool),
    "sft.limit": Rule(int, optional=True),
}


def test_a_config_within_its_rules_passes():
    check_config(base(), RULES)
    check_config({"norm": "token", "clip": (0.2, 0.28), "lr": 1, "n": {"m": {}}}, {
        "norm": Rule(str, choices=("token", "sequence")),
        "clip": Rule(tuple),
        "lr": Rule(float),
        "n": Rule(dict),
    })  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seed", -1, "config.seed: -1 found, a whole number, at least 0 expected"),
        ("seed", 1.5, "config.seed: 1.5 found, a whole number"),
        ("seed", True, "config.seed: true found, a whole number"),
        ("sft.lr", 2.0, "config.sft.lr: 2.0 found, a number, at least 0, at most 1 expected"),
        ("sft.lr", "1e-5", 'config.sft.lr: "1e-5" found, a number'),
        ("sft.lr", None, "config.sft.lr: null found, a number"),
        ("sft.warm", 1, "config.sft.warm: 1 found, true or false expected"),
        ("sft.limit", "x", 'config.sft.limit: "x" found, a whole number or none expected'),
        ("sft.rl", 1, "config.sft.rl: unknown key; did you mean sft.lr?"),
        ("sft.save_every", ..., "config.sft.save_every: the key is missing"),
        ("mesh", ..., "config.mesh: the key is missing"),
    ],
)
def test_a_config_outside_its_rules_is_named(key, value, message):
    config = base().to_dict()
    *parents, last = key.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    with pytest.raises(ConfigError) as error:
        check_config(config, RULES)
    assert message in str(error.value)


def test_a_value_outside_the_choices_is_named():
    with pytest.raises(ConfigError, match='norm: "x" found, one of token, sequence'):
        check_config({"norm": "x"}, {"norm": Rule(str, choices=("token", "sequence"))})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the command and its configs are, and it is typed."""
    (tmp_path / "main.py").write_text(textwrap.dedent(MAIN))
    (tmp_path / "demo.py").write_text(CONFIG)
    (tmp_path / "run.json").write_text('{"seed": null}')
    (tmp_path / "value.py").write_text("def get_config():\n    return int('x')\n")
    (tmp_path / "name.py").write_text("def get_config():\n    return nowhere\n")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def typed(folder, command):
    """Runs the command in this process."""
    return lambda *args, code: command("main.py", *args, code=code)


def process(*args):
    return subprocess.run([sys.executable, "main.py", *args], capture_output=True, text=True)


@pytest.mark.usefixtures("folder")
def test_the_command_line_overrides_the_config():
    done = process(
        "--config=demo.py:large",
        "--config.learn.lr=2",
        "--noconfig.learn.flag",
        "--config.learn.clip=(0.1, 0.3)",
    )
    assert done.returncode == 0, done.stderr
    assert "'lr': 2.0" in done.stdout
    assert "'size': 'large'" in done.stdout
    assert "'flag': False" in done.stdout
    assert "(0.1, 0.3)" in done.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config=demo.py", "--config.learn.rl=2"], "--config.learn.rl: unknown key; did you"),
        (["--config", "demo.py", "--config.zzz", "2"], "--config.zzz: unknown key"),
        (["--config=demo.py", "--noconfig.learn.flog"], "unknown key; did you mean learn.flag?"),
        (["--config=demo.py", "--config.learn.lr.x=2"], "--config.learn.lr.x: unknown key"),
        (["--config=demo.py", "--config.learn.steps=many"], "--config.learn.steps=many: invalid"),
        (["--config=demo.py", "--config.learn.flag=maybe"], "--config.learn.flag=maybe"),
        (["--config=demo.py", "--config.learn=3"], "--config.learn=3"),
        (["--config=demo.py", "--wrokdir=x"], "Unknown command line flag 'wrokdir'"),
        (["--config=demo.py", "stray"], "unexpected argument 'stray'"),
        (["--config=none.py"], "--config=none.py: no such file"),
        (["--config=none.py", "--config.seed=3"], "--config=none.py: no such file"),
        (["--config=run.json"], "--config=run.json: a Python file such as configs/demo.py exp"),
        (["--config.seed=3"], "config.seed"),
        ([], "--config"),
        (["--config=demo.py", "--workdir=config"], "config.learn.lr: too high"),
        (["--config=demo.py", "--workdir=data"], "train.txt:3: no box"),
    ],
)
def test_the_users_errors_are_one_line_and_exit_code_2(typed, args, message):
    out, err = typed(*args, code=2)
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert out == ""


@pytest.mark.usefixtures("folder")
def test_errors_of_the_program_keep_their_traceback():
    done = process("--config=demo.py", "--workdir=bug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "KeyError: 'a bug'" in done.stderr


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ("value.py", RuntimeError, "ValueError: invalid literal"),
        ("name.py", NameError, "name 'nowhere'"),
    ],
)
def test_errors_of_a_config_keep_their_traceback(typed, config, error, message):
    with pytest.raises(error, match=message):
        typed(f"--config={config}", code=1)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "stopped; start again"),
        (FileNotFoundError(2, "No such file", "here/x"), 2, "error: here/x: No such file"),
    ],
)
def test_what_is_no_ones_bug_is_one_line(capsys, error, code, line):
    def main(_):
        raise error

    with pytest.raises(SystemExit) as done:
        run_main(main, ["command"], interrupted="stopped; start again")
    assert done.value.code == code
    assert capsys.readouterr().err == f"{line}\n"


def test_an_error_of_the_system_about_no_file_keeps_its_traceback():
    def main(_):
        raise OSError("a bug")

    with pytest.raises(OSError, match="a bug"):
        run_main(main, ["command"])


@pytest.mark.parametrize(
    ("argv", "level"), [([], logging.WARNING), (["--verbosity=0"], logging.INFO)]
)
def test_libraries_are_heard_from_warnings_on_unless_the_user_says_otherwise(argv, level):
    seen = []
    with pytest.raises(SystemExit):
        run_main(lambda _: seen.append(logging.get_verbosity()), ["command", *argv])
    assert seen == [level]


def test_a_full_disk_is_one_line_with_its_file(capsys):
    """With or without a name; what a library makes of it too."""
    full = os.strerror(errno.ENOSPC)
    for error, named in (
        (OSError(errno.ENOSPC, full, "run/best"), "run/best"),
        (OSError(errno.ENOSPC, full), "a file"),
        (RuntimeError(f"I/O error: {full} (os error 28)"), "a file"),
    ):

        def main(_, error=error):
            raise error

        with pytest.raises(SystemExit) as done:
            run_main(main, ["command"])
        assert done.value.code == 2
        assert capsys.readouterr().err == (
            f"error: {named}: {full}; make room, then give the same command\n"
        )
