"""The host's memory: what a CPU's steps allocate and free again, over and over."""

from __future__ import annotations

import ctypes
import sys

# Of glibc's `mallopt`, by the names in malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Has the C library keep what is freed for the next one who asks, rather than give it back.

    On a CPU each step allocates gigabytes at once and frees them, which by default the system then
    has to map and clear again, page by page: about a tenth of a step. To be called before JAX makes
    its threads. Whether it could be done: with glibc alone.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(
        mallopt(*given) for given in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_ARENA_MAX, 1))
    )
