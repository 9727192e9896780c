"""How long the control goes on: for as long as rating and GRPO took, whatever was logged."""

import json
import types

import pytest

from morer1_jax.config.settings import SFTSettings
from morer1_jax.errors import ConfigError
from morer1_jax.learn.state import OptimizerConfig
from morer1_jax.stages import control
from morer1_jax.stages.marker import write_marker


def write(workdir, **times):
    records = [
        {"stage": stage, "step": step, "kind": kind, "step_time": seconds}
        for stage, listed in times.items()
        for step, seconds in listed.items()
        for kind in ("train",)
    ]
    records.append({"stage": "sft", "step": 4, "kind": "valid", "validation/micro_f1": 1.0})
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


@pytest.fixture
def steps(monkeypatch, tmp_path):
    """Steps that the control would train for, given the log."""
    loops = []

    def train(run, name, settings, *, targets, **_):
        # SFT's last rate, all the way.
        rate = settings.optimizer.learning_rate(settings.steps)
        assert [rate(0), rate(settings.steps)] == pytest.approx([1e-4, 1e-4])
        assert targets == {"train:1": "…"}
        loops.append(settings.steps)

    monkeypatch.setattr(control, "train_sft", train)
    sft = SFTSettings(
        steps=4,
        batch=4,
        micro_batches=1,
        eval_every=2,
        eval_facts=2,
        save_every=2,
        log_every=1,
        keep_checkpoints=1,
        optimizer=OptimizerConfig(lr=1e-3, schedule="cosine", warmup=2, final=0.1),
    )
    run = types.SimpleNamespace(
        workdir=tmp_path,
        dataset=types.SimpleNamespace(reasoning={"train:1": "…"}),
        settings=types.SimpleNamespace(sft=sft, grpo=types.SimpleNamespace(steps=100)),
    )

    def steps(rating_seconds=0.0, configured=None, rated=True):
        run.settings.control = types.SimpleNamespace(steps=configured)
        if rated:
            write_marker(tmp_path / "rate", {}, {"seconds": rating_seconds})
        control.run_control(run)
        return loops.pop()

    return steps


def test_it_takes_as_long_as_all_of_grpo(steps, tmp_path):
    # The first steps compile, which is no training.
    write(tmp_path, sft={1: 30.0, 2: 0.5, 3: 0.5, 4: 0.5}, grpo={1: 60.0, 2: 2.0, 3: 2.0})
    assert steps() == 400


def test_rating_counts_as_grpo(steps, tmp_path):
    write(tmp_path, sft={4: 0.5}, grpo={100: 2.0})
    assert steps(rating_seconds=50.0) == 500


def test_steps_that_were_not_logged_count_too(steps, tmp_path):
    every = dict.fromkeys(range(1, 101), 2.0)
    write(tmp_path, sft=dict.fromkeys(range(1, 5), 0.5), grpo=every)
    assert steps() == 400
    tenth = {step: seconds for step, seconds in every.items() if step % 10 == 0}
    write(tmp_path, sft={4: 0.5}, grpo=tenth)
    assert steps() == 400


def test_without_a_log_of_grpo_it_says_what_to_run(steps, tmp_path):
    with pytest.raises(ConfigError, match="step times of stage grpo, found none; run it"):
        steps()
    write(tmp_path, sft={1: 1.0})
    with pytest.raises(ConfigError, match="step times of stage grpo, found none; run it"):
        steps()


def test_the_config_may_say_how_long_without_ratings_or_a_log(steps):
    assert steps(rated=False, configured=7) == 7
