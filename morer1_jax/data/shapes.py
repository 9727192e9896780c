"""Which fixed shapes batches have, chosen from the data, and how samples are packed into rows.

A compiled program has fixed shapes, and a shape that fits the longest sample wastes most of its
places on the others. So a run has a few shapes, chosen to cost least on batches of its own data,
and each batch takes the smallest that holds it. All of it is a pure function of the lengths and the
draws, the same on any host.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np


class Need(NamedTuple):
    """What one sample takes: tokens of its prompt and its target, windows of its images."""

    prompt: int
    target: int
    windows: int

    @property
    def tokens(self) -> int:
        return self.prompt + self.target


class Shape(NamedTuple):
    """Sizes of a row: tokens, and attention windows of its images."""

    length: int
    windows: int

    def holds(self, other: Shape) -> bool:
        """Whether a row of this shape has room for what fills `other`."""
        return self.length >= other.length and self.windows >= other.windows


Cost = Callable[[Shape], float]
"""What one row of a shape costs, in any unit."""


def pack(needs: Sequence[Need], shape: Shape) -> list[list[int]]:
    """Puts samples into as few rows as best-fit decreasing finds.

    Args:
      needs: of the samples; each fits a row by itself.
      shape: of a row.

    Returns:
      For each row the places of its samples in `needs`, in order.
    """
    order = sorted(range(len(needs)), key=lambda i: (-needs[i].tokens, i))
    rows: list[list[int]] = []
    # Of each row. A run packs all its batches before its first step, so no arrays for a few rows.
    free: list[tuple[int, int]] = []
    for place in order:
        tokens, windows = needs[place].tokens, needs[place].windows
        chosen, least = len(rows), math.inf
        for row, (length, width) in enumerate(free):
            # The fullest row that still has room.
            if tokens <= length < least and windows <= width:
                chosen, least = row, length
        if chosen == len(rows):
            rows.append([])
            free.append(shape)
        length, width = free[chosen]
        rows[chosen].append(place)
        free[chosen] = length - tokens, width - windows
    return [sorted(row) for row in rows]


@dataclasses.dataclass(frozen=True)
class RowPlan:
    """How the samples of a step become rows.

    Attributes:
      shape: of every row.
      counts: numbers of rows that a batch may have, increasing.
      multiple: any other number of rows is rounded up to this; so are `counts`.
    """

    shape: Shape
    counts: tuple[int, ...]
    multiple: int

    def rows(self, needs: Sequence[Need]) -> list[list[int]]:
        """As `pack`, with empty rows up to one of the counts."""
        rows = pack(needs, self.shape)
        more = -(-len(rows) // self.multiple) * self.multiple
        count = next((count for count in self.counts if count >= len(rows)), more)
        return rows + [[] for _ in range(count - len(rows))]


def plan_rows(
    draws: Iterable[Sequence[Need]],
    cost: Cost,
    *,
    multiple: int = 1,
    round_to: int = 16,
    most: int = 2,
) -> RowPlan:
    """The rows that cost least on batches like the ones given.

    Args:
      draws: the samples of every step: a row holds any of them, and no step has more rows than
        `counts` foresee.
      multiple: rows of a batch come in multiples of this, for a mesh or micro-batches.
      round_to: a row's tokens are a multiple of this.
      most: counts of rows, each of which is a program of its own.
    """
    draws = [list(draw) for draw in draws]
    drawn = list(itertools.chain(*draws))
    first = -(-max(need.tokens for need in drawn) // round_to)
    widest_one = max(need.windows for need in drawn)
    some = draws[:_TRIED]
    best: tuple[float, Shape] | None = None
    for units in sorted({round(first * factor) for factor in np.linspace(1, 4, 25)}):
        length = units * round_to
        # By tokens alone, to see how many windows then stand in a row.
        free = [pack(draw, Shape(length, 1 << 30)) for draw in some]
        windows = max(
            sum(draw[i].windows for i in row)
            for draw, rows in zip(some, free, strict=True)
            for row in rows
        )
        shape = Shape(length, max(windows, widest_one))
        spent = sum(-(-len(rows) // multiple) * multiple for rows in free) * cost(shape)
        if best is None or spent < 0.99 * best[0]:
            best = spent, shape
    shape = best[1]
    needed = [-(-len(pack(draw, shape)) // multiple) * multiple for draw in draws]
    counts = cheapest_levels(needed, float, most)
    return RowPlan(shape, counts, multiple)


# Batches that row lengths are tried on.
_TRIED = 32


def plan_prompts(
    draws: Iterable[Sequence[Need]],
    largest: Shape,
    cost: Cost,
    *,
    round_to: int = 16,
    most: int = 2,
) -> tuple[Shape, ...]:
    """Shapes of batches of one prompt a row, that cost least on batches like the ones given.

    Args:
      draws: the prompts of some steps.
      largest: what any prompt may need; the last shape holds it.
      round_to: a row's tokens are a multiple of this.
      most: shapes, each of which is a program of its own.
    """
    held = Shape(-(-largest.length // round_to) * round_to, largest.windows)
    needed = [_rounded(widest(draw), round_to) for draw in draws]
    lengths = cheapest_levels(
        [shape.length for shape in needed], lambda n: cost(Shape(n, held.windows)), most
    )
    shapes = []
    for length in lengths[:-1]:
        windows = [shape.windows for shape in needed if shape.length <= length]
        shapes.append(Shape(length, max(windows)))
    return (*shapes, held)


def widest(needs: Sequence[Need]) -> Shape:
    """The row that holds any one of the prompts."""
    return Shape(max(need.prompt for need in needs), max(need.windows for need in needs))


def smallest(shapes: Sequence[Shape], needed: Shape) -> Shape:
    """The first of the shapes that has room.

    Raises:
      ValueError: none has.
    """
    for shape in shapes:
        if shape.holds(needed):
            return shape
    raise ValueError(f"a batch needs {needed}, the largest shape is {shapes[-1]}")


def cheapest_levels(
    values: Sequence[int], cost: Callable[[int], float], most: int
) -> tuple[int, ...]:
    """At most `most` of the values, the largest among them, to round all of them up to.

    The cost of a value is that of the level it is rounded up to; their sum is the least there is.
    """
    levels, numbers = np.unique(np.asarray(values), return_counts=True)
    before = np.concatenate([[0], np.cumsum(numbers)])
    prices = np.array([cost(int(level)) for level in levels])
    count = len(levels)
    # total[k][j]: the first j values rounded up to k levels, the last of which is number j - 1.
    total = np.full((most + 1, count + 1), np.inf)
    total[0, 0] = 0.0
    came = np.zeros((most + 1, count + 1), np.int64)
    for k, j in itertools.product(range(1, most + 1), range(1, count + 1)):
        ways = total[k - 1, :j] + (before[j] - before[:j]) * prices[j - 1]
        came[k, j] = int(np.argmin(ways))
        total[k, j] = ways[came[k, j]]
    k, j = int(np.argmin(total[:, count])), count
    chosen = []
    while j:
        chosen.append(int(levels[j - 1]))
        j, k = int(came[k, j]), k - 1
    return tuple(reversed(chosen))


def _rounded(shape: Shape, round_to: int) -> Shape:
    return Shape(-(-shape.length // round_to) * round_to, shape.windows)
