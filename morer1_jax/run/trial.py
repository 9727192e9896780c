"""Checks before the work that checkpoints can be saved in a workdir."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from morer1_jax.errors import one_line
from morer1_jax.run.checkpoint import Checkpointer
from morer1_jax.run.manifest import CheckpointError


def check_saves(workdir: Path) -> None:
    """Saves a small checkpoint, reads it back and deletes it.

    So a path or a disk that cannot hold checkpoints is found before the work is done.

    Raises:
        CheckpointError: the small checkpoint could not be saved or read back.
    """
    trial = workdir / ".checkpoint-to-try-it-out"  # Path at least as long as any stage's.
    state = {"a": jnp.arange(3.0), "b": {"c": jnp.ones((2, 2), jnp.bfloat16)}}
    shutil.rmtree(trial, ignore_errors=True)  # A killed run may have left it.
    try:
        checkpoints = Checkpointer(trial / "best")
        checkpoints.save(1, state)
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
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
        shutil.rmtree(trial, ignore_errors=True)
