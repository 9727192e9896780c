"""A step's batch as a function of the step, which can be sent to worker processes.

What a batch holds depends on the seed and the step alone. A host makes its rows of it and no
others: those of all hosts, one after another, are the batch that one host would make.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from morer1_jax.batch import PromptBatch, SequenceBatch
from morer1_jax.data.encoder import Encoder, Sample
from morer1_jax.data.shapes import Need, RowPlan, Shape, smallest, widest
from morer1_jax.errors import DataError
from morer1_jax.task.fact import Fact

# Which facts a step sees, as indices.
Draw = Callable[[int], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Host:
    """One process of `count`, and its share of every batch."""

    index: int = 0
    count: int = 1

    def rows(self, rows: Sequence[Any]) -> Sequence[Any]:
        """The rows of a global batch that this process prepares.

        Raises:
          DataError: the rows do not divide among the processes.
        """
        if len(rows) % self.count:
            raise DataError(f"a batch of {len(rows)} rows does not divide among {self.count} hosts")
        part = len(rows) // self.count
        return rows[self.index * part : (self.index + 1) * part]


@dataclasses.dataclass(frozen=True)
class SequenceFeed:
    """Samples to learn from, packed into rows: `feed(step)`.

    Attributes:
      facts: what `draw` points into.
      targets: what the assistant says, by fact's id.
      needs: of each fact, by which all hosts pack alike.
    """

    encoder: Encoder
    facts: Sequence[Fact]
    targets: Mapping[str, str]
    draw: Draw
    host: Host
    needs: Sequence[Need]
    plan: RowPlan

    def __call__(self, step: int) -> SequenceBatch:
        drawn = self.draw(step)
        rows = self.host.rows(self.plan.rows([self.needs[i] for i in drawn]))
        samples = [[self._sample(self.facts[drawn[place]]) for place in row] for row in rows]
        return self.encoder.sequences(samples, self.plan.shape)

    def _sample(self, fact: Fact) -> Sample:
        return self.encoder.sample(fact, self.targets[fact.id])


@dataclasses.dataclass(frozen=True)
class PromptFeed:
    """Prompts to sample from, a fact each: `feed(step)`.

    Attributes:
      facts: what `draw` points into.
      needs: of each fact.
      shapes: that a batch may have; it takes the smallest that holds it.
    """

    encoder: Encoder
    facts: Sequence[Fact]
    draw: Draw
    host: Host
    needs: Sequence[Need]
    shapes: Sequence[Shape]

    def __call__(self, step: int) -> PromptBatch:
        drawn = self.draw(step)
        shape = smallest(self.shapes, widest([self.needs[i] for i in drawn]))
        noise = self.host.rows(noise_ids(drawn, len(self.facts)))
        return self.encoder.prompts([self.facts[i] for i in self.host.rows(drawn)], noise, shape)


def noise_ids(drawn: np.ndarray, total: int) -> np.ndarray:
    """What the noise of each row of a batch is keyed by: its fact, and how often it came before.

    A pool smaller than its share of the batch gives a fact twice, and the same noise would give the
    same completions twice.
    """
    before = [np.count_nonzero(drawn[:row] == fact) for row, fact in enumerate(drawn)]
    return drawn + total * np.asarray(before, drawn.dtype)
