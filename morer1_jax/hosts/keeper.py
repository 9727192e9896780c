"""Keeps the processes of a run together: a program beside the first process.

It answers at the coordinator's address. It waits until all processes have come, checks that they
are of one run, and serves JAX's coordination at the next port. From then on it listens: when one
process says that it has failed, or is gone without a word, it tells all others who and why.

It is a program of its own because the death of the process that serves JAX's coordination aborts
all others inside JAX before they could say why.
"""

from __future__ import annotations

import dataclasses
import errno
import signal
import socket
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

from morer1_jax.hosts.wire import connected, receive, send

# Exit codes of processes that the keeper ends: by what a user can correct, or by another's death.
REFUSED, LOST = 2, 3
# Seconds for processes to end after they were told to; for those of a refused run to come and be
# told, too; and to wait for a port that the keeper of an earlier run may hold for as long.
_GRACE, _LATE, _PORT = 20, 5, 30.0
# Seconds in which a connection says whose it is, and half a message becomes a whole one.
_STRANGE, _HALF = 10.0, 3
# JAX's own heartbeat, in seconds: only for what the keeper cannot see, so it may be long.
HEARTBEAT = 900
_AGAIN = "start the same command again on all hosts: it goes on from what is saved"
# Facts of a process in which all of a run must agree, with what to do where they do not.
_AGREED = {
    "versions": "install the same versions on all hosts",
    "config": "give all the same config and flags",
}


@dataclasses.dataclass
class _Member:
    """One process of the run, as it introduced itself.

    Attributes:
        facts: by kind, values by name, in which all must agree.
        ended: whether it has ended in order, and waits for the others to.
    """

    process: int
    host: str
    pid: int
    facts: dict[str, dict[str, Any]]
    ended: bool = False


