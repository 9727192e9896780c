"""Tokens drawn from logits, and those that guided sampling permits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from morer1_jax.rollout.draw import draw_token, inverse_cdf, leads_to_end


@pytest.mark.parametrize("value", [-np.inf, np.nan, np.inf])
@pytest.mark.parametrize("temperature", [1.0, 0.0], ids=["sampled", "greedy"])
def test_what_is_drawn_without_probabilities_has_no_finite_log_probability(
    tiny, value, temperature
):
    """All ids that are allowed have this logit; those that are not have better ones."""
    allowed = np.arange(6) < 3
    logits = np.broadcast_to(np.where(allowed, value, 2.0), (1, 2, 6)).astype(np.float32)
    keys = tiny.keys(0, np.int32(0), np.zeros(1, np.int32), 2)
    pick = tiny.jit(draw_token, static_argnums=4)
    _, logprob = pick(logits, allowed, keys, np.int32(0), temperature)
    assert not np.isfinite(logprob).any()
    logits[..., 1] = 3.0
    _, logprob = pick(logits, allowed, keys, np.int32(0), temperature)
    np.testing.assert_allclose(logprob, 0.0 if value == -np.inf else np.nan)


def test_guided_permits_what_leads_to_the_end_and_nothing_else(tiny):
    """Against the tables followed token by token, from every pair of states that occurs."""
    tables, vocabulary = tiny.TABLES, range(tiny.ROWS)
    follow = [[]]
    for _ in range(3):
        follow += [[*tokens, v] for tokens in follow for v in (1, 2, 3, 9, 14, tiny.END)]
    begun = [list(range(1, k)) for k in range(2, 14)]
    texts = [*follow[:200], *begun, [*begun[-1], 13]]
    steps, answer = np.array([_states(tables, tokens) for tokens in texts]).T
    distances = [
        [_distance(tables, *_states(tables, [*tokens, v])) for v in vocabulary] for tokens in texts
    ]
    for left in (0, 1, 3, 11, 20):
        ours = leads_to_end(tiny.GRAMMAR, steps[:, None], answer[:, None], left)
        np.testing.assert_array_equal(ours[:, 0], np.array(distances) <= left)


def _states(tables, tokens):
    steps = answer = 0
    for token in tokens:
        c = tables.token_class[token]
        steps, answer = int(tables.steps_next[c, steps]), int(tables.answer_next[c, answer])
    return steps, answer


def _distance(tables, steps, answer):
    return tables.steps_distance[steps] or tables.answer_distance[answer]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 5, 127, 128, 129, 300]))
def test_inverse_cdf_takes_the_first_id_whose_sum_exceeds_the_number(tiny, seed, size):
    """Against a sum over all ids in float64; blocks, gaps of weight 0 and both ends included."""
    rng = np.random.default_rng(seed)
    weights = rng.random((2, 3, size)).astype(np.float32) * rng.integers(0, 2, (2, 3, size))
    weights[..., rng.integers(size)] = 1.0
    uniform = rng.random((2, 3)).astype(np.float32)
    uniform[0, 0], uniform[1, 1] = 0.0, np.float32(1 - 2**-24)
    found = np.asarray(tiny.jit(inverse_cdf)(weights, uniform))
    chosen = np.take_along_axis(weights, found[..., None], axis=-1)[..., 0]
    assert (chosen > 0).all()
    total = np.cumsum(weights, axis=-1, dtype=np.float64)
    after = np.take_along_axis(total, found[..., None], axis=-1)[..., 0]
    target, slack = uniform * total[..., -1], 1e-5 * total[..., -1]
    assert (after >= target - slack).all()
    assert (after - chosen <= target + slack).all()
