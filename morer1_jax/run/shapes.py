"""The shapes of a run's batches: `data.shapes` with the run's model, mesh and draws."""

from __future__ import annotations

from collections.abc import Sequence

from morer1_jax.data.encoder import Encoder
from morer1_jax.data.feed import Draw
from morer1_jax.data.shapes import Cost, Need, RowPlan, Shape, plan_prompts, plan_rows, widest
from morer1_jax.model.config import ModelConfig
from morer1_jax.model.flops import attention_flops, linear_flops, patch_flops
from morer1_jax.run import mesh as meshes
from morer1_jax.run.job import Job


def row_cost(config: ModelConfig) -> Cost:
    """FLOPs of a forward pass over one row, padding included."""
    linear, pairs = linear_flops(config.text), attention_flops(config.text)
    window = config.vision.window_patches * patch_flops(config.vision)
    full = 4 * config.vision.hidden_size * len(config.vision.fullatt_block_indexes)

    def cost(shape: Shape) -> float:
        patches = shape.windows * config.vision.window_patches
        text = shape.length * linear + shape.length**2 / 2 * pairs
        return text + shape.windows * window + full * patches**2

    return cost


def sequence_plan(
    job: Job, needs: Sequence[Need], draw: Draw, steps: int, micro_batches: int
) -> RowPlan:
    """How the samples of each step become rows: of every step, so that none has more rows, or a
    larger sample, than there is room for, and none but these, so that no row is as long as a sample
    that is never drawn. A run of more steps has another plan.

    Args:
      needs: of the facts that `draw` points into.
    """
    data = job.settings.data
    return plan_rows(
        [[needs[i] for i in draw(step)] for step in range(steps)],
        row_cost(job.policy.model.config),
        multiple=meshes.batch_parts(job.mesh) * micro_batches,
        round_to=data.round_to,
        most=data.shapes,
    )


def prompt_shapes(job: Job, needs: Sequence[Need], draw: Draw, steps: int) -> tuple[Shape, ...]:
    """Shapes of batches of prompts; the last holds any of them.

    Args:
      needs: of the facts that `draw` points into.
    """
    data = job.settings.data
    return plan_prompts(
        [[needs[i] for i in draw(step)] for step in range(steps)],
        widest(needs),
        row_cost(job.policy.model.config),
        round_to=data.round_to,
        most=data.shapes,
    )


def widest_prompt_shape(job: Job, encoder: Encoder) -> Shape:
    """The one shape in which any fact of any split is asked."""
    if encoder is job.encoder:
        needs = list(job.needs.values())
    else:
        facts = [fact for facts in job.facts.values() for fact in facts]
        needs = encoder.needs(facts, job.sizes, {})
    needed, round_to = widest(needs), job.settings.data.round_to
    return Shape(-(-needed.length // round_to) * round_to, needed.windows)
