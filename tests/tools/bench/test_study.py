"""The study's table: means, spreads and gains over seeds, from score files alone."""

import json
import statistics
import subprocess
import sys

import pytest

from bench import study
from morer1_jax.errors import ConfigError

SCORES = {
    "majority": [1.0, 1.0],
    "photo_hidden": [20.0, 22.0],
    "title_hidden": [30.0, 28.0],
    "sft": [50.0, 56.0],
    "control": [55.0, 57.0],
    "grpo": [70.0, 70.0],
}
NO_MIXING = [66.0, 71.0]


def _write(folder, name, micro_f1):
    folder.mkdir(parents=True, exist_ok=True)
    scores = dict.fromkeys(study.COLUMNS, 10.0) | {"micro_f1": micro_f1, "lenient": {}}
    (folder / f"{name}.json").write_text(json.dumps(scores))


@pytest.fixture
def folder(tmp_path):
    for seed in (0, 1):
        for name, values in SCORES.items():
            _write(tmp_path / f"seed{seed}" / "eval", name, values[seed])
        _write(tmp_path / f"seed{seed}-no-mixing" / "eval", "grpo", NO_MIXING[seed])
        _write(tmp_path / f"seed{seed}-no-mixing" / "eval", "sft", 0.0)
    return tmp_path


def test_collect_takes_each_system_from_its_own_run(folder):
    results = study.collect(folder, [0, 1])
    assert results["1"]["sft"]["micro_f1"] == 56.0
    assert results["1"]["grpo"]["micro_f1"] == 70.0
    assert results["1"]["no_mixing"]["micro_f1"] == 71.0
    assert set(results["0"]) == set(study.NAMES)


def test_table_gives_means_spreads_and_gains(folder):
    text = study.table(study.collect(folder, [0, 1]))
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if "|" in line}
    assert f"| 53.0 ± {statistics.stdev([50.0, 56.0]):.1f} |" in rows["SFT"]
    assert "| 70.0 ± 0.0 |" in rows["GRPO"]
    assert "- SFT: 17.0 ± 4.2 (+20.0, +14.0)" in text
    assert "- GRPO without mixing: 1.5 ± 3.5 (+4.0, -1.0)" in text


def test_one_seed_has_no_spread(folder):
    assert "| 50.0 ± 0.0 |" in study.table(study.collect(folder, [0]))


def test_a_run_that_failed_ends_the_study_in_one_line(tmp_path, monkeypatch):
    started = []

    def fail(command, check):
        started.append(command)
        return subprocess.CompletedProcess(command, 2)

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(ConfigError, match=r"seed0: this run ended with exit code 2, as said above"):
        study.run_study("some.py", tmp_path, [0, 1], [])
    assert len(started) == 1


def test_a_run_that_broke_off_does_not_lose_the_other_seeds(folder, monkeypatch, capsys):
    """As one that was killed where memory ran out."""

    def run(command, check):
        killed = any("seed0-no-mixing" in argument for argument in command)
        return subprocess.CompletedProcess(command, -9 if killed else 0)

    monkeypatch.setattr(subprocess, "run", run)
    for name in ("data", "tokenizer", "sft", "rate"):
        for seed in (0, 1):
            (folder / f"seed{seed}" / name).mkdir()
    with pytest.raises(ConfigError, match=r"^\S*seed0-no-mixing: this run ended with exit code -9"):
        study.run_study("some.py", folder, [0, 1], [])
    assert "the other seeds go on" in capsys.readouterr().err
    assert list(json.loads((folder / "study.json").read_text())) == ["1"]
    assert "over 1 seeds" in (folder / "study.md").read_text()


def test_what_is_known_is_written_after_each_seed(folder, monkeypatch):
    def run(command, check):
        return subprocess.CompletedProcess(command, 2 if "--config.seed=1" in command else 0)

    monkeypatch.setattr(subprocess, "run", run)
    for name in ("data", "tokenizer", "sft", "rate"):
        (folder / "seed0" / name).mkdir()
    with pytest.raises(ConfigError, match="seed1: this run ended with exit code 2"):
        study.run_study("some.py", folder, [0, 1], [])
    assert list(json.loads((folder / "study.json").read_text())) == ["0"]


def test_runs_are_started_in_order_and_share_what_does_not_depend_on_mixing(tmp_path, monkeypatch):
    commands = []

    def fake_run(command, check):
        commands.append(command)
        workdir = next(arg for arg in command if arg.startswith("--workdir=")).partition("=")[2]
        for name in ("data", "tokenizer", "sft", "rate"):
            path = tmp_path / workdir / name
            path.mkdir(parents=True, exist_ok=True)
            if not (path / "from").exists():
                (path / "from").write_text(workdir)
        for name in SCORES:
            _write(tmp_path / workdir / "eval", name, 1.0)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", fake_run)
    study.run_study("some.py", tmp_path / "study", [3], ["--config.grpo.steps=2"])
    assert [command[0] for command in commands] == [sys.executable] * 2
    main, plain = commands
    assert f"--config.stages={study.MAIN_STAGES}" in main
    assert "--config.grpo.mixing=False" not in main
    assert "--config.grpo.mixing=False" in plain
    assert "--config.stages=grpo,evaluate" in plain
    for command in commands:
        assert {"--config=some.py", "--config.seed=3", "--config.grpo.steps=2"} <= set(command)
    shared = tmp_path / "study" / "seed3-no-mixing" / "sft" / "from"
    assert shared.read_text() == str(tmp_path / "study" / "seed3")
    assert json.loads((tmp_path / "study" / "study.json").read_text())["3"]["grpo"]
