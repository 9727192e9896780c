"""On every mesh a run's own programs compute what one device computes without any mesh.

Losses, each tensor's gradient, parameters after a step of SGD, log-probabilities and sampled
tokens, of prompts and rows with photos. The model has fewer key-value heads than the widest axis
`tensor` has devices. What stands for one device are the same functions, compiled without a mesh and
without micro-batches.
"""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from morer1_jax.config.settings import GRPOSettings
from morer1_jax.data.shapes import Shape
from morer1_jax.learn.grpo import GroupBatch, LossConfig, grpo_gradients, token_weights
from morer1_jax.learn.sft import sft_gradients
from morer1_jax.learn.state import new_state
from morer1_jax.model.config import Runtime
from morer1_jax.model.scorer import ScoreConfig, group_logprobs
from morer1_jax.rollout.program import make_rollout
from morer1_jax.rollout.reward import RewardConfig
from morer1_jax.run.batch_sampler import sampler_program
from morer1_jax.run.mesh import fetch, shardings_of
from morer1_jax.run.placed import place
from morer1_jax.stages.grpo_step import make_programs
from morer1_jax.stages.sft import sft_program

BOUND = 1e-5  # of a tensor's largest value
# The optimizer keeps the gradients that it is given, and takes a step of SGD.
RATE = 0.5
OPTIMIZER = optax.chain(optax.trace(decay=0.0), optax.sgd(RATE))
SCORE = ScoreConfig(chunk=24)
SEED, STEP = 3, 2
SETTINGS = GRPOSettings(
    prompts=16,
    group=4,
    micro_batches=2,
    loss=LossConfig(beta=0.05, clip_low=0.1, clip_high=0.15, mask_truncated=True),
    reward=RewardConfig(format=0.25, effort=0.5, accuracy=1.0, effort_from=10, effort_to=60),
)
# Sizes of `data`, `fsdp` and `tensor`.
MESHES = ((1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4))


@pytest.fixture(autouse=True, scope="module")
def quick_daily(request):
    """The long counts compile as a run does."""
    if request.config.option.markexpr != "soak":
        request.getfixturevalue("quick_compiles")


def cases(*daily, all_cases):
    """Parameters of a test; those that are not run daily are marked `soak`."""
    assert set(daily) <= set(all_cases)
    return [
        pytest.param(*case, marks=() if case in daily else pytest.mark.soak, id=str(case))
        for case in all_cases
    ]


@pytest.fixture(scope="module")
def params(tiny):
    """Parameters that do not magnify rounding. With the larger ones of `tiny.params` one device is
    off by BOUND too, where it adds the rows' gradients in another order."""

    def smaller(path, x):
        name = path[-1].key
        return np.asarray(x if name in ("scale", "embedding") else 0.6 * x)

    return jax.tree_util.tree_map_with_path(smaller, tiny.params())


