"""Watching for compilations: a step compiles once for each shape of its batch, and never again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from jax import monitoring

# What JAX calls the event; its duration is the compiler's, or the persistent cache's.
_EVENT = "/jax/core/compile/backend_compile_duration"


class CompileWatch:
    """Counts what steps compile; a context manager.

    Attributes:
      count: programs compiled inside `step` so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._seconds: list[float] | None = None
        self._seen: set[Any] = set()

    def __enter__(self) -> CompileWatch:
        monitoring.register_event_duration_secs_listener(self._heard)
        return self

    def __exit__(self, *_: object) -> None:
        monitoring.unregister_event_duration_listener(self._heard)

    def _heard(self, event: str, seconds: float, **_: Any) -> None:
        if event == _EVENT and self._seconds is not None:
            self.count += 1
            self._seconds.append(seconds)

    @contextlib.contextmanager
    def step(self, batch: Any) -> Iterator[list[float]]:
        """Around one step.

        Yields:
          A list which, once the step is over, has the seconds of each compilation of a step whose
          batch had shapes that were seen before.
        """
        shapes = tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(batch))
        again: list[float] = []
        self._seconds = []
        try:
            yield again
        finally:
            if shapes in self._seen:
                again += self._seconds
            self._seen.add(shapes)
            self._seconds = None
