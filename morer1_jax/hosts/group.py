"""What the processes of a run say to each other on the host: no device waits for it.

All processes run the same program, so that each of these functions is called by all of them in the
same order; from another thread than the main one, with a `ticket` that the main one has taken. They
use the key-value store of `jax.distributed`; a process alone answers by itself. A process that
waits for one that has died is ended by `hosts.join`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable
from typing import TypeVar

# JAX has no public function for its key-value store, which Orbax, too, reaches this way.
from jax._src import distributed

T = TypeVar("T")

# Longest time that one process may take while others wait for it; if it dies they end at once.
_PATIENCE_MS = 7 * 24 * 3600 * 1000
_calls = itertools.count()


def count() -> int:
    """Returns the number of processes of this run."""
    return distributed.global_state.num_processes if _together() else 1


def index() -> int:
    """Returns the number of this process, from 0."""
    return distributed.global_state.process_id if _together() else 0


def is_first() -> bool:
    """Returns whether this process is the one that writes and prints what there is one of."""
    return index() == 0


def ticket(name: str) -> str:
    """Returns a name that no other call has, equal on all processes, for another thread to use."""
    return f"morer1/{next(_calls)}/{name}"


def meet(name: str, key: str | None = None) -> None:
    """Waits until every process has come here.

    Args:
        name: of the place, for logs.
        key: from `ticket`, in another thread; in the main one None.
    """
    if count() > 1:
        key = ticket(name) if key is None else f"{key}/{name}"
        distributed.global_state.client.wait_at_barrier(key, _PATIENCE_MS)


def of_first(name: str, make: Callable[[], T]) -> T:
    """Returns on every process what `make` returns on the first one, the only one that calls it.

    Args:
        name: of the value, for logs.
        make: returns a value that JSON can hold. Where it raises an error, the run ends.
    """
    if count() == 1:
        return make()
    client, key = distributed.global_state.client, ticket(name)
    if is_first():
        value = make()
        client.key_value_set(key, json.dumps(value))
    else:
        value = json.loads(client.blocking_key_value_get(key, _PATIENCE_MS))
    # The store would keep it to the end of the run.
    client.wait_at_barrier(f"{key}/read", _PATIENCE_MS)
    if is_first():
        client.key_value_delete(key)
    return value


def by_first(name: str, do: Callable[[], object]) -> None:
    """Lets the first process do something while the others wait; what it returns is dropped."""

    def done() -> None:
        do()

    of_first(name, done)


def gather(name: str, value: T) -> list[T]:
    """Returns the values of all processes, in their order.

    Args:
        name: of the values, for logs.
        value: that JSON can hold.
    """
    if count() == 1:
        return [value]
    client, key = distributed.global_state.client, ticket(name)
    client.key_value_set(f"{key}/{index()}", json.dumps(value))
    values = [
        json.loads(client.blocking_key_value_get(f"{key}/{other}", _PATIENCE_MS))
        for other in range(count())
    ]
    client.wait_at_barrier(f"{key}/read", _PATIENCE_MS)
    client.key_value_delete(f"{key}/{index()}")
    return values


def unlike_first(name: str, value: object) -> list[int]:
    """Returns the numbers of the processes that have another value than the first one.

    Args:
        name: of the value, for logs.
        value: that JSON can hold; its digest is sent.
    """
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    digests = gather(name, digest)
    return [number for number, other in enumerate(digests) if other != digests[0]]


def to_first(name: str, value: T, key: str | None = None) -> list[T] | None:
    """Returns the values of all processes on the first one; None on the others, which do not wait.

    Args:
        name: of the values, for logs.
        value: that JSON can hold.
        key: as in `meet`.
    """
    if count() == 1:
        return [value]
    client = distributed.global_state.client
    key = ticket(name) if key is None else f"{key}/{name}"
    if not is_first():
        client.key_value_set(f"{key}/{index()}", json.dumps(value))
        return None
    keys = [f"{key}/{other}" for other in range(1, count())]
    others = [json.loads(client.blocking_key_value_get(k, _PATIENCE_MS)) for k in keys]
    for k in keys:
        client.key_value_delete(k)
    return [value, *others]


def _together() -> bool:
    return distributed.global_state.client is not None
