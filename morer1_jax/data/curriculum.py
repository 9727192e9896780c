"""Chooses the facts of each step: shuffled pools, and a mix of easy and hard that shifts in time.

All of it is a pure function of (seed, step) and the pools, so a run resumes at any step, on any
number of hosts. Progressive Sample-Mixing is MORE-R1's (arXiv 2603.09478): early batches are
half easy, half hard; later ones swap easy for hard. The end and shape of its schedule are not
published; the defaults are our own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from morer1_jax.bounds import at_least, between, check_bounds, one_of
from morer1_jax.errors import DataError

# Keeps the shuffles' random streams apart from all others of a run's seed.
_STREAM = 0x504F4F4C


class EmptyPoolError(DataError):
    """A pool without facts.

    Attributes:
        pool: the pool's name.
    """

    def __init__(self, pool: str) -> None:
        super().__init__(f"the pool of {pool} facts is empty; expected at least one")
        self.pool = pool


class Pool:
    """An endless sequence of facts: epoch after epoch, each in a new order.

    No fact comes again before all others of the pool have come.
    """

    def __init__(self, name: str, items: Sequence[int], seed: Sequence[int]) -> None:
        """Makes a pool.

        Args:
            name: the pool's name, for errors.
            items: indices of facts; their order matters.
            seed: numbers that identify this pool's shuffles.

        Raises:
            EmptyPoolError: there are no items.
        """
        if not len(items):
            raise EmptyPoolError(name)
        self.name = name
        self.items = np.asarray(items)
        self._seed = (_STREAM, *seed)

    def take(self, start: int, count: int) -> np.ndarray:
        """Returns items `start` to `start + count` of the sequence."""
        size = len(self.items)
        places = np.arange(start, start + count)
        out = np.empty(count, self.items.dtype)
        for epoch in np.unique(places // size):
            order = np.random.default_rng((*self._seed, int(epoch))).permutation(size)
            in_epoch = places // size == epoch
            out[in_epoch] = self.items[order[places[in_epoch] % size]]
        return out

    def batch(self, step: int, size: int) -> np.ndarray:
        """Returns the items of a step, where every step takes `size`."""
        return self.take(step * size, size)


MixShape = Literal["linear", "cosine", "step"]


@dataclasses.dataclass(frozen=True)
class MixConfig:
    """The share of easy facts over a run.

    Attributes:
        start, end: share of easy facts in the first batch and from `until` on.
        until: the step from which the share is `end`.
        shape: the way between: "linear", "cosine" (slow at both ends) or "step" (halfway).
    """

    start: float = between(0, 1, 0.5)
    end: float = between(0, 1, 0.0)
    until: int = at_least(1, 100)
    shape: MixShape = one_of(MixShape, "linear")

    def __post_init__(self) -> None:
        check_bounds(self)

    def easy_share(self, step: int) -> float:
        """Returns the scheduled share of easy facts at a step."""
        progress = min(step / self.until, 1.0)
        if self.shape == "cosine":
            progress = 0.5 - 0.5 * float(np.cos(np.pi * progress))
        elif self.shape == "step":
            progress = float(progress >= 0.5)
        return self.start + (self.end - self.start) * progress

    def easy_count(self, step: int, batch: int) -> int:
        """Returns the number of easy facts in a batch, the share rounded half up."""
        return int(np.floor(batch * self.easy_share(step) + 0.5))


class Mixer:
    """Mixes easy and hard facts into the batches of a run by a schedule."""

    def __init__(
        self,
        easy: Sequence[int],
        hard: Sequence[int],
        config: MixConfig,
        batch: int,
        steps: int,
        seed: int,
    ) -> None:
        """Makes a mixer.

        Args:
            easy, hard: indices of the facts of each pool.
            batch: the number of facts a batch.
            steps: the number of steps of the run.

        Raises:
            EmptyPoolError: a pool that the schedule draws from is empty.
        """
        counts = np.asarray([config.easy_count(step, batch) for step in range(steps)])
        self._batch = batch
        self._counts = counts
        # Easy facts in the batches before a step.
        self._easy_before = np.concatenate([[0], np.cumsum(counts)])
        self._easy = Pool("easy", easy, (seed, 0)) if counts.any() else None
        self._hard = Pool("hard", hard, (seed, 1)) if (counts < batch).any() else None

    def easy_count(self, step: int) -> int:
        """Returns the number of easy facts in the batch of a step."""
        return int(self._counts[step])

    def batch(self, step: int) -> np.ndarray:
        """Returns the facts of a step, easy ones first."""
        easy_count, easy_before = self.easy_count(step), int(self._easy_before[step])
        parts = []
        if easy_count:
            parts.append(self._easy.take(easy_before, easy_count))
        if easy_count < self._batch:
            hard_before = step * self._batch - easy_before
            parts.append(self._hard.take(hard_before, self._batch - easy_count))
        return np.concatenate(parts)
