"""What a run's batches have room for: every step's, not those of its beginning alone."""

import dataclasses
import functools
import itertools
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from morer1_jax.config.binding import read_config
from morer1_jax.config.settings import DataSettings, GRPOSettings, settings
from morer1_jax.data.curriculum import Pool
from morer1_jax.data.images import ImageReader
from morer1_jax.data.rows import Level
from morer1_jax.data.shapes import SampleSize, Shape, share_images, smallest, widest
from morer1_jax.learn.trainable import TrainableParts
from morer1_jax.model.config import (
    DEFAULT_IDS,
    ImageConfig,
    ModelConfig,
    Runtime,
    TextConfig,
    VisionConfig,
)
from morer1_jax.run import mesh as meshes
from morer1_jax.run.placed import place
from morer1_jax.run.shapes import ask_plan, prompt_shapes, sequence_plan
from morer1_jax.task.fact import Fact
from morer1_jax.task.photos import PhotoFiles


def make_needs(facts, seed, outliers=0):
    """Facts of log-uniform sizes, a few of them far larger than the rest."""
    noise = np.random.default_rng((seed, facts))
    prompt = (60 * 4 ** noise.random(facts)).astype(int)
    target = (40 * 5 ** noise.random(facts)).astype(int)
    windows = (2 * 8 ** noise.random(facts)).astype(int)
    few = noise.choice(facts, outliers, replace=False)
    target[few], windows[few] = 900, 60
    return [SampleSize(*map(int, need)) for need in zip(prompt, target, windows, strict=True)]


DATA = DataSettings(round_to=16, shapes=2)


@pytest.fixture(scope="module")
def placed(tiny):
    mesh = meshes.make_mesh({"data": 2, "fsdp": 1, "tensor": 1}, jax.devices()[:2])
    return place(tiny.CONFIG, Runtime(), mesh)


# Of each the first 256 batches are about half a pool, or a few of its epochs.
SETTINGS = [
    (facts, batch, outliers, seed)
    for facts, batch in ((1200, 2), (3000, 4), (90, 4))
    for outliers in (0, 1, 3)
    for seed in (0, 1)
]


@pytest.mark.parametrize(("facts", "batch", "outliers", "seed"), SETTINGS)
def test_no_step_of_a_run_has_a_sample_or_more_rows_than_there_is_room_for(
    placed, facts, batch, outliers, seed
):
    steps, needs = 600, make_needs(facts, seed, outliers)
    draw = functools.partial(Pool("training", np.arange(facts), (seed, 10)).batch, size=batch)
    plan = sequence_plan(placed, DATA, needs, draw, steps, 1)
    assert len(plan.levels) <= 2
    for step in range(steps):
        drawn = [needs[i] for i in draw(step)]
        shape, rows = plan.rows(drawn)
        for row in rows:
            assert sum(drawn[i].tokens for i in row) <= shape.length, f"step {step}: {row}"
        for start in range(0, len(rows), shape.sharing):
            shared = itertools.chain(*rows[start : start + shape.sharing])
            assert sum(drawn[i].slots for i in shared) <= shape.slots, f"step {step}: {start}"
        # Another level would be compiled in the middle of the run.
        assert Level(len(rows), shape) in plan.levels, f"step {step}: {len(rows)} rows, {shape}"


def test_rows_are_planned_for_batches_that_come_late(placed):
    # Small samples for 300 steps, then large ones: as a draw that grows harder.
    needs = [SampleSize(30, 20, 2)] * 8 + [SampleSize(200, 100, 6)] * 8
    plan = sequence_plan(placed, DATA, needs, lambda step: np.arange(8) + 8 * (step >= 300), 400, 1)
    counts = []
    for of_step in (needs[:8], needs[8:]):
        shape, rows = plan.rows(of_step)
        assert Level(len(rows), shape) in plan.levels
        counts.append(len(rows))
    assert counts[0] < counts[1]


