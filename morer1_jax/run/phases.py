"""Times each program of a step on the device, without making the host wait for it."""

from __future__ import annotations

import collections
import queue
import threading
import time
from typing import Any

import jax


class PhaseTimer:
    """Times programs that run one after another; a context manager.

    The host runs ahead of the device, so a thread waits for each program's result. A phase begins
    when its program is started, or when the phase before it ends if that is later; it ends when the
    result is computed.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[int, str, float, Any] | None] = queue.SimpleQueue()
        # By step: the phases that have not ended, and the seconds of those that have.
        self._open: collections.Counter[int] = collections.Counter()
        self._seconds: dict[int, dict[str, float]] = {}
        self._ended = threading.Condition()
        self._step = 0
        self._thread = threading.Thread(target=self._wait, daemon=True)

    def __enter__(self) -> PhaseTimer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._jobs.put(None)
        self._thread.join()

    def step(self, number: int) -> None:
        """Begins a step, to which phases belong until the next call."""
        self._step = number

    def phase(self, name: str, result: Any) -> None:
        """Notes that a program was started.

        Args:
            result: arrays that it returns and that are not donated to a later program.
        """
        with self._ended:
            self._open[self._step] += 1
        self._jobs.put((self._step, name, time.perf_counter(), result))

    def take(self, step: int) -> dict[str, float]:
        """Returns seconds by phase, summed over the steps from the last call up to this step.

        Waits until they have ended.

        Raises:
            RuntimeError: the timer is not inside its `with` block.
        """
        if not self._thread.is_alive():
            raise RuntimeError("PhaseTimer: expected to be inside its context, found outside of it")
        seconds: dict[str, float] = {}
        with self._ended:
            self._ended.wait_for(lambda: not any(n for s, n in self._open.items() if s <= step))
            for number in [s for s in self._open if s <= step]:
                del self._open[number]
            for number in [s for s in self._seconds if s <= step]:
                for name, spent in self._seconds.pop(number).items():
                    seconds[name] = seconds.get(name, 0.0) + spent
        return seconds

    def _wait(self) -> None:
        ended = 0.0
        while (job := self._jobs.get()) is not None:
            step, name, began, result = job
            failed = False
            try:
                jax.block_until_ready(result)
            except Exception:  # The train loop raises it too when it reads the result.
                failed = True
            with self._ended:
                self._open[step] -= 1
                if not failed:
                    began, ended = max(began, ended), time.perf_counter()
                    of_step = self._seconds.setdefault(step, {})
                    of_step[name] = of_step.get(name, 0.0) + ended - began
                self._ended.notify_all()
