"""A step's batch as a function of the step, which can be sent to worker processes.

What a batch holds depends on the seed and the step alone. A host makes its rows of it and no
others: those of all hosts, one after another, are the batch that one host would make.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from morer1_jax.batch import PromptBatch, SequenceBatch
from morer1_jax.data.collate import Collator
from morer1_jax.data.sample import Sample, SampleReader
from morer1_jax.data.shapes import RowPlan, SampleSize, Shape, smallest, widest
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
    """Makes a step's batch of samples to learn from, packed into rows: `feed(step)`.

    Attributes:
        facts: what `draw` points into.
        targets: what the assistant says, by fact's id.
        sizes: of each fact, by which all hosts pack alike.
    """

    reader: SampleReader
    facts: Sequence[Fact]
    targets: Mapping[str, str]
    draw: Draw
    host: Host
    sizes: Sequence[SampleSize]
    plan: RowPlan

    def __call__(self, step: int) -> SequenceBatch:
        """Makes this host's rows of a step's batch."""
        drawn = self.draw(step)
        rows = self.host.rows(self.plan.rows([self.sizes[i] for i in drawn]))
        samples = [[self._sample(self.facts[drawn[place]]) for place in row] for row in rows]
        return Collator.of(self.reader).sequences(samples, self.plan.shape)

    def _sample(self, fact: Fact) -> Sample:
        return self.reader.read(fact, self.targets[fact.id])


@dataclasses.dataclass(frozen=True)
class PromptFeed:
    """Makes a step's batch of prompts to sample from, a fact each: `feed(step)`.

    Attributes:
        facts: what `draw` points into.
        sizes: of each fact.
        shapes: that a batch may have; it takes the smallest that holds it.
    """

    reader: SampleReader
    facts: Sequence[Fact]
    draw: Draw
    host: Host
    sizes: Sequence[SampleSize]
    shapes: Sequence[Shape]

    def __call__(self, step: int) -> PromptBatch:
        """Makes this host's rows of a step's batch."""
        drawn = self.draw(step)
        shape = smallest(self.shapes, widest([self.sizes[i] for i in drawn]))
        samples = [self.reader.read(self.facts[i]) for i in self.host.rows(drawn)]
        ids = self.host.rows(noise_ids(drawn, len(self.facts)))
        return Collator.of(self.reader).prompts(samples, ids, shape)


def noise_ids(drawn: Int[np.ndarray, " b"], total: int) -> Int[np.ndarray, " b"]:
    """Returns what the noise of each row is keyed by: its fact, and how often it came before.

    A pool smaller than its share of the batch gives a fact twice, and the same noise would give the
    same completions twice.

    Args:
        drawn: indices of the rows' facts.
        total: number of facts that indices may point to.
    """
    before = [np.count_nonzero(drawn[:row] == fact) for row, fact in enumerate(drawn)]
    return drawn + total * np.asarray(before, drawn.dtype)
