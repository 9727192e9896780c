"""The host's memory: what a CPU's steps allocate and free again, over and over."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import platform

import jax

# Of glibc's `mallopt`, by the names in malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Where JAX computes on the CPU, has the C library keep what is freed rather than give it back.

    Each step there allocates gigabytes at once and frees them, which by default the system then has
    to map and clear again, page by page: about a tenth of a step. To be called before JAX makes its
    threads.

    Returns:
      Whether it was done: not beside an accelerator, and with glibc alone.
    """
    if not _cpu_alone() or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(
        mallopt(*given) for given in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_ARENA_MAX, 1))
    )


def _cpu_alone() -> bool:
    """Whether JAX will find no accelerator, as far as can be told without making its threads."""
    if jax.config.jax_platforms:
        return jax.config.jax_platforms == "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not plugins and importlib.util.find_spec("libtpu") is None
