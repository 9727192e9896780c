"""Makes a step's batch, as a function of the step that can be sent to worker processes.

The contents of a batch depend on the seed and the step alone. Each host makes the rows that its
own devices hold: those of all hosts are the batch that a single host would make.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jaxtyping import Int

from morer1_jax.batch import PromptBatch, SequenceBatch
from morer1_jax.data.collate import Collator
from morer1_jax.data.rows import RowPlan
from morer1_jax.data.sample import Sample, SampleReader
from morer1_jax.data.shapes import SampleSize, Shape, share_images, smallest, widest
from morer1_jax.errors import DataError
from morer1_jax.task.fact import Fact

Batch = TypeVar("Batch")
# Returns the indices of a step's facts.
Draw = Callable[[int], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Host:
    """One process's share of every batch.

    Devices lie on a mesh in the order of their network, not of their processes, so a host's parts
    need not be neighbours; where devices of several hosts hold the same rows, each of these hosts
    prepares them.

    Attributes:
        parts: numbers, in increasing order, of those parts that this process's devices hold.
        total: number of the equal parts that the mesh splits a batch's rows into.
        counted: those of `parts` that this process counts, so that each is counted once.
    """

    parts: tuple[int, ...] = (0,)
    total: int = 1
    counted: tuple[int, ...] = (0,)

    def rows(self, rows: Sequence[Any]) -> Sequence[Any]:
        """Returns the rows of a global batch that this process prepares, part after part.

        Raises:
            DataError: the rows do not divide into the parts.
        """
        if len(rows) % self.total:
            raise DataError(
                f"a batch of {len(rows)} rows does not divide into the {self.total} parts of the "
                "mesh"
            )
        if len(self.parts) == self.total:
            return rows
        size = len(rows) // self.total
        return [row for part in self.parts for row in rows[part * size : (part + 1) * size]]

    def counted_rows(self, batch: Batch) -> Batch:
        """Returns, of a batch that this process prepared, the rows that it counts."""
        if self.counted == self.parts:
            return batch

        def of_array(array: np.ndarray) -> np.ndarray:
            parts = np.split(array, len(self.parts))
            taken = [
                rows for part, rows in zip(self.parts, parts, strict=True) if part in self.counted
            ]
            return np.concatenate(taken) if taken else array[:0]

        return jax.tree.map(of_array, batch)


@dataclasses.dataclass(frozen=True)
class SequenceFeed:
    """Makes a step's batch of samples to learn from, packed into rows: `feed(step)`.

    Attributes:
        facts: the facts that `draw` returns indices of.
        targets: the assistant's text by the fact's id.
        sizes: one a fact; every host packs the whole batch by them, so all pack alike.
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
        fact_indices = self.draw(step)
        shape, rows = self.plan.rows([self.sizes[i] for i in fact_indices])
        rows = self.host.rows(rows)
        samples = [[self._sample(self.facts[fact_indices[place]]) for place in row] for row in rows]
        return Collator.of(self.reader).sequences(samples, shape)

    def _sample(self, fact: Fact) -> Sample:
        return self.reader.read(fact, self.targets[fact.id])


@dataclasses.dataclass(frozen=True)
class PromptFeed:
    """Makes a step's batch of prompts to sample from, one a fact: `feed(step)`.

    Attributes:
        facts: the facts that `draw` returns indices of.
        sizes: one a fact.
        shapes: the shapes that a batch may have, in increasing order; it takes the first that
            holds it.
    """

    reader: SampleReader
    facts: Sequence[Fact]
    draw: Draw
    host: Host
    sizes: Sequence[SampleSize]
    shapes: Sequence[Shape]

    def __call__(self, step: int) -> PromptBatch:
        """Makes this host's rows of a step's batch."""
        fact_indices = self.indices(step)
        content = widest([self.sizes[i] for i in fact_indices], self.shapes[0].sharing)
        shape = smallest(self.shapes, content)
        samples = [self.reader.read(self.facts[i]) for i in self.host.rows(fact_indices)]
        ids = self.host.rows(noise_ids(fact_indices, len(self.facts)))
        return Collator.of(self.reader).prompts(samples, ids, shape)

    def indices(self, step: int) -> Int[np.ndarray, " b"]:
        """Returns the indices of a step's facts in the order of its rows; see `share_images`."""
        drawn = self.draw(step)
        return drawn[share_images([self.sizes[i].slots for i in drawn], self.shapes[0].sharing)]


def noise_ids(drawn: Int[np.ndarray, " b"], total: int) -> Int[np.ndarray, " b"]:
    """Returns the key of each row's noise: its fact, and how often the fact came before.

    A pool smaller than its share of the batch repeats a fact, and the same noise would repeat its
    completions.

    Args:
        drawn: indices of the rows' facts.
        total: the number of facts that indices may point to.
    """
    earlier_counts = [np.count_nonzero(drawn[:row] == fact) for row, fact in enumerate(drawn)]
    return drawn + total * np.asarray(earlier_counts, drawn.dtype)
