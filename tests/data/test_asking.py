"""Facts that are asked: each once, with others of its size, in few shapes and little padding."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from morer1_jax.data.asking import asked_batches, plan_asked
from morer1_jax.data.shapes import SampleSize, Shape, widest

NEEDS = st.builds(SampleSize, st.integers(1, 40), st.just(0), st.integers(0, 6))
SETS = st.lists(st.lists(NEEDS, min_size=1, max_size=30), min_size=1, max_size=3)


def cost(shape):
    return shape.length + 4 * shape.slots / shape.sharing


@given(SETS, st.integers(1, 3), st.sampled_from([(1,), (1, 2), (4,)]))
def test_every_fact_is_asked_in_a_shape_that_was_planned(sets, most, sharing):
    shapes = plan_asked(sets, 4, cost, round_to=8, max_shapes=most, sharing=sharing)
    assert 1 <= len(shapes) <= most
    for sizes in sets:
        batches = asked_batches(sizes, 4, shapes)
        assert len(batches) == -(-len(sizes) // 4)
        check(batches, sizes)
        assert {asked.shape for asked in batches} <= set(shapes)


def check(batches, sizes):
    """Every fact has a row; those of the last batch of a size alone may have several."""
    places = list(itertools.chain(*(asked.places for asked in batches)))
    assert set(places) == set(range(len(sizes)))
    assert len(places) - len(sizes) < 4
    for asked in batches:
        assert len(asked.places) == 4
        content = widest([sizes[place] for place in asked.places], asked.shape.sharing)
        assert asked.shape.holds(content)


@given(st.lists(NEEDS, min_size=1, max_size=30), st.sampled_from([1, 2]))
def test_facts_that_were_not_planned_for_are_asked_too(sizes, sharing):
    check(asked_batches(sizes, 4, [Shape(8, 1, sharing), Shape(16, 3, sharing)]), sizes)


def test_the_largest_are_asked_first_and_the_smallest_repeated():
    sizes = [SampleSize(10, 0, slots) for slots in (3, 1, 9, 7, 5)]
    batches = asked_batches(sizes, 2, [Shape(16, 4), Shape(16, 9)])
    assert [(asked.places, asked.shape.slots) for asked in batches] == [
        ((2, 3), 9),
        ((4, 0), 9),
        ((1, 1), 4),
    ]


def test_equal_facts_are_asked_in_their_order():
    batches = asked_batches([SampleSize(10, 0, 2)] * 7, 4, [Shape(16, 2)])
    assert [asked.places for asked in batches] == [(0, 1, 2, 3), (4, 5, 6, 6)]


def test_a_few_shapes_have_little_padding():
    noise = np.random.default_rng(0)
    slots = noise.integers(5, 60, 640)
    sizes = [SampleSize(350 + 16 * int(n), 0, int(n)) for n in slots]

    def padding(**options):
        shapes = plan_asked([sizes], 16, cost, **options)
        spent = sum(
            16 * asked.shape.slots / asked.shape.sharing
            for asked in asked_batches(sizes, 16, shapes)
        )
        return 1 - slots.sum() / spent

    assert padding(max_shapes=1) > 0.4
    assert padding(max_shapes=4) < 0.17
    # Rows that share images: large and small ones of a length together.
    assert padding(max_shapes=3, sharing=(1, 2)) < 0.04
