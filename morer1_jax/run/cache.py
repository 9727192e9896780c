"""Compiled programs kept from one command to the next."""

from __future__ import annotations

import os
from pathlib import Path

import jax

# What JAX itself reads: a folder, also a bucket's; empty for no cache.
VARIABLE = "JAX_COMPILATION_CACHE_DIR"


def use_program_cache() -> None:
    """Keeps programs that took a second to compile in `~/.cache/morer1_jax/programs`.

    A run that is taken up again, or a second answer, then starts without compiling. Where the
    environment says `JAX_COMPILATION_CACHE_DIR`, that folder is used, or none if it is empty.
    """
    if VARIABLE not in os.environ:
        folder = Path.home() / ".cache" / "morer1_jax" / "programs"
        jax.config.update("jax_compilation_cache_dir", str(folder))
