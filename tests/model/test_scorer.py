"""The trainer's log-probabilities: groups beside one prompt, and whole sequences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from morer1_jax.data.sample import Sample
from morer1_jax.data.shapes import Shape
from morer1_jax.model.attention import XLA
from morer1_jax.model.cudnn import CuDNN
from morer1_jax.model.scorer import ScoreConfig, last_valid, sequence_logprobs
from morer1_jax.model.splash import Splash

KERNELS = {"xla": XLA(), "splash": Splash(interpret=True), "cudnn": CuDNN("xla")}


@pytest.fixture(scope="module")
def of_rows(tiny):
    """`of_rows(kernels)`: as `tiny.pullback`, of whole rows; `(params, batch, cotangent)`."""

    @functools.cache
    def compiled(kernels):
        def run(params, batch, cotangent):
            model = tiny.model(kernels=kernels)
            values, pull = jax.vjp(
                lambda params: sequence_logprobs(model, params, batch, ScoreConfig(chunk=192)),
                params,
            )
            return values, pull((cotangent, jnp.zeros_like(cotangent)))[0]

        return tiny.jit(run)

    return compiled


@pytest.fixture(scope="module")
def alone(tiny, of_rows):
    """Completions of unequal lengths, two of them empty: their mask, a cotangent of their
    log-probabilities, and values and gradients of each by itself, by XLA's kernels."""
    tokens, mask, _ = tiny.completions()
    mask = mask.copy()
    mask[2, 1] = mask[5, 0] = False
    rows = [
        Sample("", made.prompt, tokens[b, g][mask[b, g]], made.images, 0)
        for b, made in enumerate(tiny.samples())
        for g in range(tiny.GROUP)
        if mask[b, g].any()
    ]
    batch = tiny.COLLATOR.sequences([[row] for row in rows], Shape(32 + tiny.LENGTH, 5))
    # Rows in order, and in a row the completion's tokens in order.
    counted = batch.weights > 0
    cotangent = np.random.default_rng(0).standard_normal(mask.shape).astype(np.float32) * mask
    alone_cotangent = np.zeros(counted.shape, np.float32)
    alone_cotangent[counted] = cotangent[mask]
    values, gradients = of_rows(XLA())(tiny.params(), batch, alone_cotangent)
    return mask, cotangent, [np.asarray(value)[counted] for value in values], gradients


# Of each kernel a program as a whole is tried daily, this one or the next; all else is soak's.
@pytest.mark.parametrize(
    "kernels", ["xla", "splash", pytest.param("cudnn", marks=pytest.mark.soak)]
)
def test_a_group_scores_as_its_completions_do_alone(tiny, alone, kernels):
    """Value and gradient: prompt and images once a group, or once with each completion.

    Each kernel's group against XLA's rows.
    """
    mask, cotangent, (logprobs, entropy), gradients = alone
    tokens, _, _ = tiny.completions()
    run = tiny.pullback(KERNELS[kernels])
    asked = tiny.params(), tiny.prompts(), tokens, mask
    ours, free = run(*asked, np.ones_like(tiny.ALLOWED), cotangent)
    np.testing.assert_allclose(np.asarray(ours[0])[mask], logprobs, atol=2e-5)
    np.testing.assert_allclose(np.asarray(ours[1])[mask], entropy, atol=2e-5)
    tiny.assert_near(free, gradients, 1e-5)
    # Of the ids that cannot be sampled the group's gradient leaves the head alone.
    banned = np.array(tiny.BANNED)
    _, pulled = run(*asked, tiny.ALLOWED, cotangent)
    assert (np.asarray(pulled["head"])[banned] == 0).all()
    assert np.abs(np.asarray(gradients["head"])[banned]).max() > 0


@pytest.mark.parametrize("kernels", ["cudnn", pytest.param("splash", marks=pytest.mark.soak)])
def test_packed_rows_by_every_kernel(tiny, of_rows, kernels):
    """Rows of several samples with photos, and padding: SFT's log-probabilities and gradients."""
    # As many rows as the completions alone, whose program is compiled already.
    batch = tiny.sequences([[0, 1], [2], [4, 6], [7], *[[3]] * 26])
    assert batch.segment_ids.max() == 2
    cotangent = np.random.default_rng(0).standard_normal(batch.weights.shape).astype(np.float32)
    given = tiny.params(), batch, cotangent
    (expected, wanted), (values, gradients) = (
        of_rows(how)(*given) for how in (XLA(), KERNELS[kernels])
    )
    np.testing.assert_allclose(values, expected, atol=2e-5)
    tiny.assert_near(gradients, wanted, 1e-5)


def scored(tiny, params, prompts, tokens, mask):
    """Log-probabilities, by the program that has their gradient too."""
    nothing = np.zeros(mask.shape, np.float32)
    values, _ = tiny.pullback()(params, prompts, tokens, mask, tiny.ALLOWED, nothing)
    return np.asarray(values[0])


@pytest.mark.parametrize("seed", [0, 1], ids=["policy", "reference"])
def test_a_photo_matters_to_its_own_row_alone(tiny, seed):
    params, prompts = tiny.params(seed), tiny.prompts()
    tokens, mask, _ = tiny.completions()
    before = scored(tiny, params, prompts, tokens, mask)
    for row in (1, 3, 7):
        changed = tiny.with_photo(prompts, row)
        after = scored(tiny, params, changed, tokens, mask)
        difference = np.abs(after - before)
        assert difference[row][mask[row]].min() > 0
        assert difference[row][mask[row]].mean() > 1e-2
        rest = np.arange(tiny.PROMPTS) != row
        np.testing.assert_allclose(after[rest], before[rest], atol=1e-5)


def test_hidden_places_and_other_completions_do_not_matter(tiny):
    params, prompts = tiny.params(), tiny.prompts()
    tokens, mask, _ = tiny.completions()
    before = scored(tiny, params, prompts, tokens, mask)
    filled = np.where(mask, tokens, tiny.IMAGE)
    after = scored(tiny, params, prompts, filled, mask)
    np.testing.assert_array_equal(after[mask], before[mask])
    changed = tokens.copy()
    changed[:, 1] = (changed[:, 1] + 1) % tiny.END
    after = scored(tiny, params, prompts, changed, mask)
    others = np.array([0, 2, 3])
    np.testing.assert_allclose(
        after[:, others][mask[:, others]], before[:, others][mask[:, others]], atol=1e-5
    )
    assert np.abs(after - before)[:, 1][mask[:, 1]].min() > 0


def test_last_valid():
    hidden = jnp.arange(24.0).reshape(4, 6, 1)
    mask = np.array([[1, 0, 0, 0, 0, 0], [1] * 6, [0, 0, 1, 1, 0, 0], [1, 0, 1, 0, 1, 0]], bool)
    np.testing.assert_array_equal(last_valid(hidden, mask)[:, 0], [0, 11, 15, 22])


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"temperature": np.inf}, {"chunk": 0}])
def test_nonsense_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ScoreConfig(**wrong)
