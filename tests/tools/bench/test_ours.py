"""Our side computes what PyTorch's does, on the inputs that both make for themselves."""

import os

import pytest

from bench.turns import Worker, check, take_turns

pytestmark = pytest.mark.usefixtures("quick_compiles")

# A side's own command, with the preset of the tests in place of the one it is asked for.
_COMMAND = """
import runpy, sys
from bench import cases
from bench.cases import Preset, Tail
from morer1_jax.model.config import TextConfig, VisionConfig

cases.PRESETS = {{"tiny": {preset!r}}}
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def worker(folder, preset, monkeypatch_module, tmp_path_factory):
    """Makes a side's process, on one device."""
    place = tmp_path_factory.mktemp("sides")
    (place / "a_command.py").write_text(_COMMAND.format(preset=preset))
    monkeypatch_module.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].partition(" ")[2])
    monkeypatch_module.setenv("PYTHONPATH", str(place), prepend=os.pathsep)
    made = []

    def make(name, *more):
        given = [f"bench.{name}", f"--folder={folder}", "--preset=tiny", *more]
        made.append(Told(name, "a_command", given))
        return made[-1]

    yield make
    for one in made:
        one.close()


class Told(Worker):
    """Keeps what it answered last, by what it was asked."""

    def ask(self, do, **more):
        self.__dict__.setdefault("told", {})[do] = super().ask(do, **more)
        return self.told[do]


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
    ("task", "numbers"),
    [
        ("sft_mixed", {"loss", "grad_norm"}),
        ("sample/128", {"tokens"}),
        ("update/128/2", {"loss", "grad_norm"}),
    ],
)
def test_the_same_numbers(ours, theirs, task, numbers):
    """Loss and gradient of packed rows and of padded ones, of groups and of each sample by itself;
    greedy tokens."""
    found = {}
    for name, side in (("ours", ours), ("theirs", theirs)):
        side.ask("prepare", task=task)
        found[name] = side.ask("numbers")["numbers"]
        assert numbers <= found[name].keys()
        side.ask("close")
    check(found, 1e-4)


def test_unequal_lengths(ours, theirs):
    """Samples that are dropped by each side in its own way, or waited for."""
    ours.ask("prepare", task="tail/128")
    found = {"ours": ours.ask("numbers")["numbers"]}
    assert len({len(tokens) for tokens in found["ours"]["tokens"]}) > 1
    for task in ("tail/128", "tail_dropping/128"):
        theirs.ask("prepare", task=task)
        check(found | {task: theirs.ask("numbers")["numbers"]}, 1e-4)
        theirs.ask("close")
    ours.ask("close")


def test_a_task_is_timed(ours, theirs):
    """A step of GRPO, and nothing before its numbers were found the same."""
    sides = {"ours": (ours, "grpo/128"), "theirs": (theirs, "grpo_plain/128")}
    for name, timing in take_turns(sides, 2, 1e-4).items():
        assert {"loss", "grad_norm"} <= sides[name][0].told["numbers"]["numbers"].keys()
        assert len(timing.seconds) == 2
        assert min(timing.seconds) > 0
        assert timing.peak_bytes > 1e8
