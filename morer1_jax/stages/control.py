"""The stage `control`: SFT that goes on from its best checkpoint for as long as GRPO took, or for
as many steps as the config says.

What GRPO gains over this is not owed to the time it was given. Rating the facts is part of the
method's price, so its time counts as GRPO's.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path

from morer1_jax.errors import ConfigError
from morer1_jax.files import read_text
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
    lines = read_text(path).splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines]
    times = [r["step_time"] for r in records if r["stage"] == stage and r["kind"] == "train"]
    if not times:
        raise ConfigError(f"{path}: no step times of stage {stage}; run it before the control")
    return times
