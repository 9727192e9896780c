"""Reads text, JSON and JSON lines, and writes files whole or not at all.

Text is UTF-8 in any locale; a byte-order mark before it is dropped.

No reader meets half of a file, not even after a crash: everything is first written beside its
destination under a hidden temporary name, flushed to the disk, and only then renamed.  That name is
a function of the destination, so the next attempt overwrites what a killed process left.
"""

import codecs
import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from etils import epath

from morer1_jax.errors import ConfigError, DataError, one_line

# What to do where a bucket's client is not installed.
INSTALL_CLIENT = "pip install 'morer1-jax[gcs]'"
_SHOWN = 80  # characters of a bad line that an error shows

T = TypeVar("T")


def read_text(path: epath.PathLike) -> str:
    """Returns the text of a UTF-8 file, local or in a bucket, without a byte-order mark.

    Line ends are left as they are.

    Raises:
        OSError: the file cannot be read.
        DataError: the file is not UTF-8, or the bucket's client is not installed.
    """
    return _decode(path, _read_bytes(path))


def _read_bytes(path: epath.PathLike) -> bytes:
    try:
        return epath.Path(path).read_bytes()
    except ImportError as error:
        raise DataError(f"{path}: {one_line(error)}; {INSTALL_CLIENT}") from None


def _decode(path: epath.PathLike, data: bytes) -> str:
    # UTF-16 without a mark mostly has a zero among its first two bytes.
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data[:2]:
        raise DataError(f"{path}: expected UTF-8 text, found UTF-16 or no text; save it as UTF-8")
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{number}: expected UTF-8 text, found other bytes; save it as UTF-8"
        ) from None


def read_lines(
    path: epath.PathLike, expected: str, remedy: str, *, partial: bool = False
) -> list[str]:
    """Returns the lines of a text file without their ends and without blank lines at the end.

    Lines end only at newlines, since text may contain U+2028 and the like.

    Args:
        path: local or in a bucket.
        expected: what the file should contain, for errors.
        remedy: what the user should do, for errors.
        partial: whether to drop a last line without a newline, which a killed writer leaves; blank
            lines at the end are then kept.

    Raises:
        DataError: the file is missing, cannot be read or is not UTF-8.
    """
    try:
        data = _read_bytes(path)
    except OSError as error:
        raise DataError(f"{path}: expected {expected}, found {_reason(error)}; {remedy}") from error
    if partial:
        return _decode(path, data[: data.rfind(b"\n") + 1]).split("\n")[:-1]
    text = _decode(path, data).rstrip()
    return text.split("\n") if text else []


def read_json(
    path: epath.PathLike,
    remedy: str,
    *,
    expected: str = "a JSON object",
    error: type[ValueError] = DataError,
    kind: Callable[..., Any] = dict,
) -> Any:
    """Returns the JSON object of a file.

    Args:
        path: local or in a bucket.
        remedy: what the user should do, for errors.
        expected: what the file should contain, for errors.
        error: class of the errors.
        kind: class of the result, called with the pairs of keys and values in file order.

    Raises:
        DataError: the file is missing, cannot be read or is not a JSON object; of class `error`.
    """
    try:
        value = json.loads(read_text(path), object_pairs_hook=kind)
    except DataError as e:
        raise error(str(e)) from None
    except (OSError, ValueError, RecursionError) as e:
        raise error(f"{path}: expected {expected}, found {_reason(e)}; {remedy}") from e
    if not isinstance(value, kind):
        found = type(value).__name__
        raise error(f"{path}: expected {expected}, found {found}; {remedy}")
    return value


def read_jsonl(
    path: epath.PathLike,
    parse: Callable[[int, Any], T],
    expected: str,
    remedy: str,
    *,
    partial: bool = False,
    skip_blank: bool = False,
) -> list[T]:
    """Returns the item that `parse` makes of each line.

    Args:
        path: local or in a bucket.
        parse: `(number, value) -> item`, of a line's number, from 1, and its JSON value.  It raises
            DataError or ConfigError with a message of its own, to which the line's place is added,
            and KeyError, TypeError or ValueError if the value is not as `expected`.
        expected: what a line should contain, for errors.
        remedy: what the user should do, for errors.
        partial: whether to drop a last line without a newline, which a killed writer leaves.
        skip_blank: whether to skip blank lines; else they are malformed.

    Raises:
        DataError: the file cannot be read, or a line is malformed; the message names file and line.
        ConfigError: raised by `parse`.
    """
    items = []
    lines = read_lines(path, f"{expected} a line", remedy, partial=partial)
    for number, line in enumerate(lines, start=1):
        if skip_blank and not line.strip():
            continue
        try:
            items.append(parse(number, json.loads(line)))
        except (ConfigError, DataError) as error:
            raise type(error)(f"{path}:{number}: {error}") from None
        except (ValueError, TypeError, KeyError, RecursionError):
            raise DataError(
                f"{path}:{number}: expected {expected}, found {line[:_SHOWN]!r}; {remedy}"
            ) from None
    return items


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or one_line(error)


