"""One process at a time writes into a folder, or a file.

The lock is the system's, on an open file, so that it ends with its process however that dies; what
a killed one leaves of the file itself blocks nobody. Who reads asks for no lock.
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
# Of file systems that know no locks.
_UNABLE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_COMMAND = 200  # characters of it that are shown
# Flags that are shown: where it reads and writes. The values of others may be secret, or long.
_SHOWN = re.compile(r"--?(workdir|out|config|checkpoint|data|data_dir|folder|json|jsonl|reasoning)")
_held: set[int] = set()


def _forget() -> None:
    """A forked child holds no lock: else it would hold its parent's, after that one's death too."""
    for file in _held:
        os.close(file)
    _held.clear()


os.register_at_fork(after_in_child=_forget)


@contextlib.contextmanager
def hold(path: str | os.PathLike[str], *, folder: bool = False) -> Iterator[None]:
    """Keeps others, on this host and those that share its locks, from writing to `path` meanwhile.

    Where the file system knows no locks, that is said on stderr, and nobody is kept away.

    Args:
      folder: whether it is a folder, which is made if it is missing, and goes again if it is empty
        at the end; else a file, or a folder that others are to find whole or not at all.

    Raises:
      ConfigError: another process holds it, says who; or `path` is no file's.
      OSError: nothing can be written there.
    """
    path = Path(path).resolve()
    if not folder and not path.name:
        raise ConfigError(f"{path}: the root of all folders found, a path below it expected")
    lock = path / LOCK if folder else path.with_name(f".{path.name}{LOCK}")
    made = [parent for parent in lock.parents if not parent.exists()]
    file = _take(lock, path)
    _held.add(file)
    try:
        _sign(file, path)
        yield
    finally:
        if file in _held:  # Else this is a forked child, and the lock its parent's.
            _held.remove(file)
            with contextlib.suppress(OSError):
                lock.unlink()
            os.close(file)
            with contextlib.suppress(OSError):  # Not empty.
                for parent in made:
                    parent.rmdir()


def _take(lock: Path, path: Path) -> int:
    """A descriptor of the lock's file, which is this process's until it is closed."""
    while True:
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:  # Another, who had made the folder, took it away.
            continue
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"{path}: {_holder(file)} writes into it; wait until it has ended, or name "
                    "another"
                ) from None
            except OSError as error:
                if error.errno not in _UNABLE:
                    raise OSError(error.errno, error.strerror, str(lock)) from None
                print(
                    f"{path}: cannot be locked ({error.strerror}); see to it that no other process "
                    "writes into it",
                    file=sys.stderr,
                )
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), os.stat(lock)):
                    return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # Of a file that its holder has removed since it was opened here.


def _sign(file: int, path: Path) -> None:
    """Writes down who holds the lock.

    One who did not end in order on another host may go on: some file systems lock a host at a time.
    """
    before = _read(file)
    if before and before["host"] != socket.gethostname():
        print(f"{path}: {_who(before)} did not end in order; is it over?", file=sys.stderr)
    now = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
        "command": _command(),
    }
    with contextlib.suppress(OSError):  # On a full disk the lock is one all the same.
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(now).encode(), 0)


def _command() -> str:
    """This process's program, and where it reads and writes."""
    program, *arguments = sys.argv or [""]
    shown = [sys.executable, program]
    wanted = False  # The value of the flag before.
    for argument in arguments:
        flag, equals, _ = argument.partition("=")
        known = _SHOWN.fullmatch(flag) is not None
        if known or (wanted and not flag.startswith("-")):
            shown.append(argument)
        wanted = known and not equals
    return _public(shlex.join(shown))


def _public(command: str) -> str:
    """Without the passwords and keys that URLs may have: before an `@`, and from `?` or `#` on."""
    command = re.sub(r"//[^\s'\"]*@", "//…@", command)
    return re.sub(r"(://[^\s'\"?#]*[?#])[^\s'\"]*", r"\1…", command)


def _holder(file: int) -> str:
    found = _read(file)
    return _who(found) if found else "another process"


def _read(file: int) -> dict[str, object] | None:
    """What `_sign` wrote; None if nothing, or it is being written."""
    try:
        found = json.loads(os.pread(file, os.fstat(file).st_size, 0))
        return {name: found[name] for name in ("host", "pid", "since", "command")}
    except (ValueError, KeyError, TypeError):
        return None


def _who(found: dict[str, object]) -> str:
    command = _public(" ".join(str(found["command"]).split()))
    if len(command) > _COMMAND:
        command = command[: _COMMAND - 1] + "…"
    return f"process {found['pid']} on {found['host']} since {found['since']} ({command})"
