"""Reads paths as users write them: local, in a bucket, or a name on the hub."""

import contextlib
import difflib
import errno
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from etils import epath

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_FILE_NAME = re.compile(
    r"\.(jsonl?|parquet|csv|tsv|txt|arrow|zip|tar|gz|bz2|xz|zst|safetensors|bin|pth?|gguf|py|ya?ml)$"
)
# The beginning of a URL, also as `Path` writes it.
_URL = re.compile(r"[A-Za-z][\w+.-]*:/")
# Paths that have the same meaning as a file's name, as a glob and as a URL.
_PLAIN = re.compile(r"(/[\w.,=+@-]+)+", re.ASCII)


def local_path(path: str | os.PathLike[str], name: str) -> Path:
    """Returns a user's path on this machine's file systems, with `~` expanded as in a shell.

    Args:
        path: the user's text.
        name: the flag or key whose value it is, for errors.

    Raises:
        OSError: the path is empty, not UTF-8, or a URL; the error has `filename`, and its
            `strerror` says what to do.
    """
    text = os.fspath(path)
    if _URL.match(text):
        raise _path_error(name, text, "expected a path of this machine, found a URL; name another")
    return Path(expand_home(text, name))


def any_path(path: str | os.PathLike[str], name: str) -> epath.Path:
    """Returns a path as `local_path` does, or a path in a bucket (`gs://…`)."""
    text = os.fspath(path)
    if "://" not in text and _URL.match(text):
        raise _path_error(name, text, "expected a path or gs://…, found half of a URL; name one")
    try:
        return epath.Path(text if "://" in text else expand_home(text, name))
    except KeyError:
        problem = "expected a path or gs://…, found another URL; name one"
        raise _path_error(name, text, problem) from None


def expand_home(text: str, name: str) -> str:
    """Returns the text of a local path with `~` expanded as in a shell.

    The result never begins with `~`, so that nothing expands it twice: a folder whose own name
    does is returned as an absolute path.

    Args:
        text: the path.
        name: the flag or key whose value it is, for errors.

    Raises:
        OSError: the path is empty or not UTF-8, as in `local_path`.
    """
    if not text.strip() or "\0" in text:
        raise _path_error(name, text, "expected a path, found none; name one")
    try:
        text.encode()
    except UnicodeEncodeError:
        problem = (
            "expected UTF-8, found another encoding or locale; name another, or set PYTHONUTF8=1"
        )
        raise _path_error(name, text, problem) from None
    text = os.path.expanduser(text)
    return os.path.join(os.getcwd(), Path(text)) if str(Path(text)).startswith("~") else text


def _path_error(name: str, text: str, problem: str) -> OSError:
    shown = text if text.isprintable() else ascii(text)
    return OSError(errno.EINVAL, problem, f"{name}={shown}")


def is_plain(path: Path) -> bool:
    """Returns whether libraries take an absolute path as it is; see `plain_path`."""
    return _PLAIN.fullmatch(str(path)) is not None


@contextlib.contextmanager
def plain_path(path: Path) -> Iterator[Path]:
    """Yields a path to a file or folder that libraries take literally, for the block alone.

    Orbax and datasets glob paths, tensorstore and fsspec parse them as URLs: with a bracket, a
    backslash or a colon they open another file, or silently none.

    Args:
        path: an absolute path.
    """
    if is_plain(path) or _URL.match(os.fspath(path)):
        yield path
        return
    folders = (tempfile.gettempdir(), "/tmp", "/var/tmp")
    folder = next((folder for folder in folders if _PLAIN.fullmatch(folder)), None)
    suffix = re.search(r"(\.\w+)*$", path.name, re.ASCII)[0]
    with tempfile.TemporaryDirectory(prefix="plain-", dir=folder) as temporary:
        link = Path(temporary) / f"path{suffix}"
        link.symlink_to(path)
        yield link


def is_hub_name(path: str) -> bool:
    """Returns whether a path is a name on the hub (`owner/name`) and not a mistyped local path.

    A path is local if it ends in a file's suffix, if its parent folder exists, or if a path of a
    similar name exists.
    """
    local = Path(path)
    if not _HUB_NAME.fullmatch(path) or _FILE_NAME.search(path):
        return False
    return not (path.startswith(".") or local.parent.exists() or did_you_mean(path))


def did_you_mean(path: str) -> str:
    """Returns a hint at an existing path of a similar name (`; is it runs/demo?`), or ""."""
    similar = _similar_path(path)
    return f"; is it {similar}?" if similar else ""


def _similar_path(path: str) -> Path | None:
    local, parent = Path(path), Path(path).parent
    similar = [local.with_name(name) for name in _similar_names(local.name, parent)]
    similar += [
        parent.with_name(name) / local.name for name in _similar_names(parent.name, parent.parent)
    ]
    return next((candidate for candidate in similar if candidate.exists()), None)


def _similar_names(name: str, folder: Path) -> list[str]:
    try:
        return difflib.get_close_matches(name, os.listdir(folder), cutoff=0.7)
    except OSError:
        return []


def hub_hint(path: str, kind: str = "") -> str:
    """Returns a hint at why a name was not looked for on the hub, for an error; or "".

    Args:
        path: a local path that does not exist.
        kind: option of `hf download` for the repository's kind, followed by a space.
    """
    if not _HUB_NAME.fullmatch(path) or path.startswith(".") or _FILE_NAME.search(path):
        return ""
    parent = Path(path).parent
    nearest = parent if parent.exists() else _similar_path(path)
    return (
        f" (not looked for there, as {nearest} is on this machine; if it is meant, hf download "
        f"{kind}{path}, and name the folder that it prints)"
    )
