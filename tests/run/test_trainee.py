"""The model that trains: its embedding's rows, and states that share no memory with parameters."""

from pathlib import Path

import jax
import numpy as np
import pytest

from morer1_jax.config.binding import read_config
from morer1_jax.config.settings import settings
from morer1_jax.run.mesh import shardings_of
from morer1_jax.run.trainee import open_trainee
from morer1_jax.task import more

TINY = Path(__file__).parents[1] / "configs" / "tiny.py"


@pytest.fixture(scope="module")
def config(small_world):
    config = read_config(TINY)
    config.mesh.update(data=2, fsdp=2, tensor=2)
    return settings(config)


@pytest.fixture(scope="module")
def trainee(config, small_world, small_tokenizer):
    return open_trainee(config, small_tokenizer, more.read_ontology(small_world), None)


def test_embedding_rows_cover_the_tokenizer_and_divide_over_a_mesh(trainee):
    policy = trainee.policy
    rows, special = policy.model.config.text.vocab_size, policy.special
    assert rows % 64 == 0
    assert 0 <= rows - len(policy.tokenizer) < 64
    assert np.flatnonzero(np.asarray(policy.allowed)).max() < len(policy.tokenizer)
    banned = [special.pad, special.image, special.video, special.vision_start]
    assert not np.asarray(policy.allowed)[banned].any()


def random(leaf):
    return np.random.default_rng(0).normal(size=leaf.shape).astype(leaf.dtype)


def test_a_new_state_outlives_the_parameters_it_was_made_from_and_they_it(trainee, config):
    params = jax.tree.map(
        lambda leaf: jax.device_put(random(leaf), leaf.sharding), trainee.placed.like
    )
    optimizer = config.sft.optimizer.build(3)
    state, like = trainee.new_state(params, optimizer), trainee.placed.like_state(optimizer)
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == shardings_of(like)
    before = jax.tree.map(np.asarray, params)
    # As the train step does with the state it is given.
    jax.tree.map(lambda leaf: leaf.delete(), state)
    jax.tree.map(np.testing.assert_array_equal, params, before)
