"""Lists, reads, writes and deletes files by paths that are local or in a bucket (`gs://…`).

What a bucket lists is what it has now: nothing is taken from a cache. Each object is written whole
or not at all, and requests that fail are made again by the client.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from etils import epath

from morer1_jax.errors import AbsentError, ConfigError, one_line
from morer1_jax.files import INSTALL_CLIENT, atomic_write, named, remove

T = TypeVar("T")

# Files that are moved at once, and bytes that are read at once.
_AT_ONCE, _BYTES = 16, 32 << 20


def in_bucket(path: epath.PathLike) -> bool:
    """Returns whether a path is in a bucket."""
    return "://" in os.fspath(path)


def absolute(path: epath.PathLike) -> Path:
    """Returns a path as an absolute one, of the kind that joins names for where it is."""
    return epath.Path(path) if in_bucket(path) else Path(path).absolute()


def names(folder: epath.PathLike) -> list[str]:
    """Returns the names in a folder, in any order; none if there is no such folder."""
    try:
        if not in_bucket(folder):
            return os.listdir(folder)
        found = _client().ls(os.fspath(folder), detail=False)
    except (FileNotFoundError, NotADirectoryError):
        return []
    # A folder that was made empty lists itself.
    own = os.fspath(folder).partition("://")[2].rstrip("/")
    return [name.rpartition("/")[2] for name in found if name.rstrip("/") != own]


def files(folder: epath.PathLike) -> list[str]:
    """Returns the files below a folder, in order, by their paths in it."""
    if not in_bucket(folder):
        found = (Path(parent) / name for parent, _, own in os.walk(folder) for name in own)
        return sorted(os.fspath(path.relative_to(folder)) for path in found)
    prefix = os.fspath(folder).partition("://")[2].rstrip("/") + "/"
    try:
        found = _client().find(os.fspath(folder))
    except FileNotFoundError:
        return []
    return sorted(name.removeprefix(prefix) for name in found if name.startswith(prefix))


def asked(seconds: float, ask: Callable[[], T], expected: str, remedy: str) -> T:
    """Returns what a bucket answers to `ask`.

    The client itself may wait for an answer forever. So it asks in a thread, which is left behind
    if there is none in time.

    Args:
        expected, remedy: begin and end of the errors' line.

    Raises:
        AbsentError: there is no answer in time.
        ConfigError: the bucket refuses.
    """
    answers: list[T] = []
    errors: list[Exception] = []

    def in_thread() -> None:
        try:
            answers.append(ask())
        except Exception as error:  # The client's classes are many, and of its own.
            errors.append(error)

    asking = threading.Thread(target=in_thread, daemon=True)
    asking.start()
    asking.join(seconds)
    if errors and not isinstance(errors[0], TimeoutError):
        reason = getattr(errors[0], "strerror", None) or one_line(errors[0])
        raise ConfigError(f"{expected}, found {reason}; {remedy}")
    if not answers:
        raise AbsentError(f"{expected}, found no answer in {seconds:.0f} s; {remedy}")
    return answers[0]


def check_bucket(path: epath.PathLike) -> None:
    """Checks that a path's bucket can be listed; raises the client's error if not."""
    bucket = os.fspath(path).partition("://")[2].split("/")[0]
    _client().ls(f"gs://{bucket}", detail=False)


def read_bytes(path: epath.PathLike) -> bytes:
    """Returns a file's bytes; raises FileNotFoundError if there is none."""
    if not in_bucket(path):
        return Path(path).read_bytes()
    with named(path):
        return _client().cat_file(os.fspath(path))


def size_of(path: epath.PathLike) -> int:
    """Returns a file's number of bytes; raises FileNotFoundError if there is none."""
    if not in_bucket(path):
        return os.stat(path).st_size
    with named(path):
        return _client().info(os.fspath(path))["size"]


def read_range(path: epath.PathLike, start: int, end: int) -> bytes:
    """Returns a file's bytes from `start` to before `end`: fewer if the file ends before."""
    if start >= end:  # Which a bucket would answer with the whole file, or with an error.
        return b""
    if in_bucket(path):
        with named(path):
            return _client().cat_file(os.fspath(path), start, end)
    with named(path), open(path, "rb", buffering=0) as file:
        # The system gives up to 2 GB at once.
        parts, file_number = [], file.fileno()
        while start < end and (part := os.pread(file_number, end - start, start)):
            parts.append(part)
            start += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def sha256(path: epath.PathLike) -> str | None:
    """Returns a file's SHA-256; None if there is no such file."""
    try:
        if not in_bucket(path):
            with named(path), open(path, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        digest, size = hashlib.sha256(), size_of(path)
        for start in range(0, size, _BYTES):
            digest.update(read_range(path, start, min(start + _BYTES, size)))
        return digest.hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return None


def write_bytes(path: epath.PathLike, data: bytes) -> None:
    """Writes a file, whole or not at all."""
    if not in_bucket(path):
        atomic_write(path, data)
        return
    with named(path):
        _client().pipe_file(os.fspath(path), data)


def delete(path: epath.PathLike) -> None:
    """Deletes a file or a folder, if it exists."""
    if not in_bucket(path):
        remove(path)
        return
    client, own = _client(), os.fspath(path)
    found = [f"{own}/{name}" for name in files(path)] or [own]
    try:
        client.rm(found)
    except FileNotFoundError:
        return


def copy(sources: Mapping[epath.PathLike, epath.PathLike]) -> None:
    """Copies files between this machine and a bucket, several at once.

    Args:
        sources: by each file's destination, the file.
    """

    def move(pair: tuple[epath.PathLike, epath.PathLike]) -> None:
        to, source = map(os.fspath, pair)
        if in_bucket(to) and os.path.getsize(source) <= _BYTES:
            # As bytes, since a log may grow while it is read.
            _client().pipe_file(to, Path(source).read_bytes())
            return
        if in_bucket(to):
            # The server is told the size first: what is sent must not grow.
            folder, name = os.path.split(source)
            with tempfile.NamedTemporaryFile(prefix=f".{name}.", dir=folder) as still:
                shutil.copyfile(source, still.name)
                _client().put_file(still.name, to)
            return
        target = Path(to)
        target.parent.mkdir(parents=True, exist_ok=True)
        _client().get_file(source, to)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(move, sources.items()))


def delete_all(paths: Iterable[epath.PathLike]) -> None:
    """Deletes files of a bucket that may be gone already."""
    for path in paths:
        delete(path)


def clear(folder: Path) -> None:
    """Makes a local folder that is empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


@functools.cache
def _client() -> Any:
    """Returns the client of buckets.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import fsspec

        return fsspec.filesystem("gcs", use_listings_cache=False)
    except ImportError:
        raise ConfigError(f"gs://: the client of buckets is not installed; {INSTALL_CLIENT}") from (
            None
        )
