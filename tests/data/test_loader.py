"""Batches ahead of time: their order, where they start, and errors in their turn."""

import threading
import time

import pytest

from morer1_jax.data.loader import load_ahead
from morer1_jax.task.fact import DataError


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_come_in_order_from_the_step_asked_for(workers):
    def make(step):
        time.sleep(0.002 * (step % 3))  # So that several workers finish out of order.
        return {"step": step}

    assert list(load_ahead(make, 4, 19, workers=workers)) == [{"step": s} for s in range(4, 19)]
    assert list(load_ahead(make, 19, 19, workers=workers)) == []


def test_each_step_is_made_once():
    calls = []
    assert list(load_ahead(lambda step: calls.append(step) or step, 2, 12, workers=2))
    assert sorted(calls) == list(range(2, 12))


def test_an_error_comes_in_its_turn_and_as_it_was_raised():
    def make(step):
        if step >= 3:
            raise DataError(f"train:{step}: no such photo")
        return step

    batches = load_ahead(make, 1, 9, workers=2)
    assert [next(batches), next(batches)] == [1, 2]
    with pytest.raises(DataError, match=r"^train:3: no such photo$"):
        next(batches)


def test_batches_are_made_ahead_but_not_without_bound():
    made = []
    batches = load_ahead(lambda step: made.append(step) or step, 0, 1000, workers=1, ahead=2)
    assert next(batches) == 0
    deadline = time.monotonic() + 10
    while len(made) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert 2 <= len(made) <= 6
    batches.close()


def test_threads_end_with_their_batches():
    before = threading.active_count()
    for _ in range(10):
        assert len(list(load_ahead(lambda step: step, 0, 3, workers=2))) == 3
    deadline = time.monotonic() + 20
    # Torn down in their own time; the last pool may stay.
    while threading.active_count() > before + 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before + 2