def placed_on(tiny, sizes, sampling_tensor=None, apart=False, **runtime):
    mesh = tiny.mesh(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    placed = place(tiny.CONFIG, Runtime(**runtime), mesh, sampling_tensor=sampling_tensor)
    return dataclasses.replace(placed, model=tiny.apart(placed.model)) if apart else placed


def state_on(tiny, placed, params):
    """A state as a run has it, of copies, since a step takes its state's memory."""
    return tiny.place(new_state(params, OPTIMIZER), shardings_of(placed.like_state(OPTIMIZER)))


def programs_on(tiny, placed):
    return make_programs(
        placed,
        SETTINGS,
        OPTIMIZER,
        tiny.sample_config(SETTINGS.group, SETTINGS.temperature),
        score_config=SCORE,
        seed=SEED,
    )


def sixteen_rows(tiny):
    """Rows of one sample and rows of two, all different."""
    alone = [[number] for number in range(8)]
    packed = [[(number + 3) % 8, number] for number in range(8)]
    return tiny.sequences(alone + packed, prompt=48, completion=32, windows=10)


def sixteen_prompts(tiny):
    samples, facts = [*tiny.samples(), *tiny.samples()], list(range(100, 116))
    return tiny.COLLATOR.prompts(samples, facts, Shape(32, 5))


@pytest.fixture(scope="module")
def of_sft(tiny, params):
    """SFT's gradients and metrics on one device."""
    run = tiny.jit(lambda params, batch: sft_gradients(tiny.model(), params, batch, SCORE))
    return jax.device_get(run(params, sixteen_rows(tiny)))


@pytest.fixture(scope="module")
def of_score(tiny, params):
    """Completions of the sixteen prompts with their masks, whether they ended, and their
    log-probabilities on one device."""
    tokens, mask, ended = (np.concatenate([x, x[::-1]]) for x in tiny.completions())
    run = tiny.jit(
        lambda params, prompts: group_logprobs(
            tiny.model(), params, prompts, tokens, mask, tiny.ALLOWED, SCORE
        )[0]
    )
    return tokens, mask, ended, np.asarray(run(params, sixteen_prompts(tiny)))


@pytest.fixture(scope="module")
def group_batch(tiny, of_score):
    """A batch whose old, reference and sampler's numbers are near the parameters' own."""
    rng = np.random.default_rng(2)
    tokens, mask, ended, scored = of_score

    def near(spread):
        return (scored + spread * rng.standard_normal(scored.shape)).astype(np.float32)

    return GroupBatch(
        prompts=sixteen_prompts(tiny),
        tokens=tokens,
        mask=mask,
        weights=np.asarray(token_weights(mask, ended, SETTINGS.loss)),
        advantages=rng.standard_normal(mask.shape[:2]).astype(np.float32),
        sampler=near(0.05),
        old=near(0.2),
        reference=near(0.3),
    )


@pytest.fixture(scope="module")
def of_grpo(tiny, params, group_batch):
    """GRPO's gradients and metrics on one device."""
    run = tiny.jit(
        lambda params, batch: grpo_gradients(
            tiny.model(), params, batch, tiny.ALLOWED, SETTINGS.loss, SCORE
        )
    )
    return jax.device_get(run(params, group_batch))


def check_step(tiny, before, after, metrics, expected):
    """Compares a step with the gradients and the metrics of one device."""
    gradients, expected_metrics = expected
    # No tensor passes because there is nothing to compare, and each moves by far more than BOUND.
    for gradient, param in zip(*map(jax.tree.leaves, (gradients, before)), strict=True):
        assert RATE * np.abs(gradient).max() > 20 * BOUND * np.abs(param).max()
    tiny.assert_near(after.opt_state[0].trace, gradients, BOUND)
    stepped = jax.tree.map(lambda param, grad: np.asarray(param) - RATE * grad, before, gradients)
    tiny.assert_near(after.params, stepped, BOUND)
    compared = {name: metrics[name] for name in expected_metrics}
    tiny.assert_near(compared, expected_metrics, BOUND)
    np.testing.assert_allclose(metrics["grad_norm"], tiny.norm(gradients), rtol=BOUND)
    np.testing.assert_allclose(metrics["param_norm"], tiny.norm(stepped), rtol=BOUND)


def check_split(placed, state):
    """Every matrix is split over all devices that the rules name, optimizer's too."""
    sizes = placed.mesh.shape
    for head in (state.params["head"], state.opt_state[0].trace["head"]):
        parts = sizes["fsdp"] * sizes["tensor"]
        assert head.addressable_shards[0].data.size == head.size // parts


# Every mesh, and the widest with all that a layer may keep for the backward pass; those with copies
# of the parameters also as if these lay on several slices.
STEPS = [(sizes, "full", False) for sizes in MESHES]
STEPS += [(sizes, remat, False) for sizes in MESHES[-2:] for remat in ("none", "dots")]
STEPS += [((8, 1, 1), "full", True), ((2, 2, 2), "full", True), ((2, 2, 2), "none", True)]


@pytest.mark.parametrize(
    ("sizes", "remat", "apart"), cases(((2, 2, 2), "full", False), all_cases=STEPS)
)
def test_a_step_of_sft(tiny, params, of_sft, sizes, remat, apart):
    placed, batch = placed_on(tiny, sizes, apart=apart, remat=remat), sixteen_rows(tiny)
    step = sft_program(placed, OPTIMIZER, 2, SCORE.chunk)
    after, metrics = step(state_on(tiny, placed, params), {}, placed.put(batch))
    check_step(tiny, params, after, metrics, of_sft)
    check_split(placed, after)
    assert (after.step, metrics["skipped_updates"]) == (1, 0)
    # A photo that is not finite changes nothing on any device, but the batch is spent.
    kept = jax.device_get((after.params, after.opt_state))
    mean = batch.vision.mean.copy()
    mean[5, 0] = np.nan
    spoilt = batch._replace(vision=batch.vision._replace(mean=mean))
    left, metrics = step(after, {}, placed.put(spoilt))
    jax.tree.map(np.testing.assert_array_equal, (left.params, left.opt_state), kept)
    assert not np.isfinite(metrics["grad_norm"])
    assert (left.step, metrics["skipped_updates"]) == (2, 1)


@pytest.mark.parametrize(
    ("sizes", "remat", "apart"),
    cases(((1, 2, 4), "none", False), ((2, 2, 2), "full", True), all_cases=STEPS),
)
def test_an_update_of_grpo(tiny, params, group_batch, of_grpo, sizes, remat, apart):
    placed = placed_on(tiny, sizes, apart=apart, remat=remat)
    update = programs_on(tiny, placed).update
    after, metrics = update(
        state_on(tiny, placed, params), {}, placed.put(group_batch), tiny.ALLOWED
    )
    check_step(tiny, params, after, metrics, of_grpo)
    check_split(placed, after)
    # Rollouts are counted by the caller.
    assert (after.step, metrics["skipped_updates"]) == (0, 0)
    assert (metrics["not_finite"] == -1).all()
    # The importance weight's cap and the clip would hide an infinity: its update is skipped, too.
    kept, mask = jax.device_get(after.params), group_batch.mask
    drawn, padding = (tuple(np.argwhere(x)[-1]) for x in (mask, ~mask))
    for name, value in (("sampler", -np.inf), ("old", -np.inf), ("reference", np.nan)):
        for at, skipped in ((drawn, 1), (padding, 0)):
            spoilt = getattr(group_batch, name).copy()
            spoilt[at] = value
            given = placed.put(group_batch.replace(**{name: spoilt}))
            after, metrics = update(after, {}, given, tiny.ALLOWED)
            assert (tiny.distance(after.params, kept) == 0) == skipped
            kept = jax.device_get(after.params)
            assert metrics["skipped_updates"] == skipped
            expected = np.where(np.arange(16) == at[0], 100 + at[0], -1)
            np.testing.assert_array_equal(metrics["not_finite"], expected if skipped else -1)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.soak
def test_scores_of_completions(tiny, params, of_score, sizes):
    placed = placed_on(tiny, sizes)
    tokens, mask, _, expected = of_score
    params = tiny.place(params, placed.param_shardings)
    given = placed.put((sixteen_prompts(tiny), tokens, mask))
    ours = programs_on(tiny, placed).score(params, *given, tiny.ALLOWED)
    tiny.assert_near(ours, expected, BOUND)


@pytest.fixture(scope="module")
def of_samples(tiny):
    """Of random parameters and of some that favour good answers: the parameters, a scored rollout
    with its metrics, and the likeliest answers, on one device."""
    given = tiny.sample_config(), SETTINGS.reward, SETTINGS.scale_rewards, SEED
    rollout = tiny.jit(make_rollout(tiny.model(), *given))
    greedy = tiny.sampler(group=1, temperature=0.0)
    prompts, others = tiny.prompts(), (tiny.GRAMMAR, tiny.ALLOWED)
    keys = tiny.keys(SEED, np.int32(-1), prompts.fact, 1)
    return [
        (
            params,
            jax.device_get(rollout(params, prompts, *others, np.int32(STEP))),
            jax.device_get(greedy(params, prompts, keys, tiny.ALLOWED)),
        )
        for params in (tiny.params(), tiny.chain_params(6.0))
    ]


def check_samples(ours, theirs):
    for field in dataclasses.fields(theirs):
        a, b = getattr(ours, field.name), getattr(theirs, field.name)
        if field.name == "logprobs":
            np.testing.assert_allclose(a, b, atol=2e-5)
        else:
            np.testing.assert_array_equal(a, b, err_msg=field.name)


# Each mesh with all layouts for sampling that fit it, and layers in a scan or in a plain loop.
LAYOUTS = [
    (sizes, tensor, unroll)
    for sizes, tensors in zip(MESHES, ((1,), (1, 2, 4), (1, 2, 4), (2, 4), (4,)), strict=True)
    for tensor in tensors
    for unroll in (False, True)
]


@pytest.mark.parametrize(
    ("sizes", "tensor", "unroll"), cases(((2, 2, 2), 4, True), all_cases=LAYOUTS)
)
def test_samples(tiny, of_samples, sizes, tensor, unroll):
    """At temperature 1 as GRPO draws, and greedily as answers are evaluated."""
    placed = placed_on(tiny, sizes, tensor, decode_unroll=unroll)
    assert dict(placed.sampling_mesh.shape) == {"data": np.prod(sizes) // tensor, "tensor": tensor}
    rollout = programs_on(tiny, placed).rollout
    greedy = sampler_program(placed, tiny.sample_config(group=1, temperature=0.0), SEED)
    prompts, others = placed.put(tiny.prompts()), (tiny.GRAMMAR, tiny.ALLOWED)
    for params, (scored, expected), likeliest in of_samples:
        params = tiny.place(params, placed.param_shardings)
        encoded, params = placed.encode(params, prompts), placed.sampling.params(params)
        ours, metrics = fetch(rollout(params, encoded, *others, np.int32(STEP)))
        check_samples(ours.rollout, scored.rollout)
        np.testing.assert_allclose(ours.reward, scored.reward, rtol=1e-6)
        np.testing.assert_allclose(ours.advantages, scored.advantages, atol=BOUND)
        tiny.assert_near(metrics, expected, BOUND)
        check_samples(fetch(greedy(params, encoded, *others)), likeliest)
    # Neither is the same answer all over.
    assert len(np.unique(scored.rollout.tokens, axis=1)) > 1
    assert 0 < scored.rollout.format.mean() < 1
