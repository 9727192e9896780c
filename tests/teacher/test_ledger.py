"""The budget holds whatever requests cost."""

import dataclasses
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from morer1_jax.teacher.ledger import Ledger, Prices, Size, Usage

SIZE = Size(text=2000, pixels=500_000, tiles=4, answer=1000)
PRICES = Prices(prompt=2.5, answer=10.0)

sizes = st.builds(
    Size,
    text=st.integers(500, 5000),
    pixels=st.integers(1000, 2_000_000),
    tiles=st.integers(2, 16),
    answer=st.just(1000),
)


@st.composite
def providers(draw):
    """How a provider counts a prompt: a sum over text, pixels and tiles; no image above 50,000."""
    text, pixels = draw(st.floats(0.1, 1.0)), draw(st.floats(0, 1 / 500))
    tiles, fixed = draw(st.floats(0, 5667)), draw(st.integers(0, 200))
    return lambda size: int(fixed + text * size.text + pixels * size.pixels + tiles * size.tiles)


def test_a_request_before_any_answer_is_taken_to_be_expensive():
    ledger = Ledger(PRICES)
    assert ledger.max_usage(SIZE) == Usage(2000 + 100_000, 1000)
    assert not Ledger(PRICES, tokens=102_999).fits(SIZE)
    assert Ledger(PRICES, tokens=103_000).fits(SIZE)
    assert Ledger(PRICES, dollars=0.266).fits(SIZE)
    assert not Ledger(PRICES, dollars=0.264).fits(SIZE)


def test_an_answer_bounds_the_cost_of_others():
    ledger = Ledger(PRICES, tokens=1_000_000)
    ledger.reserve(1, SIZE)
    ledger.reserve(2, SIZE)
    assert ledger.reserved() == Usage(204_000, 2000)
    ledger.settle(1, Usage(1600, 300))
    assert (ledger.spent, ledger.billed) == (Usage(1600, 300), 1)
    assert ledger.reserved() == Usage(2000, 1000)  # The other one, at once.
    assert ledger.max_usage(dataclasses.replace(SIZE, tiles=8)) == Usage(4000, 1000)
    assert ledger.max_usage(dataclasses.replace(SIZE, text=1, pixels=1, tiles=1)) == Usage(
        2000, 1000
    )
    # A cheaper one changes nothing.
    ledger.settle(2, Usage(800, 300))
    assert ledger.max_usage(SIZE) == Usage(2000, 1000)


def test_an_answer_beyond_its_maximum_raises_the_bound_of_others():
    ledger = Ledger(PRICES)
    for number in range(3):
        ledger.reserve(number, SIZE)
    ledger.settle(0, Usage(1600, 900))
    assert ledger.max_usage(SIZE).answer == 1125
    ledger.settle(1, Usage(1600, 3001))
    assert ledger.max_usage(SIZE) == ledger.reserved() == Usage(2000, 3752)
    assert ledger.max_usage(dataclasses.replace(SIZE, answer=5000)).answer == 5000


def test_a_request_without_usage_stays_reserved_and_an_error_costs_nothing():
    ledger = Ledger(PRICES)
    for number in (1, 2):
        ledger.reserve(number, SIZE)
    ledger.settle(1, None)
    ledger.settle(2, Usage())
    assert list(ledger.unsettled) == [1]
    assert (ledger.spent, ledger.billed) == (Usage(), 0)


@given(providers(), st.lists(sizes, min_size=2, max_size=30), st.randoms())
@settings(deadline=None)
def test_no_prompt_costs_more_than_was_reserved(tokens, asked, rng):
    ledger = Ledger(PRICES)
    for number, size in enumerate(asked):
        assert tokens(size) <= ledger.max_usage(size).prompt
        ledger.reserve(number, size)
        if rng.random() < 0.7:
            ledger.settle(number, Usage(tokens(size), rng.randint(0, size.answer)))


@given(
    providers(),
    st.lists(sizes, min_size=12, max_size=40),
    st.floats(0, 1),
    st.integers(0, 2**32),
    st.booleans(),
    st.sampled_from([0.5, 1, 3, 40]),
)
@settings(deadline=None)
def test_the_budget_holds(tokens, queue, share, seed, in_dollars, length):
    """Eight in flight arrive in any order; some are lost, and were billed all the same.

    Where answers are longer than was asked for, they differ by a quarter at most.
    """
    rng = random.Random(seed)
    first = queue.pop()

    def answer(size):
        return rng.randint(math.ceil(0.8 * length * size.answer), int(length * size.answer))

    billed = Usage(tokens(first), answer(first))
    # What the first costs, and a share of the maximum of all others.
    max_answer = int(max(1, length) * 1000)
    total = billed + sum((Usage(tokens(size), max_answer) for size in queue), Usage())
    dollars = PRICES.dollars(billed) + share * PRICES.dollars(total) if in_dollars else None
    most = None if in_dollars else int(billed.total + share * total.total)
    ledger = Ledger(PRICES, dollars, most)
    ledger.reserve(0, first)
    ledger.settle(0, billed)
    in_flight = {}
    while queue or in_flight:
        while queue and len(in_flight) < 8 and ledger.fits(queue[-1]):
            in_flight[len(queue)] = queue[-1]
            ledger.reserve(len(queue), queue.pop())
        if not in_flight:
            worst = ledger.spent + ledger.reserved() + ledger.max_usage(queue[-1])
            assert worst.total > most if dollars is None else PRICES.dollars(worst) > dollars
            break
        arrived = rng.choice(list(in_flight))
        size = in_flight.pop(arrived)
        usage = Usage(tokens(size), answer(size))
        billed += usage
        ledger.settle(arrived, usage if rng.random() < 0.9 else None)
        assert most is None or billed.total <= most
        assert dollars is None or PRICES.dollars(billed) <= dollars + 1e-9


@pytest.mark.parametrize(
    ("prices", "shown"),
    [
        (PRICES, "$0.0350"),
        (Prices(), "11,000 tokens"),
        (Prices(answer=10), "$0.0100"),
        (Prices(prompt=1e9), "$10,000,000.0000"),
    ],
)
def test_costs_are_dollars_where_there_are_prices(prices, shown):
    assert prices.format(Usage(10_000, 1000)) == shown
