"""A cache of compiled programs on the disk, shared by all commands."""

from __future__ import annotations

import os
from pathlib import Path

import jax

# JAX itself reads it: a folder, also in a bucket; empty for no cache.
VARIABLE = "JAX_COMPILATION_CACHE_DIR"


def use_program_cache() -> None:
    """Keeps programs that took a second to compile in `~/.cache/morer1_jax/programs`.

    A resumed run, or a second question, then starts without compiling. If the environment sets
    `JAX_COMPILATION_CACHE_DIR`, that folder is used, or none if it is empty.
    """
    if VARIABLE not in os.environ:
        folder = Path.home() / ".cache" / "morer1_jax" / "programs"
        jax.config.update("jax_compilation_cache_dir", str(folder))
