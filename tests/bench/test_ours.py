"""Our side computes what PyTorch's does, on the inputs that both make for themselves."""

import pytest

from morer1_jax.bench.turns import Worker, check, take_turns

pytestmark = pytest.mark.usefixtures("quick_compiles")


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
    pytest.importorskip("torch")
    return worker("peers", "--form=default")


@pytest.mark.parametrize(
    ("task", "other", "numbers"),
    [
        ("sft_mixed", "sft_mixed", {"loss", "grad_norm"}),
        ("sample/128", "sample/128", {"tokens"}),
        ("update/128/2", "update/128/2", {"loss", "grad_norm"}),
        ("grpo/128", "grpo_plain/128", {"loss", "grad_norm"}),
    ],
)
def test_the_same_numbers(ours, theirs, task, other, numbers):
    """Loss and gradient of packed rows and of padded ones, of groups and of each sample by itself;
    greedy tokens."""
    found = {}
    for name, side, its in (("ours", ours, task), ("theirs", theirs, other)):
        side.ask("prepare", task=its)
        found[name] = side.ask("numbers")["numbers"]
        assert numbers <= found[name].keys()
        side.ask("close")
    check(found, 1e-4)


def test_a_task_is_timed(ours):
    timing = take_turns({"ours": (ours, "grpo/128")}, 2, 1e-4)["ours"]
    assert len(timing.seconds) == 2
    assert min(timing.seconds) > 0
    assert timing.peak_bytes > 1e8
