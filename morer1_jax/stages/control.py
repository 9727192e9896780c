"""The stage `control`: SFT goes on from its best checkpoint for as long as GRPO took.

Or for as many steps as the config sets. GRPO's gain over this control is not due to its longer
training. The time of rating the facts counts as GRPO's.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from morer1_jax.config.settings import SFTSettings
from morer1_jax.errors import ConfigError
from morer1_jax.files import read_jsonl
from morer1_jax.hosts import group
from morer1_jax.run.setup import Run
from morer1_jax.stages.ahead import Program
from morer1_jax.stages.marker import read_results
from morer1_jax.stages.sft import programs_ahead, train_sft

# Separates its shuffles from those of SFT.
_STREAM = 9


def run_control(run: Run) -> None:
    """Goes on with SFT at its last learning rate, constant; validates and saves as SFT does."""
    train_sft(
        run,
        "control",
        _settings(run),
        targets=run.dataset.reasoning,
        params=lambda: run.trainee.best_params(run.store.checkpoints("sft")),
        stream=_STREAM,
    )


def control_programs(run: Run) -> Iterator[Program]:
    """Yields the stage's programs, and prepares the run for it."""
    targets = run.dataset.reasoning
    yield from programs_ahead(run, "control", _settings(run), targets, stream=_STREAM)


def _settings(run: Run) -> SFTSettings:
    sft = run.settings.sft
    rate = float(sft.optimizer.learning_rate(sft.steps)(sft.steps))
    optimizer = dataclasses.replace(sft.optimizer, lr=rate, schedule="constant", warmup=0)
    # By the first process's clock: all must take the same steps.
    steps = run.settings.control.steps or group.of_first("steps", lambda: _affordable_steps(run))
    return dataclasses.replace(sft, steps=steps, optimizer=optimizer)


def _affordable_steps(run: Run) -> int:
    """Returns the number of steps of SFT that fit the time that rating and GRPO took."""
    rating_seconds = read_results(run.workdir / "rate")["seconds"]
    # Medians, since steps that compile take longer, and a resumed run has several of them.
    grpo_step_seconds = statistics.median(_step_seconds(run.workdir, "grpo"))
    sft_step_seconds = statistics.median(_step_seconds(run.workdir, "sft"))
    seconds = rating_seconds + run.settings.grpo.steps * grpo_step_seconds
    return max(round(seconds / sft_step_seconds), 1)


def _step_seconds(workdir: Path, stage: str) -> list[float]:
    """Returns the seconds of each of the stage's logged steps."""
    path = workdir / "metrics.jsonl"

    def parse(_: int, record: Mapping[str, Any]) -> float | None:
        of_stage = record["stage"] == stage and record["kind"] == "train"
        return record["step_time"] if of_stage else None

    remedy = "delete the line or use a new --workdir"
    times = read_jsonl(path, parse, "a step's metrics", remedy) if path.exists() else []
    if not any(times):
        raise ConfigError(
            f"{path}: expected step times of stage {stage}, found none; run it before the control"
        )
    return [seconds for seconds in times if seconds is not None]
