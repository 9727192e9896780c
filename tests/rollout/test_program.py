"""Sample, reward and advantage as one program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from morer1_jax.rollout.program import make_rollout
from morer1_jax.rollout.reward import RewardConfig, advantages

REWARD = RewardConfig(format=0.25, effort=0.5, accuracy=1.0, effort_from=10, effort_to=60)
SEED = 3


@pytest.fixture(scope="module")
def run(tiny):
    """The compiled program: `(params, step) -> (scored, metrics)`."""
    program = tiny.jit(make_rollout(tiny.model(), tiny.sample_config(), REWARD, "group", SEED))
    given = tiny.prompts(), tiny.GRAMMAR, tiny.ALLOWED
    return lambda params, step: jax.device_get(program(params, *given, np.int32(step)))


def test_rewards_advantages_and_metrics(tiny, run):
    scored, metrics = run(tiny.chain_params(6.0), 2)
    drawn, prompts = scored.rollout, tiny.prompts()
    effort = np.clip((drawn.effort - 10) / 50, 0, 1)
    right = drawn.answer == prompts.gold[:, None]
    reward = 0.25 * drawn.format + 0.5 * effort + 1.0 * right
    assert 0 < drawn.format.mean() < 1
    assert 0 < right.mean() < 1
    np.testing.assert_allclose(scored.reward, reward, rtol=1e-6)
    expected, equal = advantages(jnp.asarray(scored.reward), "group")
    np.testing.assert_allclose(scored.advantages, expected, atol=1e-5)
    lengths = drawn.mask.sum(-1)
    wanted = {
        "completions/lengths": lengths,
        "reward": reward.mean(),
        "reward_std": reward.std(1, ddof=1).mean(),
        "frac_reward_zero_std": equal.mean(),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": 1 - drawn.ended.mean(),
        "completions/begun_again_ratio": 0.0,
        "completions/unreadable_ratio": (drawn.answer < 0).mean(),
    }
    for name, part in ("format", drawn.format), ("effort", effort), ("accuracy", right):
        wanted[f"rewards/{name}/mean"] = np.mean(part)
        wanted[f"rewards/{name}/std"] = np.std(part, ddof=1)
    assert metrics.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


def test_noise_is_of_the_seed_and_the_step(tiny, run):
    params, prompts = tiny.params(), tiny.prompts()
    drawn = run(params, 2)[0].rollout
    keys = tiny.keys(SEED, np.int32(2), prompts.fact, tiny.GROUP)
    expected = tiny.sampler()(params, prompts, keys, tiny.ALLOWED)
    np.testing.assert_array_equal(drawn.tokens, expected.tokens)
    assert (run(params, 3)[0].rollout.tokens != drawn.tokens).any((1, 2)).all()


def test_parts_draw_the_same(tiny, run):
    """One after another: tokens, rewards, and metrics over all of them."""
    given = tiny.sample_config(), REWARD, "batch", SEED
    params, others = tiny.params(), (tiny.prompts(), tiny.GRAMMAR, tiny.ALLOWED, np.int32(2))
    whole, in_parts = (
        jax.device_get(tiny.jit(make_rollout(tiny.model(), *given, parts))(params, *others))
        for parts in (1, 4)
    )
    np.testing.assert_array_equal(in_parts[0].rollout.tokens, whole[0].rollout.tokens)
    np.testing.assert_allclose(in_parts[0].rollout.logprobs, whole[0].rollout.logprobs, atol=2e-5)
    np.testing.assert_allclose(in_parts[0].advantages, whole[0].advantages, atol=1e-5)
    for name, value in whole[1].items():
        np.testing.assert_allclose(in_parts[1][name], value, rtol=1e-5, err_msg=name)
