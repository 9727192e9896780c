"""One run of the benchmark: what it needs, what it keeps as it goes, and what failed."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.compare import Comparison, Measured, Results
from bench.growth import Growth, draw
from bench.model import made_now
from bench.task import process_peak
from bench.turns import SideError, Timing
from morer1_jax.cli import needs_extra
from morer1_jax.errors import ConfigError
from morer1_jax.files import atomic_write
from morer1_jax.progress import progress

Forms = Callable[[str], Sequence[str]]
"""Of a peer's task, the forms it is run in."""


def check_needs(chosen: Sequence[Comparison], forms: Forms) -> None:
    """Finds out whether all sides can run here, before the first is timed.

    Raises:
      ConfigError: a package or a compiler is missing; says which, and what can be left out.
      OSError: the system does not tell how much memory a process has held.
    """
    with needs_extra("bench"):
        from bench.peers_model import DEVICE
    without = [c.task for c in chosen if not _has(c, forms, peer="TRL")]
    if len(without) < len(chosen):
        leave = f"leave TRL out: --tasks={','.join(without)}" if without else ""
        with needs_extra("bench", leave):
            import bench.peers_trl  # noqa: F401
    if DEVICE.type != "cpu":
        return
    process_peak()
    compiler = os.environ.get("CXX", "g++")
    if any(_has(c, forms, form="compiled") for c in chosen) and shutil.which(compiler) is None:
        raise ConfigError(
            f"{compiler}: no such program, a C++ compiler expected for PyTorch's form 'compiled'; "
            "install one, name yours in CXX, or give --forms without it"
        )


def _has(one: Comparison, forms: Forms, peer: str | None = None, form: str | None = None) -> bool:
    """Whether a side is the peer's and in the form."""
    return any(
        found for name, task in one.peers.items() if peer in (None, name)
        for found in forms(task) if form in (None, found)
    )  # fmt: skip


def sit(
    results: Results,
    chosen: Sequence[Comparison],
    measure: Callable[[Comparison], dict[str, Timing]],
    run: dict[str, Any],
    out: Path | None = None,
) -> Iterator[Measured]:
    """Measures one comparison after another; each is in `results`, and in `out`, once it is over.

    What an equal run that did not come to its end has measured is not measured again.

    Args:
      run: what it measures, JSON-ready.
      out: the folder of `bench.json`, `bench.md` and `bench.png`.

    Raises:
      ConfigError: at the end, that some failed, and which.
    """
    made = made_now()
    run = {**run, "versions": made.partition(", ")[2]}
    done = results.begin(run)
    failed = []
    for comparison in progress(chosen, desc="compare", unit="task"):
        task = comparison.task
        if task in done:
            continue
        try:
            timings = measure(comparison)
        except SideError as error:
            failed.append(task)
            print(f"{task} failed: {error}", file=sys.stderr, flush=True)
            continue
        results.tasks[task] = Measured(comparison.name, made, timings)
        done.append(task)
        _keep(results, out)
        yield results.tasks[task]
    if failed:
        raise ConfigError(
            f"{len(failed)} of {len(chosen)} tasks failed, as said above: {', '.join(failed)}; put "
            "that right and start again"
            + ("" if out is None else f", what {out} has of the others is not measured again")
        )
    results.unfinished = None
    _keep(results, out)


def _keep(results: Results, out: Path | None) -> None:
    if out is None:
        return
    results.save(out / "bench.json")
    tables = [one.table() for _, one in results.in_order()]
    atomic_write(out / "bench.md", "\n".join([*tables, Growth.of(results).tables()]))
    draw(results, out / "bench.png")
