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
    """The room that one sample takes of a row.

    Attributes:
        prompt, target: numbers of tokens.
        slots: places of its images in the vision tower's layout.
    """

    prompt: int
    target: int
    slots: int

    @property
    def tokens(self) -> int:
        """Tokens of prompt and target."""
        return self.prompt + self.target


class Shape(NamedTuple):
    """The room of a row: tokens, and places of images in the vision tower's layout."""

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
        sizes: one a sample, each of which fits a row by itself.

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
        for row, (free_tokens, free_slots) in enumerate(free):
            if tokens <= free_tokens < least_free and slots <= free_slots:
                best_row, least_free = row, free_tokens
        if best_row == len(rows):
            rows.append([])
            free.append(shape)
        free_tokens, free_slots = free[best_row]
        rows[best_row].append(place)
        free[best_row] = Shape(free_tokens - tokens, free_slots - slots)
    return [sorted(row) for row in rows]


@dataclasses.dataclass(frozen=True)
class RowPlan:
    """The rule by which the samples of a step become rows.

    Attributes:
        shape: the shape of every row.
        counts: the numbers of rows that a batch may have, increasing multiples of `multiple`.
        multiple: a batch of more rows than `counts` has is rounded up to a multiple of this.
    """

    shape: Shape
    counts: tuple[int, ...]
    multiple: int

    def rows(self, sizes: Sequence[SampleSize]) -> list[list[int]]:
        """Packs samples as `pack` does, and adds empty rows up to one of the counts."""
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
        draws: the sizes of every step's samples. Any of them fits a row of the plan, and the last
            of its counts is enough for every step.
        multiple: a batch's number of rows is a multiple of this, for a mesh or micro-batches.
        round_to: a row's tokens are a multiple of this.
        max_counts: the most different numbers of rows; each takes a compiled program of its own.
    """
    draws = [list(draw) for draw in draws]
    all_sizes = list(itertools.chain(*draws))
    units_of_longest = -(-max(size.tokens for size in all_sizes) // round_to)
    max_slots = max(size.slots for size in all_sizes)
    trial_draws = draws[:_TRIED]
    # Rows as long as the longest sample, up to four times as long; a longer one must save 1 %.
    best: tuple[float, Shape] | None = None
    for units in sorted({round(units_of_longest * factor) for factor in np.linspace(1, 4, 25)}):
        length = units * round_to
        # Packed by tokens alone, to see how many slots a row then takes.
        rows_of_draws = [pack(draw, Shape(length, 1 << 30)) for draw in trial_draws]
        slots = max(
            sum(draw[i].slots for i in row)
            for draw, rows in zip(trial_draws, rows_of_draws, strict=True)
            for row in rows
        )
        shape = Shape(length, max(slots, max_slots))
        total_cost = sum(_round_up(len(rows), multiple) for rows in rows_of_draws) * cost(shape)
        if best is None or total_cost < 0.99 * best[0]:
            best = total_cost, shape
    # The numbers of rows of all steps, not only of those tried.
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
        draws: the sizes of every step's prompts.
        largest: the most room of any prompt; the last shape holds it.
        round_to: a row's tokens are a multiple of this.
        max_shapes: the most shapes; each takes a compiled program of its own.
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
    """Returns the least shape of a row that holds any one of the prompts."""
    return Shape(max(size.prompt for size in sizes), max(size.slots for size in sizes))


def smallest(shapes: Sequence[Shape], content: Shape) -> Shape:
    """Returns the first of the shapes that holds the content.

    Raises:
        ValueError: no shape holds the content.
    """
    for shape in shapes:
        if shape.holds(content):
            return shape
    raise ValueError(f"expected a batch of at most {shapes[-1]}, found {content}")


def cheapest_levels(
    values: Sequence[int], cost: Callable[[int], float], max_levels: int
) -> tuple[int, ...]:
    """Chooses levels among the values, the largest among them, to round all values up to.

    A value costs what its level costs; the levels chosen minimise the sum over all values.
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
