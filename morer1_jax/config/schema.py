"""Configs against dataclasses: each branch is a dataclass, each key one of its fields."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from ml_collections import ConfigDict

from morer1_jax.config.binding import Rule, check_config
from morer1_jax.errors import ConfigError

T = TypeVar("T")

# Whole numbers that may be 0; every other one is at least 1.
_MAY_BE_ZERO = ("seed", "warmup", "effort_from", "rank")


def build(kind: type[T], config: ConfigDict | Mapping[str, Any]) -> T:
    """Checks a config against the dataclass `kind`, and builds it.

    Raises:
      ConfigError: an unknown or missing key, a value of another type or out of its range; the
        message names the dotted key.
    """
    check_config(config, dict(_rules(kind, "")))
    return _build(kind, config, "")


def _fields(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _rules(kind: type, prefix: str) -> typing.Iterator[tuple[str, Rule]]:
    for name, hint in _fields(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from _rules(hint, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _rule(name, hint)


def _rule(name: str, hint: Any) -> Rule:
    optional = False
    if isinstance(hint, types.UnionType):
        optional = type(None) in hint.__args__
        (hint,) = (arg for arg in hint.__args__ if arg is not type(None))
    if typing.get_origin(hint) is Literal:
        return Rule(str, choices=typing.get_args(hint), optional=optional)
    if typing.get_origin(hint) is tuple:
        return Rule(tuple, optional=optional)
    low = None
    if hint is int and name not in ("data", "fsdp", "tensor"):
        low = 0 if name in _MAY_BE_ZERO else 1
    elif hint is float:
        low = 0
    return Rule(hint, low=low, optional=optional)


def _build(kind: type, node: Any, prefix: str) -> Any:
    values = {}
    for name, hint in _fields(kind).items():
        value = node[name]
        if dataclasses.is_dataclass(hint):
            value = _build(hint, value, f"{prefix}{name}.")
        elif typing.get_origin(hint) is tuple:
            value = _items(f"{prefix}{name}", value, typing.get_args(hint)[0])
        values[name] = value
    try:
        return kind(**values)
    except ValueError as error:
        # The classes know their fields' names but not where in the config they are.
        field, _, rest = str(error).partition(": ")
        if (key := field.rpartition(".")[2]) in values:
            raise ConfigError(f"config.{prefix}{key}: {rest}") from None
        raise ConfigError(f"{f'config.{prefix}'.rstrip('.')}: {error}") from None


def _items(key: str, value: list[Any] | tuple[Any, ...], kind: type) -> tuple[Any, ...]:
    if not all(type(item) is kind for item in value):
        wanted = {int: "whole numbers", str: "texts"}[kind]
        raise ConfigError(f"config.{key}: {list(value)} found, a list of {wanted} expected")
    return tuple(value)