def test_a_sample_that_no_step_draws_takes_no_room(placed):
    needs = [SampleSize(60, 40, 2)] * 12 + [SampleSize(60, 900, 60)]

    def draw(step):
        return np.arange(4) + step

    plan = sequence_plan(placed, DATA, needs, draw, 9, 1)
    assert all(shape.length <= 4 * 112 and shape.slots <= 8 for _, shape in plan.levels)
    # A run of one step more does draw it.
    shape = sequence_plan(placed, DATA, needs, draw, 10, 1).levels[-1].shape
    assert shape.length >= 960
    assert shape.slots >= 60


def test_shapes_of_prompts_are_those_of_the_whole_run(placed):
    # 200 of 500 steps ask longer prompts.
    needs = [SampleSize(60, 0, 2)] * 4 + [SampleSize(300, 0, 8)] * 4
    grpo = GRPOSettings(steps=500, prompts=4, micro_batches=1)
    shapes = prompt_shapes(placed, DATA, grpo, needs, lambda step: np.arange(4) + 4 * (step >= 300))
    # Two prompts of a device share a row of images, which costs no more.
    assert shapes[0].sharing == 1
    assert smallest(shapes, widest(needs[:4])) == Shape(64, 2)
    assert smallest(shapes, widest(needs[4:])) == Shape(304, 8)


@pytest.mark.parametrize(
    ("prompts", "micro_batches", "sharing"), [(2, 1, 1), (4, 1, 2), (4, 2, 1), (8, 2, 2), (6, 2, 1)]
)
def test_prompts_that_share_images_are_on_one_device_in_one_part(
    placed, prompts, micro_batches, sharing
):
    """Of two devices; large and small images, which best share a row."""
    needs = [SampleSize(60, 0, 2), SampleSize(60, 0, 30)] * prompts
    grpo = GRPOSettings(steps=2, prompts=prompts, micro_batches=micro_batches)
    shapes = prompt_shapes(placed, DATA, grpo, needs, lambda step: np.arange(prompts) + step)
    assert {shape.sharing for shape in shapes} == {sharing}


@pytest.mark.parametrize(
    ("prompts", "micro_batches", "sharing"), [(4, 2, 2), (8, 4, 2), (6, 1, 1), (2, 1, 1)]
)
def test_what_a_frozen_tower_gives_has_rows_of_its_own(placed, prompts, micro_batches, sharing):
    """So that only the tower's program needs rows that share images on one device."""
    frozen = dataclasses.replace(placed, trainable=TrainableParts(vision=0.0))
    needs = [SampleSize(60, 0, 2), SampleSize(60, 0, 30)] * prompts
    grpo = GRPOSettings(steps=2, prompts=prompts, micro_batches=micro_batches)
    shapes = prompt_shapes(frozen, DATA, grpo, needs, lambda step: np.arange(prompts) + step)
    assert {shape.sharing for shape in shapes} == {sharing}


def test_features_that_are_kept_take_no_part_in_the_plan(placed):
    kept = dataclasses.replace(DATA, keep_features=True)
    needs = [SampleSize(60, 0, 2), SampleSize(60, 0, 30)] * 8
    grpo = GRPOSettings(steps=2, prompts=8, micro_batches=1)
    draw = functools.partial(Pool("t", np.arange(16), (1,)).batch, size=8)
    assert prompt_shapes(placed, kept, grpo, needs, draw) == (Shape(64, 30, 1),)


# Photos of news, the probability of their sizes, and of their objects' boxes: made up after what
# is public of MORE, whose photos are not.
PHOTOS = {
    (640, 480): 0.18,
    (800, 600): 0.12,
    (1024, 683): 0.22,
    (600, 400): 0.16,
    (683, 1024): 0.10,
    (480, 640): 0.07,
    (400, 300): 0.06,
    (320, 240): 0.03,
    (1050, 550): 0.06,
}