class Keeper:
    """The processes of one run.

    Args:
        port: of the coordinator's address.
        count: the number of processes.
        patience: seconds that all have to come.
    """

    def __init__(self, port: int, count: int, patience: float) -> None:
        self._count, self._until = count, time.monotonic() + patience
        self._patience = patience
        self._door = _door(port, min(_PORT, patience))
        self._members: dict[Connection, _Member] = {}
        # Connections that have not said whose they are, and until when they may.
        self._strangers: dict[Connection, float] = {}
        self._started = False
        self._ended: dict[str, Any] | None = None  # What all are told.

    def serve(self, service_port: int) -> None:
        """Runs until no process is left.

        Args:
            service_port: where JAX's coordination is served, which all are told once all are here.
        """
        while self._members or not self._started:
            ends = [*self._strangers.values(), *(() if self._started else (self._until,))]
            left = max(0.0, min(ends) - time.monotonic()) if ends else None
            for source in wait([self._door, *self._members, *self._strangers], left):
                if source is self._door:
                    self._open()
                elif source in self._strangers:
                    self._introduce(source)
                elif source in self._members:
                    self._hear(source)
            now = time.monotonic()
            for connection in [c for c, until in self._strangers.items() if until <= now]:
                self._drop(connection)
            if not self._started and self._until <= now:
                if self._ended is not None:
                    return
                self._end(LOST, self._missing())
            self._let_go()
            here = len(self._present()) == self._count
            if here and not self._started and self._ended is None:
                self._start(service_port)

    def _open(self) -> None:
        """Takes a connection, whose first message is to say whose it is."""
        try:
            connection = connected(self._door.accept()[0], _HALF)
        except OSError:  # It is gone already.
            return
        self._strangers[connection] = time.monotonic() + _STRANGE

    def _hear(self, connection: Connection) -> None:
        """Takes one message of a process, or its end."""
        message, member = receive(connection), self._members[connection]
        if message is None:
            self._drop(connection)
            if not member.ended:
                self._end(LOST, f"{self._name(member)} has died; {_AGAIN}")
        elif "failed" in message:
            # It waits until all are told.
            self._end(int(message["code"]), f"{self._name(member)}: {message['failed']}")
            self._drop(connection)
        else:
            member.ended = True

    def _let_go(self) -> None:
        """Lets processes end that have ended in order, the first one after all others."""
        for connection in self._first_last():
            member = self._members[connection]
            if member.ended:
                if member.process == 0 and len(self._members) > 1:
                    return
                self._drop(connection)

    def _introduce(self, connection: Connection) -> None:
        """Takes the first message of a connection, which may be anybody's."""
        message = receive(connection)
        try:
            facts = {kind: dict(facts) for kind, facts in dict(message["facts"]).items()}
            member = _Member(
                int(message["process"]), str(message["host"]), int(message["pid"]), facts
            )
            count = int(message["count"])
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
            self._drop(connection)
            return
        del self._strangers[connection]
        taken = [other for other in self._present() if other.process == member.process]
        self._members[connection] = member
        if self._started:
            self._refuse(connection, {"busy": True})
        elif self._ended is not None:
            self._refuse(connection, self._ended)
        elif count != self._count:
            self._end(
                REFUSED,
                f"process {member.process} on {member.host}: expected {self._count} processes as "
                f"process 0 was told, found {count}; give all the same --processes",
            )
        elif taken:
            self._end(
                REFUSED,
                f"process {member.process}: expected one, found two, on {taken[0].host} (pid "
                f"{taken[0].pid}) and {member.host} (pid {member.pid}); give each a --process of "
                "its own",
            )

    def _start(self, service_port: int) -> None:
        """Tells all processes that all are here, if all are of one run."""
        if difference := next(self._differences(), None):
            self._end(REFUSED, difference)
            return
        self._started = True
        for connection in self._members:
            self._tell(connection, {"start": service_port})

    def _differences(self) -> Iterator[str]:
        """Yields in what processes differ from the first, one kind of facts after another."""
        first, *others = sorted(self._present(), key=lambda member: member.process)
        for kind, remedy in _AGREED.items():
            for other in others:
                ours, theirs = first.facts.get(kind, {}), other.facts.get(kind, {})
                for name in sorted(ours.keys() | theirs.keys()):
                    found, expected = theirs.get(name, "nothing"), ours.get(name, "nothing")
                    if found != expected:
                        yield (
                            f"{self._name(other)}: {name}: expected {expected} as on {first.host} "
                            f"(process 0), found {found}; {remedy}"
                        )

    def _missing(self) -> str:
        missing = sorted(set(range(self._count)) - {m.process for m in self._present()})
        listed = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
        return (
            f"expected {self._count} processes within {self._patience:.0f} s, found "
            f"{self._count - len(missing)}: process {listed} did not come; start the same command "
            "on every host"
        )

    def _first_last(self) -> list[Connection]:
        """Returns all connections, that of the first process last.

        In a container, and in a step of Slurm, the end of the first process is the keeper's.
        """

        def is_first(connection: Connection) -> bool:
            return self._members[connection].process == 0

        return sorted(self._members, key=is_first)

    def _present(self) -> list[_Member]:
        return list(self._members.values())

    def _name(self, member: _Member) -> str:
        return f"process {member.process} of {self._count} on {member.host} (pid {member.pid})"

    def _refuse(self, connection: Connection, answer: dict[str, Any]) -> None:
        self._tell(connection, answer)
        self._drop(connection)

    def _end(self, code: int, line: str) -> None:
        """Tells all processes to end; only the first reason counts."""
        if self._ended is not None:
            return
        self._ended = {"end": line, "code": code}
        self._until = time.monotonic() + _LATE
        for connection in self._first_last():
            self._tell(connection, self._ended)
        # Processes end by themselves; a host that is cut off does not delay the keeper's end.
        signal.alarm(_GRACE)

    def _tell(self, connection: Connection, message: dict[str, Any]) -> None:
        try:
            send(connection, message)
        except OSError:  # It is gone, which is heard next.
            return

    def _drop(self, connection: Connection) -> None:
        self._members.pop(connection, None)
        self._strangers.pop(connection, None)
        connection.close()


def _door(port: int, seconds: float) -> socket.socket:
    """Listens at a port, as soon as it is free; raises OSError after so many seconds."""
    dual, until = socket.has_dualstack_ipv6(), time.monotonic() + seconds
    family = socket.AF_INET6 if dual else socket.AF_INET
    while True:
        try:
            return socket.create_server(("", port), family=family, dualstack_ipv6=dual)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > until:
                raise
            time.sleep(0.5)


def service_port(port: int) -> int:
    """Returns the port of JAX's coordination beside that of the coordinator's address."""
    return port + 1 if port < 65535 else port - 1


def main() -> None:
    """Serves a run; prints `ready`, or why it cannot, in a line.

    Its arguments are the coordinator's port, the number of processes, and seconds of patience.
    """
    # A signal to all of the first process's group ends that process, which the keeper outlives.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    port, count, patience = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    try:
        keeper = Keeper(port, count, patience)
        from jax._src.lib import _jax

        service = _jax.get_distributed_runtime_service(
            f"[::]:{service_port(port)}", count, heartbeat_timeout=HEARTBEAT
        )
    except Exception as error:  # Of the operating system, or of JAX, which has no class for it.
        print(" ".join(str(error).split()), flush=True)
        return
    print("ready", flush=True)
    keeper.serve(service_port(port))
    del service


if __name__ == "__main__":
    main()
