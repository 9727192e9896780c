"""The programs of a config by shapes alone: those its stages run, each with what lies beside it."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from morer1_jax.config.binding import read_config
from morer1_jax.config.settings import settings
from morer1_jax.cost.hlo import parse
from morer1_jax.cost.program import cost_of
from morer1_jax.learn.state import abstract_params
from morer1_jax.model.vlm import split_tower
from morer1_jax.rollout.sampler import ATTEMPTS
from morer1_jax.run.mesh import device_bytes, make_mesh
from morer1_jax.run.placed import place
from morer1_jax.stages.programs import planned_programs

CONFIG = Path(__file__).parents[1] / "configs" / "tiny.py"


@pytest.fixture(scope="module")
def plan(tiny):
    """`plan(stages, **mesh)`: the programs of the tiny config, and its placed model."""

    def plan(stages, dtype="bfloat16", updates=1, chunk=1024, layers=2, sampling="auto", **axes):
        config = read_config(CONFIG)
        config.stages, config.runtime.dtype = stages, dtype
        config.runtime.decode_unroll = False
        config.grpo.update(prompts=8, updates=updates, micro_batches=2)
        config.score.chunk = chunk
        config.sampling.stages = sampling
        config.mesh.update(axes)
        made = settings(config)
        mesh = make_mesh(made.mesh.axes, jax.devices()[: int(np.prod([*axes.values()]))])
        text = dataclasses.replace(tiny.CONFIG.text, num_hidden_layers=layers)
        model = dataclasses.replace(tiny.CONFIG, text=text)
        placed = place(model, made.runtime, mesh, made.tune)
        return planned_programs(made, placed), placed

    return plan


IMAGES, MOVE, GREEDY = "images", "move to the sampler", "greedy answers"


@pytest.mark.parametrize(
    ("stages", "names"),
    [
        ("sft,evaluate", ["SFT step", IMAGES, MOVE, GREEDY]),
        ("rate", [IMAGES, MOVE, "rating"]),
        ("rate,grpo,evaluate", [IMAGES, MOVE, GREEDY, "rating", "rollout", "score", "update"]),
        ("synthesise", []),
    ],
)
def test_each_stage_has_its_programs(plan, stages, names):
    planned, _ = plan(stages, data=1, fsdp=4, tensor=1)
    assert [program.name for program in planned] == names


def test_nothing_is_moved_where_training_and_sampling_are_alike(plan):
    planned, placed = plan("evaluate", dtype="float32", data=1, fsdp=1, tensor=1)
    assert [program.name for program in planned] == [IMAGES, GREEDY]
    assert placed.sampling.moved == {}
    # What both layouts have is the sampler's own; the tower alone lies beside.
    tower = split_tower(abstract_params(placed.model))[0]
    found = {leaf.shape for leaf in jax.tree.leaves(planned[1].beside["parameters"])}
    assert found == {leaf.shape for leaf in jax.tree.leaves(tower)}


def test_every_program_lowers_with_its_arguments(plan):
    planned, _ = plan("sft,rate,grpo,evaluate", data=1, fsdp=2, tensor=1)
    for program in planned:
        assert program.lower().as_text().startswith("module @jit_"), program.name


def test_what_lies_beside_a_rollout(plan):
    planned, placed = plan("grpo", data=1, fsdp=2, tensor=1)
    rollout = next(program for program in planned if program.name == "rollout")
    sizes = {name: device_bytes(tree) for name, tree in rollout.beside.items()}
    shapes = jax.tree.leaves(abstract_params(placed.model))
    # AdamW's two moments in float32, and two counters: half of every matrix on each device.
    trained = device_bytes(placed.like)
    assert 0 <= sizes["optimizer"] - 2 * trained < 64
    assert sizes["parameters"] < 4 * sum(leaf.size for leaf in shapes)
    # The reference in bfloat16, but for scales of norms.
    assert trained / 2 < sizes["reference"] < trained / 1.9


def test_decode_loops_cover_all_tokens_but_the_first(plan):
    planned, placed = plan("grpo", data=1, fsdp=2, tensor=1)
    loops = next(program for program in planned if program.name == "rollout").loops
    assert sum(loop.tokens for loop in loops) == 136 - 1
    # Beside the decoder's weights and the head, the keys and values of 4 prompts of 224 tokens and
    # of their 2 completions each, in both layers, both heads of 8, in bfloat16.
    weights = {k: v for k, v in placed.sampling.like.items() if k in ("language", "head")}
    assert all(loop.slots == 16 for loop in loops)
    for loop in loops:
        kept = 4 * (224 + 2 * loop.cache) * 2 * 2 * (2 * 8) * 2
        assert loop.reads == device_bytes(weights) + kept


def test_decode_loops_are_the_sampler_s_stages_and_that_of_a_new_beginning(plan):
    """As many as the compiled program has, in its order."""
    text = "1:1,1:32,0.5:32,0.25:64,0.125:136"
    planned, placed = plan("grpo", data=1, fsdp=2, tensor=1, sampling=text)
    rollout = next(program for program in planned if program.name == "rollout")
    sizes = [(16, 32), (8, 32), (4, 64), (2, 136), (2, 136)]
    assert [(loop.slots, loop.cache) for loop in rollout.loops] == sizes
    assert [loop.tokens for loop in rollout.loops] == [31, 0, 32, 72, 0]
    # Of fewer samples than prompts, their own prompts alone.
    weights = {k: v for k, v in placed.sampling.like.items() if k in ("language", "head")}
    for loop in rollout.loops:
        kept = (min(8, loop.slots) * 224 + loop.slots * loop.cache) / 2 * 2 * 2 * (2 * 8) * 2
        assert loop.reads == device_bytes(weights) + kept
    compiled = parse(rollout.lower().compile().as_text())
    found = cost_of(compiled, placed.mesh.size, {ATTEMPTS: 0}).loops
    assert len(found) == len(rollout.loops)
    assert all(name.endswith("while") for name, _ in found)


def test_chunks_of_logits(plan):
    """In chunks of 96 places of a device's rows.

    SFT has two rows, each with 136 targets, an update two and a score four with twice as many.
    """
    planned, _ = plan("sft,grpo", data=1, fsdp=2, tensor=1, chunk=96)
    chunks = {program.name: program.chunks for program in planned}
    assert (chunks["SFT step"], chunks["score"], chunks["update"]) == (3, 12, 6)
    assert not any(chunks[name] for name in chunks.keys() - {"SFT step", "score", "update"})


@pytest.mark.parametrize("optimised", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_programs_do_not_grow_with_the_layers(plan, optimised):
    """Those that train and score, which run the decoder's layers in a loop."""

    def text(program):
        lowered = program.lower()
        return lowered.compile().as_text() if optimised else lowered.as_text()

    def sizes(layers):
        planned, _ = plan("sft,grpo", data=1, fsdp=2, tensor=1, layers=layers)
        return {
            program.name: len(text(program))
            for program in planned
            if program.name in ("SFT step", "score", "update")
        }

    few, many = sizes(2), sizes(28)
    assert len(few) == 3
    for name, size in many.items():
        print(f"{name}: {size / few[name]:.3f}")
        assert size <= 1.3 * few[name], name
