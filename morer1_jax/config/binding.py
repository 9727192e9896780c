"""Binds a workdir to its config, and says which keys may still change when a run goes on."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from morer1_jax.errors import ConfigError
from morer1_jax.files import read_json, write_json

# Keys that may differ when a run is resumed: beyond rounding no step depends on them, so that a run
# out of memory can be corrected. How often and on how many facts is validated decides which of its
# steps is the best.
# Dotted prefixes (see `matches`).  Every other key is part of the run's identity, from when it has
# shaped something (see `stages.workdir`).
OPERATIONAL = (
    "mesh",
    "stages",
    "compile",
    "profile",
    "model.path",  # what is in it is compared, not where it is
    "runtime.attention",
    "runtime.remat",
    "runtime.scan_unroll",
    "runtime.decode_unroll",
    "score.chunk",
    "sampling",
    "data.round_to",  # of padding
    "data.shapes",
    "data.prompt_length",  # what fits is checked; rows are as long as the data needs
    "data.windows",
    "data.keep_features",
    "rate.batch",
    "evaluate.batch",
    "*.micro_batches",
    "grpo.rollout_parts",
    "*.eval_facts",
    "*.workers",
    "*.worker_kind",
    "*.save_every",
    "*.log_every",
    "*.eval_every",
    "*.rollouts_every",
    "*.keep_checkpoints",
)
# Keys that older versions had not, with the value that says what these did, so that their workdirs
# go on.
ADDED = {"runtime.gradient_sums": "float32", "*.optimizer.moments": "float32"}
FILE = "config.json"
_ABSENT = object()
Tree = ConfigDict | Mapping[str, Any]


def read_config(path: str | os.PathLike[str], *arguments: Any) -> ConfigDict:
    """Returns the config of another config file: what its `get_config(*arguments)` returns."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*arguments)


def flatten(config: Tree) -> dict[str, Any]:
    """Returns dotted key to value, sorted, tuples as lists: exactly what a JSON file gives back.

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
                f"config.{prefix}: expected a value that JSON can hold (a finite number, text, "
                f"true or false, none, a list or a dict of these), found {node!r}"
            ) from None

    tree = config.to_dict() if isinstance(config, ConfigDict) else config
    return dict(sorted(walk("", tree)))


def matches(key: str, patterns: Sequence[str]) -> bool:
    """Returns whether a dotted key is one of `patterns` or below one; `*` is any one component."""
    parts = key.split(".")
    for pattern in patterns:
        components = pattern.split(".")
        if len(parts) >= len(components) and all(
            component in ("*", part) for component, part in zip(components, parts, strict=False)
        ):
            return True
    return False


def identity(
    config: Tree, prefixes: Sequence[str] = ("*",), operational: Sequence[str] = OPERATIONAL
) -> dict[str, Any]:
    """Returns the flat keys at or below `prefixes` on which the run's numbers depend."""
    return {
        key: value
        for key, value in flatten(config).items()
        if matches(key, prefixes) and not matches(key, operational)
    }


def bind(
    config: Tree,
    workdir: str | os.PathLike[str],
    operational: Sequence[str] = OPERATIONAL,
    write: bool = True,
    bound: Callable[[str], str | None] | None = None,
) -> None:
    """Binds `workdir` to `config`: kept in `config.json` at first use, compared afterwards.

    Operational keys may differ and are updated in the file; so do keys that bind nothing yet. A
    difference in any other key is an error that leaves the workdir as it was.

    Args:
        config: the whole, with every key.
        write: whether this process keeps the file; in a run of several, only the first does.
        bound: says why a key may not change, or None if it may; by default all are bound.

    Raises:
        ConfigError: keys of the run's identity differ, or the workdir's file cannot be read.
    """
    path, current = Path(workdir) / FILE, flatten(config)
    kept = None
    if path.exists():
        kept = flatten(read_json(path, "use a new --workdir", error=ConfigError))
        kept_identity, current_identity = (
            {key: value for key, value in flat.items() if not matches(key, operational)}
            for flat in (kept, current)
        )
        if changed := differences(kept_identity, current_identity, bound):
            raise ConfigError(
                f"{path}: expected the config of this run, found another run's: "
                f"{'; '.join(changed)}; use a new --workdir, or set these keys back"
            )
    if write and kept != current:
        write_json(path, config.to_dict() if isinstance(config, ConfigDict) else config)


def differences(
    kept: Mapping[str, Any],
    current: Mapping[str, Any],
    bound: Callable[[str], str | None] | None = None,
) -> list[str]:
    """Returns each key whose values differ, with both of them, and why it is bound; see `bind`."""
    changed = []
    for key in sorted(kept.keys() | current.keys()):
        before, now = kept.get(key, _before(key)), current.get(key, _ABSENT)
        # In Python, True == 1; to whoever reads a config they are not the same.
        if before == now and isinstance(before, bool) == isinstance(now, bool):
            continue
        why = "" if bound is None else bound(key)
        if why is not None:
            reason = f" ({why})" if why else ""
            changed.append(f"{key}: expected {_show(now)}, found {_show(before)}{reason}")
    return changed


def _before(key: str) -> Any:
    """Returns what a key's absence from a kept config means."""
    return next((value for added, value in ADDED.items() if matches(key, [added])), _ABSENT)


def _show(value: Any) -> str:
    return "absent" if value is _ABSENT else json.dumps(value, ensure_ascii=False)
