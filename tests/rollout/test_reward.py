"""Reward parts and group advantages against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from morer1_jax.rollout.reward import (
    REWARD_PARTS,
    RewardConfig,
    advantages,
    deviation,
    reward_parts,
    total_reward,
)
from morer1_jax.rollout.sampler import Rollout


def rollout(well_formed, answer, effort):
    """A rollout of which only the outcomes matter."""
    nothing = jnp.zeros((*np.shape(answer), 1))
    return Rollout(
        tokens=nothing.astype(jnp.int32),
        mask=nothing.astype(bool),
        logprobs=nothing,
        ended=jnp.ones(np.shape(answer), bool),
        format=jnp.asarray(well_formed),
        answer=jnp.asarray(answer, jnp.int32),
        effort=jnp.asarray(effort, jnp.int32),
        attempts=jnp.ones(np.shape(answer), jnp.int32),
    )


def test_parts_and_their_weights():
    drawn = rollout(
        [[True, False, True], [False, True, False]],
        [[0, 0, 1], [2, 1, -1]],
        [[0, 20, 35], [50, 80, 1000]],
    )
    config = RewardConfig(format=0.25, effort=0.5, accuracy=2.0, effort_from=20, effort_to=80)
    parts = reward_parts(drawn, jnp.array([0, 1]), config)
    assert tuple(parts) == REWARD_PARTS
    np.testing.assert_array_equal(parts["format"], [[1, 0, 1], [0, 1, 0]])
    np.testing.assert_array_equal(parts["accuracy"], [[1, 1, 0], [0, 1, 0]])
    np.testing.assert_allclose(parts["effort"], [[0, 0, 0.25], [0.5, 1, 1]])
    assert all(part.dtype == jnp.float32 for part in parts.values())
    expected = [[2.25, 2.0, 0.375], [0.25, 2.75, 0.5]]
    np.testing.assert_allclose(total_reward(parts, config), expected)


def test_an_unreadable_answer_is_never_right():
    """No label has the id that stands for an answer that could not be read."""
    drawn = rollout([[False] * 2] * 3, [[-1, -1]] * 3, [[0, 0]] * 3)
    parts = reward_parts(drawn, jnp.arange(3), RewardConfig())
    assert not np.any(parts["accuracy"])


def test_an_empty_ramp_is_refused():
    with pytest.raises(ValueError, match=r"effort_to: expected above .* found 5"):
        RewardConfig(effort_from=5, effort_to=5)


def test_advantages():
    reward = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    reward[2] = 0.1 + 0.2
    # float64 from the formula: the sample deviation, of the group or of the batch.
    exact = reward.astype(np.float64)
    centred = exact - exact.mean(1, keepdims=True)
    centred[2] = 0
    scales = {
        "group": exact.std(1, ddof=1)[:, None] + 1e-4,
        "batch": exact.std(ddof=1) + 1e-4,
        "none": 1.0,
    }
    for scale, by in scales.items():
        found, equal = advantages(jnp.asarray(reward), scale)
        np.testing.assert_allclose(found, centred / by, atol=2e-6)
        np.testing.assert_array_equal(equal, np.arange(5) == 2)
        assert (np.asarray(found)[2] == 0).all()
    with pytest.raises(ValueError, match=r"scale_rewards: expected .* found 'sample'"):
        advantages(jnp.asarray(reward), "sample")


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("value", [0.0, 0.1, 1.3, 1 / 3, 1e30])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_equal_rewards_have_no_advantage(scale, value, group):
    found, equal = jax.jit(advantages, static_argnums=1)(jnp.full((4, group), value), scale)
    np.testing.assert_array_equal(found, np.zeros((4, group)))
    assert equal.all()


def test_a_single_sample_has_no_advantage():
    found, equal = advantages(jnp.array([[1.0], [0.0], [3.0]]), "group")
    np.testing.assert_array_equal(found, np.zeros((3, 1)))
    assert equal.all()


def test_deviation():
    values = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    np.testing.assert_allclose(deviation(jnp.asarray(values)), values.std(ddof=1), rtol=1e-5)
    np.testing.assert_allclose(
        deviation(jnp.asarray(values), axis=1), values.std(1, ddof=1), rtol=1e-5
    )
    assert deviation(jnp.ones((1, 1))) == 0
