"""Each phase has the time its program took, though the host waits for none."""

import jax
import jax.numpy as jnp
import pytest

from morer1_jax.run import phases
from morer1_jax.run.phases import PhaseTimer


class Clock:
    """Stands for time, which passes only while somebody waits."""

    now = 100.0

    def until(self, moment):
        """An array that is computed at some moment."""
        clock = self

        class Slow:
            def block_until_ready(self):
                clock.now = max(clock.now, moment)
                return self

        return Slow()


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(phases.time, "perf_counter", lambda: clock.now)
    return clock


def test_phases_follow_one_another(clock):
    timer = PhaseTimer()
    # Both are handed over before the thread that waits has begun.
    timer.phase("rollout", clock.until(102.0))
    timer.phase("update", clock.until(107.0))
    with timer:
        assert timer.take(0) == {"rollout": 2.0, "update": 5.0}
        assert timer.take(0) == {}


def test_a_phase_handed_over_late_lasts_from_then(clock):
    timer = PhaseTimer()
    timer.phase("rollout", clock.until(101.0))
    clock.now = 104.0
    timer.phase("update", clock.until(106.0))
    clock.now = 100.0
    with pytest.raises(RuntimeError, match="found outside of it"):
        timer.take(0)
    with timer:
        assert timer.take(0) == {"rollout": 1.0, "update": 2.0}


def test_a_phase_belongs_to_its_step(clock):
    """Whatever the device has done of the next one by then."""
    timer = PhaseTimer()
    for step in (1, 2, 3):
        timer.step(step)
        timer.phase("rollout", clock.until(100.0 + 5 * step))
        timer.phase("update", clock.until(102.0 + 5 * step))
    with timer:
        assert timer.take(3) == {"rollout": 5.0 + 3.0 + 3.0, "update": 6.0}
    timer = PhaseTimer()
    for step in (1, 2, 3):
        timer.step(step)
        timer.phase("rollout", clock.until(200.0 + step))
    with timer:
        assert timer.take(1)["rollout"] > 80.0
        assert timer.take(3) == {"rollout": 2.0}


def test_steps_add_up_and_an_error_is_left_to_whoever_asks_for_the_result(clock):
    class Broken:
        def block_until_ready(self):
            raise RuntimeError("out of memory")

    with PhaseTimer() as timer:
        timer.phase("score", clock.until(101.0))
        timer.phase("update", Broken())
        timer.phase("score", clock.until(104.0))
        timer.phase("weights", jax.jit(jnp.sin)(1.0))
        seconds = timer.take(0)
    assert set(seconds) == {"score", "weights"}
    assert 3.0 <= seconds["score"] <= 4.0
