"""Checks before the work that checkpoints can be saved in a workdir."""

from __future__ import annotations

import contextlib
import socket
import time
import uuid
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from morer1_jax import stores
from morer1_jax.errors import ConfigError, abridged, one_line
from morer1_jax.files import atomic_write
from morer1_jax.hosts import group
from morer1_jax.paths import is_plain
from morer1_jax.run.checkpoint import Checkpointer
from morer1_jax.run.manifest import CheckpointError
from morer1_jax.run.store import Store

# Seconds until a file that one host has written must be seen by the others: caches of NFS keep that
# there is none for 30 s.
_SEEN = 40.0


def check_shared(store: Store) -> None:
    """Checks that all processes of a run see the same workdir.

    Raises:
        ConfigError: they do not, or one that libraries would read in another way.
    """
    if group.count() == 1 or store.is_bucket:
        return
    workdir = store.root
    if not is_plain(workdir):
        raise ConfigError(
            f"{workdir}: expected letters, digits and _.,=+@- alone in the path of a --workdir of "
            "several processes, found others; name another"
        )
    trial = workdir / f".shared-by-{group.count()}"
    text = group.of_first("trial file", lambda: _write_trial(trial))
    until = time.monotonic() + _SEEN
    while not (seen := _has(trial, text)) and time.monotonic() < until:
        time.sleep(0.5)
    hosts = group.gather("who sees it", [socket.gethostname(), seen])
    group.by_first("trial is over", lambda: trial.unlink(missing_ok=True))
    if blind := [f"process {n} on {host}" for n, (host, sees) in enumerate(hosts) if not sees]:
        raise ConfigError(
            f"{workdir}: expected a folder that all processes share, found that "
            f"{abridged(blind)} does not see what process 0 writes; name one on a shared file "
            "system as --workdir"
        )


def _has(path: Path, text: str) -> bool:
    return path.exists() and path.read_text(encoding="utf-8") == text


def _write_trial(path: Path) -> str:
    text = str(uuid.uuid4())
    atomic_write(path, text)
    return text


def check_saves(workdir: Path, sharding: jax.sharding.Sharding | None = None) -> None:
    """Saves a small checkpoint, reads it back and deletes it.

    So a path or a disk that cannot hold checkpoints is found before the work is done.

    Args:
        sharding: over all devices; None: one device.

    Raises:
        CheckpointError: the small checkpoint could not be saved or read back.
    """
    trial = workdir / ".checkpoint-to-try-it-out"  # Path at least as long as any stage's.
    make = jax.jit(
        lambda: {"a": jnp.arange(3.0), "b": {"c": jnp.ones((2, 2), jnp.bfloat16)}},
        out_shardings=sharding,
    )
    state = make()
    # A killed run may have left it.
    group.by_first("trial", lambda: stores.delete(trial))
    try:
        checkpoints = Checkpointer(trial / "best")
        checkpoints.save(1, state)
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        restored, _ = checkpoints.restore(1, like)
        same = jax.tree.map(
            lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), state, restored
        )
        if not all(jax.tree.leaves(same)):
            raise CheckpointError("other numbers than were saved")
    except Exception as error:  # Orbax, tensorstore and file systems have classes of their own.
        reason = getattr(error, "strerror", None) or one_line(error)
        raise CheckpointError(
            f"{workdir}: expected a folder where checkpoints can be saved and read back, found "
            f"{reason}; use another --workdir"
        ) from error
    finally:
        if group.is_first():
            with contextlib.suppress(Exception):  # The first error counts.
                stores.delete(trial)
