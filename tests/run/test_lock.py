"""One process at a time writes into a folder or a file, and says who it is."""

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys

import pytest

from morer1_jax.errors import ConfigError
from morer1_jax.run.lock import LOCK, hold

# Holds a folder, forks a child that outlives it, and says so.
HOLDER = """
import os, sys, time
from morer1_jax.run.lock import hold

with hold(sys.argv[1], folder=True):
    runs, told = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(told, b".")
        time.sleep(600)
    os.read(runs, 1)
    print(child, flush=True)
    time.sleep(600)
"""


def refusal(path, **kind):
    with pytest.raises(ConfigError) as error, hold(path, **kind):
        pass
    return str(error.value)


def test_a_lock_names_its_holder_and_ends_with_it_whatever_it_forked(tmp_path):
    folder = tmp_path / "new" / "run"
    command = [sys.executable, "-c", HOLDER, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    try:
        message = refusal(folder, folder=True)
        assert message.startswith(
            f"{folder}: expected no other process to write into it, found process {process.pid} on "
            f"{socket.gethostname()} since 20"
        )
        assert f"({sys.executable} -c)" in message
        assert message.endswith("; wait until it has ended, or name another")
        assert "\n" not in message
        process.kill()
        process.wait()
        os.kill(child, 0)  # It lives.
        assert os.listdir(folder) == [LOCK]
        with hold(folder, folder=True):
            pass
    finally:
        os.kill(child, 9)
        process.kill()
        process.stdout.close()
    assert os.listdir(folder) == []


@pytest.mark.parametrize("folder", [True, False])
def test_nothing_is_left_of_a_lock(tmp_path, folder):
    path = tmp_path / "a" / "b" / "out"

    def fail():
        with hold(path, folder=folder):
            same = tmp_path / "a" / ".." / "a" / "b" / "out"
            message = refusal(same, folder=folder)
            assert message.startswith(f"{path}: expected no other process to write into it, found ")
            assert f", found process {os.getpid()} on " in message
            assert path.exists() == folder
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        fail()
    assert os.listdir(tmp_path) == []
    with hold(path, folder=folder):
        path.mkdir(exist_ok=True)
        (path / "mine").write_text("x")
    assert os.listdir(path.parent) == ["out"]
    assert os.listdir(path) == ["mine"]


@pytest.mark.parametrize("folder", [True, False])
def test_a_path_is_the_same_by_any_name(tmp_path, folder):
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with hold(tmp_path / "out", folder=folder):
        assert "to write into it" in refusal(tmp_path / "link", folder=folder)


def test_what_a_killed_process_left_blocks_nobody(tmp_path, capsys):
    (tmp_path / LOCK).write_text("torn {")
    with hold(tmp_path, folder=True):
        pass
    left = {"host": "elsewhere", "pid": 7, "since": "2024-01-01 00:00:00+00:00", "command": "a b"}
    (tmp_path / LOCK).write_text(json.dumps(left))
    with hold(tmp_path, folder=True):
        pass
    # It may go on, where the file system locks each host by itself.
    assert capsys.readouterr().err == (
        f"{tmp_path}: process 7 on elsewhere since 2024-01-01 00:00:00+00:00 (a b) did not end in "
        "order; is it over?\n"
    )


def test_of_a_command_a_lock_says_the_program_and_where_it_writes(tmp_path, monkeypatch):
    secret = ["--base-url=https://me:s3cret@proxy/v1", "--key", "s3cret", "s3cret", "-k=s3cret"]
    urls = ["--data=gs://me:s3/cret@bucket/a?token=s3cret&b=c#s3cret", "--folder=/a#b?c"]
    paths = ["--workdir", "runs/a b", "s3cret", "-out=o", "--checkpoint=runs/demo/sft"]
    monkeypatch.setattr(sys, "argv", ["tools/x.py", *secret, *urls, *paths, "--dataset=s3cret"])
    with hold(tmp_path, folder=True):
        text, message = (tmp_path / LOCK).read_text(), refusal(tmp_path, folder=True)
    shown = (
        f"{sys.executable} tools/x.py '--data=gs://…@bucket/a?…' '--folder=/a#b?c' --workdir "
        "'runs/a b' -out=o --checkpoint=runs/demo/sft"
    )
    assert json.loads(text)["command"] == shown
    assert f"({shown})" in message or f"({shown[:199]}…)" in message
    for written in (text, message):
        assert "cret" not in written


def test_what_an_earlier_version_wrote_of_a_command_is_shown_without_secrets(tmp_path):
    left = {"host": socket.gethostname(), "pid": 7, "since": "now"}
    with hold(tmp_path, folder=True):
        command = "python x --base-url=https://me:s3cret@proxy/v1?key=s3cret --out=a"
        (tmp_path / LOCK).write_text(json.dumps(left | {"command": command}))
        message = refusal(tmp_path, folder=True)
    assert "(python x --base-url=https://…@proxy/v1?… --out=a)" in message


def test_the_root_of_all_folders_is_no_file(tmp_path):
    for root in ("/", "//", f"{tmp_path}/" + "../" * len(tmp_path.parts)):
        assert refusal(root) == "/: expected a path below the root, found the root"


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch, capsys):
    def unable(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unable)
    with hold(tmp_path, folder=True):
        pass
    assert capsys.readouterr().err.startswith(f"{tmp_path}: cannot be locked (No locks available)")


def test_a_full_disk_is_no_hindrance(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with hold(tmp_path, folder=True):
        assert "to write into it, found another process;" in refusal(tmp_path, folder=True)