def write_json(path: str | os.PathLike[str], value: Any, *, indent: int | None = 1) -> None:
    """Writes a JSON value whole or not at all, with `indent` spaces a level; all on a line if None.

    Raises:
        ValueError: a number is not finite.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    atomic_write(path, text + "\n")


def write_jsonl(
    path: str | os.PathLike[str], values: Iterable[Any], *, ascii_only: bool = True
) -> None:
    """Writes JSON values, one a line, whole or not at all.

    Args:
        ascii_only: whether to escape other characters, so that no reader ends a line at U+2028.
    """
    lines = (json.dumps(value, ensure_ascii=ascii_only) + "\n" for value in values)
    atomic_write(path, "".join(lines))


def temporary_path(path: str | os.PathLike[str]) -> Path:
    """Returns the hidden sibling that `path` is written to before it is renamed."""
    path = Path(path)
    return path.with_name(f".{path.name}.tmp")


def check_writable(path: str | os.PathLike[str], *, folder: bool = False) -> None:
    """Checks that `path` can be written, before the work is done whose result goes there.

    Nothing is made or changed; missing parent folders are made by the writer.

    Args:
        folder: whether `path` is to be a folder, and not a file.

    Raises:
        OSError: `path` is a folder instead of a file or the other way round, or nothing may be
            written there; the error has `filename`, and its `strerror` says what to do.
    """
    path = Path(path)
    kinds = ("a file", "a folder")
    if path.exists() and path.is_dir() != folder:
        problem = f"expected {kinds[folder]} to write, found {kinds[not folder]}; name another"
        raise OSError(errno.EEXIST, problem, str(path))
    nearest = next(p for p in (path, *path.parents) if p.exists() and (p != path or folder))
    try:
        # Permissions do not tell: root has all of them, even on a read-only file system.
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        problem = f"cannot be written: {nearest}: {error.strerror}; name another"
        raise OSError(error.errno, problem, str(path)) from None


def sync_path(path: str | os.PathLike[str]) -> None:
    """Flushes a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with named(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Replaces the file `path` by `data` (text as UTF-8) at once, or leaves it as it was.

    Missing parent folders are made.  Two processes must not write the same path at once.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        with named(path), open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_path(path.parent)


def remove(path: str | os.PathLike[str]) -> None:
    """Deletes a file or a folder, if it exists.

    A folder is renamed first, so that a process that is killed leaves no half of it.
    """
    path, trash = Path(path), temporary_path(path)
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    if trash.exists():
        shutil.rmtree(trash)
    os.rename(path, trash)
    sync_path(path.parent)
    shutil.rmtree(trash)


@contextlib.contextmanager
def named(path: str | os.PathLike[str]) -> Iterator[None]:
    """Adds the file's name to the system's errors in the block: those of writes have none."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def allocate(path: str | os.PathLike[str], size: int) -> None:
    """Makes a file of `size` bytes and reserves their room on the disk.

    Raises:
        OSError: the disk has no room; the error has the file's name.
    """
    with named(path), open(path, "wb") as file:
        if hasattr(os, "posix_fallocate") and size:
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)


# No room on the disk, in the quota, or for a file of this size.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Libraries not written in Python report them only in the text of their errors.
_FULL_TEXT = re.compile("|".join(re.escape(os.strerror(number)) for number in _FULL))


def full_disk(error: BaseException) -> tuple[str | None, str] | None:
    """Returns the file that had no room (None if unknown) and the reason.

    Searches the error, its causes and the members of groups; returns None if none is a full disk.
    """
    result: tuple[str | None, str] | None = None
    visited: list[BaseException] = []
    pending: list[BaseException | None] = [error]
    while pending:
        current = pending.pop(0)
        if current is None or any(current is known for known in visited):
            continue
        visited.append(current)
        pending += [current.__cause__, current.__context__, *getattr(current, "exceptions", ())]
        match = _FULL_TEXT.search(str(current))
        if isinstance(current, OSError) and current.errno in _FULL:
            result = (current.filename, current.strerror or os.strerror(current.errno))
            if current.filename:
                return result
        elif match and result is None:
            result = (None, match.group())
    return result


@contextlib.contextmanager
def atomic_dir(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields an empty folder to fill, which becomes `path` when the block ends without an error.

    After an error nothing is left.  Missing parent folders are made.

    Raises:
        FileExistsError: `path` exists and is not an empty folder.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists already; delete it or choose another folder")
    temporary = temporary_path(path)
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                sync_path(os.path.join(folder, name))
            sync_path(folder)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_path(path.parent)
