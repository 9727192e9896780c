"""The command line: flags over a config, and errors told from bugs."""

import errno
import os
import subprocess
import sys
import textwrap

import pytest
from absl import logging

from morer1_jax.cli import run_main

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


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the command and its configs are, and it is typed."""
    (tmp_path / "main.py").write_text(textwrap.dedent(MAIN))
    (tmp_path / "demo.py").write_text(CONFIG)
    (tmp_path / "run.json").write_text('{"seed": null}')
    (tmp_path / "value.py").write_text("def get_config():\n    return int('x')\n")
    (tmp_path / "refuses.py").write_text(
        "from morer1_jax.errors import ConfigError\n"
        "def get_config(size):\n"
        "    raise ConfigError(f'size: expected small, found {size}; choose it')\n"
    )
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
        (["--config=run.json"], "--config=run.json: expected a Python file such as"),
        (["--config.seed=3"], "config.seed"),
        ([], "--config"),
        (["--config=refuses.py:big"], "size: expected small, found big; choose it"),
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
