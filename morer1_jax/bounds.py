"""Declares bounds of a dataclass's fields, which are checked when an object is made.

    steps: int = at_least(1, 200)

A class whose fields have bounds calls `check_bounds(self)` in its `__post_init__`.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from typing import Any

from morer1_jax.errors import FieldError

_DERIVED = "derived"


def at_least(low: float, default: Any = dataclasses.MISSING) -> Any:
    """Returns a field for a finite number of at least `low`, or for None if its type allows it."""
    return _bounded(default, f"at least {low:g}", lambda value: low <= value < math.inf)


def above(low: float, default: Any = dataclasses.MISSING) -> Any:
    """Returns a field for a finite number above `low`, or for None if its type allows it."""
    return _bounded(default, f"above {low:g}", lambda value: low < value < math.inf)


def between(low: float, high: float, default: Any = dataclasses.MISSING) -> Any:
    """Returns a field for a number from `low` to `high`, both included."""
    return _bounded(default, f"from {low:g} to {high:g}", lambda value: low <= value <= high)


def one_of(choices: Any, default: Any = dataclasses.MISSING) -> Any:
    """Returns a field for one of the values of `choices`, a `Literal` type."""
    values = typing.get_args(choices)
    return _bounded(default, f"one of {', '.join(values)}", values.__contains__)


def derived(default: Any = dataclasses.MISSING, **options: Any) -> Any:
    """Returns a field that is computed from others, so that no config has it as a key."""
    return dataclasses.field(default=default, metadata={_DERIVED: True}, **options)


def is_derived(field: dataclasses.Field) -> bool:
    """Returns whether a field was declared by `derived`."""
    return _DERIVED in field.metadata


def words(field: dataclasses.Field) -> str:
    """Returns a field's bound in words, such as "at least 1"; "" without one."""
    return field.metadata.get("words", "")


def check_bounds(instance: Any) -> None:
    """Checks an object's fields against their bounds.

    Raises:
        FieldError: a field is out of its bound; the first is named.
    """
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if words(field) and value is not None and not field.metadata["holds"](value):
            is_infinite = isinstance(value, float) and not math.isfinite(value)
            bound = f"a finite number {words(field)}" if is_infinite else words(field)
            raise FieldError(field.name, f"expected {bound}, found {value!r}")


def _bounded(default: Any, bound: str, holds: Any) -> Any:
    return dataclasses.field(default=default, metadata={"words": bound, "holds": holds})
