"""The stage `control`: SFT that goes on from its best checkpoint for as long as GRPO took, or for
as many steps as the config says.

What GRPO gains over this is not owed to the time it was given. Rating the facts is part of the
method's price, so its time counts as GRPO's.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from morer1_jax.errors import ConfigError
from morer1_jax.files import read_jsonl
from morer1_jax.model.layers import Params
from morer1_jax.run.checkpoint import Checkpointer
from morer1_jax.run.job import Job
from morer1_jax.stages.sft import loop_config, train_sft


def run_control(job: Job, params: Callable[[], Params], rating_seconds: float) -> Checkpointer:
    """Goes on with SFT at its last learning rate, constant; validated and kept like SFT.

    Args:
      params: makes those that SFT ended with.
      rating_seconds: how long rating the training facts took.
    """
    sft = job.settings.sft
    steps = job.settings.control.steps or _affordable_steps(job, rating_seconds)
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


def _affordable_steps(job: Job, rating_seconds: float) -> int:
    """Steps of SFT in the time that rating and GRPO took."""
    # Medians leave out the steps that compiled, of which a resumed run has several.
    grpo_seconds = job.settings.grpo.steps * statistics.median(_step_times(job.workdir, "grpo"))
    sft_step_seconds = statistics.median(_step_times(job.workdir, "sft"))
    return max(round((rating_seconds + grpo_seconds) / sft_step_seconds), 1)


def _step_times(workdir: Path, stage: str) -> list[float]:
    """Seconds of the stage's logged steps."""
    path = workdir / "metrics.jsonl"

    def parse(_: int, record: Mapping[str, Any]) -> float | None:
        of_stage = record["stage"] == stage and record["kind"] == "train"
        return record["step_time"] if of_stage else None

    remedy = "delete the line or use a new --workdir"
    times = read_jsonl(path, parse, "a step's metrics", remedy) if path.exists() else []
    if not any(times):
        raise ConfigError(f"{path}: no step times of stage {stage}; run it before the control")
    return [time for time in times if time is not None]
