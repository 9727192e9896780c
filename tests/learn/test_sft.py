"""SFT's loss and gradients: what they are the mean of, and what must not change them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from morer1_jax.learn.sft import sft_gradients
from morer1_jax.model.attention import PackedCausal
from morer1_jax.model.scorer import ScoreConfig
from morer1_jax.model.vision import VisionInputs

SCORE = ScoreConfig(temperature=0.5, chunk=160)  # the temperature is of sampling alone


def in_rows(tiny, rows=None):
    """Samples as `tiny.sequences` has them, with room for several in a row; so that all batches
    are of one shape, eight rows."""
    return tiny.sequences(rows, prompt=48, completion=32, windows=10)


@pytest.fixture(scope="module")
def learn(tiny):
    """`learn(micro_batches)`: compiled `(params, batch) -> (gradients, metrics)`."""
    programs = {}

    def learn(micro_batches=1):
        if micro_batches not in programs:
            programs[micro_batches] = tiny.jit(
                lambda params, batch: sft_gradients(
                    tiny.model(), params, batch, SCORE, micro_batches
                )
            )
        return programs[micro_batches]

    return learn


def test_loss_is_the_mean_over_target_tokens(tiny, learn):
    """Against a loss written down here over whole logits, value and gradient."""
    params, batch = tiny.params(), in_rows(tiny)
    counts = batch.weights.sum(1)
    np.testing.assert_array_equal(counts, 1 + 2 * np.arange(tiny.PROMPTS))

    def loss(params):
        attend = PackedCausal(jnp.asarray(batch.segment_ids))
        positions = np.moveaxis(batch.positions, 1, 0)
        images = VisionInputs.of(batch.vision, tiny.CONFIG.vision.temporal_patch_size)
        logits = tiny.model().apply(
            {"params": params},
            method=lambda m: m.logits(
                m(batch.tokens, positions, attend, images, batch.vision_index)
            ),
        )
        logprobs = jax.nn.log_softmax(logits)
        entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
        each = -jnp.take_along_axis(logprobs, batch.targets[..., None], axis=-1)[..., 0]
        counted = jnp.where(batch.weights > 0, each, 0.0)
        total = jnp.sum(counted) / int(counts.sum())
        rows = jnp.mean(jnp.sum(counted, axis=1) / counts)
        return total, (rows, jnp.sum(entropy * batch.weights) / int(counts.sum()))

    (expected, (of_rows, entropy)), wanted = tiny.jit(jax.value_and_grad(loss, has_aux=True))(
        params
    )
    gradients, metrics = learn()(params, batch)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["entropy"], entropy, rtol=1e-5)
    assert metrics["target_tokens"] == counts.sum()
    assert abs(of_rows - expected) > 1e-3
    tiny.assert_near(gradients, wanted, 1e-5)


def test_micro_batches_do_not_matter(tiny, learn):
    params, batch = tiny.params(), in_rows(tiny)
    tiny.assert_near(learn(8)(params, batch), learn(1)(params, batch), 1e-5)


def test_packing_does_not_matter(tiny, learn):
    params = tiny.params()
    # Filled up with rows that do not count.
    packed = in_rows(tiny, [[5, 0], [7], [2, 6, 1], [4, 3], *[[0]] * 4])
    packed = packed._replace(weights=packed.weights * (np.arange(8) < 4)[:, None])
    assert packed.segment_ids.max() == 3
    tiny.assert_near(learn()(params, packed), learn()(params, in_rows(tiny)), 1e-5)


def test_a_photo_matters(tiny, learn):
    params, batch = tiny.params(), in_rows(tiny)
    before, metrics = learn()(params, batch)
    after, changed = learn()(params, tiny.with_photo(batch, 5))
    assert abs(changed["loss"] - metrics["loss"]) > 1e-4
    for name in ("vision", "language"):
        assert tiny.distance(after[name], before[name]) > 1e-2
    # The photo of a row whose loss does not count does not.
    weights = batch.weights * (np.arange(tiny.PROMPTS) != 5)[:, None]
    batch = batch._replace(weights=weights)
    without = learn()(params, batch)
    tiny.assert_near(learn()(params, tiny.with_photo(batch, 5)), without, 1e-6)


def test_a_batch_without_targets_is_zero(tiny, learn):
    batch = in_rows(tiny)
    batch = batch._replace(weights=np.zeros_like(batch.weights))
    for micro_batches in (1, 8):
        gradients, metrics = learn(micro_batches)(tiny.params(), batch)
        assert all(value == 0 for value in metrics.values())
        assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradients))
