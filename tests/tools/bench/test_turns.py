"""Sides in processes of their own take turns, and are refused where they differ."""

import textwrap

import pytest

from bench.turns import SideError, Timing, Worker, check, ratio, take_turns
from morer1_jax.errors import ConfigError

_SIDE = """
import argparse, sys, time
from pathlib import Path
from bench.task import serve

class Task:
    flops = 2e9

    def __init__(self, name, value, log):
        self.name, self.value, self.log = name, value, log

    def numbers(self):
        print("said by a library")
        if self.name == "fails":
            raise ValueError("this side is broken")
        return {"loss": self.value, "tokens": [[1, 2], [3, 4]]}

    def prepare(self):
        self.log.open("a").write("p")

    def run(self):
        self.log.open("a").write(str(self.value)[0])
        time.sleep(0.01)

class Side:
    def task(self, name):
        return Task(name, float(sys.argv[1]), Path(sys.argv[2]))

    def peak_bytes(self):
        return 100

serve(Side)
"""


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """Makes a process of a side that says `value`, and logs what it does in one file."""
    (tmp_path / "a_side.py").write_text(textwrap.dedent(_SIDE))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    made = []

    def make(name, value):
        made.append(Worker(name, "a_side", [str(value), str(tmp_path / "log")]))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_sides_alternate(worker, tmp_path):
    sides = {"ours": (worker("ours", 1.0), "sft"), "theirs": (worker("theirs", 1.0001), "sft")}
    sides["third"] = worker("third", 1.0002), "sft"
    timings = take_turns(sides, rounds=3, tolerance=1e-3)
    assert list(timings) == ["ours", "theirs", "third"]
    assert (tmp_path / "log").read_text() == "ppp" + "111" * 3
    for timing in timings.values():
        assert len(timing.seconds) == 3
        assert min(timing.seconds) >= 0.01
        assert (timing.peak_bytes, timing.flops) == (100, 2e9)


def test_order_turns_round(worker, tmp_path):
    """So that no side always comes after the same one."""
    sides = {"ours": (worker("ours", 1.0), "sft"), "theirs": (worker("theirs", 2.0), "sft")}
    take_turns(sides, rounds=3, tolerance=2.0)
    assert (tmp_path / "log").read_text() == "pp" + "12" + "21" + "12"


def test_other_numbers_are_refused_before_a_round(worker, tmp_path):
    sides = {"ours": (worker("ours", 1.0), "sft"), "theirs": (worker("theirs", 1.01), "sft")}
    with pytest.raises(SideError, match=r"loss: expected 1\.0, as ours has it, found 1\.01"):
        take_turns(sides, rounds=1, tolerance=1e-3)
    assert (tmp_path / "log").read_text() == "pp"


def test_a_side_that_fails_says_why(worker):
    sides = {"ours": (worker("ours", 1.0), "fails")}
    with pytest.raises(
        SideError, match=r"(?s)ours ended at 'numbers' with status 1:.*this side is broken"
    ):
        take_turns(sides, rounds=1, tolerance=1e-3)


def test_a_side_that_was_killed_says_so(worker):
    """As where memory ran out, of which the process itself says nothing."""
    side = worker("ours", 1.0)
    side.ask("prepare", task="sft")
    side._process.kill()
    side._process.wait()
    with pytest.raises(SideError, match=r"ours ended at 'run' by SIGKILL, .* memory ran out"):
        side.ask("run")
    side.close()


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ({"a": 1.0}, {"a": 1.0009}, True),
        ({"a": 1.0}, {"a": 1.002}, False),
        ({"a": 1.0, "b": 2.0}, {"a": 1.0, "c": 5.0}, True),
        ({"a": [[1, 2]]}, {"a": [[1, 2]]}, True),
        ({"a": [[1, 2]]}, {"a": [[1, 3]]}, False),
        ({"a": [[1, 2]]}, {"a": [[1]]}, False),
        ({"a": 0.0}, {"a": 1e-7}, True),
        ({"a": float("nan")}, {"a": float("nan")}, False),
    ],
)
def test_check(first, second, same):
    numbers = {"ours": first, "theirs": second}
    if same:
        check(numbers, 1e-3)
    else:
        with pytest.raises(SideError, match=r"a: expected .* as ours has it"):
            check(numbers, 1e-3)


def test_sides_without_a_common_number_are_refused():
    with pytest.raises(SideError, match=r"found \[\] of ours and \['loss'\] of theirs"):
        check({"ours": {}, "theirs": {"loss": 1.0}}, 1e-3)


def test_ratio_is_of_runs_of_one_round():
    """A machine that slows down slows both sides of a round."""
    ours = Timing(0.0, [1.0, 2.0, 4.0], 0, None)
    theirs = Timing(0.0, [3.0, 6.2, 11.6], 0, None)
    least, median, most = ratio(theirs, ours)
    assert (least, most) == pytest.approx((2.9, 3.1))
    assert median == pytest.approx(3.1)
    with pytest.raises(ConfigError, match="expected at least 1"):
        ratio(Timing(0.0, [], 0, None), ours)
