"""Makes progress bars with rates; in a log file they are a line every 30 s."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from morer1_jax.hosts import group

# Seconds between two redrawings of a bar that goes to a file.
_FILE_INTERVAL = 30.0


def progress(
    iterable: Iterable[Any] | None = None,
    *,
    desc: str,
    total: int | None = None,
    initial: int = 0,
    unit: str = "step",
    scale: bool = False,
) -> tqdm:
    """Returns a progress bar on stderr with counts, time left and rate, in the first process only.

    On a terminal it is redrawn in place; in a file it is a line every `_FILE_INTERVAL`.

    Args:
        iterable: the items to count; without it, call `update(n)` and `close()`, or use the bar as
            a context manager.
        desc: the text before the bar.
        total: the number of items; by default the iterable's length.
        initial: number of items done before, when a run is resumed.
        unit: an item's name.
        scale: whether to print large counts with a prefix: 1.20GB.
    """
    terminal = sys.stderr.isatty()
    line = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]\n"
    return tqdm(
        iterable,
        desc=desc,
        total=total,
        initial=initial,
        unit=unit,
        unit_scale=scale,
        disable=not group.is_first(),
        dynamic_ncols=terminal,
        bar_format=None if terminal else line,
        mininterval=0.2 if terminal else _FILE_INTERVAL,
        maxinterval=10.0 if terminal else _FILE_INTERVAL,
    )
