"""Sample, reward and advantage as one program: on one device, and on eight."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from morer1_jax.rollout.program import make_rollout
from morer1_jax.rollout.reward import RewardConfig, advantages
from morer1_jax.run import mesh as meshes

REWARD = RewardConfig(format=0.25, effort=0.5, accuracy=1.0, effort_from=10, effort_to=60)
SEED = 3


@pytest.fixture(scope="module")
def compiled(tiny):
    """`compiled(mesh)`: the program as a run compiles it, `(params, step) -> (scored, metrics)`."""

    def compile_for(mesh):
        model = tiny.model(mesh=mesh)
        program = make_rollout(model, tiny.sample_config(), REWARD, "group", SEED)
        rows, whole = meshes.batch_sharding(mesh), NamedSharding(mesh, P())
        by_name = meshes.param_shardings(mesh, tiny.params())
        rollout = tiny.jit(
            program,
            in_shardings=(by_name, rows, whole, whole, whole),
            out_shardings=(rows, whole),
        )

        def run(params, step):
            prompts = meshes.put_batch(tiny.prompts(), mesh)
            placed = tiny.place(params, by_name)
            out = rollout(placed, prompts, tiny.GRAMMAR, tiny.ALLOWED, jnp.int32(step))
            return meshes.fetch(out)

        return run

    return compile_for


@pytest.fixture(scope="module")
def on_one_device(tiny, compiled):
    return compiled(tiny.mesh(data=1, fsdp=1, tensor=1))


def test_rewards_advantages_and_metrics(tiny, on_one_device):
    scored, metrics = on_one_device(tiny.chain_params(6.0), 2)
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
        "completions/unreadable_ratio": (drawn.answer < 0).mean(),
    }
    for name, part in ("format", drawn.format), ("effort", effort), ("accuracy", right):
        wanted[f"rewards/{name}/mean"] = np.mean(part)
        wanted[f"rewards/{name}/std"] = np.std(part, ddof=1)
    assert metrics.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


def test_noise_is_of_the_seed_and_the_step(tiny, on_one_device):
    params, prompts = tiny.params(), tiny.prompts()
    drawn = on_one_device(params, 2)[0].rollout
    keys = tiny.keys(SEED, np.int32(2), prompts.fact, tiny.GROUP)
    expected = tiny.sampler()(params, prompts, keys, tiny.ALLOWED)
    np.testing.assert_array_equal(drawn.tokens, expected.tokens)
    assert (on_one_device(params, 3)[0].rollout.tokens != drawn.tokens).any((1, 2)).all()


@pytest.mark.parametrize(
    "axes", [{"data": 1, "fsdp": 2, "tensor": 4}, {"data": 2, "fsdp": 4, "tensor": 1}], ids=str
)
def test_eight_devices_draw_the_same(tiny, compiled, on_one_device, axes):
    run = compiled(tiny.mesh(**axes))
    for params in tiny.params(), tiny.chain_params(6.0):
        (ours, metrics), (theirs, expected) = run(params, 1), on_one_device(params, 1)
        for field in dataclasses.fields(theirs.rollout):
            a, b = (getattr(x.rollout, field.name) for x in (ours, theirs))
            if field.name == "logprobs":
                np.testing.assert_allclose(a, b, atol=2e-5)
            else:
                np.testing.assert_array_equal(a, b, err_msg=field.name)
        np.testing.assert_allclose(ours.reward, theirs.reward, rtol=1e-6)
        np.testing.assert_allclose(ours.advantages, theirs.advantages, atol=1e-5)
        tiny.assert_near(metrics, expected, 1e-5)
