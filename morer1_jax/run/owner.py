"""Says in a bucket's folder which run writes there, since a bucket has no locks.

An object says whose the folder is, and is renewed every few seconds. One that is not renewed is
left from a run that was killed. No clock of another machine is read.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from morer1_jax import stores
from morer1_jax.errors import ConfigError, Stopped, one_line
from morer1_jax.hosts import group, join

OWNER = ".owner.json"
# Seconds between two renewals, and those after which one that is not renewed is nobody's.
_RENEWED, _DEAD = 5.0, 20.0
# Exit code of a run that has lost its workdir to another, or can no longer reach it.
_LOST = 3


@contextlib.contextmanager
def owned(root: Path) -> Iterator[None]:
    """Makes this run the one that writes into a bucket's folder, for the block.

    In the block the process ends if it can no longer say so.

    Raises:
        ConfigError: another run is writing there, or nothing can be written there.
    """
    owner, over = _Owner(root), threading.Event()
    owner.take()
    keeper = threading.Thread(target=owner.keep, args=(over,), daemon=True, name="owner")
    keeper.start()
    try:
        yield
    except BaseException as error:
        over.set()
        # Other processes may still write: the next run waits until nobody renews it.
        if group.count() == 1 or isinstance(error, Stopped):
            owner.give_up()
        raise
    over.set()
    owner.give_up()


class _Owner:
    """This run as the one that writes into a bucket's folder."""

    def __init__(self, root: Path) -> None:
        self._root, self._path = root, root / OWNER
        self._run, self._renewals = str(uuid.uuid4()), 0

    def take(self) -> None:
        """Says whose the folder is, once whoever said so before is known to be gone."""
        try:
            before = self._read()
            if not before:
                self._renew()
        except Exception as error:  # The client's classes are many, and of its own.
            reason = getattr(error, "strerror", None) or one_line(error)
            raise ConfigError(
                f"{self._root}: expected a bucket that can be written, found {reason}; name "
                "another as --workdir, or give this machine's account the right to write there"
            ) from None
        if before:
            print(f"{self._root}: waiting whether {_name(before)} still writes", file=sys.stderr)
            time.sleep(_DEAD)
            if (now := self._read()) and now != before:
                raise ConfigError(
                    f"{self._root}: expected no other run to write there, found {_name(now)}; wait "
                    "until it has ended, or name another --workdir"
                )
        self._renew()
        # Of two that began at once the second to write has it.
        time.sleep(1.0)
        if self._read().get("run") != self._run:
            raise ConfigError(
                f"{self._root}: expected no other run to write there, found one that began just "
                "now; wait until it has ended, or name another --workdir"
            )

    def keep(self, over: threading.Event) -> None:
        """Renews it until the end; ends the process if it is another's, or cannot be renewed."""
        renewed = time.monotonic()
        while not over.wait(_RENEWED):
            problem = ""
            try:
                if (owner := self._read()) and owner.get("run") != self._run:
                    self._lose(f"{_name(owner)} writes there now")
                self._renew()
                renewed = time.monotonic()
            except Exception as error:  # The client's classes are many, and of its own.
                problem = one_line(error)
            # By then others take the folder for nobody's.
            if problem and (seconds := time.monotonic() - renewed) > _DEAD - _RENEWED:
                self._lose(f"no answer of the bucket for {seconds:.0f} s ({problem})")

    def give_up(self) -> None:
        """Deletes the object, if it still says that the folder is this run's."""
        with contextlib.suppress(Exception):  # By itself it is nobody's soon.
            if self._read().get("run") == self._run:
                stores.delete(self._path)

    def _renew(self) -> None:
        self._renewals += 1
        text = {
            "run": self._run,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "renewal": self._renewals,
        }
        stores.write_bytes(self._path, json.dumps(text).encode())

    def _read(self) -> dict[str, Any]:
        try:
            return json.loads(stores.read_bytes(self._path))
        except (FileNotFoundError, ValueError):
            return {}

    def _lose(self, why: str) -> None:
        line = f"{self._root}: {why}; this run ends, and goes on when the command is given again"
        join.leave(_LOST, line)
        print(f"error: {line}", file=sys.stderr, flush=True)
        os._exit(_LOST)


def _name(owner: dict[str, Any]) -> str:
    return f"process {owner.get('pid')} on {owner.get('host')}"
