"""Caches compiled programs on the disk, for all commands."""

from __future__ import annotations

import os
from pathlib import Path

import jax

# JAX reads this variable itself: a folder, local or in a bucket; empty for no cache.
VARIABLE = "JAX_COMPILATION_CACHE_DIR"


def use_program_cache() -> None:
    """Keeps programs that took a second or more to compile in `~/.cache/morer1_jax/programs`.

    A resumed run, or a second question, then starts without compiling. If the environment sets
    `JAX_COMPILATION_CACHE_DIR`, that folder is used instead, or none if it is empty.
    """
    if VARIABLE not in os.environ:
        folder = Path.home() / ".cache" / "morer1_jax" / "programs"
        jax.config.update("jax_compilation_cache_dir", str(folder))
