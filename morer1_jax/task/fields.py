"""Reads Python literals of untrusted files as data, and checks values key by key."""

import ast
from collections.abc import Mapping
from typing import Any

from morer1_jax.errors import DataError


def literal(line: str) -> Any:
    """Returns the value of a Python literal without running code.

    Raises:
        DataError: the line is not a literal, or its dict, or a dict among its values, has a key
            twice.
    """
    try:
        node = ast.parse(line.strip(), mode="eval").body
        value = ast.literal_eval(node)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as e:
        problem = e.msg if isinstance(e, SyntaxError) else "something else"
        raise DataError(f"expected one Python dict literal a line, found {problem}") from e
    if isinstance(node, ast.Dict):
        for dict_node in (node, *(child for child in node.values if isinstance(child, ast.Dict))):
            keys = [
                key_node.value for key_node in dict_node.keys if isinstance(key_node, ast.Constant)
            ]
            if len(set(keys)) < len(keys):
                raise DataError("expected each key of a dict once, found one twice")
    return value


def fields(value: Any, where: str, types: Mapping[str, type | tuple[type, ...]]) -> list[Any]:
    """Returns the values of a dict with exactly the keys of `types`, in their order.

    Args:
        where: what errors call the value.
        types: the type or types of each value, by key.

    Raises:
        DataError: the value is not a dict, or has other keys or a value of another type.
    """
    if type(value) is not dict:
        raise DataError(
            f"{where}: expected a dict of {', '.join(types)}, found {type(value).__name__}"
        )
    for key in types:
        if key not in value:
            raise DataError(f"{where}: expected {', '.join(types)}, found no key {key!r}")
    for key in value:
        if key not in types:
            raise DataError(f"{where}: expected {', '.join(types)}, found key {key!r}")
    for key, expected in types.items():
        if not isinstance(value[key], expected):
            names = expected if isinstance(expected, tuple) else (expected,)
            raise DataError(
                f"{where}: {key}: expected {' or '.join(t.__name__ for t in names)}, "
                f"found {type(value[key]).__name__}"
            )
    return [value[key] for key in types]


def is_text(text: str) -> bool:
    """Returns whether a string is Unicode text: JSON and Python may spell lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
