"""Chooses the shapes of a run's batches by `data.shapes`, from its model, mesh and draws."""

from __future__ import annotations

from collections.abc import Sequence

from morer1_jax.data.feed import Draw
from morer1_jax.data.shapes import (
    Cost,
    RowPlan,
    SampleSize,
    Shape,
    plan_prompts,
    plan_rows,
    widest,
)
from morer1_jax.model.config import ModelConfig
from morer1_jax.model.flops import row_flops
from morer1_jax.run.setup import Run


def row_cost(config: ModelConfig) -> Cost:
    """Returns a function from a row's shape to the FLOPs of its forward pass, padding included."""
    return lambda shape: row_flops(config, shape.length, shape.slots)


def sequence_plan(
    run: Run, sizes: Sequence[SampleSize], draw: Draw, steps: int, micro_batches: int
) -> RowPlan:
    """Chooses how the samples of each step become rows.

    The plan is made from all steps, so that every step's samples fit, and rows are no longer than
    the drawn samples need. Another number of steps has another plan.

    Args:
        sizes: of the facts that `draw` indexes.
    """
    policy, data = run.trainee.policy, run.settings.data
    return plan_rows(
        [[sizes[i] for i in draw(step)] for step in range(steps)],
        row_cost(policy.model.config),
        multiple=policy.placed.parts * micro_batches,
        round_to=data.round_to,
        max_counts=data.shapes,
    )


def prompt_shapes(
    run: Run, sizes: Sequence[SampleSize], draw: Draw, steps: int
) -> tuple[Shape, ...]:
    """Chooses shapes of batches of prompts, of which the last has room for any fact.

    Args:
        sizes: of the facts that `draw` indexes.
    """
    data = run.settings.data
    return plan_prompts(
        [[sizes[i] for i in draw(step)] for step in range(steps)],
        widest(sizes),
        row_cost(run.trainee.policy.model.config),
        round_to=data.round_to,
        max_shapes=data.shapes,
    )
