"""The errors that a user can put right: each message is one line that says what to do."""

from __future__ import annotations


class ConfigError(ValueError):
    """A configuration that is malformed or asks for something this package does not do."""


class DataError(ValueError):
    """Bad data.  The message is one line: where it was found, what it is, what was expected."""


class WeightsError(DataError):
    """A checkpoint whose tensors are not those the config calls for."""


class NotFiniteError(DataError):
    """A number that is not finite; the message is one line."""


class Faults:
    """Bad data found in one pass, to be named together: who has twenty wants to know them at once.

    `add` raises when there are `most`, `check` at the end if there is any.
    """

    def __init__(self, most: int = 20) -> None:
        self._most = most
        self._found: list[DataError] = []

    def add(self, fault: DataError) -> None:
        """Keeps a fault.  Raises DataError, of all so far, if that makes as many as are named."""
        self._found.append(fault)
        if len(self._found) == self._most:
            self.check(" or more")

    def check(self, more: str = "") -> None:
        """Raises DataError, in one line, if a fault was found."""
        if len(self._found) == 1:
            raise self._found[0]
        if self._found:
            named = "; ".join(f"({n}) {fault}" for n, fault in enumerate(self._found, start=1))
            raise DataError(f"{len(self._found)} faults{more}: {named}")


def one_line(error: BaseException) -> str:
    """The message of another library's error, for use within a one-line message."""
    return " ".join(str(error).split()) or type(error).__name__
