"""A run's configuration: what it may hold, and what may change when the run goes on."""

import importlib.util
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from morer1_jax.cli import suggest
from morer1_jax.errors import ConfigError
from morer1_jax.files import read_json, write_json

# Keys that may differ when a run is resumed: beyond rounding no step depends on them, so that a run
# out of memory can be corrected. How often and on how many facts is validated decides which of its
# steps is the best.
# Dotted prefixes (see `matches`).  Every other key is part of the run's identity, from when it has
# shaped something (see `binding`).
OPERATIONAL = (
    "mesh",
    "stages",
    "profile",
    "model.path",  # what is in it is compared, not where it is
    "runtime.attention",
    "runtime.remat",
    "runtime.scan_unroll",
    "runtime.decode_unroll",
    "score.chunk",
    "data.round_to",  # of padding
    "data.shapes",
    "data.prompt_length",  # what fits is checked; rows are as long as the data needs
    "data.windows",
    "data.keep_features",
    "rate.batch",
    "evaluate.batch",
    "*.micro_batches",
    "*.eval_facts",
    "*.workers",
    "*.worker_kind",
    "*.save_every",
    "*.log_every",
    "*.eval_every",
    "*.rollouts_every",
    "*.keep_checkpoints",
)
FILE = "config.json"
_ABSENT = object()


@dataclass(frozen=True)
class Rule:
    """What a key may hold.

    Attributes:
      kind: `int`, `float` (takes whole numbers too), `bool`, `str`, `tuple` (or list) or `dict`
        (the key's whole subtree, unchecked).
      low, high: bounds of a number, inclusive.
      choices: the values allowed, if not any.
      optional: whether None is allowed.
    """

    kind: type
    low: float | None = None
    high: float | None = None
    choices: tuple[Any, ...] | None = None
    optional: bool = False


