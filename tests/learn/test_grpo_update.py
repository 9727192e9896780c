"""GRPO's gradients through the model: parts, photos, and the first update."""

import dataclasses

import jax
import numpy as np
import pytest

from morer1_jax.learn.grpo import (
    GroupBatch,
    LossConfig,
    grpo_gradients,
    token_weights,
)
from morer1_jax.model.scorer import ScoreConfig

CONFIG = LossConfig(beta=0.05, clip_low=0.1, clip_high=0.15, mask_truncated=True)
SCORE = ScoreConfig(chunk=192)


@pytest.fixture(scope="module")
def learn(tiny):
    """`learn(config, micro_batches, remat)`: compiled `(params, batch) -> (gradients, metrics)`."""
    programs = {}

    def learn(config=CONFIG, micro_batches=1, remat="none"):
        key = config, micro_batches, remat
        if key not in programs:
            runtime = dataclasses.replace(tiny.model().runtime, remat=remat)
            model = tiny.model().clone(runtime=runtime)
            programs[key] = tiny.jit(
                lambda params, batch: grpo_gradients(
                    model, params, batch, tiny.ALLOWED, config, SCORE, micro_batches
                )
            )
        return programs[key]

    return learn


@pytest.fixture
def scored(tiny):
    """Log-probabilities of the tiny completions under the parameters."""
    tokens, mask, _ = tiny.completions()
    asked = (tiny.prompts(), tokens, mask, tiny.ALLOWED)
    nothing = np.zeros(mask.shape, np.float32)
    return np.asarray(tiny.pullback()(tiny.params(), *asked, nothing)[0][0])


@pytest.fixture
def batch(tiny, scored):
    """A batch whose old, reference and sampler's numbers are near the parameters' own."""
    rng = np.random.default_rng(2)
    tokens, mask, ended = tiny.completions()

    def near(spread):
        return (scored + spread * rng.standard_normal(scored.shape)).astype(np.float32)

    return GroupBatch(
        prompts=tiny.prompts(),
        tokens=tokens,
        mask=mask,
        weights=np.asarray(token_weights(mask, ended, CONFIG)),
        advantages=rng.standard_normal(mask.shape[:2]).astype(np.float32),
        sampler=near(0.05),
        old=near(0.2),
        reference=near(0.3),
    )


def test_gradients_go_through_the_scorer(tiny, learn, batch, scored):
    """The chain rule: the formula's slope at each token, pulled back through the model."""
    gradients, metrics = learn()(tiny.params(), batch)
    new = scored.astype(np.float64)
    advantage = batch.advantages[..., None].astype(np.float64)
    ratio = np.exp(new - batch.old)
    clipped = ((advantage > 0) & (ratio > 1.15)) | ((advantage < 0) & (ratio < 0.9))
    slope = np.where(clipped, 0.0, -ratio * advantage)
    slope *= np.minimum(np.exp(batch.old - batch.sampler), 2.0)
    slope += 0.05 * (1 - np.exp(batch.reference - new))
    slope *= batch.weights
    cotangent = np.where(batch.mask, slope, 0).astype(np.float32)
    asked = (batch.prompts, batch.tokens, batch.mask, tiny.ALLOWED)
    _, expected = tiny.pullback()(tiny.params(), *asked, cotangent)
    tiny.assert_near(gradients, expected, 2e-5)
    assert min(metrics["clip_ratio/low_mean"], metrics["clip_ratio/high_mean"]) > 0.05


def test_micro_batches_do_not_matter(tiny, learn, batch):
    """Metrics too, the greatest difference among them, whichever part has it."""
    whole = learn()(tiny.params(), batch)
    tiny.assert_near(learn(micro_batches=8)(tiny.params(), batch), whole, 1e-5)
    # In sums that each backward pass adds to (`model.running`).
    tiny.assert_near(learn(micro_batches=4, remat="full")(tiny.params(), batch), whole, 1e-5)
    assert whole[1]["sampling/sampling_logp_difference/max"] > 0


