import io
import json
import struct
import sys

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from morer1_jax.errors import DataError
from morer1_jax.progress import progress
from morer1_jax.run.log import MetricLog, RecordLog


def lines(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def keys(path):
    return [(record["stage"], record["step"], record["kind"]) for record in lines(path)]


def events(folder):
    """What TensorBoard shows: later files' restarts take back the steps from theirs on."""
    shown = {}
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.HasField("session_log"):
                shown = {key: value for key, value in shown.items() if key[1] < event.step}
            for value in event.summary.value:
                assert (value.tag, event.step) not in shown
                shown[value.tag, event.step] = value.simple_value
    return shown


def test_metrics_are_json_lines_and_events(tmp_path):
    log = MetricLog(tmp_path, "sft")
    log.write(1, {"loss": np.float32(0.5), "num_tokens": 7})
    log.write(1, {"loss": 0.25}, kind="valid")
    log.close()
    assert lines(tmp_path / "metrics.jsonl") == [
        {"stage": "sft", "step": 1, "kind": "train", "loss": 0.5, "num_tokens": 7},
        {"stage": "sft", "step": 1, "kind": "valid", "loss": 0.25},
    ]
    assert events(tmp_path / "tensorboard" / "sft") == {
        ("train/loss", 1): 0.5,
        ("train/num_tokens", 1): 7,
        ("valid/loss", 1): 0.25,
    }


def test_what_is_not_finite_is_null_and_named(tmp_path):
    log = MetricLog(tmp_path, "grpo")
    log.write(3, {"kl": float("nan"), "loss": 1.0, "entropy": -np.inf})
    (record,) = lines(tmp_path / "metrics.jsonl")
    assert record["kl"] is None
    assert record["entropy"] is None
    assert record["loss"] == 1.0
    assert record["not_finite"] == ["kl", "entropy"]
    rollouts = RecordLog(tmp_path / "rollouts.jsonl", "grpo")
    rollouts.write(3, [{"rewards": {"format": 1.0, "effort": [float("inf")]}}])
    (record,) = lines(tmp_path / "rollouts.jsonl")
    assert record["rewards"] == {"format": 1.0, "effort": [None]}
    assert record["not_finite"] == ["rewards.effort.0"]


def test_every_step_is_there_once_after_a_crash(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricLog(tmp_path, "sft").write(9, {"loss": 9.0})
    log = MetricLog(tmp_path, "grpo")
    for step in range(1, 8):
        log.write(step, {"loss": float(step)})
        if step % 2 == 0:
            log.write(step, {"loss": -float(step)}, kind="valid")
    log.sync()
    with open(path, "ab") as file:
        file.write(b'{"stage": "grpo", "step": 8, "ki')  # Torn by the crash.

    log = MetricLog(tmp_path, "grpo")
    log.resume_at(4)
    assert path.read_bytes().endswith(b"\n")
    for step in range(5, 9):
        log.write(step, {"loss": 10.0 * step})
        if step % 2 == 0:
            log.write(step, {"loss": -10.0 * step}, kind="valid")
    log.close()
    found = keys(path)
    assert len(set(found)) == len(found)
    expected = {("sft", 9, "train")} | {("grpo", step, "train") for step in range(1, 9)}
    assert set(found) == expected | {("grpo", step, "valid") for step in (2, 4, 6, 8)}
    by_step = {r["step"]: r["loss"] for r in lines(path) if r["kind"] == "train"}
    assert by_step[4] == 4.0
    assert by_step[5] == 50.0
    shown = events(tmp_path / "tensorboard" / "grpo")
    assert {step: v for (tag, step), v in shown.items() if tag == "train/loss"} == {
        **{step: step for step in range(1, 5)},
        **{step: 10 * step for step in range(5, 9)},
    }


def test_resuming_before_the_first_checkpoint_starts_afresh(tmp_path):
    MetricLog(tmp_path, "sft").write(0, {"loss": 1.0}, kind="valid")
    log = MetricLog(tmp_path, "sft")
    log.resume_at(None)
    log.write(0, {"loss": 2.0}, kind="valid")
    assert [record["loss"] for record in lines(tmp_path / "metrics.jsonl")] == [2.0]


def test_a_step_cannot_be_written_twice(tmp_path):
    log = MetricLog(tmp_path, "sft")
    log.write(5, {"loss": 1.0})
    log.write(5, {"loss": 1.0}, kind="valid")
    for again in (log, MetricLog(tmp_path, "sft")):
        with pytest.raises(ValueError, match="sft train: expected a step after 5, found 5"):
            again.write(5, {"loss": 1.0})
    assert len(keys(tmp_path / "metrics.jsonl")) == 2


def test_a_torn_last_line_is_dropped_before_the_next_is_written(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    RecordLog(path, "grpo").write(1, [{"text": "é"}, {"text": "b"}], kind="rollout")
    path.write_bytes(path.read_bytes() + '{"stage": "grpo", "text": "é'.encode()[:-1])
    RecordLog(path, "grpo").write(2, [{"text": "c"}], kind="rollout")
    assert [record["text"] for record in lines(path)] == ["é", "b", "c"]


@pytest.mark.parametrize("line", ["garbage", '{"stage": "sft", "step": 1}', "[]", ""])
def test_a_foreign_line_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "sft", "step": 1, "kind": "train"}\n' + line + "\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: expected a JSON object"):
        MetricLog(tmp_path, "sft")


def test_a_record_may_not_take_the_place_of_its_step(tmp_path):
    with pytest.raises(ValueError, match=r"expected no reserved key .* found step"):
        MetricLog(tmp_path, "sft").write(1, {"step": 3})


def test_only_the_first_process_writes(tmp_path):
    log = MetricLog(tmp_path, "sft", writer=False)
    log.resume_at(3)
    log.write(4, {"loss": 1.0})
    log.sync()
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_progress_in_a_file_is_whole_lines_with_a_rate(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    assert list(progress(range(2000), desc="sft", unit="step")) == list(range(2000))
    shown = [line.strip() for line in out.getvalue().replace("\r", "").splitlines() if line.strip()]
    assert len(shown) <= 2
    assert shown[-1].startswith("sft: 2000/2000 [")
    assert "step/s" in shown[-1]
