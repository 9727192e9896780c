"""Counts a step's tokens and FLOPs (`model.flops`), for tokens a second and MFU."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

from morer1_jax.batch import PromptBatch, SequenceBatch
from morer1_jax.cost.chips import known_chip
from morer1_jax.learn.trainable import TrainableParts
from morer1_jax.model.config import ModelConfig
from morer1_jax.model.flops import batch_vision_flops, text_flops


class Work(NamedTuple):
    """The work of one step, or of several.

    Attributes:
        tokens: number of tokens of text and images trained on (in GRPO sampled, too); no padding.
        flops: see `model.flops`.
    """

    tokens: float
    flops: float

    def __add__(self, other: Work) -> Work:  # type: ignore[override]
        return Work(self.tokens + other.tokens, self.flops + other.flops)


class Passes(NamedTuple):
    """The cost of a training step, in forward passes.

    1 for the forward pass, 1 for the gradient with respect to the inputs, 1 for that with respect
    to the parameters.
    """

    text: int
    vision: int

    @classmethod
    def of(cls, parts: TrainableParts) -> Passes:
        """Returns the passes of a step that trains these parts.

        Products of adapters, and of a merger that trains without its tower, are too small to count.
        """
        whole = parts.language > 0 and parts.adapters is None
        return cls(text=2 + whole, vision=3 if parts.vision > 0 else 1)


def sequence_work(config: ModelConfig, passes: Passes, batch: SequenceBatch) -> Work:
    """Returns the work of a step of SFT."""
    lengths = np.concatenate([np.bincount(row)[1:] for row in batch.segment_ids]).astype(np.int64)
    text = text_flops(
        config.text,
        tokens=lengths.sum(),
        pairs=(lengths * (lengths + 1) // 2).sum(),
        logits=np.count_nonzero(batch.weights),
    )
    vision = batch_vision_flops(config.vision, batch.vision)
    flops = passes.text * text + passes.vision * vision
    return Work(float(lengths.sum()), float(flops))


def group_work(
    config: ModelConfig,
    passes: Passes,
    prompts: PromptBatch,
    lengths: np.ndarray,
    *,
    scored: int,
    updates: int,
) -> Work:
    """Returns the work of a step of GRPO, each prompt computed once for its group.

    Args:
        lengths: [b, g], number of tokens of each completion.
        scored: number of passes for log-probabilities alone, of a reference or of old parameters.
        updates: number of updates on the rollout.
    """
    # Tokens, and pairs of tokens that attend to each other.
    prompt = np.asarray(prompts.mask).sum(axis=1).astype(np.int64)
    lengths = np.asarray(lengths, np.int64)
    pairs = (prompt * (prompt + 1) // 2).sum()
    pairs += (lengths * prompt[:, None] + lengths * (lengths + 1) // 2).sum()
    tokens = prompt.sum() + lengths.sum()
    # A rollout costs the same as one forward pass, since each token passes once.
    text = text_flops(config.text, tokens, pairs, lengths.sum())
    vision = batch_vision_flops(config.vision, prompts.vision)
    flops = (1 + scored + updates * passes.text) * text
    # A frozen tower runs once for rollout, reference and updates.
    flops += (1 + scored + updates * passes.vision if passes.vision > 1 else 1) * vision
    return Work(float(tokens), float(flops))


def throughput(work: Work, seconds: float) -> dict[str, float]:
    """Returns `throughput/tokens_per_second_per_device`, and `mfu` if the peak is known."""
    devices = jax.device_count()
    rates = {"throughput/tokens_per_second_per_device": work.tokens / seconds / devices}
    chip = known_chip(jax.devices()[0].device_kind)
    if chip is not None:
        rates["mfu"] = work.flops / seconds / devices / chip.flops
    return rates
