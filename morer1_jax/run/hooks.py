"""What one kind of training does: the functions that the train loop calls."""

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
    """Scores by name, and the name of the one by which the best checkpoint is chosen."""

    scores: dict[str, float]
    decisive: str


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What one kind of training does.

    Attributes:
      batch: makes the arrays of a step, on the host; a pure function of the step, which worker
        processes are sent a copy of.
      begin: makes the state that training starts from; not called if there is a checkpoint, so
        that no state is held beside the one restored.
      like: the state's shapes, dtypes and shardings.
      step: `(state, batch, step) -> (state, metrics)`, metrics possibly still being computed;
        those that are arrays with axes are for `work` and are not logged.
      validate: `params -> Validation`, of the parameters that train.
      work: `(batch, metrics) -> Work`, asked of each step once the next one has begun; its
        `NotFiniteError` gets the step's name.
      timer: that `step` tells what it starts.
      resume: told the step training is taken up at, before anything is written.
      shown: metrics to show beside the progress bar.
      updates: of a step, each of which may be skipped.
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
