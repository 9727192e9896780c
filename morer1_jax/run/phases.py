"""How long each part of a step takes on the device, without making the host wait for it."""

from __future__ import annotations

import queue
import threading
import time
from typing import Any

import jax


class PhaseTimer:
    """Times programs that run one after another; a context manager.

    The host runs ahead of the device, so a thread waits for each program's result and notes when
    it is there. A phase lasts from when it was handed over, or from the end of the one before if
    that is later, until then.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[str, float, Any] | None] = queue.SimpleQueue()
        self._seconds: dict[str, float] = {}
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._wait, daemon=True)

    def __enter__(self) -> PhaseTimer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._jobs.put(None)
        self._thread.join()

    def phase(self, name: str, result: Any) -> None:
        """Notes that a program was started.

        Args:
          result: arrays that it makes, which no later program is given to write over.
        """
        self._jobs.put((name, time.perf_counter(), result))

    def take(self) -> dict[str, float]:
        """Seconds of each phase, summed over what has ended since this was last asked for."""
        with self._lock:
            seconds, self._seconds = self._seconds, {}
        return seconds

    def _wait(self) -> None:
        ended = 0.0
        while (job := self._jobs.get()) is not None:
            name, began, result = job
            try:
                jax.block_until_ready(result)
            except Exception:  # The step that asks for it raises it, too.
                continue
            began, ended = max(began, ended), time.perf_counter()
            with self._lock:
                self._seconds[name] = self._seconds.get(name, 0.0) + ended - began
