"""Packing loses nothing and overfills nothing; levels are the cheapest there are."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from morer1_jax.data.shapes import (
    RowPlan,
    SampleSize,
    Shape,
    cheapest_levels,
    pack,
    plan_prompts,
    plan_rows,
    smallest,
    widest,
)

NEEDS = st.builds(SampleSize, st.integers(1, 40), st.integers(0, 24), st.integers(0, 6))
DRAWS = st.lists(st.lists(NEEDS, min_size=1, max_size=12), min_size=1, max_size=5)


def by_tokens(shape):
    return shape.length


@given(st.lists(NEEDS, max_size=30), st.integers(64, 200), st.integers(6, 20))
def test_every_sample_is_in_one_row_that_has_room(needs, length, windows):
    rows = pack(needs, Shape(length, windows))
    assert sorted(itertools.chain(*rows)) == list(range(len(needs)))
    for row in rows:
        assert row
        assert sum(needs[i].tokens for i in row) <= length
        assert sum(needs[i].slots for i in row) <= windows


@given(st.lists(NEEDS, min_size=1, max_size=30))
def test_no_two_rows_could_be_one(needs):
    shape = Shape(80, 12)
    rows = pack(needs, shape)
    for a, b in itertools.combinations(rows, 2):
        together = [needs[i] for i in a + b]
        tokens, windows = (sum(n.tokens for n in together), sum(n.slots for n in together))
        assert not shape.holds(Shape(tokens, windows))


def test_rows_are_filled_best_fit_first():
    needs = [SampleSize(n, 0, 0) for n in (6, 5, 4, 3, 2)]
    # 6 and 4, then 5, 3 and 2: two full rows where a row each would be five.
    assert pack(needs, Shape(10, 0)) == [[0, 2], [1, 3, 4]]


@given(DRAWS, st.integers(1, 4), st.integers(1, 3))
def test_a_plan_holds_every_batch(draws, multiple, most):
    plan = plan_rows(draws, by_tokens, multiple=multiple, round_to=8, max_counts=most)
    assert plan.shape.length % 8 == 0
    assert len(plan.counts) <= most
    assert all(count % multiple == 0 for count in plan.counts)
    for draw in draws:
        assert len(plan.rows(draw)) in plan.counts
        check_rows(plan, draw)


def check_rows(plan, needs):
    """Each sample is in one row, and each row has room for its own."""
    rows = plan.rows(needs)
    assert sorted(itertools.chain(*rows)) == list(range(len(needs)))
    for row in rows:
        filled = Shape(sum(needs[i].tokens for i in row), sum(needs[i].slots for i in row))
        assert plan.shape.holds(filled)


def test_a_batch_of_more_rows_than_were_planned_for_gets_them():
    plan = RowPlan(Shape(10, 0), counts=(2, 4), multiple=2)
    needs = [SampleSize(9, 0, 0)] * 5
    assert [len(plan.rows(needs[:n])) for n in (1, 2, 3, 4, 5)] == [2, 2, 4, 4, 6]
    assert plan.rows(needs[:1]) == [[0], []]


def test_short_samples_share_rows_and_long_ones_do_not():
    noise = np.random.default_rng(0)
    lengths = (64 * 4 ** noise.random((40, 32))).astype(int)
    draws = [[SampleSize(int(n), 0, 0) for n in draw] for draw in lengths]
    plan = plan_rows(draws, by_tokens)
    spent = sum(len(plan.rows(draw)) for draw in draws) * plan.shape.length
    # A sample a row of the longest would fill 0.54 of the places.
    assert lengths.sum() / spent > 0.85
    same = [[SampleSize(100, 0, 0)] * 4] * 3
    assert plan_rows(same, lambda shape: shape.length**2).shape.length == 112


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 4))
def test_levels_are_the_cheapest(values, most):
    def spent(levels):
        return sum(min(level**2 for level in levels if level >= value) for value in values)

    found = cheapest_levels(values, lambda value: value**2, most)
    assert list(found) == sorted(set(found))
    assert len(found) <= most
    assert found[-1] == max(values)
    ways = (
        (*some, max(values))
        for count in range(most)
        for some in itertools.combinations(sorted(set(values) - {max(values)}), count)
    )
    assert spent(found) == min(map(spent, ways))


@given(DRAWS, st.integers(1, 3))
def test_every_batch_of_prompts_has_a_shape(draws, most):
    everything = widest(list(itertools.chain(*draws)))
    shapes = plan_prompts(draws, everything, by_tokens, round_to=8, max_shapes=most)
    assert 1 <= len(shapes) <= most
    assert shapes[-1].holds(everything)
    for draw in draws:
        chosen = smallest(shapes, widest(draw))
        assert chosen.holds(widest(draw))
        assert chosen.length % 8 == 0


def test_what_fits_no_shape_is_an_error():
    with pytest.raises(ValueError, match=r"at most Shape\(.* found Shape\(length=9, slots=0\)"):
        smallest([Shape(8, 1)], Shape(9, 0))