def flatten(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key to value, sorted, tuples as lists: exactly what a JSON file gives back.

    Raises:
      ConfigError: a value that JSON cannot hold.
    """

    def walk(prefix: str, node: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(node, Mapping) and (node or not prefix):
            for key, value in node.items():
                yield from walk(f"{prefix}.{key}" if prefix else str(key), value)
            return
        try:
            yield prefix, json.loads(json.dumps(node, allow_nan=False))
        except (TypeError, ValueError):
            raise ConfigError(
                f"config.{prefix}: {node!r} found, a value that JSON can hold expected "
                "(a finite number, text, true or false, none, a list or a dict of these)"
            ) from None

    return dict(sorted(walk("", _tree(config))))


def matches(key: str, patterns: Sequence[str]) -> bool:
    """Whether a dotted key is one of `patterns` or below one; `*` stands for one component."""
    parts = key.split(".")
    for pattern in patterns:
        wanted = pattern.split(".")
        if len(parts) >= len(wanted) and all(
            want in ("*", part) for want, part in zip(wanted, parts, strict=False)
        ):
            return True
    return False


def identity(
    config: ConfigDict | Mapping[str, Any],
    prefixes: Sequence[str] = ("*",),
    operational: Sequence[str] = OPERATIONAL,
) -> dict[str, Any]:
    """The flat keys at or below `prefixes` on which the run's numbers depend."""
    return {
        key: value
        for key, value in flatten(config).items()
        if matches(key, prefixes) and not matches(key, operational)
    }


def load(
    config: ConfigDict | Mapping[str, Any],
    workdir: str | os.PathLike[str],
    operational: Sequence[str] = OPERATIONAL,
    write: bool = True,
    bound: Callable[[str], str | None] | None = None,
) -> None:
    """Binds `workdir` to `config`: kept in `config.json` at first use, compared afterwards.

    Operational keys may differ and are updated in the file; so do keys that bind nothing yet. A
    difference in any other key is an error that leaves the workdir as it was.

    Args:
      write: whether this process keeps the file; in a run of several, only the first does.
      bound: says why a key may not change, or None if it may; by default all are bound.

    Raises:
      ConfigError: keys of the run's identity differ, or the workdir's file cannot be read.
    """
    path = Path(workdir) / FILE
    now = flatten(config)
    before = _read(path) if path.exists() else None
    if before is not None:
        there, here = (
            {key: value for key, value in flat.items() if not matches(key, operational)}
            for flat in (before, now)
        )
        if changed := differences(there, here, bound):
            raise ConfigError(
                f"{path} belongs to another run: {'; '.join(changed)}; "
                "use a new --workdir, or set these keys back"
            )
    if write and before != now:
        write_json(path, _tree(config))


def differences(
    there: Mapping[str, Any],
    here: Mapping[str, Any],
    bound: Callable[[str], str | None] | None = None,
) -> list[str]:
    """Each key whose values differ, with both of them, and why it is bound; see `load`."""
    changed = []
    for key in sorted(there.keys() | here.keys()):
        before, now = there.get(key, _ABSENT), here.get(key, _ABSENT)
        if _same(before, now):
            continue
        why = "" if bound is None else bound(key)
        if why is not None:
            why = f" ({why})" if why else ""
            changed.append(f"{key}: {_show(before)} there, {_show(now)} here{why}")
    return changed


def check_config(config: ConfigDict | Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    """Checks every key of a config, before anything is done.

    Args:
      rules: dotted key to what it may hold.  A key without a rule is an error, and so is a rule
        without its key: a config says everything and nothing more.

    Raises:
      ConfigError: names the dotted key, what was found and what is expected.
    """
    values = flatten(config)
    groups = [key for key, rule in rules.items() if rule.kind is dict]
    for key in values:
        if key not in rules and not matches(key, groups):
            raise ConfigError(f"config.{key}: unknown key{suggest(key, rules)}")
    for key, rule in rules.items():
        if rule.kind is dict:
            if not any(matches(name, [key]) for name in values):
                raise ConfigError(f"config.{key}: the key is missing")
        elif key not in values:
            raise ConfigError(f"config.{key}: the key is missing")
        else:
            _check(key, values[key], rule)


def _check(key: str, value: Any, rule: Rule) -> None:
    if value is None and rule.optional:
        return
    kinds = {float: (int, float), tuple: (list,)}.get(rule.kind, (rule.kind,))
    fits = isinstance(value, kinds) and isinstance(value, bool) == (rule.kind is bool)
    if fits and rule.kind in (int, float):
        low = -math.inf if rule.low is None else rule.low
        high = math.inf if rule.high is None else rule.high
        fits = low <= value <= high
    if fits and rule.choices is not None:
        fits = value in rule.choices
    if fits:
        return
    if rule.choices is not None:
        expected = "one of " + ", ".join(map(str, rule.choices))
    else:
        expected = {int: "a whole number", float: "a number", str: "text", tuple: "a list"}.get(
            rule.kind, "true or false"
        )
        if rule.low is not None:
            expected += f", at least {rule.low:g}"
        if rule.high is not None:
            expected += f", at most {rule.high:g}"
    none = " or none" if rule.optional else ""
    raise ConfigError(f"config.{key}: {_show(value)} found, {expected}{none} expected")


def _read(path: Path) -> dict[str, Any]:
    return flatten(read_json(path, "use a new --workdir", error=ConfigError))


def _tree(config: ConfigDict | Mapping[str, Any]) -> Mapping[str, Any]:
    return config.to_dict() if isinstance(config, ConfigDict) else config


def _same(left: Any, right: Any) -> bool:
    # In Python, True == 1; to whoever reads a config they are not the same.
    return left == right and isinstance(left, bool) == isinstance(right, bool)


def _show(value: Any) -> str:
    return "absent" if value is _ABSENT else json.dumps(value, ensure_ascii=False)


def read_config(path: str | os.PathLike[str]) -> ConfigDict:
    """The config of another config file: what its `get_config()` returns."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()
