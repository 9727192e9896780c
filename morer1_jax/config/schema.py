"""Builds configs from and into dataclasses: a branch is a dataclass, a key one of its fields.

A key that a config leaves out has its field's default.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference

from morer1_jax.bounds import is_derived, words
from morer1_jax.cli import suggest
from morer1_jax.errors import ConfigError, FieldError

T = TypeVar("T")

_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def build(kind: type[T], config: ConfigDict | Mapping[str, Any], *, whole: bool = False) -> T:
    """Checks a config against the dataclass `kind`, and builds it.

    Args:
        whole: whether every key must be there, as in the file that a workdir keeps.

    Raises:
        ConfigError: an unknown key, a value of another type or out of its bounds, or a key that is
            missing from a whole config; the message names the dotted key.
    """
    tree, keys = config.to_dict() if isinstance(config, ConfigDict) else config, list(_keys(kind))
    built = _build(kind(), tree, "", keys)
    if whole and (missing := [key for key in keys if not _has(tree, key)]):
        raise ConfigError(f"config.{missing[0]}: the key is missing")
    return built


def to_config(instance: Any) -> ConfigDict:
    """Returns a dataclass's fields as a config, every key of which can be set."""
    config = ConfigDict()
    for field, hint in _fields(type(instance)):
        value = getattr(instance, field.name)
        if dataclasses.is_dataclass(value):
            value = to_config(value)
        elif _optional(hint)[1]:
            value = FieldReference(value, field_type=_optional(hint)[0])
        config[field.name] = value
    return config


def to_tree(instance: Any) -> dict[str, Any]:
    """Returns a dataclass's fields as nested dicts of JSON values."""
    tree = {}
    for field, _ in _fields(type(instance)):
        value = getattr(instance, field.name)
        is_branch = dataclasses.is_dataclass(value)
        tree[field.name] = to_tree(value) if is_branch else json.loads(json.dumps(value))
    return tree


def _fields(kind: type) -> Iterator[tuple[dataclasses.Field, Any]]:
    """Yields the fields that are keys, with their types."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if not is_derived(field):
            yield field, hints[field.name]


def _keys(kind: type, prefix: str = "") -> Iterator[str]:
    for field, hint in _fields(kind):
        if dataclasses.is_dataclass(hint):
            yield from _keys(hint, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


def _has(tree: Mapping[str, Any], key: str) -> bool:
    for name in key.split("."):
        if name not in tree:
            return False
        tree = tree[name]
    return True


def _build(base: T, node: Any, prefix: str, known: list[str]) -> T:
    """Returns a branch with a config's values in place of `base`'s.

    Args:
        known: all keys of the config, for suggestions.
    """
    if not isinstance(node, Mapping):
        raise ConfigError(f"config.{prefix[:-1]}: expected a branch of keys, found {_show(node)}")
    fields = {field.name: (field, hint) for field, hint in _fields(type(base))}
    for name in node:
        if name not in fields:
            key = f"{prefix}{name}"
            raise ConfigError(f"config.{key}: unknown key{suggest(key, known)}")
    values = {}
    for name, value in node.items():
        field, hint = fields[name]
        if dataclasses.is_dataclass(hint):
            values[name] = _build(getattr(base, name), value, f"{prefix}{name}.", known)
        else:
            values[name] = _checked(f"{prefix}{name}", value, field, hint)
    try:
        return dataclasses.replace(base, **values)
    except FieldError as error:
        # A class knows its fields' names, but not where in the config it is.
        raise ConfigError(f"config.{prefix}{error.field}: {error.problem}") from None


def _checked(key: str, value: Any, field: dataclasses.Field, hint: Any) -> Any:
    """Returns a key's value, a list as a tuple, if it is of the field's type."""
    hint, is_optional = _optional(hint)
    if value is None and is_optional:
        return None
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        fits, expected = value in choices, f"one of {', '.join(choices)}"
    elif typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        fits = isinstance(value, list | tuple) and all(type(element) is item for element in value)
        expected = {int: "a list of whole numbers", str: "a list of texts"}[item]
        value = tuple(value) if fits else value
    else:
        kinds = (int, float) if hint is float else (hint,)
        fits = isinstance(value, kinds) and isinstance(value, bool) == (hint is bool)
        expected = " ".join(filter(None, (_NAMES[hint], words(field))))
    if not fits:
        none = " or none" if is_optional else ""
        raise ConfigError(f"config.{key}: expected {expected}{none}, found {_show(value)}")
    return value


def _optional(hint: Any) -> tuple[Any, bool]:
    """Returns a type without its None, and whether it had one."""
    if not isinstance(hint, types.UnionType):
        return hint, False
    (kind,) = (arg for arg in hint.__args__ if arg is not type(None))
    return kind, True


def _show(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        return repr(value)
