"""Ends a run in order when it is told to: before a maintenance, a preemption, or a limit of time.

All of these come as SIGTERM. The run polls between its phases, saves, and raises `Stopped`.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import threading
from collections.abc import Iterator
from typing import Any

from jax.experimental import multihost_utils

from morer1_jax.errors import Stopped
from morer1_jax.hosts import group

_told = threading.Event()
_polls = itertools.count()


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Takes SIGTERM in the block as a wish to stop, for `stopping` to tell.

    A second one ends the process at once. Of several processes JAX takes the signal, whichever it
    was sent to, for all of them.
    """

    def stop(number: int, frame: Any) -> None:
        if _told.is_set():
            raise Stopped("stopped by a second SIGTERM, before all was saved")
        _told.set()

    is_main = threading.current_thread() is threading.main_thread()
    # Not if whoever started the process ignores it.
    takes = is_main and group.count() == 1 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if takes:
        signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if takes:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            _told.clear()


def stopping() -> bool:
    """Returns whether to save and stop here; of several processes all get the same answer."""
    if group.count() == 1:
        return _told.is_set()
    return multihost_utils.reached_preemption_sync_point(next(_polls))


def check_stop() -> None:
    """Stops here, where there is nothing to save, if the run was told to.

    Raises:
        Stopped: it was.
    """
    if stopping():
        raise Stopped("stopped by SIGTERM")
