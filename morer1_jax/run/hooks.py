"""The functions by which a kind of training (SFT, GRPO) differs, for the train loop to call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from morer1_jax.learn.state import TrainState
from morer1_jax.model.layers import Params
from morer1_jax.run.phases import PhaseTimer
from morer1_jax.run.throughput import Work

Metrics = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Validation:
    """Scores by name; the best checkpoint is the one with the highest score `decisive`."""

    scores: dict[str, float]
    decisive: str


@dataclasses.dataclass(frozen=True)
class Hooks:
    """The functions and facts by which a kind of training differs.

    Attributes:
        batch: makes the arrays of a step, on the host; a pure function of the step's index, which
            is copied to worker processes.
        begin: makes the state that training starts from; not called if there is a checkpoint, so
            that no state is in memory beside the one restored.
        like: the state's shapes, dtypes and shardings.
        step: `(state, batch, step) -> (state, metrics)`, metrics possibly still being computed;
            those that are arrays with axes are for `work` and are not logged.
        validate: `params -> Validation`, of the parameters that train.
        work: `(batch, metrics) -> Work`, called for each step once the next one has begun; the loop
            adds the step's number to its `NotFiniteError`.
        timer: notes the programs that `step` starts.
        resume: called with the checkpoint's step (None at the start) before anything is written.
        shown: names of metrics to show beside the progress bar.
        updates: number of updates in a step, each of which may be skipped.
        dtype: that a step computes in.
    """

    batch: Callable[[int], Any]
    begin: Callable[[], TrainState]
    like: TrainState
    step: Callable[[TrainState, Any, int], tuple[TrainState, Metrics]]
    validate: Callable[[Params], Validation]
    work: Callable[[Any, Metrics], Work]
    timer: PhaseTimer
    resume: Callable[[int | None], None] = lambda step: None
    shown: tuple[str, ...] = ("loss",)
    updates: int = 1
    dtype: str = "float32"
