"""What is set against what, and how it is told."""

import json

import pytest

from morer1_jax.bench import compare
from morer1_jax.bench.cases import PRESETS
from morer1_jax.bench.turns import Timing
from morer1_jax.run.config import ConfigError

TIMINGS = {
    "ours": Timing(12.0, [1.0, 2.0, 1.5], 3_000_000_000, 4e11),
    "generate, default": Timing(1.0, [8.0, 9.0, 9.0], 2_000_000_000, None),
    "generate, onednn": Timing(1.0, [3.0, 5.0, 4.5], 2_000_000_000, 5e11),
}


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
    assert compare.table("sampling, prompt 128", TIMINGS).splitlines() == [
        "### sampling, prompt 128",
        "",
        "| | seconds | ours is faster by | memory, MB | GFLOP | first run, seconds |",
        "|---|---|---|---|---|---|",
        "| ours | 1.50 (1.00 to 2.00) |  | 3,000 | 400 | 12 |",
        "| generate, onednn | 4.50 (3.00 to 5.00) | 3.00× (2.50 to 3.00) | 2,000 | 500 | 1 |",
        "| generate, default | 9.00 (8.00 to 9.00) | 6.00× (4.50 to 8.00) | 2,000 |  | 1 |",
    ]


def test_saved_results_are_gone_on_with(tmp_path):
    path = tmp_path / "bench.json"
    results = compare.Results.read(path, "small", "2 CPU cores")
    assert results.tasks == {}
    results.tasks["sample/128"] = "sampling, prompt 128", TIMINGS
    results.tasks["sft"] = "SFT, one length", TIMINGS
    results.sorted(["sft", "sample/128", "grpo/128"]).save(path)
    again = compare.Results.read(path, "small", "2 CPU cores")
    assert again == results
    assert list(again.tasks) == ["sft", "sample/128"]
    assert [text.splitlines()[0] for text in again.tables()] == [
        "### SFT, one length",
        "### sampling, prompt 128",
    ]
    (first, _) = json.loads(path.read_text())["comparisons"]
    assert first["sides"]["ours"]["seconds"] == [1.0, 2.0, 1.5]
    assert first["sides"]["generate, default"]["flops"] is None


def test_other_results_are_refused(tmp_path):
    path = tmp_path / "bench.json"
    compare.Results("tiny", "2 CPU cores", {}).save(path)
    with pytest.raises(ConfigError, match=r"results of 'tiny' on '2 CPU cores' found, of 'small'"):
        compare.Results.read(path, "small", "2 CPU cores")
    path.write_text("{}")
    with pytest.raises(ConfigError, match=r"results of tools/bench\.py expected"):
        compare.Results.read(path, "small", "2 CPU cores")
