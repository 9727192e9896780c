"""The stage `control`: SFT that goes on from its best checkpoint for as long as GRPO took.

What GRPO gains over this is not owed to the time it was given.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from morer1_jax.run.checkpoint import Checkpointer
from morer1_jax.run.config import ConfigError
from morer1_jax.run.job import Job
from morer1_jax.run.sft import loop_config, train_sft


def run_control(job: Job, params: Any) -> Checkpointer:
    """Goes on with SFT at its last learning rate, constant; validated and kept like SFT."""
    sft = job.settings.sft
    steps = max(round(_seconds(job.workdir, "grpo") / _step_seconds(job.workdir)), 1)
    rate = float(sft.optimizer.learning_rate(sft.steps)(sft.steps))
    return train_sft(
        job,
        "control",
        encoder=job.encoder,
        targets=job.reasoning,
        params=params,
        optimizer=dataclasses.replace(sft.optimizer, lr=rate, schedule="constant", warmup=0),
        loop=loop_config(sft, steps),
        batch=sft.batch,
        micro_batches=sft.micro_batches,
        eval_facts=sft.eval_facts,
        stream=9,
    )


def _step_times(workdir: Path, stage: str) -> list[float]:
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines]
    # The first step compiles.
    times = [r["step_time"] for r in records if r["stage"] == stage and r["kind"] == "train"][1:]
    if not times:
        raise ConfigError(f"{path}: no step times of stage {stage}; run it before the control")
    return times


def _seconds(workdir: Path, stage: str) -> float:
    return sum(_step_times(workdir, stage))


def _step_seconds(workdir: Path) -> float:
    times = sorted(_step_times(workdir, "sft"))
    return times[len(times) // 2]
