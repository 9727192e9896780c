"""Products of matrices are counted as they are computed."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from bench.flops import call_flops
from bench.ours import Side
from bench.peers import Peer

A, B = jnp.ones((2, 3, 5)), jnp.ones((2, 5, 7))
PRODUCT = 2 * 2 * 3 * 5 * 7


def product(a, b):
    return jnp.einsum("bij,bjk->bik", a, b)


def scanned(a, b):
    def body(total, _):
        return total + product(a, b), None

    return jax.lax.scan(body, jnp.zeros((2, 3, 7)), length=4)


def looped(a, b):
    def body(state):
        return state[0] + 1, product(a, b)

    return jax.lax.while_loop(lambda state: state[0] < 3, body, (0, jnp.zeros((2, 3, 7))))


def test_a_product():
    assert call_flops(product, A, B) == PRODUCT
    assert call_flops(jax.jit(lambda a, b: jnp.tanh(product(a, b)) + 1.0), A, B) == PRODUCT


def test_a_gradient_has_three_and_recomputation_a_fourth():
    def loss(a, b):
        return jnp.sum(jnp.tanh(product(a, b)) ** 2)

    both = jax.grad(loss, (0, 1))
    assert call_flops(both, A, B) == 3 * PRODUCT
    again = jax.grad(jax.checkpoint(loss), (0, 1))
    assert call_flops(again, A, B) == 4 * PRODUCT


def test_loops():
    assert call_flops(scanned, A, B) == 4 * PRODUCT
    assert call_flops(looped, A, B, trips=[3]) == 3 * PRODUCT
    with pytest.raises(ValueError, match="found more loops"):
        call_flops(looped, A, B)
    with pytest.raises(ValueError, match="each of 1 loops, found 2"):
        call_flops(looped, A, B, trips=[3, 3])


def test_branches():
    def either(a, b):
        return jax.lax.cond(a[0, 0, 0] > 0, product, lambda a, b: jnp.zeros((2, 3, 7)), a, b)

    assert call_flops(either, A, B) == PRODUCT


@pytest.mark.parametrize("task", ["sft", "update/128/1"])
def test_both_sides_count_alike(folder, preset, task, one_device):
    """Where both do the same work: one sample a row, no prompt shared, no padding of text."""
    # As many tokens as a chunk of logits has.
    preset = dataclasses.replace(preset, completion=128)
    ours = Side(folder, preset).task(task).flops
    theirs = Peer(folder, preset, "default").task(task).flops
    assert ours == pytest.approx(theirs, rel=0.1)
