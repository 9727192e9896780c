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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from morer1_jax import stores
from morer1_jax.errors import ConfigError, Stopped, one_line
from morer1_jax.hosts import group, join

T = TypeVar("T")

OWNER = ".owner.json"
# Seconds between two renewals, and those after which one that is not renewed is nobody's.
_RENEWED, _DEAD = 5.0, 45.0
# Seconds without a renewal after which a run ends, and those in which all of its processes then do.
_GIVEN, _ENDS = 25.0, 15.0
# Seconds in which the bucket must answer at the start.
_ANSWERS = 30.0
# Exit code of a run that has lost its workdir to another, or can no longer reach it.
_LOST = 3


@contextlib.contextmanager
def owned(root: Path) -> Iterator[None]:
    """Makes this run the one that writes into a bucket's folder, for the block.

    In the block the process ends if it can no longer say so.

    Raises:
        ConfigError: another run is writing there, or nothing can be written there.
        AbsentError: the bucket does not answer.
    """
    owner, over = _Owner(root), threading.Event()
    keeper = threading.Thread(target=owner.keep, args=(over,), daemon=True, name="owner")
    watcher = threading.Thread(target=owner.watch, args=(over,), daemon=True, name="owner's watch")

    def end() -> None:
        """Gives the claim up; if the bucket does not answer, it lapses by itself."""
        over.set()
        if keeper.is_alive():
            keeper.join(_RENEWED)
        with contextlib.suppress(Exception):
            owner.asked(owner.give_up, _RENEWED)

    try:
        owner.take()
        keeper.start()
        watcher.start()
        yield
    except BaseException as error:
        over.set()
        # Other processes may still write: the next run waits until nobody renews it.
        if group.count() == 1 or isinstance(error, Stopped):
            end()
        raise
    end()


class _Owner:
    """This run as the one that writes into a bucket's folder."""

    def __init__(self, root: Path) -> None:
        self._root, self._path = root, root / OWNER
        self._run, self._renewals = str(uuid.uuid4()), 0
        self._renewed, self._problem = time.monotonic(), ""

    def take(self) -> None:
        """Says whose the folder is, once whoever said so before is known to be gone."""
        if before := self.asked(self._read):
            print(
                f"{self._root}: {_name(before)} has written there; waiting {_DEAD:.0f} s to see "
                "whether it still does",
                file=sys.stderr,
                flush=True,
            )
            time.sleep(_DEAD)
            if (now := self.asked(self._read)) and now != before:
                raise ConfigError(
                    f"{self._root}: expected no other run to write there, found {_name(now)}; wait "
                    "until it has ended, or name another --workdir"
                )
        self.asked(self._renew)
        # Of two that began at once the second to write has it.
        time.sleep(1.0)
        if self.asked(self._read).get("run") != self._run:
            raise ConfigError(
                f"{self._root}: expected no other run to write there, found one that began just "
                "now; wait until it has ended, or name another --workdir"
            )

    def keep(self, over: threading.Event) -> None:
        """Renews it until the end; ends the process if it is another's."""
        while not over.wait(_RENEWED):
            try:
                if (owner := self._read()) and owner.get("run") != self._run:
                    self._lose(f"{_name(owner)} writes there now")
                if over.is_set():
                    return
                self._renew()
                self._problem = ""
            except Exception as error:  # The client's classes are many, and of its own.
                self._problem = f" ({one_line(error)})"

    def watch(self, over: threading.Event) -> None:
        """Ends the process before others take the folder for nobody's.

        The client may wait for a bucket that is silent for longer than that.
        """
        while not over.wait(_RENEWED / 5):
            if (seconds := time.monotonic() - self._renewed) > _GIVEN:
                self._lose(f"no answer of the bucket for {seconds:.0f} s{self._problem}")

    def give_up(self) -> None:
        """Deletes the object, if it still says that the folder is this run's."""
        if self._read().get("run") == self._run:
            stores.delete(self._path)

    def asked(self, ask: Callable[[], T], seconds: float | None = None) -> T:
        """Returns what the bucket answers in so many seconds; `_ANSWERS` if None.

        Raises:
            AbsentError: it does not.
            ConfigError: it refuses.
        """
        return stores.asked(
            _ANSWERS if seconds is None else seconds,
            ask,
            f"{self._root}: expected a bucket that can be written",
            "name another as --workdir, or give this machine's account the right to write there",
        )

    def _renew(self) -> None:
        now, self._renewals = time.monotonic(), self._renewals + 1
        text = {
            "run": self._run,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "renewal": self._renewals,
        }
        stores.write_bytes(self._path, json.dumps(text).encode())
        self._renewed = now

    def _read(self) -> dict[str, Any]:
        try:
            return json.loads(stores.read_bytes(self._path))
        except (FileNotFoundError, ValueError):
            return {}

    def _lose(self, why: str) -> None:
        line = f"{self._root}: {why}; this run ends, and goes on when the command is given again"
        if group.count() > 1:
            # Whatever the others and this process still wait for.
            last = threading.Timer(_ENDS, lambda: os._exit(_LOST))
            last.daemon = True
            last.start()
        join.leave(_LOST, line)
        print(f"error: {line}", file=sys.stderr, flush=True)
        os._exit(_LOST)


def _name(owner: dict[str, Any]) -> str:
    return f"process {owner.get('pid')} on {owner.get('host')}"
