"""Sums over micro-batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from morer1_jax.cost.attribution import attribute
from morer1_jax.cost.hlo import parse
from morer1_jax.cost.program import cost_of
from morer1_jax.learn.accumulate import accumulate, add
from morer1_jax.learn.sft import sft_gradients
from morer1_jax.model.config import Runtime
from morer1_jax.model.scorer import ScoreConfig
from morer1_jax.run import mesh as meshes
from morer1_jax.run.placed import place

pytestmark = pytest.mark.usefixtures("quick_compiles")

WEIGHTS = {"w": jnp.zeros((3, 2))}
BATCH = {"x": jnp.arange(24.0).reshape(8, 3), "empty": jnp.zeros((8, 0, 2)), "none": None}


def sums(model, part, total):
    """A sum of the weights' shape, added to its total, and two for the metrics."""
    own = {"w": jnp.stack([jnp.sum(part["x"], axis=0)] * 2, axis=1)}
    metrics = {"rows": jnp.float32(part["x"].shape[0]), "x": jnp.sum(part["x"] ** 2, axis=0)}
    return own if total is None else add(total, own), metrics


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_parts_sum_to_the_whole(tiny, parts):
    grads, metrics = accumulate(sums, tiny.model(), WEIGHTS, BATCH, parts)
    x = np.arange(24.0).reshape(8, 3)
    np.testing.assert_allclose(grads["w"], np.stack([np.sum(x, axis=0)] * 2, axis=1))
    np.testing.assert_allclose(metrics["x"], np.sum(x**2, axis=0))
    assert metrics["rows"] == 8


def test_a_part_takes_rows_from_all_over_the_batch(tiny):
    """With rows split over devices in order, every device has work in every part."""
    mine = []

    def seen(model, part, total):
        jax.debug.callback(mine.append, part["x"][:, 0], ordered=True)
        return sums(model, part, total)

    accumulate(seen, tiny.model(), WEIGHTS, BATCH, 2)
    jax.effects_barrier()
    np.testing.assert_array_equal(mine, [[0, 6, 12, 18], [3, 9, 15, 21]])


def test_parts_may_be_joined_otherwise(tiny):
    def combine(total, part):
        return add(total, part) | {"x": jnp.maximum(total["x"], part["x"])}

    def largest(model, part, total):
        grads, metrics = sums(model, part, total)
        return grads, metrics | {"x": part["x"].max(0)}

    _, metrics = accumulate(largest, tiny.model(), WEIGHTS, BATCH, 4, combine)
    assert metrics["rows"] == 8
    np.testing.assert_array_equal(metrics["x"], [21, 22, 23])


@pytest.mark.parametrize("parts", [0, 3, 16, -1])
def test_parts_must_divide_the_batch(tiny, parts):
    with pytest.raises(ValueError, match=f"parts: expected .* 8 rows, found {parts}"):
        accumulate(sums, tiny.model(), WEIGHTS, BATCH, parts)


def test_copies_that_are_apart_sum_to_the_whole(tiny):
    model = tiny.apart(tiny.model(mesh=tiny.mesh(data=2, fsdp=2, tensor=1)))
    run = jax.jit(lambda batch: accumulate(sums, model, WEIGHTS, batch, 2))
    x = np.arange(24.0).reshape(8, 3)
    grads, metrics = run(BATCH)
    np.testing.assert_allclose(grads["w"], np.stack([np.sum(x, axis=0)] * 2, axis=1))
    np.testing.assert_allclose(metrics["x"], np.sum(x**2, axis=0))
    assert metrics["rows"] == 8


@pytest.mark.parametrize("remat", ["none", "full"])
def test_copies_that_are_apart_add_their_sums_up_once(tiny, remat):
    """Of what devices with different copies send each other this alone is more than numbers."""
    placed = place(tiny.CONFIG, Runtime(remat=remat), tiny.mesh(data=2, fsdp=2, tensor=1))
    model = tiny.apart(placed.model)
    batch = tiny.sequences(None, prompt=48, completion=32, windows=10)

    def run(params, batch):
        return sft_gradients(model, params, batch, ScoreConfig(chunk=24), micro_batches=2)

    program = meshes.program(
        run,
        takes=(placed.param_shardings, placed.rows),
        gives=(placed.param_shardings, placed.replicated),
    )
    compiled = program.lower(placed.like, placed.put(batch)).compile()
    transfers = cost_of(parse(compiled.as_text()), placed.mesh.size).transfers
    moved = attribute(transfers, placed.mesh, placed.like)
    between = [
        (transfer, one.axes)
        for transfer, one in zip(transfers, moved, strict=True)
        if "data" in one.axes
    ]
    # The turns of chunks of logits, two in each pass of a micro-batch, and the metrics.
    numbers = [one for one, _ in between if one.bytes <= 256]
    assert sum(one.times for one in numbers) <= 2 * 2 + 4
    large = [(one, axes) for one, axes in between if one.bytes > 256]
    assert all((one.kind, one.times, axes) == ("all-reduce", 1, ("data",)) for one, axes in large)
    shapes = jax.tree.leaves(placed.like)
    share = sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in shapes)
    added = sum(np.prod(array.shape) for one, _ in large for array in one.entering)
    assert share - 64 * len(shapes) <= added <= share + 64
