"""Batches ahead of time: a pure function of the step, evaluated by worker threads in order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import grain.python as grain


@dataclasses.dataclass(frozen=True)
class _Failed:
    """An error on its way to the consumer: grain would add lines of its own to its message."""

    error: Exception


class _Steps(grain.RandomAccessDataSource):
    def __init__(self, make: Callable[[int], Any], start: int, stop: int) -> None:
        self._make, self._start, self._stop = make, start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, place: int) -> Any:
        try:
            return self._make(self._start + place)
        except Exception as error:
            return _Failed(error)


def load_ahead(
    make: Callable[[int], Any], start: int, stop: int, *, workers: int = 1, ahead: int = 2
) -> Iterator[Any]:
    """Yields `make(start)` … `make(stop - 1)`, each ready before it is asked for.

    Args:
      make: a pure function of the step.
      workers: threads that call it.
      ahead: finished batches held at most.

    Raises:
      Whatever `make` raises, when its batch's turn comes.
    """
    if stop <= start:
        return
    dataset = grain.MapDataset.source(_Steps(make, start, stop)).to_iter_dataset(
        grain.ReadOptions(num_threads=workers, prefetch_buffer_size=max(ahead, workers))
    )
    for batch in dataset:
        if isinstance(batch, _Failed):
            raise batch.error
        yield batch
