"""Makes standard output and error streams that raise no errors."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from morer1_jax.errors import ConfigError


def check_text(arguments: Iterable[str]) -> None:
    """Checks that a command line is text that can be printed.

    Raises:
        ConfigError: an argument is not UTF-8.
    """
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise ConfigError(
                f"{argument!a}: expected UTF-8, found another encoding or locale; set PYTHONUTF8=1"
            ) from None


@contextlib.contextmanager
def unfailing_output() -> Iterator[None]:
    """Makes writing to `sys.stdout` and `sys.stderr` raise no error in the block.

    Characters that their encoding lacks are escaped. A stream that can no longer be written (the
    pipe to a `head` that has ended, a closed terminal, a file on a full disk) or that was closed
    from the start is replaced by /dev/null.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _UnfailingStream(sys.stdout, 1), _UnfailingStream(sys.stderr, 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


class _UnfailingStream:
    def __init__(self, stream: TextIO | None, number: int) -> None:
        """Wraps a stream; None if the file of this number was closed before the program began."""
        if stream is None:
            try:
                os.fstat(number)
            except OSError:  # Otherwise libraries would print into the next file that is opened.
                _redirect_to_null(number)
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._discard_output(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._discard_output(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _discard_output(self, error: OSError) -> None:
        with contextlib.suppress(OSError):  # The stream has no file.
            _redirect_to_null(self._stream.fileno())
            self._stream.flush()
        if error.errno != errno.EPIPE and self is sys.stdout:
            print(f"no more is printed: {error.strerror}", file=sys.stderr)


def _redirect_to_null(number: int) -> None:
    """Makes a file's number refer to /dev/null."""
    null = os.open(os.devnull, os.O_WRONLY)
    if null != number:
        os.dup2(null, number)
        os.close(null)
