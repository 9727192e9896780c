"""Locks a folder or a file for one writing process at a time.

The operating system locks an open file, so a lock ends with its process however that dies, and the
file that a killed process leaves blocks nobody. Readers take no lock.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import re
import shlex
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from morer1_jax.errors import ConfigError

LOCK = ".lock"
# Errors of file systems without locks.
_UNABLE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_COMMAND = 200  # most characters of the holder's command that are shown
# Flags that are shown: the paths that a command reads and writes. Others may be secret, or long.
_SHOWN = re.compile(r"--?(workdir|out|config|checkpoint|data|data_dir|folder|json|jsonl|reasoning)")
_held: set[int] = set()


def _forget() -> None:
    """Closes the locks in a forked child, which would hold its parent's even after its death."""
    for file in _held:
        os.close(file)
    _held.clear()


os.register_at_fork(after_in_child=_forget)


@contextlib.contextmanager
def hold(
    path: str | os.PathLike[str], *, folder: bool = False, name: object = None
) -> Iterator[None]:
    """Keeps other processes that hold `path` with this function from writing to it in the block.

    On a file system without locks it prints a warning and locks nothing.

    Args:
        path: the file or folder to write.
        folder: whether the lock file is put into `path`, a folder, which is made if it is missing
            and removed if it is empty at the end; else the lock file is put beside `path`.
        name: what the user calls it, for messages; `path` if None.

    Raises:
        ConfigError: another process, which the message names, holds the lock; or `path` is the
            root.
        OSError: nothing can be written there.
    """
    path = Path(path).resolve()
    if not folder and not path.name:
        raise ConfigError(f"{path}: expected a path below the root, found the root")
    lock = path / LOCK if folder else path.with_name(f".{path.name}{LOCK}")
    new_folders = [parent for parent in lock.parents if not parent.exists()]
    called = path if name is None else name
    file = _take(lock, called)
    _held.add(file)
    try:
        _sign(file, called)
        yield
    finally:
        if file in _held:  # Else this is a forked child, and the lock its parent's.
            _held.remove(file)
            with contextlib.suppress(OSError):
                lock.unlink()
            os.close(file)
            with contextlib.suppress(OSError):  # Not empty.
                for parent in new_folders:
                    parent.rmdir()


def _take(lock: Path, name: object) -> int:
    """Returns the descriptor of the lock's file, locked until it is closed."""
    while True:
        # Open the file, which its last holder may be removing, with a folder that it made.
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            continue
        try:
            # Lock it, without waiting.
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"{name}: expected no other process to write into it, found {_holder(file)}; "
                    "wait until it has ended, or name another"
                ) from None
            except OSError as error:
                if error.errno not in _UNABLE:
                    raise OSError(error.errno, error.strerror, str(lock)) from None
                print(
                    f"{name}: cannot be locked ({error.strerror}); see to it that no other process "
                    "writes into it",
                    file=sys.stderr,
                )
            # A lock counts only if the file still has its name.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), os.stat(lock)):
                    return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _sign(file: int, name: object) -> None:
    """Writes host, process and command into the lock's file.

    Warns if the file still names a process on another host: some file systems lock only within a
    host, so that process may still run.
    """
    previous = _read(file)
    if previous and previous["host"] != socket.gethostname():
        print(f"{name}: {_describe(previous)} did not end in order; is it over?", file=sys.stderr)
    holder = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
        "command": _command(),
    }
    with contextlib.suppress(OSError):  # On a full disk the lock holds all the same.
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(holder).encode(), 0)


def _command() -> str:
    """Returns this process's program and the flags that say what it reads and writes."""
    program, *arguments = sys.argv or [""]
    shown = [sys.executable, program]
    value_follows = False
    for argument in arguments:
        flag, equals, _ = argument.partition("=")
        is_shown = _SHOWN.fullmatch(flag) is not None
        if is_shown or (value_follows and not flag.startswith("-")):
            shown.append(argument)
        value_follows = is_shown and not equals
    return _public(shlex.join(shown))


def _public(command: str) -> str:
    """Removes passwords and keys from a command's URLs: before an `@`, and from `?` or `#` on."""
    command = re.sub(r"//[^\s'\"]*@", "//…@", command)
    return re.sub(r"(://[^\s'\"?#]*[?#])[^\s'\"]*", r"\1…", command)


def _holder(file: int) -> str:
    holder = _read(file)
    return _describe(holder) if holder else "another process"


def _read(file: int) -> dict[str, object] | None:
    """Returns what `_sign` wrote; None if nothing, or it is being written."""
    try:
        holder = json.loads(os.pread(file, os.fstat(file).st_size, 0))
        return {name: holder[name] for name in ("host", "pid", "since", "command")}
    except (ValueError, KeyError, TypeError):
        return None


def _describe(holder: dict[str, object]) -> str:
    command = _public(" ".join(str(holder["command"]).split()))
    if len(command) > _COMMAND:
        command = command[: _COMMAND - 1] + "…"
    return f"process {holder['pid']} on {holder['host']} since {holder['since']} ({command})"
