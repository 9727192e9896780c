"""Packing loses nothing and overfills no row; rows are about equally full."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from morer1_jax.data.rows import Level, RowPlan, pack, plan_rows, spread
from morer1_jax.data.shapes import SampleSize, Shape

NEEDS = st.builds(SampleSize, st.integers(1, 40), st.integers(0, 24), st.integers(0, 6))
DRAWS = st.lists(st.lists(NEEDS, min_size=1, max_size=12), min_size=1, max_size=5)


def tokens(needs, row):
    return sum(needs[i].tokens for i in row)


def by_tokens(shape):
    return shape.length


def by_slots(shape):
    return shape.length + 10 * shape.slots / shape.sharing


@given(st.lists(NEEDS, max_size=30), st.integers(64, 200))
def test_every_sample_is_in_one_row_that_has_room(needs, length):
    rows = pack(needs, length)
    assert sorted(itertools.chain(*rows)) == list(range(len(needs)))
    for row in rows:
        assert row
        assert tokens(needs, row) <= length


@given(st.lists(NEEDS, min_size=1, max_size=30))
def test_no_two_rows_could_be_one(needs):
    for a, b in itertools.combinations(pack(needs, 80), 2):
        assert tokens(needs, a + b) > 80


def test_rows_are_filled_best_fit_first():
    needs = [SampleSize(n, 0, 0) for n in (6, 5, 4, 3, 2)]
    # 6 and 4, then 5, 3 and 2: two full rows where a row each would be five.
    assert pack(needs, 10) == [[0, 2], [1, 3, 4]]


@given(st.lists(NEEDS, max_size=30), st.integers(64, 200), st.integers(1, 12))
def test_spread_samples_are_each_in_one_row_that_has_room(needs, length, count):
    rows = spread(needs, length, count)
    if rows is None:  # Samples of up to 64 tokens: rows that many rooms are left in would do.
        assert sum(need.tokens for need in needs) > count * (length - 64)
        return
    assert len(rows) == count
    assert sorted(itertools.chain(*rows)) == list(range(len(needs)))
    assert all(tokens(needs, row) <= length for row in rows)


def test_rows_are_about_equally_full_of_tokens_and_of_images():
    noise = np.random.default_rng(0)
    slots = noise.integers(5, 60, 64)
    needs = [SampleSize(350 + 16 * int(n), int(noise.integers(100, 300)), int(n)) for n in slots]
    rows = spread(needs, 10_000, 16)
    for sums in ([tokens(needs, row) for row in rows], [sum(slots[row]) for row in rows]):
        assert max(sums) < 1.12 * np.mean(sums)
    # By tokens alone the images are left as they fall.
    packed = [sum(slots[row]) for row in pack(needs, max(tokens(needs, row) for row in rows))]
    assert max(packed) > 1.2 * np.mean([sum(slots[row]) for row in rows])


@given(DRAWS, st.integers(1, 4), st.integers(1, 3), st.sampled_from([(1,), (1, 2), (3,)]))
def test_a_plan_holds_every_batch(draws, multiple, most, sharing):
    for cost in (by_tokens, by_slots):
        plan = plan_rows(
            draws, cost, multiple=multiple, round_to=8, max_levels=most, sharing=sharing
        )
        assert 1 <= len(plan.levels) <= most
        (rows_a_row,) = {level.shape.sharing for level in plan.levels}
        assert rows_a_row in sharing
        (length,) = {level.shape.length for level in plan.levels}
        assert length % 8 == 0
        for count, _ in plan.levels:
            assert count % (multiple * rows_a_row) == 0
        for draw in draws:
            shape, rows = plan.rows(draw)
            assert Level(len(rows), shape) in plan.levels
            check_rows(shape, rows, draw)


def check_rows(shape, rows, needs):
    """Each sample is in one row, which has room for its own, as have rows that share images."""
    assert sorted(itertools.chain(*rows)) == list(range(len(needs)))
    assert all(tokens(needs, row) <= shape.length for row in rows)
    for start in range(0, len(rows), shape.sharing):
        shared = itertools.chain(*rows[start : start + shape.sharing])
        assert sum(needs[i].slots for i in shared) <= shape.slots


def test_a_batch_takes_the_first_level_that_holds_it():
    small, wide, many = Shape(10, 1), Shape(10, 4), Shape(10, 4)
    plan = RowPlan((Level(2, small), Level(2, wide), Level(4, many)), multiple=2)
    assert plan.rows([SampleSize(9, 0, 1)]) == (small, [[0], []])
    assert plan.rows([SampleSize(9, 0, 2)]) == (wide, [[0], []])
    assert plan.rows([SampleSize(9, 0, 0)] * 3) == (many, [[0], [1], [2], []])


def test_a_batch_that_was_not_planned_for_gets_a_level_of_its_own():
    plan = RowPlan((Level(2, Shape(10, 1)), Level(4, Shape(10, 1))), multiple=2)
    shape, rows = plan.rows([SampleSize(9, 0, 0)] * 5)
    assert (shape, len(rows)) == (Shape(10, 1), 6)
    shape, rows = plan.rows([SampleSize(9, 0, 3)])
    assert (shape, len(rows)) == (Shape(10, 3), 2)


def test_short_samples_share_rows_and_long_ones_do_not():
    noise = np.random.default_rng(0)
    lengths = (64 * 4 ** noise.random((40, 32))).astype(int)
    draws = [[SampleSize(int(n), 0, 0) for n in draw] for draw in lengths]
    plan = plan_rows(draws, by_tokens)
    spent = sum(len(rows) * shape.length for shape, rows in map(plan.rows, draws))
    # A sample a row of the longest would fill 0.54 of the places.
    assert lengths.sum() / spent > 0.85
    same = [[SampleSize(100, 0, 0)] * 4] * 3
    (level,) = plan_rows(same, lambda shape: shape.length**2).levels
    assert level.shape.length == 112


def test_a_plans_rows_have_little_padding_of_images():
    noise = np.random.default_rng(0)
    draws = []
    for slots in noise.integers(5, 60, (16, 64)):
        targets = noise.integers(100, 300, 64)
        pairs = zip(slots.tolist(), targets.tolist(), strict=True)
        draws.append([SampleSize(350 + 16 * own, target, own) for own, target in pairs])
    plan = plan_rows(draws, lambda shape: shape.length + 32 * shape.slots, multiple=8, max_levels=3)
    spent = sum(len(rows) * shape.slots for shape, rows in map(plan.rows, draws))
    assert 1 - sum(need.slots for draw in draws for need in draw) / spent < 0.12


def test_levels_follow_the_images_where_all_batches_have_as_many_rows():
    draws = [[SampleSize(90, 0, slots)] * 4 for slots in (2, 2, 3, 8)]
    plan = plan_rows(draws, by_slots, multiple=4, max_levels=3)
    assert [level.shape.slots for level in plan.levels] == [2, 3, 8]
    assert [plan.rows(draw)[0].slots for draw in draws] == [2, 2, 3, 8]
