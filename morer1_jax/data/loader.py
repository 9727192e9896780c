"""Batches ahead of time: a pure function of the step, evaluated in order by threads or processes.

Threads share the interpreter's lock, which is held while text becomes tokens and patches find their
places, but not while photos are decoded and scaled. Processes share nothing: each gets a copy of
the function and makes every n-th batch; large arrays come back through shared memory.
"""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any, Literal

import grain.python as grain
import numpy as np
from absl import flags

from morer1_jax.errors import one_line

WorkerKind = Literal["thread", "process"]


@dataclasses.dataclass(frozen=True)
class _Failed:
    """An error on its way to the consumer: grain would add lines of its own to its message."""

    error: Exception


class _Steps(grain.RandomAccessDataSource):
    def __init__(self, make: Callable[[int], Any], start: int, stop: int, kind: WorkerKind) -> None:
        self._make, self._start, self._stop = make, start, stop
        self._pack = _packed if kind == "process" else _Failed

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, place: int) -> Any:
        try:
            return self._make(self._start + place)
        except Exception as error:
            return self._pack(error)


def _packed(error: Exception) -> _Failed:
    """An error that survives the way to another process, its traceback as a note."""
    error.add_note("".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # Of a class whose pickling is broken; its message must do.
        replaced = RuntimeError(f"{type(error).__name__}: {one_line(error)}")
        replaced.add_note(error.__notes__[-1])
        error = replaced
    return _Failed(error)


def _settle(index: int, count: int) -> None:
    """Makes a worker process live exactly as long as it is needed."""
    del index, count
    # Ctrl-C is the trainer's, which then stops its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    trainer = multiprocessing.parent_process()

    def follow() -> None:
        trainer.join()
        os._exit(1)  # The trainer was killed and could not stop anybody.

    threading.Thread(target=follow, daemon=True).start()


def _own(batch: Any) -> Any:
    """The batch out of shared memory, which is scarce, and which a device would keep for long."""
    if isinstance(batch, np.ndarray):
        return np.array(batch)
    if isinstance(batch, dict):
        return {key: _own(value) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        values = map(_own, batch)
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch


def load_ahead(
    make: Callable[[int], Any],
    start: int,
    stop: int,
    *,
    workers: int = 1,
    ahead: int = 2,
    kind: WorkerKind = "thread",
) -> Iterator[Any]:
    """Yields `make(start)` … `make(stop - 1)`, each ready before it is asked for.

    Close it to stop the workers before it is exhausted.

    Args:
      make: a pure function of the step; for processes, one that can be pickled.
      workers: threads or processes that call it.
      ahead: finished batches held at most, or one a worker if that is more.
      kind: what the workers are.

    Raises:
      Whatever `make` raises, when its batch's turn comes, and RuntimeError if a worker process
      was killed.
    """
    if stop <= start:
        return
    steps = grain.MapDataset.source(_Steps(make, start, stop, kind))
    if kind == "process":
        if not flags.FLAGS.is_parsed():  # grain asks for flags of its own; here it gets defaults.
            flags.FLAGS.mark_as_parsed()
        workers = min(workers, stop - start)
        options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=-(-ahead // workers))
        batches = steps.to_iter_dataset(
            grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        ).mp_prefetch(options, worker_init_fn=_settle)
    else:
        batches = steps.to_iter_dataset(
            grain.ReadOptions(num_threads=workers, prefetch_buffer_size=max(ahead, workers))
        )
    iterator = iter(batches)
    try:
        while True:
            try:
                batch = next(iterator)
            except StopIteration:
                return
            except Exception as error:  # Those of `make` do not come this way.
                raise RuntimeError(
                    f"a worker process that prepares batches failed: {one_line(error)}; if it was "
                    "killed for want of memory, lower data.workers"
                ) from error
            if isinstance(batch, _Failed):
                raise batch.error
            yield _own(batch) if kind == "process" else batch
    finally:
        iterator.close()
        if kind == "process":
            # grain's iterators refer to each other, and hold their last batches in shared memory.
            del iterator, batches
            gc.collect()
