"""GRPO's loss by tokens against float64 NumPy written from the formula; no model takes part."""

import dataclasses
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from morer1_jax.learn import grpo
from morer1_jax.learn.grpo import (
    GroupBatch,
    LossConfig,
    combined_metrics,
    grpo_gradients,
    token_weights,
)
from morer1_jax.model.scorer import ScoreConfig

NORMALISATIONS = ("sequence", "token", "constant")
B, G, T = 3, 6, 6


@pytest.fixture
def gradients_of(tiny, monkeypatch):
    """`gradients_of(batch, new, config)`: gradient by the new log-probabilities, and metrics.

    The scorer is replaced by the numbers themselves, which stand in for the parameters.
    """
    monkeypatch.setattr(
        grpo,
        "group_logprobs",
        lambda model, params, *rest: (params["new"], jnp.full_like(params["new"], 0.5)),
    )

    def run(batch, new, config):
        params = {"new": jnp.asarray(new)}
        gradients, metrics = grpo_gradients(
            tiny.model(), params, batch, None, config, ScoreConfig()
        )
        return gradients["new"], metrics

    return run


@pytest.fixture(scope="module")
def data():
    """Log-probabilities such that many ratios are beyond either clip, for either sign of A."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, T + 1, (B, G))
    lengths[0, :2] = (1, T)
    mask = np.arange(T) < lengths[..., None]
    advantages = rng.standard_normal((B, G))
    advantages[1] = 0.0
    new = -rng.gamma(2.0, size=(B, G, T))
    near = [new + 0.6 * rng.standard_normal(new.shape) for _ in range(3)]
    return types.SimpleNamespace(
        mask=mask,
        ended=(lengths < T) | (rng.random((B, G)) < 0.3),
        advantages=advantages,
        new=new,
        old=near[0],
        reference=near[1],
        sampler=near[2],
    )


def make_batch(data, config, dtype=np.float32, **changes):
    """A batch of what the data holds, without reference where beta is 0."""
    values = vars(data) | changes
    cast = {
        name: None if values[name] is None else jnp.asarray(values[name], dtype)
        for name in ("advantages", "sampler", "old", "reference")
    }
    if not config.beta:
        cast["reference"] = None
    weights = token_weights(jnp.asarray(data.mask), jnp.asarray(data.ended), config)
    return GroupBatch(
        prompts=None,
        tokens=jnp.zeros(data.mask.shape, jnp.int32),
        mask=jnp.asarray(data.mask),
        weights=weights.astype(dtype),
        **cast,
    )


def numpy_grpo(data, config):
    """Loss, gradient by `new`, and metrics, a token at a time in float64."""
    kept = data.ended | (not config.mask_truncated)
    tokens = sum(data.mask[i].sum() for i in np.ndindex(B, G) if kept[i])
    loss, gradient = 0.0, np.zeros((B, G, T))
    seen = dict.fromkeys(("kl", "low", "high", "difference", "largest"), 0.0)
    for i in np.ndindex(B, G):
        advantage = data.advantages[i]
        length = data.mask[i].sum()
        for t in range(length if kept[i] else 0):
            weight = {
                "sequence": 1 / (length * B * G),
                "token": 1 / tokens,
                "constant": 1 / (B * G * T),
            }[config.normalisation]
            new, old, sampler = data.new[i][t], data.old[i][t], data.sampler[i][t]
            ratio = np.exp(new - old)
            # A gain counts up to the upper clip, a loss down to the lower one.
            too_high = advantage > 0 and ratio > 1 + config.clip_high
            too_low = advantage < 0 and ratio < 1 - config.clip_low
            used = 1 + config.clip_high if too_high else 1 - config.clip_low if too_low else ratio
            value = -used * advantage
            slope = 0.0 if too_high or too_low else -ratio * advantage
            if config.importance_cap is not None:
                factor = min(np.exp(old - sampler), config.importance_cap)
                value, slope = value * factor, slope * factor
            if config.beta:
                towards = data.reference[i][t] - new
                kl = np.exp(towards) - towards - 1
                value += config.beta * kl
                slope += config.beta * (1 - np.exp(towards))
                seen["kl"] += kl / tokens
            loss += weight * value
            gradient[i][t] = weight * slope
            seen["low"] += too_low / tokens
            seen["high"] += too_high / tokens
            seen["difference"] += abs(old - sampler) / tokens
            seen["largest"] = max(seen["largest"], abs(old - sampler))
    return loss, gradient, seen


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_loss_and_gradient_are_the_formulas(gradients_of, data, normalisation):
    for beta, cap, mask_truncated in itertools.product((0.0, 0.1), (None, 1.2), (False, True)):
        config = LossConfig(
            beta=beta,
            importance_cap=cap,
            mask_truncated=mask_truncated,
            normalisation=normalisation,
        )
        gradient, metrics = gradients_of(
            make_batch(data, config), data.new.astype(np.float32), config
        )
        loss, expected, seen = numpy_grpo(data, config)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(gradient, expected, atol=1e-5 * np.abs(expected).max())
        assert min(seen["low"], seen["high"]) > 0.02
        wanted = {
            "loss": loss,
            "entropy": 0.5,
            "clip_ratio/low_mean": seen["low"],
            "clip_ratio/high_mean": seen["high"],
            "clip_ratio/region_mean": seen["low"] + seen["high"],
            "sampling/sampling_logp_difference/mean": seen["difference"],
            "sampling/sampling_logp_difference/max": seen["largest"],
        }
        if beta:
            wanted["kl"] = seen["kl"]
        assert metrics.keys() == wanted.keys()
        for name, value in wanted.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_the_caps_are_both_at_work(data):
    """The cases above differ: the cap cuts some weights and not others."""
    weights = np.exp(data.old - data.sampler)[data.mask]
    assert 0.1 < np.mean(weights > 1.2) < 0.9
    assert 0.1 < np.mean(~data.ended) < 0.9


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_the_first_update_has_a_ratio_of_exactly_1(gradients_of, data, advantage):
    """Under a clip range without width any other ratio would count as clipped, or cost more."""
    config = LossConfig(clip_low=0.0, clip_high=0.0, importance_cap=None, normalisation="constant")
    batch = make_batch(data, config, old=None, advantages=np.full((B, G), advantage))
    _, metrics = gradients_of(batch, data.new.astype(np.float32), config)
    assert metrics["clip_ratio/region_mean"] == 0
    assert metrics["loss"] == jnp.sum(-advantage * batch.weights)


def test_the_first_update_follows_the_policy_gradient(gradients_of, data):
    config = LossConfig(importance_cap=None)
    batch = make_batch(data, config, old=None)
    gradient, _ = gradients_of(batch, data.new.astype(np.float32), config)
    np.testing.assert_array_equal(gradient, -batch.advantages[..., None] * batch.weights)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_the_importance_weight_leaves_the_kl_alone(gradients_of, data, normalisation):
    """Where nothing is gained or lost the loss is beta times the KL, whatever the sampler drew."""
    loss = {}
    for cap in (None, 0.5, 2.0):
        config = LossConfig(beta=0.1, importance_cap=cap, normalisation=normalisation)
        batch = make_batch(data, config, advantages=np.zeros((B, G)))
        loss[cap] = gradients_of(batch, data.new.astype(np.float32), config)
    for cap in (0.5, 2.0):
        jax.tree.map(np.testing.assert_array_equal, loss[cap], loss[None])
    if normalisation == "token":
        _, metrics = loss[2.0]
        np.testing.assert_allclose(metrics["loss"], 0.1 * metrics["kl"], rtol=1e-6)


def test_several_updates_metrics():
    """The greatest difference of a rollout is no mean of each update's greatest."""
    name = "sampling/sampling_logp_difference/"
    updates = [
        {"kl": np.float32(kl), f"{name}mean": np.float32(0.1), f"{name}max": np.float32(most)}
        for kl, most in ((0.0, 1.0), (1.0, 5.0), (2.0, 3.0))
    ]
    combined = combined_metrics(updates)
    assert combined.keys() == updates[0].keys()
    np.testing.assert_allclose([combined["kl"], combined[f"{name}mean"]], [1.0, 0.1], rtol=1e-6)
    assert combined[f"{name}max"] == 5.0


