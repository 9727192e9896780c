"""Joins the processes of a run, watches over them, and ends them together.

Every process is connected to the run's keeper (`hosts.keeper`). When one fails or dies, all others
print who and why, and end within seconds, whatever they are waiting for.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import jax
from jax._src import distributed
from jax._src.lib import _jax

import morer1_jax
from morer1_jax.errors import AbsentError, ConfigError, Stopped, one_line
from morer1_jax.hosts import group
from morer1_jax.hosts.keeper import HEARTBEAT, LOST, service_port
from morer1_jax.hosts.launch import Place
from morer1_jax.hosts.wire import connected, receive, send

# Packages in whose versions all processes must agree, since they decide numbers or files.
_PACKAGES = (
    "flax",
    "jax",
    "jaxlib",
    "numpy",
    "optax",
    "orbax-checkpoint",
    "Pillow",
    "tokenizers",
    "transformers",
)
# Seconds: between two attempts to reach the keeper, for JAX to connect once all are here, and to
# wait for the news of another's death, of which an error may be the consequence.
_RETRY, _CONNECT, _NEWS = 0.5, 60, 3.0
# Most seconds that a process waits, at its end, for the keeper to have told all others.
_LAST = 10.0
_membership: _Membership | None = None
_undos: list[Callable[[], None]] = []


@contextlib.contextmanager
def joined(place: Place | None, config: Mapping[str, Any]) -> Iterator[None]:
    """Makes this process one of a run for the block; nothing changes for a process alone.

    At the end all wait for each other. Where the block raises an error, `leave` is to be called.
    Processes but the first print nothing to standard output.

    Args:
        place: from `find_place`.
        config: values by name, in which all processes must agree.

    Raises:
        AbsentError: the others did not come.
        ConfigError: they are of another run, or the coordinator's address is not the first
            process's.
    """
    global _membership
    if place is None:
        yield
        return
    facts = {"versions": _versions(), "config": dict(config)}
    connection, port = _enter(place, facts)
    _membership = _Membership(connection, place)
    _connect_jax(place, port)
    try:
        with contextlib.ExitStack() as stack:
            if place.process:
                null = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(null))
            yield
    except Stopped:  # By all of them, at the same point.
        _part()
        raise
    _part()


def _part() -> None:
    """Ends in order, all together."""
    global _membership
    group.meet("end of the run")
    jax.distributed.shutdown()
    _membership.end()
    _membership = None


def leave(code: int, line: str, error: BaseException | None = None) -> None:
    """Tells the others of this process's error, which ends them, and ends it; returns if alone.

    A process that fails may not wait for the others, as the interpreter's end would. If the error
    is the consequence of another's death, the news of that are printed instead.

    Args:
        code: of the exit.
        line: what all print.
        error: whose traceback this process prints before it.
    """
    if _membership is not None:
        _membership.fail(code, line, error)


@contextlib.contextmanager
def undone(undo: Callable[[], None]) -> Iterator[None]:
    """Has `undo` called if another process's error ends this one in the block."""
    _undos.append(undo)
    try:
        yield
    finally:
        _undos.remove(undo)


class _Membership:
    """This process's connection to the run's keeper, and the thread that listens to it."""

    def __init__(self, connection: Connection, place: Place) -> None:
        self._connection = connection
        self.name = f"process {place.process} of {place.processes} on {socket.gethostname()}"
        self._ending = threading.Lock()
        self._thread = threading.Thread(target=self._listen, daemon=True, name="keeper")
        self._thread.start()

    def _listen(self) -> None:
        message = receive(self._connection)
        if message is None:
            message = {"end": "the keeper of the run, beside process 0, has died", "code": LOST}
        if self._ending.acquire(blocking=False):
            for undo in reversed(_undos):
                with contextlib.suppress(Exception):  # The line that follows is what matters.
                    undo()
            _exit(int(message["code"]), f"error: {message['end']}")

    def fail(self, code: int, line: str, error: BaseException | None) -> NoReturn:
        time.sleep(_NEWS)
        self._ending.acquire()  # The listener does not give it back, and ends this process.
        if error is not None:
            with contextlib.suppress(Exception):
                traceback.print_exception(error)
        with contextlib.suppress(OSError):
            send(self._connection, {"failed": line, "code": code})
            self._thread.join(_LAST)
        _exit(code, f"error: {self.name}: {line}")

    def end(self) -> None:
        """Leaves in order."""
        self._ending.acquire()
        with contextlib.suppress(OSError):
            send(self._connection, {"bye": True})
            self._thread.join(_LAST)
        self._connection.close()


