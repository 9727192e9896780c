"""Caches compiled programs on the disk or in a bucket, for all commands."""

from __future__ import annotations

import os
from pathlib import Path

import jax

from morer1_jax import stores

# JAX reads this variable itself: a folder, local or in a bucket; empty for no cache.
VARIABLE = "JAX_COMPILATION_CACHE_DIR"
# Seconds in which a bucket must answer; JAX itself would wait for it forever.
_ANSWERS = 30.0


def use_program_cache() -> None:
    """Keeps programs that took a second or more to compile in `~/.cache/morer1_jax/programs`.

    A resumed run, or a second question, then starts without compiling. If the environment sets
    `JAX_COMPILATION_CACHE_DIR`, that folder is used instead, or none if it is empty.

    Raises:
        AbsentError, ConfigError: that folder is in a bucket that does not answer, or refuses.
    """
    if VARIABLE not in os.environ:
        folder = Path.home() / ".cache" / "morer1_jax" / "programs"
        jax.config.update("jax_compilation_cache_dir", str(folder))
    elif stores.in_bucket(folder := os.environ[VARIABLE]):
        _check_answers(folder)


def _check_answers(folder: str) -> None:
    """Checks that a bucket can be listed; raises what `stores.asked` does."""
    stores.asked(
        _ANSWERS,
        lambda: stores.check_bucket(folder),
        f"{VARIABLE}={folder}: expected a bucket that can be read",
        "name another, or leave it empty for no cache",
    )