def test_what_updates_skipped_is_summed_and_what_they_name_is_kept():
    """One of two was skipped, for its second group; neither is lost in a mean."""
    updates = [
        {"skipped_updates": jnp.int32(skipped), "not_finite": jnp.asarray(facts, jnp.int32)}
        for skipped, facts in ((0, [-1, -1, 4]), (1, [-1, 7, -1]))
    ]
    combined = combined_metrics(updates)
    assert combined["skipped_updates"] == 1
    assert combined["not_finite"].tolist() == [-1, 7, 4]


@pytest.mark.parametrize("beta", [0.04, 1.0])
def test_the_gradient_of_kl_by_finite_differences(tiny, gradients_of, data, beta):
    config = LossConfig(beta=beta, importance_cap=None, normalisation="sequence")
    with jax.enable_x64():
        batch = make_batch(data, config, np.float64, old=None, advantages=np.zeros((B, G)))
        gradient, metrics = gradients_of(batch, data.new, config)
        assert gradient.dtype == np.float64
        assert metrics["kl"] > 0.05
        loss = tiny.jit(lambda new: gradients_of(batch, new, config)[1]["loss"])
        for i in np.ndindex(B, G, T):
            step = np.zeros((B, G, T))
            step[i] = 1e-5
            slope = (loss(data.new + step) - loss(data.new - step)) / 2e-5
            np.testing.assert_allclose(gradient[i], slope, rtol=1e-6, atol=1e-10)
    # Least, and level, where the two agree.
    level = make_batch(data, config, old=None, reference=data.new, advantages=np.zeros((B, G)))
    gradient, metrics = gradients_of(level, data.new.astype(np.float32), config)
    assert metrics["loss"] == 0
    assert (np.asarray(gradient) == 0).all()


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_weights(data, normalisation):
    config = LossConfig(normalisation=normalisation, mask_truncated=True)
    mask, ended = jnp.asarray(data.mask), jnp.asarray(data.ended)
    weights = np.asarray(token_weights(mask, ended, config))
    counted = data.mask & data.ended[..., None]
    assert weights.dtype == np.float32
    np.testing.assert_array_equal(weights > 0, counted)
    expected = {
        "sequence": data.ended.mean(),
        "token": 1.0,
        "constant": counted.mean(),
    }
    np.testing.assert_allclose(weights.sum(), expected[normalisation], rtol=1e-6)
    nothing = token_weights(mask, jnp.zeros_like(ended), config)
    assert (np.asarray(nothing) == 0).all()
    # Truncated completions count unless masked.
    config = dataclasses.replace(config, mask_truncated=False)
    weights = np.asarray(token_weights(mask, jnp.zeros_like(ended), config))
    np.testing.assert_array_equal(weights > 0, data.mask)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_groups_of_equal_rewards(gradients_of, data, normalisation):
    """They give nothing, yet count in the denominators: the rest's step is not raised."""
    config = LossConfig(normalisation=normalisation)
    none = make_batch(data, config, advantages=np.zeros((B, G)))
    gradient, metrics = gradients_of(none, data.new.astype(np.float32), config)
    assert metrics["loss"] == 0
    assert (np.asarray(gradient) == 0).all()
    gradient, _ = gradients_of(make_batch(data, config), data.new.astype(np.float32), config)
    assert (np.asarray(gradient)[1] == 0).all()
    kept = [0, 2]
    fewer = jax.tree.map(lambda x: x[np.array(kept)], make_batch(data, config))
    rest = token_weights(fewer.mask, jnp.asarray(data.ended[kept]), config)
    alone, _ = gradients_of(fewer.replace(weights=rest), data.new[kept].astype(np.float32), config)
    tokens = data.mask.sum((1, 2))
    share = tokens[kept].sum() / tokens.sum() if normalisation == "token" else len(kept) / B
    np.testing.assert_allclose(np.asarray(gradient)[kept], alone * share, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_a_fully_masked_batch_is_zero(gradients_of, data, normalisation):
    config = LossConfig(normalisation=normalisation, mask_truncated=True, beta=0.1)
    cut = types.SimpleNamespace(**vars(data) | {"ended": np.zeros((B, G), bool)})
    empty = types.SimpleNamespace(**vars(data) | {"mask": np.zeros((B, G, T), bool)})
    for nothing in (cut, empty):
        batch = make_batch(nothing, config)
        gradient, metrics = gradients_of(batch, data.new.astype(np.float32), config)
        assert all(value == 0 for value in metrics.values())
        assert (np.asarray(gradient) == 0).all()


def test_numbers_beyond_a_completions_end_are_not_read(gradients_of, data):
    """A place without a token may hold that of an id that cannot be sampled, about -1e30."""
    config = LossConfig(beta=0.1)
    batch = make_batch(data, config)
    expected = gradients_of(batch, data.new.astype(np.float32), config)
    worst = {
        name: jnp.where(batch.mask, getattr(batch, name), value)
        for value in (-1e30, np.nan)
        for name in ("old", "reference", "sampler")
    }
    new = np.where(data.mask, data.new, -1e30).astype(np.float32)
    jax.tree.map(
        np.testing.assert_array_equal, gradients_of(batch.replace(**worst), new, config), expected
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"normalisation": "mean"}, "expected one of .*constant, found 'mean'"),
        ({"importance_cap": 0.0}, "expected above 0, found 0.0"),
    ],
)
def test_nonsense_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**wrong)
