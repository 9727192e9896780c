"""Packs samples into rows, and chooses the fixed shapes of a run's batches from its data.

A compiled program has fixed shapes, and a shape that fits the longest sample wastes most of its
places on the others. So a run has a few shapes, chosen to cost least on batches of its own data,
and each batch takes the smallest that holds it. All of it is a pure function of the sizes and the
draws, the same on any host.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

# Batches that row lengths are tried on.
_TRIED = 32


class SampleSize(NamedTuple):
    """What one sample takes of a row.

    Attributes:
        prompt, target: tokens.
        slots: of its images in the vision tower's layout.
    """

    prompt: int
    target: int
    slots: int

    @property
    def tokens(self) -> int:
        """Tokens of prompt and target."""
        return self.prompt + self.target


class Shape(NamedTuple):
    """What a row has room for: tokens, and slots of images in the vision tower's layout."""

    length: int
    slots: int

    def holds(self, other: Shape) -> bool:
        """Returns whether a row of this shape has room for what fills `other`."""
        return self.length >= other.length and self.slots >= other.slots

    def rounded(self, multiple: int) -> Shape:
        """Returns the shape with its tokens rounded up to a multiple."""
        return Shape(-(-self.length // multiple) * multiple, self.slots)


Cost = Callable[[Shape], float]
"""What one row of a shape costs, in any unit."""


def pack(sizes: Sequence[SampleSize], shape: Shape) -> list[list[int]]:
    """Puts samples into as few rows as best-fit decreasing finds.

    Args:
        sizes: of the samples, each of which fits a row by itself.
        shape: of a row.

    Returns:
        For each row the places of its samples in `sizes`, in order.
    """
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i].tokens, i))
    rows: list[list[int]] = []
    # A run packs all its batches before its first step: plain numbers beat arrays for a few rows.
    free: list[Shape] = []
    for place in order:
        tokens, slots = sizes[place].tokens, sizes[place].slots
        # The fullest row that still has room, or a new one.
        best_row, least_free = len(rows), math.inf
        for row, (length, room) in enumerate(free):
            if tokens <= length < least_free and slots <= room:
                best_row, least_free = row, length
        if best_row == len(rows):
            rows.append([])
            free.append(shape)
        length, room = free[best_row]
        rows[best_row].append(place)
        free[best_row] = Shape(length - tokens, room - slots)
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

    def rows(self, sizes: Sequence[SampleSize]) -> list[list[int]]:
        """Packs as `pack`, with empty rows up to one of the counts."""
        rows = pack(sizes, self.shape)
        fallback = _round_up(len(rows), self.multiple)
        count = next((count for count in self.counts if count >= len(rows)), fallback)
        return rows + [[] for _ in range(count - len(rows))]


def plan_rows(
    draws: Iterable[Sequence[SampleSize]],
    cost: Cost,
    *,
    multiple: int = 1,
    round_to: int = 16,
    max_counts: int = 2,
) -> RowPlan:
    """Chooses the rows that cost least on these batches.

    Args:
        draws: the samples of every step: a row holds any of them, and no step has more rows than
            `counts` foresee.
        multiple: rows of a batch come in multiples of this, for a mesh or micro-batches.
        round_to: a row's tokens are a multiple of this.
        max_counts: numbers of rows, each of which is a program of its own.
    """
    draws = [list(draw) for draw in draws]
    every_size = list(itertools.chain(*draws))
    units_of_longest = -(-max(size.tokens for size in every_size) // round_to)
    max_slots = max(size.slots for size in every_size)
    tried_draws = draws[:_TRIED]
    # Rows as long as the longest sample, up to four times as long.
    best: tuple[float, Shape] | None = None
    for units in sorted({round(units_of_longest * factor) for factor in np.linspace(1, 4, 25)}):
        length = units * round_to
        # Packed by tokens alone, to see how many slots a row then takes.
        packed = [pack(draw, Shape(length, 1 << 30)) for draw in tried_draws]
        slots = max(
            sum(draw[i].slots for i in row)
            for draw, rows in zip(tried_draws, packed, strict=True)
            for row in rows
        )
        shape = Shape(length, max(slots, max_slots))
        spent = sum(_round_up(len(rows), multiple) for rows in packed) * cost(shape)
        if best is None or spent < 0.99 * best[0]:
            best = spent, shape
    shape = best[1]
    counts = [_round_up(len(pack(draw, shape)), multiple) for draw in draws]
    return RowPlan(shape, cheapest_levels(counts, float, max_counts), multiple)


def plan_prompts(
    draws: Iterable[Sequence[SampleSize]],
    largest: Shape,
    cost: Cost,
    *,
    round_to: int = 16,
    max_shapes: int = 2,
) -> tuple[Shape, ...]:
    """Chooses shapes of batches of one prompt a row, which cost least on these batches.

    Args:
        draws: the prompts of each step.
        largest: what any prompt may take; the last shape holds it.
        round_to: a row's tokens are a multiple of this.
        max_shapes: each is a program of its own.
    """
    last = largest.rounded(round_to)
    shapes_of_draws = [widest(draw).rounded(round_to) for draw in draws]
    lengths = cheapest_levels(
        [shape.length for shape in shapes_of_draws],
        lambda length: cost(Shape(length, last.slots)),
        max_shapes,
    )
    shapes = []
    for length in lengths[:-1]:
        slots = [shape.slots for shape in shapes_of_draws if shape.length <= length]
        shapes.append(Shape(length, max(slots)))
    return (*shapes, last)


def widest(sizes: Sequence[SampleSize]) -> Shape:
    """Returns the row that holds any one of the prompts."""
    return Shape(max(size.prompt for size in sizes), max(size.slots for size in sizes))


def smallest(shapes: Sequence[Shape], content: Shape) -> Shape:
    """Returns the first of the shapes that holds the content.

    Raises:
        ValueError: none does.
    """
    for shape in shapes:
        if shape.holds(content):
            return shape
    raise ValueError(f"expected a batch of at most {shapes[-1]}, found {content}")


def cheapest_levels(
    values: Sequence[int], cost: Callable[[int], float], max_levels: int
) -> tuple[int, ...]:
    """Chooses levels among the values, the largest among them, to round all values up to.

    The cost of a value is that of the level it is rounded up to; their sum is the least there is.
    """
    levels, repeats = np.unique(np.asarray(values), return_counts=True)
    values_before = np.concatenate([[0], np.cumsum(repeats)])
    prices = np.array([cost(int(level)) for level in levels])
    count = len(levels)
    # total[k, j]: the first j values rounded up to k levels, the last of which is number j - 1.
    total = np.full((max_levels + 1, count + 1), np.inf)
    total[0, 0] = 0.0
    came_from = np.zeros((max_levels + 1, count + 1), np.int64)
    for k, j in itertools.product(range(1, max_levels + 1), range(1, count + 1)):
        totals = total[k - 1, :j] + (values_before[j] - values_before[:j]) * prices[j - 1]
        came_from[k, j] = int(np.argmin(totals))
        total[k, j] = totals[came_from[k, j]]
    # Back from the cheapest number of levels.
    k, j = int(np.argmin(total[:, count])), count
    chosen = []
    while j:
        chosen.append(int(levels[j - 1]))
        j, k = int(came_from[k, j]), k - 1
    return tuple(reversed(chosen))


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
