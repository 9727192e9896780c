"""The errors that a user can correct; each message is one line that says what to do."""

from __future__ import annotations

from collections.abc import Sequence


class ConfigError(ValueError):
    """A configuration that is malformed or asks for something this package does not do."""


class AbsentError(ConfigError):
    """Another process, or a bucket, that does not answer; perhaps it does if all start again."""


class FieldError(ConfigError):
    """An invalid value of a dataclass's field; the caller that knows the file adds the place.

    Attributes:
        field: the field's name; dotted, such as `a.b`, for a field of a field.
        problem: "expected …, found …".
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field, self.problem = field, problem


class DataError(ValueError):
    """Invalid data; the message names the place, what was expected and what was found."""


class WeightsError(DataError):
    """A checkpoint whose files or tensors do not fit its config."""


class NotFiniteError(DataError):
    """A number that is not finite; the message is one line."""


class Stopped(BaseException):
    """The end of a run that was told to stop, and has saved what it had: start it again.

    No error, so that no code that handles errors takes it for one.
    """


class ErrorList:
    """The errors of one pass over the data, raised together so that a user sees all at once."""

    def __init__(self, max_errors: int = 20) -> None:
        """Makes an empty list, which raises when it holds `max_errors`."""
        self._max_errors = max_errors
        self._errors: list[DataError] = []

    def add(self, error: DataError) -> None:
        """Keeps an error.

        Raises:
            DataError: naming all errors so far, if the list is full.
        """
        self._errors.append(error)
        if len(self._errors) == self._max_errors:
            self.check(" or more")

    def check(self, suffix: str = "") -> None:
        """Ends the pass.

        Raises:
            DataError: naming all errors in one line, if there is any.
        """
        if len(self._errors) == 1:
            raise self._errors[0]
        if self._errors:
            listed = "; ".join(f"({n}) {error}" for n, error in enumerate(self._errors, start=1))
            raise DataError(f"{len(self._errors)} faults{suffix}: {listed}")


def abridged(names: Sequence[object], most: int = 4, between: str = ", ") -> str:
    """Returns the first `most` names and the number of the others, for use in a message."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return between.join(map(str, names[:most])) + rest


def one_line(error: BaseException) -> str:
    """Returns the message of another library's error for use within a one-line message."""
    return " ".join(str(error).split()) or type(error).__name__
