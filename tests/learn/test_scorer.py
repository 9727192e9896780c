"""The trainer's log-probabilities: groups beside one prompt, and whole sequences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from morer1_jax.data.encoder import Sample
from morer1_jax.learn.scorer import ScoreConfig, last_valid, sequence_logprobs
from morer1_jax.model.attention import XLA
from morer1_jax.model.cudnn import CuDNN
from morer1_jax.model.splash import Splash

KERNELS = {"xla": XLA(), "splash": Splash(interpret=True), "cudnn": CuDNN("xla")}


# Of each kernel a program as a whole is tried daily, this one or the next; all else is soak's.
@pytest.mark.parametrize(
    "kernels", ["xla", "splash", pytest.param("cudnn", marks=pytest.mark.soak)]
)
def test_a_group_scores_as_its_completions_do_alone(tiny, kernels):
    """Value and gradient: prompt and images once a group, or once with each completion.

    Each kernel's group against XLA's rows; the completions' lengths are unequal, two are empty.
    """
    kernels = KERNELS[kernels]
    params, prompts = tiny.params(), tiny.prompts()
    tokens, mask, _ = tiny.completions()
    mask = mask.copy()
    mask[2, 1] = mask[5, 0] = False
    rows = [
        Sample("", made.prompt, tokens[b, g][mask[b, g]], made.images)
        for b, made in enumerate(tiny.samples())
        for g in range(tiny.GROUP)
        if mask[b, g].any()
    ]
    batch = tiny.TinyEncoder().sequences([[row] for row in rows])
    # Rows in order, and in a row the completion's tokens in order.
    counted = batch.weights > 0
    cotangent = np.random.default_rng(0).standard_normal(mask.shape).astype(np.float32) * mask
    alone_cotangent = np.zeros(counted.shape, np.float32)
    alone_cotangent[counted] = cotangent[mask]

    @tiny.jit
    def run(params):
        values, pull = jax.vjp(
            lambda params: sequence_logprobs(tiny.model(), params, batch, ScoreConfig(chunk=24)),
            params,
        )
        return values, pull((alone_cotangent, jnp.zeros_like(alone_cotangent)))[0]

    (logprobs, entropy), gradients = run(params)
    everything = np.ones_like(tiny.ALLOWED)
    ours = tiny.scorer(kernels=kernels)(params, prompts, tokens, mask, everything)
    np.testing.assert_allclose(ours[0][mask], logprobs[counted], atol=2e-5)
    np.testing.assert_allclose(ours[1][mask], entropy[counted], atol=2e-5)
    # Of the ids that cannot be sampled the group's gradient leaves the head alone.
    banned = np.array(tiny.BANNED)
    pulled = tiny.pullback(kernels)(params, prompts, tokens, mask, tiny.ALLOWED, cotangent)
    assert (pulled["head"][banned] == 0).all()
    assert np.abs(gradients["head"][banned]).max() > 0
    free = tiny.pullback(kernels)(params, prompts, tokens, mask, everything, cotangent)
    tiny.assert_near(free, gradients, 1e-5)


@pytest.mark.parametrize("kernels", ["cudnn", pytest.param("splash", marks=pytest.mark.soak)])
def test_packed_rows_by_every_kernel(tiny, kernels):
    """Rows of several samples with photos, and padding: SFT's log-probabilities and gradients."""
    params, batch = tiny.params(), tiny.sequences([[0, 1], [2], [4, 6], [7]])
    cotangent = np.random.default_rng(0).standard_normal(batch.weights.shape).astype(np.float32)

    @functools.partial(tiny.jit, static_argnums=1)
    def run(params, kernels):
        model = tiny.model(kernels=kernels)
        values, pull = jax.vjp(
            lambda params: sequence_logprobs(model, params, batch, ScoreConfig(chunk=24)), params
        )
        return values, pull((cotangent, jnp.zeros_like(cotangent)))[0]

    expected, wanted = run(params, XLA())
    values, gradients = run(params, KERNELS[kernels])
    np.testing.assert_allclose(values, expected, atol=2e-5)
    tiny.assert_near(gradients, wanted, 1e-5)


@pytest.mark.parametrize("seed", [0, 1], ids=["policy", "reference"])
def test_a_photo_matters_to_its_own_row_alone(tiny, seed):
    params, prompts = tiny.params(seed), tiny.prompts()
    tokens, mask, _ = tiny.completions()
    before, _ = tiny.scorer()(params, prompts, tokens, mask, tiny.ALLOWED)
    for row in (1, 3, 7):
        changed = tiny.with_photo(prompts, row)
        after, _ = tiny.scorer()(params, changed, tokens, mask, tiny.ALLOWED)
        difference = np.abs(after - before)
        assert difference[row][mask[row]].min() > 0
        assert difference[row][mask[row]].mean() > 1e-2
        rest = np.arange(tiny.PROMPTS) != row
        np.testing.assert_allclose(after[rest], before[rest], atol=1e-5)


def test_hidden_places_and_other_completions_do_not_matter(tiny):
    params, prompts = tiny.params(), tiny.prompts()
    tokens, mask, _ = tiny.completions()
    before, _ = tiny.scorer()(params, prompts, tokens, mask, tiny.ALLOWED)
    filled = np.where(mask, tokens, tiny.IMAGE)
    after, _ = tiny.scorer()(params, prompts, filled, mask, tiny.ALLOWED)
    np.testing.assert_array_equal(after[mask], before[mask])
    changed = tokens.copy()
    changed[:, 1] = (changed[:, 1] + 1) % tiny.END
    after, _ = tiny.scorer()(params, prompts, changed, mask, tiny.ALLOWED)
    others = np.array([0, 2, 3])
    np.testing.assert_allclose(
        after[:, others][mask[:, others]], before[:, others][mask[:, others]], atol=1e-5
    )
    assert np.abs(after - before)[:, 1][mask[:, 1]].min() > 0


def test_last_valid():
    hidden = jnp.arange(24.0).reshape(4, 6, 1)
    mask = np.array([[1, 0, 0, 0, 0, 0], [1] * 6, [0, 0, 1, 1, 0, 0], [1, 0, 1, 0, 1, 0]], bool)
    np.testing.assert_array_equal(last_valid(hidden, mask)[:, 0], [0, 11, 15, 22])


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"chunk": 0}])
def test_nonsense_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ScoreConfig(**wrong)
