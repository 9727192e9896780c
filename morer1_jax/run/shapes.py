"""Chooses the shapes of a run's batches by `data.shapes`, from its model, mesh and draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from morer1_jax.config.settings import DataSettings, GRPOSettings
from morer1_jax.data.asking import AskPlan, plan_asked
from morer1_jax.data.feed import Draw
from morer1_jax.data.rows import RowPlan, plan_rows
from morer1_jax.data.shapes import Cost, SampleSize, Shape, plan_prompts, round_up
from morer1_jax.model.config import ModelConfig
from morer1_jax.model.flops import row_flops
from morer1_jax.run.placed import Placed
from morer1_jax.task.fact import Fact

# Rows of tokens that may share a row of images. Attention over whole images costs the square of
# the row's patches: with four, this costs more than the padding that is saved.
_SHARING = (1, 2)
# Batches for which another program is worth its compilation.
_BATCHES_A_SHAPE = 8


def row_cost(config: ModelConfig, *, encoded: bool = False) -> Cost:
    """Returns a function from a row's shape to the FLOPs of its forward pass, padding included.

    Args:
        encoded: whether images come as features, without cost.
    """

    def cost(shape: Shape) -> float:
        images = 0.0 if encoded else row_flops(config, 0, shape.slots) / shape.sharing
        return row_flops(config, shape.length, 0) + images

    return cost


def sequence_plan(
    placed: Placed,
    data: DataSettings,
    sizes: Sequence[SampleSize],
    draw: Draw,
    steps: int,
    micro_batches: int,
) -> RowPlan:
    """Chooses how the samples of each step become rows.

    The plan is made from all steps, so that every step's samples fit, and rows are no longer than
    the drawn samples need. Another number of steps has another plan.

    Args:
        sizes: of the facts that `draw` indexes.
    """
    return plan_rows(
        [[sizes[i] for i in draw(step)] for step in range(steps)],
        row_cost(placed.model.config, encoded=data.keep_features),
        multiple=placed.parts * micro_batches,
        round_to=data.round_to,
        max_levels=data.shapes,
        sharing=_SHARING[:1] if data.keep_features else _SHARING,
    )


def prompt_shapes(
    placed: Placed,
    data: DataSettings,
    grpo: GRPOSettings,
    sizes: Sequence[SampleSize],
    draw: Draw,
) -> tuple[Shape, ...]:
    """Chooses shapes of the batches of prompts of all of GRPO's steps.

    Args:
        sizes: of the facts that `draw` indexes.
    """
    micro_batches = placed.micro_batches(grpo.prompts, grpo.micro_batches)
    return plan_prompts(
        [[sizes[i] for i in draw(step)] for step in range(grpo.steps)],
        row_cost(placed.model.config, encoded=data.keep_features),
        round_to=data.round_to,
        max_shapes=data.shapes,
        sharing=_sharing(placed, data, grpo.prompts, micro_batches),
    )


def ask_plan(
    placed: Placed,
    data: DataSettings,
    sizes: Mapping[str, SampleSize],
    sets: Sequence[Sequence[Fact]],
    batch: int,
) -> AskPlan:
    """Chooses shapes for asking each of these sets of facts, `batch` at once.

    Args:
        sizes: by the fact's id, of these and of any other facts that will be asked.
    """
    batch = round_up(batch, placed.parts)
    sizes_of_sets = [[sizes[fact.id] for fact in facts] for facts in sets if facts]
    batches = sum(-(-len(own) // batch) for own in sizes_of_sets)
    shapes = plan_asked(
        sizes_of_sets,
        batch,
        row_cost(placed.model.config, encoded=data.keep_features),
        round_to=data.round_to,
        max_shapes=min(data.shapes, 1 + batches // _BATCHES_A_SHAPE),
        sharing=_sharing(placed, data, batch),
    )
    return AskPlan(sizes, shapes)


def _sharing(
    placed: Placed,
    data: DataSettings,
    rows: int,
    micro_batches: int = 1,
) -> list[int]:
    """Returns how many prompts may share a row of images.

    Those that do are always on one device. Where the tower trains they are in one part, too, of
    what a device scores and trains on one after another.

    Args:
        rows: of a batch.
        micro_batches: most parts that a batch is scored and trained in.
    """
    if data.keep_features:
        return [1]
    on_device = rows // placed.parts
    most = micro_batches if placed.tower_trains else 1
    at_once = [on_device // parts for parts in range(1, most + 1) if on_device % parts == 0]
    return [count for count in _SHARING if all(part % count == 0 for part in at_once)]
