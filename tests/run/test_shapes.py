"""What a run's batches have room for: every step's, not those of its beginning alone."""

import functools
import types

import jax
import numpy as np
import pytest

from morer1_jax.data.curriculum import Pool
from morer1_jax.data.shapes import SampleSize, Shape, smallest, widest
from morer1_jax.model.config import Runtime
from morer1_jax.run import mesh as meshes
from morer1_jax.run.placed import place
from morer1_jax.run.shapes import prompt_shapes, sequence_plan


def make_needs(facts, seed, outliers=0):
    """Facts of log-uniform sizes, a few of them far larger than the rest."""
    noise = np.random.default_rng((seed, facts))
    prompt = (60 * 4 ** noise.random(facts)).astype(int)
    target = (40 * 5 ** noise.random(facts)).astype(int)
    windows = (2 * 8 ** noise.random(facts)).astype(int)
    few = noise.choice(facts, outliers, replace=False)
    target[few], windows[few] = 900, 60
    return [SampleSize(*map(int, need)) for need in zip(prompt, target, windows, strict=True)]


@pytest.fixture(scope="module")
def run(tiny):
    """What of a run the shapes are chosen by."""
    mesh = meshes.make_mesh({"data": 2, "fsdp": 1, "tensor": 1}, jax.devices()[:2])
    placed = place(tiny.CONFIG, Runtime(), mesh)
    policy = types.SimpleNamespace(model=placed.model, placed=placed)
    return types.SimpleNamespace(
        settings=types.SimpleNamespace(data=types.SimpleNamespace(round_to=16, shapes=2)),
        trainee=types.SimpleNamespace(policy=policy),
    )


# Of each the first 256 batches are about half a pool, or a few of its epochs.
SETTINGS = [
    (facts, batch, outliers, seed)
    for facts, batch in ((1200, 2), (3000, 4), (90, 4))
    for outliers in (0, 1, 3)
    for seed in (0, 1)
]


@pytest.mark.parametrize(("facts", "batch", "outliers", "seed"), SETTINGS)
def test_no_step_of_a_run_has_a_sample_or_more_rows_than_there_is_room_for(
    run, facts, batch, outliers, seed
):
    steps, needs = 600, make_needs(facts, seed, outliers)
    draw = functools.partial(Pool("training", np.arange(facts), (seed, 10)).batch, size=batch)
    plan = sequence_plan(run, needs, draw, steps, 1)
    assert len(plan.counts) <= 2
    for step in range(steps):
        drawn = [needs[i] for i in draw(step)]
        rows = plan.rows(drawn)
        for row in rows:
            filled = Shape(sum(drawn[i].tokens for i in row), sum(drawn[i].slots for i in row))
            assert plan.shape.holds(filled), f"step {step}: {filled} in a row of {plan.shape}"
        # Another count would be compiled in the middle of the run.
        assert len(rows) in plan.counts, f"step {step}: {len(rows)} rows, {plan.counts} planned"


def test_rows_are_planned_for_batches_that_come_late(run):
    # Small samples for 300 steps, then large ones: as a draw that grows harder.
    needs = [SampleSize(30, 20, 2)] * 8 + [SampleSize(200, 100, 6)] * 8
    plan = sequence_plan(run, needs, lambda step: np.arange(8) + 8 * (step >= 300), 400, 1)
    assert len(plan.rows(needs[8:])) in plan.counts
    assert len(plan.rows(needs[:8])) < len(plan.rows(needs[8:]))


def test_a_sample_that_no_step_draws_takes_no_room(run):
    needs = [SampleSize(60, 40, 2)] * 12 + [SampleSize(60, 900, 60)]

    def draw(step):
        return np.arange(4) + step

    plan = sequence_plan(run, needs, draw, 9, 1)
    assert plan.shape.length <= 4 * 112
    assert plan.shape.slots <= 8
    # A run of one step more does draw it.
    assert sequence_plan(run, needs, draw, 10, 1).shape.holds(Shape(960, 60))


def test_shapes_of_prompts_are_those_of_the_whole_run(run):
    # 200 of 500 steps ask longer prompts.
    needs = [SampleSize(60, 0, 2)] * 4 + [SampleSize(300, 0, 8)] * 4
    shapes = prompt_shapes(run, needs, lambda step: np.arange(4) + 4 * (step >= 300), 500)
    assert smallest(shapes, widest(needs[:4])) == Shape(64, 2)
    assert smallest(shapes, widest(needs[4:])) == Shape(304, 8)
