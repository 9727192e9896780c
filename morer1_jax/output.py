"""Printing that never ends what is printed about."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from morer1_jax.errors import ConfigError


def check_text(arguments: Iterable[str]) -> None:
    """Raises ConfigError for what of a command line is not text, and can be written nowhere."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise ConfigError(
                f"{argument!a}: not UTF-8, or not in this locale; set PYTHONUTF8=1"
            ) from None


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Makes `sys.stdout` and `sys.stderr` streams that take whatever is written to them.

    What their encoding lacks is written as an escape. A stream that can no longer be written, as
    the pipe to a `head` that has ended, a terminal that is gone or a file on a full disk, is given
    up; one that was never open is as good as /dev/null.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Lasting(sys.stdout, 1), _Lasting(sys.stderr, 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


class _Lasting:
    def __init__(self, stream: TextIO | None, number: int) -> None:
        """Takes a stream, or None where the file of this number was closed from the beginning."""
        if stream is None:
            try:
                os.fstat(number)
            except OSError:  # Else the next file to be opened gets what libraries print.
                _to_nowhere(number)
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _give_up(self, error: OSError) -> None:
        with contextlib.suppress(OSError):  # It has no file.
            _to_nowhere(self._stream.fileno())
            self._stream.flush()
        if error.errno != errno.EPIPE and self is sys.stdout:
            print(f"no more is printed: {error.strerror}", file=sys.stderr)


def _to_nowhere(number: int) -> None:
    """Lets a file's number mean /dev/null."""
    null = os.open(os.devnull, os.O_WRONLY)
    if null != number:
        os.dup2(null, number)
        os.close(null)
