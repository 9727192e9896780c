"""Values of untrusted lines: read as data, and checked key by key."""

import ast
from collections.abc import Mapping
from typing import Any

from morer1_jax.errors import DataError


def literal(line: str) -> Any:
    """The value of a Python literal, run as no code.

    Raises:
        DataError: it is none, or a dict in it, or in a value of it, has a key twice.
    """
    try:
        node = ast.parse(line.strip(), mode="eval").body
        value = ast.literal_eval(node)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as e:
        problem = e.msg if isinstance(e, SyntaxError) else "not a literal"
        raise DataError(f"malformed ({problem}), expected one Python dict literal a line") from e
    if isinstance(node, ast.Dict):
        for part in (node, *(v for v in node.values if isinstance(v, ast.Dict))):
            keys = [k.value for k in part.keys if isinstance(k, ast.Constant)]
            if len(set(keys)) < len(keys):
                raise DataError("a key occurs twice in one dict, expected each once")
    return value


def fields(value: Any, where: str, types: Mapping[str, type | tuple[type, ...]]) -> list[Any]:
    """The values of a dict with exactly the given keys, each of its type, in the given order.

    Raises:
        DataError: it is no such dict; `where` says what it is.
    """
    if type(value) is not dict:
        raise DataError(f"{where}: {type(value).__name__}, expected a dict of {', '.join(types)}")
    for key in types:
        if key not in value:
            raise DataError(f"{where}: no key {key!r}, expected {', '.join(types)}")
    for key in value:
        if key not in types:
            raise DataError(f"{where}: unexpected key {key!r}, expected {', '.join(types)}")
    for key, expected in types.items():
        if not isinstance(value[key], expected):
            names = expected if isinstance(expected, tuple) else (expected,)
            raise DataError(
                f"{where}: {key} is of type {type(value[key]).__name__}, "
                f"expected {' or '.join(t.__name__ for t in names)}"
            )
    return [value[key] for key in types]


def is_text(text: str) -> bool:
    """Whether it is Unicode text: JSON and Python may spell surrogates that are none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
