"""Paths as users write them, reading text, and writing files whole.

Text is UTF-8 whatever the locale; a byte-order mark before it is no part of it.

A reader, or a run that was killed, never meets half of a file: everything is first written beside
its destination under a hidden temporary name, flushed to the disk, and only then renamed.  A
temporary name is a function of the destination, so what a killed process leaves behind is
overwritten by the next attempt and never accumulates.
"""

import codecs
import contextlib
import difflib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from morer1_jax.errors import TextError

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_FILE_NAME = re.compile(
    r"\.(jsonl?|parquet|csv|tsv|txt|arrow|zip|tar|gz|bz2|xz|zst|safetensors|bin|pth?|gguf|py|ya?ml)$"
)
# The beginning of a URL, also as `Path` writes it; a disk's folder of such a name is not meant.
_URL = re.compile(r"[A-Za-z][\w+.-]*:/")
# Paths that mean the same to a file system, a glob and a URL.
_PLAIN = re.compile(r"(/[\w.,=+@-]+)+", re.ASCII)


def local_path(path: str | os.PathLike[str], name: str) -> Path:
    """A path of this machine's file systems as a user wrote it, `~` as a shell has it.

    Args:
      name: the flag or key it is the value of, which errors name.

    Raises:
      OSError: it is empty, no UTF-8, or a URL; it has `filename`, and its `strerror` says what to
        do.
    """
    text = os.fspath(path)
    if _URL.match(text):
        raise _no_path(name, text, "a URL found, a path of this machine expected; name one")
    return Path(expanded(text, name))


def any_path(path: str | os.PathLike[str], name: str) -> epath.Path:
    """As `local_path`, or a path in a bucket (`gs://…`)."""
    text = os.fspath(path)
    try:
        return epath.Path(text if "://" in text else expanded(text, name))
    except KeyError:
        raise _no_path(name, text, "a path or gs://… expected; name one") from None


def expanded(text: str, name: str) -> str:
    """The text of a local path with `~` as a shell has it; raises OSError as `local_path` does.

    Once more it is the same: a folder whose own name begins with `~` is named from the root.
    """
    if not text.strip() or "\0" in text:
        raise _no_path(name, text, "no path; name one")
    try:
        text.encode()
    except UnicodeEncodeError:
        problem = "not UTF-8, or not in this locale; name another, or set PYTHONUTF8=1"
        raise _no_path(name, text, problem) from None
    text = os.path.expanduser(text)
    return os.path.join(os.getcwd(), Path(text)) if str(Path(text)).startswith("~") else text


def _no_path(name: str, text: str, problem: str) -> OSError:
    shown = text if text.isprintable() else ascii(text)
    return OSError(errno.EINVAL, problem, f"{name}={shown}")


@contextlib.contextmanager
def plain_path(path: Path) -> Iterator[Path]:
    """A file or folder under a name that other libraries take for no more than that.

    Orbax and datasets glob the paths they are given, tensorstore and fsspec find URLs in them: a
    bracket, a backslash or a colon leads elsewhere, or nowhere without a word.

    Args:
      path: an absolute one.
    """
    if _PLAIN.fullmatch(str(path)):
        yield path
        return
    places = (tempfile.gettempdir(), "/tmp", "/var/tmp")
    place = next((place for place in places if _PLAIN.fullmatch(place)), None)
    suffix = re.search(r"(\.\w+)*$", path.name, re.ASCII)[0]
    with tempfile.TemporaryDirectory(prefix="plain-", dir=place) as temporary:
        link = Path(temporary) / f"path{suffix}"
        link.symlink_to(path)
        yield link


def read_text(path: epath.PathLike) -> str:
    """The text of a UTF-8 file, local or in a bucket, without a byte-order mark before it.

    Line ends are left as they are.

    Raises:
      OSError: it cannot be read.
      TextError: it is not UTF-8, or is of UTF-16.
    """
    data = epath.Path(path).read_bytes()
    # Without a mark, too, one of the first two bytes of UTF-16 is mostly zero.
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data[:2]:
        raise TextError(f"{path}: UTF-16 or no text, expected UTF-8 text; save it as UTF-8")
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise TextError(
            f"{path}:{number}: not UTF-8, expected UTF-8 text; save it as UTF-8"
        ) from None


def temporary_path(path: str | os.PathLike[str]) -> Path:
    """The hidden sibling that `path` is written to before it is renamed."""
    path = Path(path)
    return path.with_name(f".{path.name}.tmp")


