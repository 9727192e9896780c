"""Growth is computed from what was measured."""

import dataclasses

import pytest

from bench.cases import PRESETS
from bench.compare import Measured, Results
from bench.growth import Growth, draw, laws
from bench.turns import Timing

PRESET = dataclasses.replace(PRESETS["small"], completion=101)


def comparison(task, **sides):
    timings = {name: Timing(0.0, [9 * s, s, 0.0], 0, None) for name, s in sides.items()}
    return task, Measured(task, "today", timings)


def results(tasks=slice(None)):
    return Results(PRESET, "2 cores", dict(MEASURED[tasks]))


MEASURED = [
    comparison("sft", ours=1.0, fast=2.0),
    comparison("first/128", ours=0.5, fast=1.0, slow=0.1),
    comparison("sample/128", ours=1.5, fast=3.0, slow=6.1),
    comparison("first/512", ours=1.0, fast=2.0, slow=1.0),
    comparison("sample/512", ours=2.1, fast=7.0, slow=5.5),
    comparison("update/512/2", ours=2.0, fast=4.0, slow=8.0),
    comparison("update/512/8", ours=4.0, fast=16.0, slow=32.0),
]


def test_medians_of_ours_and_the_fastest_other():
    growth = Growth.of(results())
    assert growth.update == {2: (2.0, 4.0, "fast"), 8: (4.0, 16.0, "fast")}
    # Each form's own first token is taken off before the fastest is looked for.
    assert growth.decode[128][:2] == pytest.approx((0.01, 0.02))
    assert growth.decode[512][:2] == pytest.approx((0.011, 0.045))
    assert [growth.decode[p].form for p in (128, 512)] == ["fast", "slow"]


def test_tables():
    lines = Growth.of(results()).tables().splitlines()
    assert laws(PRESET, 8) == (512 + 8 * 101, 8 * 613)
    assert "| 8 | 4.00 | 2.00 | 1.85 | 16.00 | 4.00 | 4.00 |" in lines
    assert "| 512 | 11.0 | +10% | 45.0 (slow) | +125% |" in lines


def test_one_size_has_no_growth():
    assert Growth.of(results(slice(3))).tables() == ""


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("tasks", [slice(1), slice(1, 2), slice(None)], ids=str)
def test_picture(tmp_path, tasks):
    draw(results(tasks), tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
