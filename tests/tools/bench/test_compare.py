"""What is set against what, and how it is told."""

import dataclasses
import json

import pytest

from bench import compare
from bench.cases import PRESETS
from bench.turns import Timing
from morer1_jax.errors import ConfigError

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


def measured(sides=TIMINGS):
    return compare.Measured("sampling, prompt 128", "2026-11-24, jax 0.10.2", sides)


def test_table():
    assert measured().table().splitlines() == [
        "### sampling, prompt 128",
        "",
        "| | seconds | ours is faster by | memory, MB | GFLOP | first run, seconds |",
        "|---|---|---|---|---|---|",
        "| ours | 1.50 (1.00 to 2.00) |  | 3,000 | 400 | 12 |",
        "| generate, onednn | 4.50 (3.00 to 5.00) | 3.00× (2.50 to 3.00) | 2,000 | 500 | 1 |",
        "| generate, default | 9.00 (8.00 to 9.00) | 6.00× (4.50 to 8.00) | 2,000 |  | 1 |",
        "",
        "3 rounds, 2026-11-24, jax 0.10.2",
    ]


def test_saved_results_are_gone_on_with(tmp_path):
    path = tmp_path / "bench.json"
    results = compare.Results.read(path, PRESETS["small"], "2 cores")
    assert results.tasks == {}
    results.tasks |= {"sample/128": measured(), "sft": measured()}
    results.save(path)
    again = compare.Results.read(path, PRESETS["small"], "2 cores")
    assert again == results
    assert [task for task, _ in again.in_order()] == ["sft", "sample/128"]
    saved = json.loads(path.read_text())["tasks"]["sft"]
    assert saved["made"] == "2026-11-24, jax 0.10.2"
    assert saved["sides"]["ours"]["seconds"] == [1.0, 2.0, 1.5]
    assert saved["sides"]["generate, default"]["flops"] is None


def test_other_results_are_refused(tmp_path):
    path = tmp_path / "bench.json"
    small = PRESETS["small"]
    compare.Results(small, "2 cores", {"sft": measured()}).save(path)
    for preset, device in (
        (PRESETS["tiny"], "2 cores"),
        (dataclasses.replace(small, group=4), "2 cores"),
        (small, "4 cores"),
    ):
        with pytest.raises(
            ConfigError, match=r"found those of another preset or device \('2 cores'\)"
        ):
            compare.Results.read(path, preset, device)
    path.write_text("{}")
    with pytest.raises(ConfigError, match=r"expected results of tools/bench\.py"):
        compare.Results.read(path, small, "2 cores")


def test_forms_that_are_known_are_not_lost():
    results = compare.Results(PRESETS["small"], "2 cores", {"sft": measured()})
    results.check_replaceable("sft", ["generate, onednn", "generate, default", "generate, new"])
    results.check_replaceable("grpo/128", ["TRL, default"])
    with pytest.raises(ConfigError, match=r"no results of sft .* generate, onednn, which would be"):
        results.check_replaceable("sft", ["generate, default"])
