"""Files and lines of the figures that a benchmark's command gives."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from morer1_jax.files import check_writable
from morer1_jax.paths import local_path
from morer1_jax.run.lock import hold


@contextlib.contextmanager
def json_file(given: str | None) -> Iterator[Path | None]:
    """Yields the file of `--json`, which no other process writes in the block; None if not given.

    Raises:
        ConfigError, OSError: it cannot be written.
    """
    if given is None:
        yield None
        return
    path = local_path(given, "--json")
    check_writable(path)
    with hold(path):
        yield path


def print_figures(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints a line for each name, with its figures."""
    for name, figures in results.items():
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in figures.items()))
