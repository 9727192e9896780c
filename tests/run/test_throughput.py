"""What a step has done, counted from its batch: no padding, and each prompt once for its group."""

import types

import numpy as np
import pytest

from morer1_jax.learn.trainable import TrainableParts
from morer1_jax.model.config import LoRA
from morer1_jax.model.flops import batch_vision_flops, text_flops
from morer1_jax.run import throughput
from morer1_jax.run.throughput import Passes, Work, group_work, sequence_work


def test_padding_and_packing_change_nothing(tiny):
    passes = Passes(text=3, vision=3)
    padded = sequence_work(tiny.CONFIG, passes, tiny.sequences())
    more = sequence_work(tiny.CONFIG, passes, tiny.sequences(prompt=50, windows=9))
    rows = [[0, 1, 2, 3], [], [4, 5], [6, 7]]
    packed = sequence_work(
        tiny.CONFIG, passes, tiny.sequences(rows, prompt=90, completion=90, windows=20)
    )
    assert padded == more == packed
    samples = tiny.samples()
    assert padded.tokens == sum(len(s.prompt) + len(s.target) for s in samples)


def test_a_step_of_sft(tiny):
    """Sample 0 has no image: its own tokens, pairs and targets, three times."""
    sample = tiny.samples()[0]
    n = len(sample.prompt) + len(sample.target)
    work = sequence_work(tiny.CONFIG, Passes(3, 3), tiny.sequences([[0]]))
    assert work.flops == 3 * text_flops(tiny.CONFIG.text, n, n * (n + 1) // 2, len(sample.target))
    with_images = tiny.sequences([[2]])
    text = sequence_work(tiny.CONFIG, Passes(1, 0), with_images).flops
    whole = sequence_work(tiny.CONFIG, Passes(1, 2), with_images).flops
    assert whole - text == 2 * batch_vision_flops(tiny.CONFIG.vision, with_images.vision) > 0


def test_a_step_of_grpo(tiny):
    """Rollout, reference and update, each a pass over a prompt and its group."""
    prompts = tiny.prompts()
    lengths = np.arange(1, tiny.PROMPTS * 2 + 1).reshape(tiny.PROMPTS, 2)
    work = group_work(tiny.CONFIG, Passes(3, 3), prompts, lengths, scored=1, updates=1)
    expected = 0
    for sample, answers in zip(tiny.samples(), lengths, strict=True):
        s = len(sample.prompt)
        pairs = s * (s + 1) // 2 + sum(t * s + t * (t + 1) // 2 for t in answers)
        expected += text_flops(tiny.CONFIG.text, s + answers.sum(), pairs, answers.sum())
    expected += batch_vision_flops(tiny.CONFIG.vision, prompts.vision)
    assert work.flops == pytest.approx((1 + 1 + 3) * expected, rel=1e-12)
    assert work.tokens == lengths.sum() + sum(len(s.prompt) for s in tiny.samples())


LORA = LoRA(rank=2, alpha=4.0)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (TrainableParts(), Passes(text=3, vision=3)),
        (TrainableParts(vision=0.0), Passes(text=3, vision=1)),
        (TrainableParts(vision=0.0, merger=0.0), Passes(text=3, vision=1)),
        (TrainableParts(vision=0.0, merger=0.0, lora=LORA), Passes(text=2, vision=1)),
        (TrainableParts(language=0.0), Passes(text=2, vision=3)),
    ],
)
def test_what_does_not_train_has_no_gradient(parts, expected):
    assert Passes.of(parts) == expected


def test_speed_and_mfu(monkeypatch):
    chip = types.SimpleNamespace(flops=1e12)
    monkeypatch.setattr(throughput, "known_chip", lambda kind: chip)
    monkeypatch.setattr(throughput.jax, "device_count", lambda: 4)
    found = throughput.throughput(Work(4000.0, 2e12) + Work(4000.0, 2e12), seconds=2.0)
    assert found == {"throughput/tokens_per_second_per_device": 1000.0, "mfu": 0.5}
