"""Our side computes what PyTorch's does, on the inputs that both make for themselves."""

import pytest

from morer1_jax.bench.turns import Worker, take_turns


@pytest.fixture(scope="module")
def worker(folder, monkeypatch_module):
    """Makes a side's process, on one device."""
    monkeypatch_module.delenv("XLA_FLAGS")
    made = []

    def make(name, *more):
        given = [f"--folder={folder}", "--preset=tiny", *more]
        made.append(Worker(name, f"morer1_jax.bench.{name}", given))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def ours(worker):
    return worker("ours")


@pytest.fixture(scope="module")
def theirs(worker):
    return worker("peers", "--form=default")


@pytest.mark.parametrize("task", ["sft_mixed", "sample/128"])
def test_the_same_numbers(ours, theirs, task):
    """Loss and gradient of packed rows and of padded ones; greedy tokens. `take_turns` refuses
    sides that differ (see test_turns.py)."""
    timings = take_turns({"ours": (ours, task), "theirs": (theirs, task)}, 1, 1e-4)
    for timing in timings.values():
        assert timing.median > 0
        assert timing.peak_bytes > 1e8


def test_a_step_of_grpo_runs(ours):
    timing = take_turns({"ours": (ours, "grpo/128")}, 2, 1e-4)["ours"]
    assert len(timing.seconds) == 2
