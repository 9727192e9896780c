"""A run compiles once for each shape of its batches, in the step that first has it, then never."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("quick_compiles")

# How many programs of a step are compiled for every shape, at least and at most, and how many have
# shapes that never change. GRPO's: rollout, score, update, and the tower, unless rating asked in a
# shape like it; weights, finish.
PROGRAMS = {"sft": (1, 1, 0), "grpo": (3, 4, 2)}


@pytest.mark.parametrize("steps", [24, pytest.param(1000, marks=pytest.mark.soak)])
def test_as_many_compilations_as_shapes(tmp_path, steps, without_torch):
    script = Path(__file__).with_name("steady.py")
    run = subprocess.run(
        [sys.executable, script, f"--folder={tmp_path}", f"--steps={steps}"],
        env=without_torch(),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "compiled again" not in run.stdout + run.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    logged = [line for line in map(json.loads, lines) if line["kind"] == "train"]
    for stage, shapes in json.loads((tmp_path / "shapes.json").read_text()).items():
        least, most, fixed = PROGRAMS[stage]
        counts = [line["compilations"] for line in logged if line["stage"] == stage]
        assert len(counts) == len(shapes) == steps // 2
        buckets = [len({str(shape) for shape in shapes[:n]}) for n in range(1, len(shapes) + 1)]
        # A step is logged once the next one has begun.
        known = [*buckets[1:], buckets[-1]]
        # As many as there are shapes, and no more while their number stays the same.
        count_of = dict(zip(known, counts, strict=True))
        assert counts == [count_of[number] for number in known]
        for number, count in count_of.items():
            assert fixed + least * number <= count <= fixed + most * number
        print(f"{stage}: {buckets[-1]} shapes, {counts[-1]} compilations in {len(shapes)} steps")
        assert buckets[-1] <= 2  # config.data.shapes
        if stage == "grpo":
            assert buckets[-1] > 1
