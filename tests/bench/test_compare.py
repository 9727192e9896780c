"""What is set against what, and how it is told."""

import json

import pytest

from morer1_jax.bench import compare
from morer1_jax.bench.cases import PRESETS
from morer1_jax.bench.turns import Timing

TIMINGS = {
    "ours": Timing(12.0, [1.0, 2.0, 1.5], 3_000_000_000, 4e11),
    "generate, default": Timing(1.0, [8.0, 9.0, 9.0], 2_000_000_000, None),
    "generate, onednn": Timing(1.0, [3.0, 5.0, 4.5], 2_000_000_000, 5e11),
}
SAMPLING = compare.Comparison("sampling, prompt 128", "sample/128", {"generate": "sample/128"})


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_is_compared_with_both(name):
    made = compare.comparisons(PRESETS[name])
    tasks = [one.task for one in made]
    assert len(set(tasks)) == len(tasks)
    assert {"sft", "sft_mixed"} < set(tasks)
    for prompt in PRESETS[name].prompts:
        assert {f"first/{prompt}", f"sample/{prompt}"} < set(tasks)
        (grpo,) = [one for one in made if one.task == f"grpo/{prompt}"]
        assert set(grpo.peers) == {"TRL", "by hand"}
    longest = max(PRESETS[name].prompts)
    assert [task for task in tasks if task.startswith("update")] == [
        f"update/{longest}/{g}" for g in (1, 2, 4, 8, 16)
    ]


def test_table():
    assert compare.table(SAMPLING, TIMINGS).splitlines() == [
        "### sampling, prompt 128",
        "",
        "| | seconds | ours is faster by | memory, MB | GFLOP | first run, seconds |",
        "|---|---|---|---|---|---|",
        "| ours | 1.50 (1.00 to 2.00) |  | 3,000 | 400 | 12 |",
        "| generate, onednn | 4.50 (3.00 to 5.00) | 3.00× (2.50 to 3.00) | 2,000 | 500 | 1 |",
        "| generate, default | 9.00 (8.00 to 9.00) | 6.00× (4.50 to 8.00) | 2,000 |  | 1 |",
    ]


def test_saved_results_hold_every_run(tmp_path):
    results = [compare.as_json(SAMPLING, TIMINGS)]
    compare.save(tmp_path / "bench.json", "small", "2 CPU cores", results)
    read = json.loads((tmp_path / "bench.json").read_text())
    assert (read["preset"], read["device"]) == ("small", "2 CPU cores")
    (only,) = read["comparisons"]
    assert only["task"] == "sample/128"
    assert only["sides"]["ours"]["seconds"] == [1.0, 2.0, 1.5]
    assert only["sides"]["generate, default"]["flops"] is None