def test_prompts_that_share_rows_of_images_train_as_those_with_their_own(tiny, learn, batch):
    """Tower and all, also in parts, which split no row of images."""
    whole = learn()(tiny.params(), batch)
    shared = batch.replace(prompts=tiny.prompts(sharing=2))
    assert len(shared.prompts.vision.patches) == tiny.PROMPTS // 2
    tiny.assert_near(learn(micro_batches=2)(tiny.params(), shared), whole, 1e-5)
    # Another's photo is not one's own.
    order = [1, 0, *range(2, tiny.PROMPTS)]
    index = shared.prompts.vision_index[order]
    mixed = shared.replace(prompts=shared.prompts._replace(vision_index=index))
    gradients, _ = learn(micro_batches=2)(tiny.params(), mixed)
    assert tiny.distance(gradients["language"], whole[0]["language"]) > 1e-2


def test_a_photo_matters(tiny, learn, batch):
    before, metrics = learn()(tiny.params(), batch)
    swapped = batch.replace(prompts=tiny.with_photo(batch.prompts, 5))
    after, changed = learn()(tiny.params(), swapped)
    assert abs(changed["loss"] - metrics["loss"]) > 1e-3
    for name in ("vision", "language"):
        assert tiny.distance(after[name], before[name]) > 1e-2
    # The photo of a row whose tokens do not count does not.
    weights = batch.weights * (np.arange(tiny.PROMPTS) != 5)[:, None, None]
    without = learn()(tiny.params(), batch.replace(weights=weights))
    again = learn()(tiny.params(), swapped.replace(weights=weights))
    tiny.assert_near(again, without, 1e-6)


def test_the_first_update_is_on_policy(tiny, learn, batch, scored):
    """Old left out: a ratio of exactly 1. Old from the scorer's program: the same but for noise."""
    # Narrow enough to catch a ratio that is off by more than a rounding.
    narrow = dataclasses.replace(CONFIG, clip_low=1e-7, clip_high=1e-7, beta=0.0)
    for sign in (1, -1):
        first = batch.replace(old=None, reference=None, advantages=sign * batch.advantages)
        gradients, metrics = learn(narrow)(tiny.params(), first)
        assert metrics["clip_ratio/low_mean"] == metrics["clip_ratio/high_mean"] == 0
    # The reference is the policy itself, whose KL is nothing.
    later = first.replace(old=scored, reference=scored)
    same, seen = learn()(tiny.params(), later)
    assert seen["clip_ratio/region_mean"] == 0
    assert abs(seen["kl"]) < 1e-8
    np.testing.assert_allclose(seen["loss"], metrics["loss"], atol=1e-6)
    tiny.assert_near(same, gradients, 2e-5)


def test_groups_of_equal_rewards_give_nothing(tiny, learn, batch):
    config = dataclasses.replace(CONFIG, clip_low=1e-7, clip_high=1e-7, beta=0.0)
    equal = batch.replace(old=None, reference=None, advantages=np.zeros_like(batch.advantages))
    gradients, metrics = learn(config)(tiny.params(), equal)
    assert metrics["loss"] == 0
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradients))


def test_a_fully_masked_batch_is_zero(tiny, learn, batch):
    nothing = np.zeros_like(batch.mask)
    cut = batch.replace(weights=np.asarray(token_weights(batch.mask, nothing[..., 0], CONFIG)))
    empty = batch.replace(
        mask=nothing,
        weights=np.asarray(token_weights(nothing, ~nothing[..., 0], CONFIG)),
        tokens=np.full_like(batch.tokens, tiny.IMAGE),
        old=np.full_like(batch.old, -1e30),
        reference=np.full_like(batch.old, -1e30),
    )
    for masked in (cut, empty):
        for micro_batches in (1, 8):
            gradients, metrics = learn(micro_batches=micro_batches)(tiny.params(), masked)
            assert all(value == 0 for value in metrics.values())
            assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradients))
