"""Writes and reads the file that marks a stage's output as whole.

A stage writes all its output first and its marker last, so that a stage that was killed is run
again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from morer1_jax.errors import ConfigError
from morer1_jax.files import read_json, write_json

MARKER = "DONE.json"


def write_marker(folder: Path, config: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """Marks a stage's output as whole; called last of all.

    Args:
        folder: the stage's folder in a workdir.
        config: values of the keys that the output depends on, by dotted key.
        results: JSON values for later stages.
    """
    marker = {"stage": folder.name, "config": dict(config), "results": dict(results)}
    write_json(folder / MARKER, marker)


def read_marker(folder: Path) -> dict[str, Any] | None:
    """Returns `stage`, `config` and `results` of a stage's marker; None if there is none.

    Raises:
        ConfigError: the file is not a marker, or another version's.
    """
    path, expected = folder / MARKER, "a stage's marker"
    if not path.exists():
        return None
    remedy = f"use a new --workdir, or delete it to run stage {folder.name} again"
    marker = read_json(path, remedy, expected=expected, error=ConfigError)
    if not all(isinstance(marker.get(key), dict) for key in ("config", "results")):
        # Markers of an earlier version had a digest in place of the config's keys.
        raise ConfigError(
            f"{path}: expected {expected}, found another version's; use a new --workdir"
        )
    return marker


def read_results(folder: Path) -> dict[str, Any]:
    """Returns the results that a stage left for later ones.

    Raises:
        ConfigError: the stage is not done.
    """
    marker = read_marker(folder)
    if marker is None:
        raise ConfigError(
            f"{folder}: expected a stage that is done, found no {MARKER}; run stage {folder.name} "
            "first"
        )
    return marker["results"]
