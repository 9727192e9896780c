"""Chunked log-probabilities equal plain ones, and never hold what plain ones hold."""

import functools
import itertools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from morer1_jax.model import logprobs
from morer1_jax.model.logprobs import token_logprobs

V, D = 101, 24


def numbers(rng, rows=2, length=12):
    head = jnp.asarray(rng.standard_normal((V, D)), jnp.float32)
    # So that logits have a size that logits have.
    hidden = jnp.asarray(0.5 * rng.standard_normal((rows, length, D)), jnp.float32)
    return head, hidden, jnp.asarray(rng.integers(0, 91, (rows, length)), jnp.int32)


MASKS = {
    "all": np.ones((2, 12), bool),
    "some": np.random.default_rng(1).random((2, 12)) < 0.5,
    "one row": np.arange(2)[:, None] == np.ones(12),
    "none": np.zeros((2, 12), bool),
}


@functools.cache
def compiled(way, asked, **options):
    """`(head, hidden, targets, mask, weights)`: values and entropies, and the gradients by head
    and hidden states of the sum of what is asked for."""

    def total(head, hidden, targets, mask, weights):
        results = way(hidden, head, targets, mask, **options)
        parts = [jnp.sum(w * r) for w, r in zip(weights, results, strict=True)]
        parts = {"both": parts, "logprob": parts[:1], "entropy": parts[1:]}[asked]
        return sum(parts), results

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))


def in_chunks(hidden, head, targets, mask, *, left_out, chunk, masked):
    allowed = jnp.arange(V) < 91 if left_out else None
    options = {"allowed": allowed, "temperature": 0.7, "chunk": chunk}
    return token_logprobs(hidden, head, targets, counted=mask if masked else None, **options)


def at_once(hidden, head, targets, mask, *, left_out):
    logps = jax.nn.log_softmax(hidden @ (head[:91] if left_out else head).T / 0.7)
    logprob = jnp.take_along_axis(logps, targets[..., None], axis=-1)[..., 0]
    return logprob * mask, -jnp.sum(jnp.exp(logps) * logps, axis=-1) * mask


# Daily each chunk, each of what is asked for, with a mask and without; the rest takes longer.
DAILY = (
    (1, True, "both"),
    (5, True, "both"),
    (12, True, "entropy"),
    (99, True, "logprob"),
    (99, False, "both"),
)
ALL = itertools.product((1, 5, 12, 99), (True, False), ("both", "logprob", "entropy"))


@pytest.mark.parametrize(
    ("chunk", "masked", "asked"),
    [
        pytest.param(*case, marks=() if case in DAILY else pytest.mark.soak, id=str(case))
        for case in ALL
    ],
)
def test_chunked_equal_plain(chunk, masked, asked):
    """In value, entropy and gradients of both the hidden states and the head."""
    rng = np.random.default_rng(0)
    head, hidden, targets = numbers(rng)
    weights = rng.standard_normal((2, 2, 12))
    ours = compiled(in_chunks, asked, left_out=chunk != 5, chunk=chunk, masked=masked)
    theirs = compiled(at_once, asked, left_out=chunk != 5)
    for name in MASKS if masked else ["all"]:
        given = head, hidden, targets, MASKS[name], weights
        got, wanted = ours(*given), theirs(*given)
        for a, b in zip(*map(jax.tree.leaves, (got, wanted)), strict=True):
            np.testing.assert_allclose(
                a, b, atol=1e-5 * max(1, float(np.abs(b).max())), err_msg=name
            )


def test_bfloat16_states():
    """Logits, sums and the head's gradient in float32; what flows back in the states' own dtype."""
    head, hidden, targets = numbers(np.random.default_rng(0))

    def loss(head, hidden):
        return jnp.sum(token_logprobs(hidden, head, targets, chunk=5)[0])

    gradient = jax.jit(jax.grad(loss, (0, 1)))
    exact, half = (gradient(head, hidden.astype(dtype)) for dtype in (jnp.float32, jnp.bfloat16))
    assert [x.dtype for x in half] == [jnp.float32, jnp.bfloat16]
    for a, b in zip(half, exact, strict=True):
        np.testing.assert_allclose(np.float32(a), b, atol=2e-2 * float(jnp.abs(b).max()), rtol=0)


