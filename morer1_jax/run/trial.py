"""Finds out before the work whether checkpoints can be saved where they are to be."""

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

    So a path or a disk with which that fails is found before the work that is to be saved.

    Raises:
      CheckpointError: it fails.
    """
    trial = workdir / ".checkpoint-to-try-it-out"  # A path as long as any stage's.
    state = {"a": jnp.arange(3.0), "b": {"c": jnp.ones((2, 2), jnp.bfloat16)}}
    shutil.rmtree(trial, ignore_errors=True)  # Of a run that was killed meanwhile.
    try:
        checkpoints = Checkpointer(trial / "best")
        checkpoints.save(1, state)
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
        found, _ = checkpoints.restore(1, like)
        same = jax.tree.map(
            lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), state, found
        )
        if not all(jax.tree.leaves(same)):
            raise CheckpointError("other numbers were read than were saved")
    except Exception as error:  # Of orbax, tensorstore and the file system.
        why = getattr(error, "strerror", None) or one_line(error)
        raise CheckpointError(
            f"{workdir}: no checkpoint can be saved there and read back: {why}; use another "
            "--workdir"
        ) from error
    finally:
        shutil.rmtree(trial, ignore_errors=True)
