"""Runs the benchmark task by task: checks what it needs, keeps each result, reports failures."""

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
"""Maps a task of PyTorch to the forms it is run in."""


def check_needs(comparisons: Sequence[Comparison], forms: Forms) -> None:
    """Checks that all sides can run here, before the first is timed.

    Raises:
        ConfigError: a package or a compiler is missing; names it, and what can be left out.
        OSError: the system does not say how much memory a process has held.
    """
    with needs_extra("bench"):
        from bench.peers_model import DEVICE
    without_trl = [c.task for c in comparisons if not _has(c, forms, peer="TRL")]
    if len(without_trl) < len(comparisons):
        advice = f"leave TRL out: --tasks={','.join(without_trl)}" if without_trl else ""
        with needs_extra("bench", advice):
            import bench.peers_trl  # noqa: F401
    if DEVICE.type != "cpu":
        return
    process_peak()
    compiler = os.environ.get("CXX", "g++")
    compiles = any(_has(c, forms, form="compiled") for c in comparisons)
    if compiles and shutil.which(compiler) is None:
        raise ConfigError(
            f"{compiler}: expected a C++ compiler for PyTorch's form 'compiled', found no such "
            "program; install one, name yours in CXX, or give --forms without 'compiled'"
        )


def _has(
    comparison: Comparison, forms: Forms, peer: str | None = None, form: str | None = None
) -> bool:
    """Returns whether a side is of this program and form; None stands for any."""
    return any(
        peer in (None, name) and form in (None, form_of_task)
        for name, task in comparison.peers.items()
        for form_of_task in forms(task)
    )


def measure_all(
    results: Results,
    comparisons: Sequence[Comparison],
    measure: Callable[[Comparison], dict[str, Timing]],
    run: dict[str, Any],
    out: Path | None = None,
) -> Iterator[Measured]:
    """Measures one comparison after another, and yields the outcome of each.

    Each outcome is in `results`, and in `out`, before it is yielded. What an equal, interrupted run
    has measured is not measured again.

    Args:
        results: of earlier runs; outcomes are added.
        run: what is measured, JSON-ready; tells an equal run from another.
        out: the folder of `bench.json`, `bench.md` and `bench.png`; None: no files.

    Raises:
        ConfigError: at the end, if tasks failed; names them.
    """
    # The tasks that an equal run has done.
    made = made_now()
    run = {**run, "versions": made.partition(", ")[2]}
    done = results.begin(run)
    # The others; one that fails does not end them.
    failed = []
    for comparison in progress(comparisons, desc="compare", unit="task"):
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
            f"{len(failed)} of {len(comparisons)} tasks failed, as said above: "
            f"{', '.join(failed)}; put that right and start again"
            + ("" if out is None else f", what {out} has of the others is not measured again")
        )
    results.unfinished = None
    _keep(results, out)


def _keep(results: Results, out: Path | None) -> None:
    if out is None:
        return
    results.save(out / "bench.json")
    tables = [outcome.table() for _, outcome in results.in_order()]
    atomic_write(out / "bench.md", "\n".join([*tables, Growth.of(results).tables()]))
    draw(results, out / "bench.png")
