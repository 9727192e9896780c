"""Batches ahead of time: their order, where they start, and errors in their turn."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pytest

from morer1_jax.data.loader import load_ahead
from morer1_jax.errors import DataError


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


def test_processes_give_batches_in_order_and_errors_as_they_were_raised():
    class Broken(Exception):
        def __init__(self, one, two):
            super().__init__(f"{one}\n{two}")

    def make(step):
        if step == 7:
            raise DataError("train:7: no such photo")
        if step == 9:
            raise Broken("lost on", "the way")
        return {"step": step, "array": np.full((200, 300), step), "process": os.getpid()}

    batches = load_ahead(make, 2, 12, workers=2, kind="process")
    made = [next(batches) for _ in range(5)]
    assert [batch["step"] for batch in made] == [2, 3, 4, 5, 6]
    assert all((batch["array"] == batch["step"]).all() for batch in made)
    assert all(type(batch["array"]) is np.ndarray for batch in made)
    processes = [batch["process"] for batch in made]
    assert len(set(processes)) == 2
    assert os.getpid() not in processes
    with pytest.raises(DataError) as error:
        next(batches)
    assert str(error.value) == "train:7: no such photo"
    assert "in make" in "".join(error.value.__notes__)  # Where it was raised, for whoever asks.
    with pytest.raises(RuntimeError) as error:
        list(load_ahead(make, 9, 10, workers=2, kind="process"))
    assert str(error.value) == "Broken: lost on the way"
    gone(processes)


def eventually(condition):
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert condition()


def gone(processes):
    eventually(lambda: not any(map(psutil.pid_exists, processes)))


def test_a_killed_worker_process_is_an_error_and_no_wait():
    batches = load_ahead(lambda step: os.getpid(), 0, 1000, workers=2, kind="process")
    first, second = next(batches), next(batches)
    os.kill(second, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"^a worker process .*exit code -9") as error:
        list(batches)
    assert "\n" not in str(error.value)
    gone([first, second])


def test_worker_processes_end_when_their_batches_are_closed_or_their_trainer_is_killed():
    batches = load_ahead(lambda step: (os.getpid(), np.zeros(99)), 0, 4, kind="process")
    for _ in range(4):
        worker, _ = next(batches)
    gc.disable()
    try:
        batches.close()
        gone([worker])
    finally:
        gc.enable()
    program = (
        "import os, time\n"
        "from morer1_jax.data.loader import load_ahead\n"
        "def run():\n"
        "    batches = load_ahead(lambda step: os.getpid(), 0, 99, workers=1, kind='process')\n"
        "    print(next(batches), flush=True)\n"
        "    time.sleep(100)\n"
        "if __name__ == '__main__':\n"
        "    run()\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as trainer:
        worker = int(trainer.stdout.readline())
        trainer.kill()
    gone([worker])
