"""Copies the files of a bucket's dataset to this machine, once, and reads them there.

Files that are read at random want a disk: each record would else be a request of its own, in every
epoch anew, and the readers of most releases of ArrayRecord know no buckets.

A copy's name is a digest of all that the bucket says of its files (name, size, checksums,
generation): when any of them changes, the data is copied anew. Copies of data that is no longer
used may be deleted.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
from etils import epath

from morer1_jax.errors import DataError, one_line
from morer1_jax.files import atomic_dir, named, remove
from morer1_jax.progress import progress

# The folder of the copies, if it is not to be `~/.cache/morer1_jax/data`.
VARIABLE = "MORER1_DATA_CACHE"
# Files copied at once, and bytes a request.
_FILES, _BYTES = 8, 16 << 20

# What a bucket says of each file, by its path below the folder.
Listing = Mapping[str, Mapping[str, Any]]


def local_copy(folder: epath.Path, parts: Sequence[str]) -> Path:
    """Returns a folder of this machine with the same files, which are copied if they are not there.

    Of several processes of a machine one copies, and the others wait for it.

    Args:
        folder: in a bucket.
        parts: names of the folders in it whose files are wanted.

    Raises:
        DataError: a file cannot be read whole, or changes meanwhile.
        OSError: the copy cannot be written.
    """
    listing = _listing(folder, parts)
    said = json.dumps(listing, sort_keys=True, default=str)
    caches = Path(os.environ.get(VARIABLE) or Path.home() / ".cache" / "morer1_jax" / "data")
    copy = caches / hashlib.sha256(said.encode()).hexdigest()[:32]
    with _alone(copy, folder):
        if not _is_whole(copy, listing):
            remove(copy)
            with atomic_dir(copy) as partial:
                _copy(folder, listing, partial)
                if _listing(folder, parts) != listing:
                    raise DataError(
                        f"{folder}: expected files that stay as they are, found that they changed "
                        "while they were copied; start again when whoever writes them is done"
                    )
    return copy


def _listing(folder: epath.Path, parts: Sequence[str]) -> Listing:
    files, root = _file_system(folder)
    # What an earlier call was told may have changed.
    files.invalidate_cache()
    try:
        found = {
            path: info
            for part in parts
            for path, info in files.find(f"{root}/{part}", detail=True).items()
        }
    except Exception as error:  # Clients have classes of their own.
        raise DataError(f"{folder}: cannot be listed: {one_line(error)}; start again") from error
    if not found:
        raise DataError(f"{folder}: expected files in {' and '.join(parts)}, found none")
    return {path.removeprefix(root).lstrip("/"): info for path, info in sorted(found.items())}


def _file_system(folder: epath.Path) -> tuple[Any, str]:
    files, root = fsspec.core.url_to_fs(os.fspath(folder))
    return files, root.rstrip("/")


def _is_whole(copy: Path, listing: Listing) -> bool:
    """Returns whether every file is there, of its size: `atomic_dir` wrote it, but users delete."""
    paths = {copy / name: info["size"] for name, info in listing.items()}
    return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())


def _copy(folder: epath.Path, listing: Listing, out: Path) -> None:
    total = sum(info["size"] for info in listing.values())
    with (
        ThreadPoolExecutor(_FILES) as pool,
        progress(desc="copy data", total=total, unit="B", scale=True) as bar,
    ):
        copies = [
            pool.submit(_copy_file, folder, name, info, out / name, bar.update)
            for name, info in listing.items()
        ]
        try:
            for copied in copies:
                copied.result()
        except BaseException:  # Whoever interrupts does not wait for the other files.
            pool.shutdown(cancel_futures=True)
            raise


def _copy_file(
    folder: epath.Path, name: str, info: Mapping[str, Any], out: Path, count: Any
) -> None:
    """Copies a file and compares it with what the bucket says of it."""
    files, root = _file_system(folder)
    size, digest, read = info["size"], hashlib.md5(usedforsecurity=False), 0
    out.parent.mkdir(parents=True, exist_ok=True)
    with named(out), open(out, "wb") as file:
        for start in range(0, size, _BYTES):
            try:
                data = files.cat_file(f"{root}/{name}", start, min(start + _BYTES, size))
            except Exception as error:  # As above.
                raise DataError(
                    f"{folder / name}: expected {size:,} bytes, found {read:,}, then "
                    f"{one_line(error)}; start again"
                ) from error
            file.write(data)
            digest.update(data)
            read += len(data)
            count(len(data))
    expected = info.get("md5Hash")
    found = base64.b64encode(digest.digest()).decode()
    if read != size or expected not in (None, found):
        raise DataError(
            f"{folder / name}: expected {size:,} bytes of MD5 {expected}, found {read:,} of "
            f"{found}; start again"
        )


@contextlib.contextmanager
def _alone(copy: Path, folder: epath.Path) -> Iterator[None]:
    """Keeps other processes of this machine from writing the same copy in the block."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    # The file stays: another process may wait for the one that was removed.
    lock = copy.parent / f".{copy.name}.lock"
    with named(lock), open(lock, "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{folder}: waiting for another process that copies it to {copy}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            problem = f"cannot be locked: {error.strerror}; set {VARIABLE} to a local disk's folder"
            raise OSError(error.errno, problem, str(lock)) from None
        yield
