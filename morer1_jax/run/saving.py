"""The blocks in which a checkpoint's files are written, whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Iterator
from pathlib import Path

from morer1_jax import stores
from morer1_jax.files import atomic_dir, full_disk, temporary_path
from morer1_jax.hosts import group
from morer1_jax.run.shelf import delete

# Of orbax's threads, in the messages that they log beside the error that the caller gets.
_THREADS = ("_SignalingThread", "background save thread")


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """Yields the folder in which a checkpoint is written; after an error nothing is left of it.

    On a file system it is a hidden one, which the first process renames at the end. A bucket cannot
    rename, and there a checkpoint is one by its manifest alone.
    """
    if not stores.in_bucket(path):
        hidden = contextlib.nullcontext(temporary_path(path))
        with atomic_dir(path) if group.is_first() else hidden as folder:
            yield folder
        return
    try:
        yield path
    except BaseException:
        if group.is_first():
            with contextlib.suppress(Exception):  # The first error counts.
                delete(path)
        raise


@contextlib.contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Turns a full disk into one error with a file's name; hides the log of orbax's threads."""

    def keep(record: logging.LogRecord) -> bool:
        return not any(name in str(record.msg) for name in _THREADS)

    logger = logging.getLogger("absl")
    logger.addFilter(keep)
    try:
        yield
    except Exception as error:
        if full := full_disk(error):
            raise OSError(errno.ENOSPC, full[1], str(path)) from None
        raise
    finally:
        logger.removeFilter(keep)
