"""Batches ahead of time: a pure function of the step, evaluated in order by threads or processes.

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
    """Yields `make(start)` … `make(stop - 1)`, each begun before it is asked for.

    Close the iterator to stop the workers before it is exhausted.

    Args:
        make: a pure function of the step; for processes, one that can be pickled.
        start: the first step.
        stop: the step after the last.
        workers: threads or processes that call it.
        ahead: batches made ahead at most, or one a worker if that is more.
        kind: what the workers are.

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
    context = multiprocessing.get_context("spawn")
    function = cloudpickle.dumps(make)
    started: list[multiprocessing.process.BaseProcess] = []
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

    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            started.append(context.Process(target=_serve, args=(theirs, function), daemon=True))
            started[-1].start()
            theirs.close()  # Else the end of the process would not end the connection.
            idle.put((started[-1], ours))
        yield call
    finally:
        for process in started:
            process.kill()
        for process in started:
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