def check_writable(path: str | os.PathLike[str], *, folder: bool = False) -> None:
    """Finds out whether `path` can be written, before the work is spent that is to go there.

    It makes and changes nothing; missing parent folders are made by whoever writes.

    Args:
      folder: whether a folder is to be written; else a file.

    Raises:
      OSError: a folder is where a file is to be, or the other way round, or nothing may be written
        there; it has `filename`, and its `strerror` says what to do.
    """
    path = Path(path)
    kinds = ("a file", "a folder")
    if path.exists() and path.is_dir() != folder:
        problem = f"{kinds[not folder]} found, {kinds[folder]} to write expected; name another"
        raise OSError(errno.EEXIST, problem, str(path))
    above = path if path.is_dir() else path.parent
    there = next(parent for parent in (above, *above.parents) if parent.exists())
    try:
        # Permissions do not tell: of a file system that takes no files root has all of them.
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        problem = f"cannot be written: {there}: {error.strerror}; name another"
        raise OSError(error.errno, problem, str(path)) from None


def is_hub_name(path: str) -> bool:
    """Whether a path is a name on the hub (`owner/name`), and none of this machine, mistyped.

    It is a file's if it ends as files do, and this machine's if its folder is there or one with
    nearly the same name holds the rest of it.
    """
    local = Path(path)
    if not _HUB_NAME.fullmatch(path) or _FILE_NAME.search(path):
        return False
    return not (path.startswith(".") or local.parent.exists() or nearby(path))


def nearby(path: str) -> str:
    """What is there under nearly this name: `; is it runs/demo?`, or nothing."""
    local = Path(path)
    alike = [local.with_name(name) for name in _alike(local.name, local.parent)]
    above = local.parent
    alike += [above.with_name(name) / local.name for name in _alike(above.name, above.parent)]
    return next((f"; is it {other}?" for other in alike if other.exists()), "")


def why_local(path: str, kind: str = "") -> str:
    """Why what might be a name on the hub was not looked for there, and how to have it; or nothing.

    Args:
      kind: what `hf download` is told of the kind of the repository.
    """
    if not _HUB_NAME.fullmatch(path) or path.startswith(".") or _FILE_NAME.search(path):
        return ""
    parent = Path(path).parent
    here = parent if parent.exists() else nearby(path).removeprefix("; is it ").removesuffix("?")
    return (
        f" (not looked for there, as {here} is on this machine; if it is meant, hf download "
        f"{kind}{path}, and name the folder that it prints)"
    )


def _alike(name: str, folder: Path) -> list[str]:
    try:
        return difflib.get_close_matches(name, os.listdir(folder), cutoff=0.7)
    except OSError:
        return []


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
    """Deletes a file or a folder, if it is there.

    Its name goes first, so that who is killed meanwhile leaves no half of a folder under it.
    """
    path, grave = Path(path), temporary_path(path)
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    if grave.exists():
        shutil.rmtree(grave)
    os.rename(path, grave)
    sync_path(path.parent)
    shutil.rmtree(grave)


@contextlib.contextmanager
def named(path: str | os.PathLike[str]) -> Iterator[None]:
    """Gives errors of the system in the block a file's name, which those of writing lack."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def allocate(path: str | os.PathLike[str], size: int) -> None:
    """Makes a file of `size` bytes for which there is room on the disk.

    Raises:
      OSError: there is none; with the file's name.
    """
    with named(path), open(path, "wb") as file:
        if hasattr(os, "posix_fallocate") and size:
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)


# A disk without room, a quota that is used up, a file that may not grow.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What libraries make of it that are not written in Python.
_FULL_TEXT = re.compile("|".join(re.escape(os.strerror(number)) for number in _FULL))


def full_disk(error: BaseException) -> tuple[str | None, str] | None:
    """The file that found no room, if known, and why; None if the error does not come from that.

    Looked at are the error, what led to it, and what it is made of.
    """
    seen: list[BaseException] = []
    found: tuple[str | None, str] | None = None
    todo: list[BaseException | None] = [error]
    while todo:
        one = todo.pop(0)
        if one is None or any(one is other for other in seen):
            continue
        seen.append(one)
        todo += [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]
        match = _FULL_TEXT.search(str(one))
        if isinstance(one, OSError) and one.errno in _FULL:
            found = (one.filename, one.strerror or os.strerror(one.errno))
            if one.filename:
                return found
        elif match and found is None:
            found = (None, match.group())
    return found


@contextlib.contextmanager
def atomic_dir(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields an empty folder to fill, which becomes `path` when the block ends without an error.

    After an error nothing is left.  Missing parent folders are made.

    Raises:
      FileExistsError: `path` is there already (an empty folder is taken over).
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
