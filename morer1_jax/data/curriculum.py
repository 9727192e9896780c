"""Which facts a step sees: shuffled pools, and the easy/hard mix that moves as training goes on.

All of it is a pure function of (seed, step) and the pools, so a run can be taken up at any step, on
any number of hosts. Progressive Sample-Mixing is MORE-R1's (arXiv 2603.09478): early batches are
half easy, half hard; later ones swap easy for hard. The schedule's end and shape are not public:
those here are ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from morer1_jax.errors import DataError

# Sets the shuffles' random streams apart from whatever else is drawn from a run's seed.
_STREAM = 0x504F4F4C


class EmptyPoolError(DataError):
    """A pool that facts are drawn from has none.

    Attributes:
      pool: its name.
    """

    def __init__(self, pool: str) -> None:
        super().__init__(f"the pool of {pool} facts is empty; expected at least one")
        self.pool = pool


class Pool:
    """An endless sequence over some facts: epoch after epoch, each in a new order.

    No fact comes again before all others of the pool have come.

    Args:
      items: what is drawn; order matters.
      seed: numbers that name this pool's shuffles.

    Raises:
      EmptyPoolError: there are no items.
    """

    def __init__(self, name: str, items: Sequence[int], seed: Sequence[int]) -> None:
        if not len(items):
            raise EmptyPoolError(name)
        self.name = name
        self.items = np.asarray(items)
        self._seed = (_STREAM, *seed)

    def take(self, start: int, count: int) -> np.ndarray:
        """Items `start` to `start + count` of the sequence."""
        size = len(self.items)
        places = np.arange(start, start + count)
        out = np.empty(count, self.items.dtype)
        for epoch in np.unique(places // size):
            order = np.random.default_rng((*self._seed, int(epoch))).permutation(size)
            here = places // size == epoch
            out[here] = self.items[order[places[here] % size]]
        return out

    def batch(self, step: int, size: int) -> np.ndarray:
        """The items of a step, where every step takes `size`."""
        return self.take(step * size, size)


@dataclasses.dataclass(frozen=True)
class MixConfig:
    """The share of easy facts over a run.

    Attributes:
      start, end: share of easy facts in the first batch and from `until` on.
      until: the step from which the share is `end`.
      shape: how it goes between: "linear", "cosine" (slow at both ends) or "step" (halfway).
    """

    start: float = 0.5
    end: float = 0.0
    until: int = 100
    shape: Literal["linear", "cosine", "step"] = "linear"

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"mix.{name}: {getattr(self, name)} found, a share expected")
        if self.until < 1:
            raise ValueError(f"mix.until: {self.until} found, at least 1 expected")
        if self.shape not in ("linear", "cosine", "step"):
            raise ValueError(
                f"mix.shape: {self.shape!r} found, 'linear', 'cosine' or 'step' expected"
            )

    def easy_share(self, step: int) -> float:
        """The scheduled share of easy facts at a step."""
        progress = min(step / self.until, 1.0)
        if self.shape == "cosine":
            progress = 0.5 - 0.5 * float(np.cos(np.pi * progress))
        elif self.shape == "step":
            progress = float(progress >= 0.5)
        return self.start + (self.end - self.start) * progress

    def easy_count(self, step: int, batch: int) -> int:
        """The number of easy facts in a batch, the share rounded half up."""
        return int(np.floor(batch * self.easy_share(step) + 0.5))


class Mixer:
    """Batches of easy and hard facts by a schedule.

    Args:
      easy, hard: indices of facts.
      batch: facts a batch.

    Raises:
      EmptyPoolError: a pool the schedule draws from within `steps` is empty.
    """

    def __init__(
        self,
        easy: Sequence[int],
        hard: Sequence[int],
        config: MixConfig,
        batch: int,
        steps: int,
        seed: int,
    ) -> None:
        counts = np.asarray([config.easy_count(step, batch) for step in range(steps)])
        self._batch = batch
        self._counts = counts
        # Facts each pool has given before a step.
        self._easy_before = np.concatenate([[0], np.cumsum(counts)])
        self._easy = Pool("easy", easy, (seed, 0)) if counts.any() else None
        self._hard = Pool("hard", hard, (seed, 1)) if (counts < batch).any() else None

    def easy_count(self, step: int) -> int:
        """Easy facts in the batch of a step."""
        return int(self._counts[step])

    def batch(self, step: int) -> np.ndarray:
        """The facts of a step, easy ones first."""
        easy_count, easy_before = self.easy_count(step), int(self._easy_before[step])
        parts = []
        if easy_count:
            parts.append(self._easy.take(easy_before, easy_count))
        if easy_count < self._batch:
            hard_before = step * self._batch - easy_before
            parts.append(self._hard.take(hard_before, self._batch - easy_count))
        return np.concatenate(parts)