def news_sizes(vision, facts, seed=0):
    """Sizes of facts about news photos, as the published configs take them."""
    noise = np.random.default_rng(seed)
    images = ImageReader(PhotoFiles(""), ImageConfig(max_pixels=512 * 28 * 28))
    shares = np.array([*PHOTOS.values()])
    sizes = []
    for choice in noise.choice(len(PHOTOS), facts, p=shares / shares.sum()):
        width, height = [*PHOTOS][choice]
        if noise.random() < 1 / 3:  # Cut to another shape.
            width, height = (int(side * noise.uniform(0.75, 1)) for side in (width, height))
        sides = np.exp(noise.normal(np.log([0.2, 0.4]), 0.6)).clip(0.03, 0.9)
        box = (*noise.uniform(sides / 2, 1 - sides / 2), *sides)
        fact = Fact("train:1", ("a",), "a", (0, 1), "object", box, "photo", "none")
        cost = vision.image_cost(images.grids(fact, (width, height)))
        prompt = int(noise.integers(343, 361)) + cost.tokens
        target = int(np.clip(noise.normal(230, 50), 120, 500))
        sizes.append(SampleSize(prompt, target, cost.slots))
    return sizes


@pytest.fixture(scope="module")
def published():
    """The published 3B configs' settings, on eight devices."""
    own = settings(read_config(Path(__file__).parents[2] / "configs" / "qwen2_5_vl_3b_grpo.py"))
    config = ModelConfig(TextConfig(), VisionConfig(), **DEFAULT_IDS)
    mesh = meshes.make_mesh({"data": 1, "fsdp": 8, "tensor": 1}, jax.devices()[:8])
    return own, place(config, Runtime(), mesh)


def test_padding_of_news_photos_is_small(published):
    """In window slots, of all that is trained on or asked."""
    own, placed = published
    sizes = news_sizes(placed.model.config.vision, 1024)
    padding = {}
    # SFT.
    draw = functools.partial(Pool("t", np.arange(512), (0,)).batch, size=own.sft.batch)
    plan = sequence_plan(placed, own.data, sizes, draw, 32, own.sft.micro_batches)
    rows = [plan.rows([sizes[i] for i in draw(step)]) for step in range(32)]
    spent = sum(len(of_step) * shape.slots / shape.sharing for shape, of_step in rows)
    padding["sft"] = 1 - sum(sizes[i].slots for step in range(32) for i in draw(step)) / spent
    # GRPO.
    grpo = dataclasses.replace(own.grpo, steps=32)
    draw = functools.partial(Pool("t", np.arange(1024), (1,)).batch, size=grpo.prompts)
    shapes = prompt_shapes(placed, own.data, grpo, sizes, draw)
    spent = used = 0
    for step in range(32):
        drawn = [sizes[i] for i in draw(step)]
        drawn = [drawn[i] for i in share_images([s.slots for s in drawn], shapes[0].sharing)]
        shape = smallest(shapes, widest(drawn, shapes[0].sharing))
        spent += len(drawn) * shape.slots / shape.sharing
        used += sum(size.slots for size in drawn)
    padding["grpo"] = 1 - used / spent
    # Rating, and validation with evaluation.
    facts = [types.SimpleNamespace(id=str(number)) for number in range(1024)]
    by_id = {fact.id: size for fact, size in zip(facts, sizes, strict=True)}
    for name, sets, batch in (
        ("rate", [facts], own.rate.batch),
        ("evaluate", [facts[:256], facts[256:]], own.evaluate.batch),
    ):
        asking = ask_plan(placed, own.data, by_id, sets, batch)
        assert len(asking.shapes) <= own.data.shapes
        batches = [asked for each in sets for asked in asking.batches(each, batch)]
        assert {asked.shape for asked in batches} <= set(asking.shapes)
        spent = sum(batch * asked.shape.slots / asked.shape.sharing for asked in batches)
        padding[name] = 1 - sum(size.slots for size in sizes) / spent
    assert {name: share for name, share in padding.items() if share >= 0.15} == {}
    assert set(padding) == {"sft", "grpo", "rate", "evaluate"}
