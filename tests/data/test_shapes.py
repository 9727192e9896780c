"""Shapes hold every batch, and levels are the cheapest there are."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from morer1_jax.data.shapes import (
    SampleSize,
    Shape,
    cheapest_levels,
    plan_prompts,
    share_images,
    shared_slots,
    smallest,
    widest,
)

NEEDS = st.builds(SampleSize, st.integers(1, 40), st.integers(0, 24), st.integers(0, 6))


def by_tokens(shape):
    return shape.length


def by_slots(shape):
    return shape.slots / shape.sharing


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


@given(st.data(), st.integers(1, 3), st.sampled_from([(1,), (1, 2), (4,)]))
def test_every_batch_of_prompts_has_a_shape(data, most, sharing):
    draws = data.draw(st.lists(st.lists(NEEDS, min_size=8, max_size=8), min_size=1, max_size=5))
    for cost in (by_tokens, by_slots):
        shapes = plan_prompts(draws, cost, round_to=8, max_shapes=most, sharing=sharing)
        assert 1 <= len(shapes) <= most
        assert list(shapes) == sorted(shapes)
        (rows_a_row,) = {shape.sharing for shape in shapes}
        assert rows_a_row in sharing
        for draw in draws:
            order = share_images([need.slots for need in draw], rows_a_row)
            content = widest([draw[place] for place in order], rows_a_row)
            chosen = smallest(shapes, content)
            assert chosen.holds(content)
            assert chosen.length % 8 == 0


def test_shapes_follow_what_the_batches_differ_in():
    """Four batches of one length and three sizes of images, or the other way about."""
    by_both = lambda shape: shape.length + 16 * shape.slots  # noqa: E731
    draws = [[SampleSize(60, 0, slots)] * 2 for slots in (2, 2, 4, 9)]
    shapes = plan_prompts(draws, by_both, max_shapes=3)
    assert shapes == (Shape(64, 2), Shape(64, 4), Shape(64, 9))
    draws = [[SampleSize(prompt, 0, 4)] * 2 for prompt in (30, 30, 90, 200)]
    shapes = plan_prompts(draws, by_both, max_shapes=3)
    assert shapes == (Shape(32, 4), Shape(96, 4), Shape(208, 4))


def test_prompts_share_images_where_that_costs_less():
    draws = [[SampleSize(60, 0, slots) for slots in (1, 9, 2, 8)]] * 2
    assert plan_prompts(draws, by_slots, sharing=(1, 2)) == (Shape(64, 10, 2),)
    squared = lambda shape: shape.slots**2 / shape.sharing  # noqa: E731
    draws = [[SampleSize(60, 0, 5)] * 4] * 2
    assert plan_prompts(draws, squared, sharing=(1, 2)) == (Shape(64, 5, 1),)


@given(st.lists(st.integers(0, 65), min_size=12, max_size=12), st.sampled_from([1, 2, 3, 4]))
def test_rows_that_share_images_fill_about_as_much(slots, sharing):
    order = share_images(slots, sharing)
    assert sorted(order) == list(range(12))
    if sharing == 1:
        assert order == list(range(12))
    in_order = [slots[place] for place in order]
    most = shared_slots(in_order, sharing)
    sums = [sum(in_order[i : i + sharing]) for i in range(0, 12, sharing)]
    assert most == max(sums)
    # No group is fuller than the others by more than its largest row.
    assert most <= sum(slots) / len(sums) + max(slots)


def test_large_images_are_put_to_small_ones():
    assert share_images([1, 9, 2, 8, 5, 5], 2) == [1, 0, 3, 2, 4, 5]
    with pytest.raises(ValueError, match="expected a divisor of 5 rows, found 2"):
        share_images([1] * 5, 2)


def test_what_fits_no_shape_is_an_error():
    with pytest.raises(ValueError, match=r"at most Shape\(.* found Shape\(length=9, slots=0"):
        smallest([Shape(8, 1)], Shape(9, 0))
    # Rows that share images hold none that do not.
    assert not Shape(8, 4, 2).holds(Shape(8, 4))