def _enter(place: Place, facts: dict[str, dict[str, Any]]) -> tuple[Connection, int]:
    """Introduces this process to the keeper; returns the connection and JAX's port."""
    if place.process == 0:
        _start_keeper(place)
    print(
        f"process {place.process} of {place.processes} on {socket.gethostname()}: joins the "
        f"others at {place.coordinator}, within {place.patience:.0f} s",
        file=sys.stderr,
    )
    hello = {
        "process": place.process,
        "count": place.processes,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "facts": facts,
    }
    until = time.monotonic() + place.patience
    while True:
        connection = _reach(place, until)
        with contextlib.suppress(OSError):  # Whoever it is, it has hung up.
            send(connection, hello)
        # The keeper itself refuses within its patience.
        answer = receive(connection) if connection.poll(place.patience + _CONNECT) else None
        # The keeper of an earlier run may still be there for a moment.
        if answer is None or "busy" not in answer or time.monotonic() > until:
            break
        connection.close()
        time.sleep(_RETRY)
    if answer is None:
        raise ConfigError(
            f"--coordinator={place.coordinator}: expected this run's first process, found a "
            "program that does not answer as one; give the address of process 0, with a free port"
        )
    if "busy" in answer:
        raise ConfigError(
            f"--coordinator={place.coordinator}: expected a new run, found one that has begun and "
            "goes on; wait until it has ended, or give another port"
        )
    if "end" in answer:
        raise (AbsentError if answer["code"] == LOST else ConfigError)(answer["end"])
    where = "; what the run says is in process 0's output" if place.process else ""
    print(f"all {place.processes} processes are here{where}", file=sys.stderr)
    return connection, int(answer["start"])


def _start_keeper(place: Place) -> None:
    _, port = place.host_and_port
    program = [sys.executable, "-m", "morer1_jax.hosts.keeper"]
    keeper = subprocess.Popen(
        [*program, str(port), str(place.processes), str(place.patience)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    with keeper.stdout as answer:
        said = answer.readline().strip()
    if said != "ready":
        raise ConfigError(
            f"{place.coordinator}: expected ports {port} and {service_port(port)} to be free on "
            f"this host ({socket.gethostname()}), found: {said or 'no keeper'}; give another "
            "--coordinator"
        )


def _reach(place: Place, until: float) -> Connection:
    """Connects to the keeper, which may not have started yet, until a time is over."""
    while True:
        try:
            return connected(socket.create_connection(place.host_and_port, timeout=_RETRY * 10))
        except OSError as error:
            if time.monotonic() > until:
                raise AbsentError(
                    f"process {place.process} on {socket.gethostname()}: expected process 0 at "
                    f"{place.coordinator}, found nobody in {place.patience:.0f} s "
                    f"({error.strerror or one_line(error)}); start it, and give all processes its "
                    "host and port as --coordinator"
                ) from None
            time.sleep(_RETRY)


def _connect_jax(place: Place, port: int) -> None:
    """Does what `jax.distributed.initialize` does, but start the service, which the keeper has."""
    host, _ = place.host_and_port
    state = distributed.global_state
    if place.devices is not None:
        shown = ",".join(map(str, place.devices))
        jax.config.update("jax_cuda_visible_devices", shown)
        jax.config.update("jax_rocm_visible_devices", shown)
    state.coordinator_address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    state.process_id, state.num_processes = place.process, place.processes
    client = _jax.get_distributed_runtime_client(
        state.coordinator_address,
        place.process,
        init_timeout=_CONNECT,
        heartbeat_timeout=HEARTBEAT,
        use_compression=True,
    )
    client.connect()
    state.client = client
    state.initialize_preemption_sync_manager()
    # TPUs' runtime numbers processes by itself.
    found, expected = (jax.process_index(), jax.process_count()), (place.process, place.processes)
    if found != expected:
        raise ConfigError(
            f"expected this to be process {expected[0]} of {expected[1]} ({place.said_by}), found "
            f"{found[0]} of {found[1]} by the devices; give flags as the devices are numbered"
        )


def _versions() -> dict[str, str]:
    """Returns the versions of what numbers depend on, and a digest of this package's own code."""
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    folder = Path(morer1_jax.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    own = {"Python": platform.python_version(), "morer1-jax": digest.hexdigest()[:12]}
    return versions | own


def _exit(code: int, line: str) -> NoReturn:
    """Ends the process at once: neither another thread nor a collective may delay it."""
    # Not through Python's streams, whose lock another thread may hold.
    with contextlib.suppress(OSError):
        os.write(2, f"\n{' '.join(line.split())}\n".encode())
    os._exit(code)