def test_a_head_that_does_not_train_costs_nothing():
    """Its gradient would be the largest product of all."""
    head, hidden, targets = numbers(np.random.default_rng(0))

    def loss(head, hidden):
        return jnp.sum(token_logprobs(hidden, head, targets, chunk=5)[0])

    def products(argument):
        text = jax.jit(jax.grad(loss, argument)).lower(head, hidden).as_text()
        return text.count("stablehlo.dot_general")

    assert (products((0, 1)), products(1)) == (4, 3)
    both, alone = (jax.jit(jax.grad(loss, which))(head, hidden) for which in ((0, 1), 1))
    np.testing.assert_array_equal(both[1], alone)


def test_logits_only_where_counted():
    """Chunks that are run, by a callback in what each of them takes."""
    head, hidden, targets = numbers(np.random.default_rng(0), 3, 20)
    counted = np.zeros((3, 20), bool)
    counted[0, [0, 7, 19]] = counted[2, 3:12] = True  # at most nine of a row

    def chunks(chunk, gradient=False):
        seen = []
        real = logprobs._logits

        def counting(hidden, *args):
            jax.debug.callback(lambda shape: seen.append(tuple(shape)), np.array(hidden.shape))
            return real(hidden, *args)

        def total(hidden):
            return jnp.sum(token_logprobs(hidden, head, targets, counted=counted, chunk=chunk)[0])

        with mock.patch.object(logprobs, "_logits", counting):
            jax.jit(jax.grad(total) if gradient else total)(hidden)
        jax.effects_barrier()
        return seen

    assert chunks(4) == [(3, 4, D)] * 3
    assert chunks(9) == [(3, 9, D)]
    assert chunks(20) == [(3, 20, D)]
    assert chunks(4, gradient=True) == [(3, 4, D)] * 6


def _plain(hidden, head, targets):
    logps = jax.nn.log_softmax(hidden @ head.T)
    logprob = jnp.take_along_axis(logps, targets[..., None], axis=-1)[..., 0]
    return logprob, -jnp.sum(jnp.exp(logps) * logps, axis=-1)


@pytest.mark.parametrize("gradient", [False, True])
def test_memory_at_full_size(gradient):
    """16,384 tokens, 152,064 rows of the vocabulary, by the compiler's own account."""
    length, v, d = 16_384, 152_064, 256
    shapes = [
        jax.ShapeDtypeStruct((1, length, d), jnp.float32),
        jax.ShapeDtypeStruct((v, d), jnp.float32),
        jax.ShapeDtypeStruct((1, length), jnp.int32),
    ]

    def memory(way):
        def loss(hidden, head, targets):
            return jnp.sum(way(hidden, head, targets)[0])

        made = jax.grad(loss, (0, 1)) if gradient else way
        return jax.jit(made).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    plain, chunked = memory(_plain), memory(token_logprobs)
    print(f"16k tokens: plain {plain / 1e6:,.0f} MB, chunked {chunked / 1e6:,.0f} MB")
    assert plain > 0.99 * 4 * length * v
    assert plain > 5 * chunked


def test_target_that_is_not_allowed_is_finite():
    """So that a masked-out position with a padding target leaves value and gradient whole."""
    head, hidden, _ = numbers(np.random.default_rng(0), 1, 3)
    targets = jnp.array([[1, 95, 2]])
    mask = jnp.array([[1, 0, 1]])

    def loss(hidden):
        logprob, _ = token_logprobs(hidden, head, targets, allowed=jnp.arange(V) < 91)
        return jnp.sum(logprob * mask), logprob

    gradient, logprob = jax.jit(jax.grad(loss, has_aux=True))(hidden)
    assert logprob[0, 1] < -1e29
    assert np.isfinite(gradient).all()
