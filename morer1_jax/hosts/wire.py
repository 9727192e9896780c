"""The connections between a run's processes and its keeper: JSON messages over TCP.

A process that dies closes its connection, whatever it was doing; of a host that dies, or of a
network that is cut, the operating system's own probes tell. So nothing has to be sent in time, and
a long compilation is never taken for a death.
"""

from __future__ import annotations

import json
import socket
import struct
from multiprocessing.connection import Connection
from typing import Any

# Seconds until the other host is probed, between two probes, and probes without an answer after
# which it is dead: 30 s in all.
_IDLE, _BETWEEN, _PROBES = 10, 5, 4
# Most bytes of a message; what is longer is from a stranger.
_MOST = 1 << 20


def connected(connection: socket.socket, patience: int = 0) -> Connection:
    """Returns a TCP socket as a connection of whole messages, over which a dead host is noticed.

    Args:
        patience: seconds after which `receive` gives up half a message; 0: never.
    """
    connection.setblocking(True)
    if patience:
        timeout = struct.pack("ll", patience, 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {"TCP_KEEPIDLE": _IDLE, "TCP_KEEPINTVL": _BETWEEN, "TCP_KEEPCNT": _PROBES}
    options["TCP_USER_TIMEOUT"] = 1000 * (_IDLE + _BETWEEN * _PROBES)
    for name, value in options.items():
        if hasattr(socket, name):  # Not all are on every system.
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return Connection(connection.detach())


def send(connection: Connection, message: dict[str, Any]) -> None:
    """Sends a message.

    Raises:
        OSError: the other end is gone.
    """
    connection.send_bytes(json.dumps(message).encode())


def receive(connection: Connection) -> dict[str, Any] | None:
    """Waits for a message; returns None if the other end is gone, or is not one of ours."""
    try:
        message = json.loads(connection.recv_bytes(_MOST))
    except (EOFError, OSError, ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None
