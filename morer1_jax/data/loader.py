"""Prepares batches ahead of time, in threads or processes; a batch is a function of its step.

Threads share the interpreter's lock, which is held while text becomes tokens and patches find their
places, but not while photos are decoded and scaled.  Processes share nothing: each gets a copy of
the function, and a thread waits for each of its batches.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import multiprocessing
import pickle
import queue
import signal
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, Literal

import cloudpickle

from morer1_jax.errors import one_line

WorkerKind = Literal["thread", "process"]


def load_ahead(
    make: Callable[[int], Any],
    start: int,
    stop: int,
    *,
    workers: int = 1,
    ahead: int = 2,
    kind: WorkerKind = "thread",
) -> Iterator[Any]:
    """Yields `make(start)` … `make(stop - 1)` in order, each prepared ahead of its turn.

    Close the iterator to stop the workers before it is exhausted.

    Args:
        make: a pure function of the step; for processes, one that can be pickled.
        workers: the number of threads or processes that call it.
        ahead: the most batches prepared ahead, or one a worker if that is more.

    Raises:
        Exception: whatever `make` raises, when its batch's turn comes.
        RuntimeError: a worker process was killed.
    """
    if stop <= start:
        return
    workers = min(workers, stop - start)
    processes = _processes(make, workers) if kind == "process" else contextlib.nullcontext(make)
    with processes as call:
        pool = ThreadPoolExecutor(workers)
        steps = iter(range(start, stop))
        batches: collections.deque[Future[Any]] = collections.deque()
        try:
            while True:
                for step in itertools.islice(steps, max(ahead, workers) + 1 - len(batches)):
                    batches.append(pool.submit(call, step))
                if not batches:
                    return
                yield batches.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@dataclasses.dataclass(frozen=True)
class _Failure:
    """An exception that a worker process sends in place of a batch."""

    error: Exception


@contextlib.contextmanager
def _processes(make: Callable[[int], Any], count: int) -> Iterator[Callable[[int], Any]]:
    """Yields `make` as a function that an idle one of `count` processes evaluates."""
    # Each process with its connection; a call takes an idle one, and puts it back afterwards.
    context = multiprocessing.get_context("spawn")
    function = cloudpickle.dumps(make)
    processes: list[multiprocessing.process.BaseProcess] = []
    idle: queue.SimpleQueue[tuple[multiprocessing.process.BaseProcess, Connection]]
    idle = queue.SimpleQueue()

    def call(step: int) -> Any:
        process, connection = idle.get()
        try:
            connection.send(step)
            batch = connection.recv()
        except (EOFError, OSError):
            process.join()
            raise RuntimeError(
                f"a worker process that prepares batches failed: exit code {process.exitcode}; if "
                "it was killed for want of memory, lower data.workers"
            ) from None
        finally:
            idle.put((process, connection))
        if isinstance(batch, _Failure):
            raise batch.error
        return batch

    # Start the processes, and end them with the block.
    try:
        for _ in range(count):
            parent_end, worker_end = context.Pipe()
            processes.append(
                context.Process(target=_serve, args=(worker_end, function), daemon=True)
            )
            processes[-1].start()
            worker_end.close()  # Else the end of the process would not end the connection.
            idle.put((processes[-1], parent_end))
        yield call
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()


def _serve(connection: Connection, function: bytes) -> None:
    """Answers steps with batches until the trainer closes the connection, or is killed."""
    # Ctrl-C is the trainer's, which then stops its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    make = cloudpickle.loads(function)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            step = connection.recv()
            try:
                batch = make(step)
            except Exception as error:
                batch = _Failure(_portable(error))
            connection.send(batch)


def _portable(error: Exception) -> Exception:
    """Returns an error that survives the way to another process, its traceback as a note."""
    error.add_note("".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # Of a class whose pickling is broken; its message must do.
        replacement = RuntimeError(f"{type(error).__name__}: {one_line(error)}")
        replacement.add_note(error.__notes__[-1])
        return replacement
    return error
