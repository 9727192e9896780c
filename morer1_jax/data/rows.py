"""Packs the samples of a step into rows, several to a row, of shapes chosen from a run's data.

A sample's tokens decide how few rows there are; its images' slots, how many places of the vision
tower's layout each of them needs. So samples are spread over the rows until these are about equal
in both.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from morer1_jax.data.shapes import (
    Cost,
    SampleSize,
    Shape,
    nested_levels,
    round_up,
    share_images,
    shared_slots,
)

# Batches that row lengths are tried on, and the number of the best that are tried on all batches.
_TRIED, _FINALISTS = 32, 4
# Rows to try to fill evenly, as a multiple of the fewest that hold all samples.
_MORE_ROWS = 1.05


def pack(sizes: Sequence[SampleSize], length: int) -> list[list[int]]:
    """Puts samples into as few rows of so many tokens as best-fit decreasing finds.

    Args:
        sizes: one a sample, each of which fits a row by itself.

    Returns:
        For each row the places of its samples in `sizes`, in order.
    """
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i].tokens, i))
    rows: list[list[int]] = []
    # A run packs all its batches before its first step: plain numbers beat arrays for a few rows.
    free: list[int] = []
    for place in order:
        tokens = sizes[place].tokens
        # The fullest row that still has room, or a new one.
        best_row, least_free = len(rows), math.inf
        for row, free_tokens in enumerate(free):
            if tokens <= free_tokens < least_free:
                best_row, least_free = row, free_tokens
        if best_row == len(rows):
            rows.append([])
            free.append(length)
        rows[best_row].append(place)
        free[best_row] -= tokens
    return [sorted(row) for row in rows]


def spread(sizes: Sequence[SampleSize], length: int, count: int) -> list[list[int]] | None:
    """Puts samples into `count` rows, so that none has many more tokens or slots than others.

    Returns:
        For each row the places of its samples in `sizes`, in order; None if this way none of the
        rows has room for a sample.
    """
    all_tokens = max(sum(size.tokens for size in sizes), 1)
    all_slots = max(sum(size.slots for size in sizes), 1)
    shares = [size.tokens / all_tokens + size.slots / all_slots for size in sizes]
    # The largest sample first, each to the row that is least full by the fuller of its two sums.
    rows: list[list[int]] = [[] for _ in range(count)]
    filled = [(0.0, number, 0, 0) for number in range(count)]
    for place in sorted(range(len(sizes)), key=lambda i: (-shares[i], i)):
        without_room = []
        while filled and filled[0][2] + sizes[place].tokens > length:
            without_room.append(heapq.heappop(filled))
        if not filled:
            return None
        _, number, tokens, slots = filled[0]
        tokens, slots = tokens + sizes[place].tokens, slots + sizes[place].slots
        fullness = max(tokens / all_tokens, slots / all_slots)
        heapq.heapreplace(filled, (fullness, number, tokens, slots))
        rows[number].append(place)
        for row in without_room:
            heapq.heappush(filled, row)
    return [sorted(row) for row in rows]


class Level(NamedTuple):
    """The rows that a batch may have: their number and their shape."""

    count: int
    shape: Shape


@dataclasses.dataclass(frozen=True)
class RowPlan:
    """The rule by which the samples of a step become rows.

    Attributes:
        levels: the rows that a batch may have, in increasing order; it takes the first that hold
            it. Their lengths are equal.
        multiple: a batch that none of them holds has a level of its own, of a multiple of so many
            rows.
    """

    levels: tuple[Level, ...]
    multiple: int

    def rows(self, sizes: Sequence[SampleSize]) -> tuple[Shape, list[list[int]]]:
        """Puts samples into few rows about equally, and adds empty ones up to a level's number.

        Returns:
            The rows' shape, and for each row the places of its samples in `sizes`, in order.
        """
        shape = self.levels[-1].shape
        rows, slots = _few_rows(sizes, shape.length, shape.sharing, self.multiple)
        own = Level(len(rows), shape._replace(slots=max(slots, shape.slots)))
        count, shape = next(
            (
                level
                for level in self.levels
                if level.count >= len(rows) and level.shape.slots >= slots
            ),
            own,
        )
        return shape, rows + [[] for _ in range(count - len(rows))]


def plan_rows(
    draws: Iterable[Sequence[SampleSize]],
    cost: Cost,
    *,
    multiple: int = 1,
    round_to: int = 16,
    max_levels: int = 2,
    sharing: Sequence[int] = (1,),
) -> RowPlan:
    """Chooses the rows that cost least on these batches.

    Args:
        draws: the sizes of every step's samples; the levels hold each of them.
        multiple: a batch's number of rows of images is a multiple of this, for a mesh or
            micro-batches.
        round_to: a row's tokens are a multiple of this.
        max_levels: the most levels; each takes a compiled program of its own.
        sharing: the numbers of rows that may share a row of images.
    """
    draws = [list(draw) for draw in draws]
    longest = max(size.tokens for size in itertools.chain(*draws))

    def levels_of(
        draws: Sequence[Sequence[SampleSize]], length: int, sharing: int
    ) -> tuple[float, tuple[Level, ...]]:
        contents = []
        for draw in draws:
            rows, slots = _few_rows(draw, length, sharing, multiple * sharing)
            contents.append(Level(len(rows), Shape(length, slots, sharing)))
        return _cheapest_rows(contents, cost, max_levels)

    # Rows as long as the longest sample, up to four times as long.
    units = -(-longest // round_to)
    lengths = sorted({round(units * factor) * round_to for factor in np.linspace(1, 4, 25)})
    trials = [
        (levels_of(draws[:_TRIED], length, rows_a_row)[0], length, rows_a_row)
        for length, rows_a_row in itertools.product(lengths, sharing)
    ]
    # Those that cost least on the first batches, on all of them.
    plans = [
        (*levels_of(draws, length, rows_a_row), rows_a_row)
        for _, length, rows_a_row in sorted(trials)[:_FINALISTS]
    ]
    _, levels, rows_a_row = min(plans)
    return RowPlan(levels, multiple * rows_a_row)


def _few_rows(
    sizes: Sequence[SampleSize], length: int, sharing: int, multiple: int
) -> tuple[list[list[int]], int]:
    """Puts samples into the least multiple of rows that is found to hold their tokens.

    Returns:
        The rows, in the order of `share_images`, and the most slots that a row of images needs.
    """
    packed = pack(sizes, length)
    least = -(-sum(size.tokens for size in sizes) // length)
    enough = round_up(max(len(packed), 1), multiple)
    # Best fit leaves the last rows nearly empty: a few rows more, evenly filled, may cost less.
    most = max(enough, int(len(packed) * _MORE_ROWS))
    counts = range(round_up(max(least, 1), multiple), most + 1, multiple)
    tried = (spread(sizes, length, count) for count in counts)
    full = packed + [[] for _ in range(enough - len(packed))]
    rows = next((rows for rows in tried if rows is not None), full)
    slots = [sum(sizes[place].slots for place in row) for row in rows]
    order = share_images(slots, sharing)
    return [rows[number] for number in order], shared_slots([slots[n] for n in order], sharing)


def _cheapest_rows(
    contents: Sequence[Level], cost: Cost, max_levels: int
) -> tuple[float, tuple[Level, ...]]:
    """Returns what the batches cost with the levels that make it least, and these levels."""

    def price(level: Level) -> float:
        return level.count * cost(level.shape)

    def largest(levels: Sequence[Level]) -> Level:
        slots = max(level.shape.slots for level in levels)
        shape = levels[0].shape._replace(slots=slots)
        return Level(max(level.count for level in levels), shape)

    keys = (lambda level: level.count, lambda level: level.shape.slots)
    return min(nested_levels(contents, key, largest, price, max_levels) for key in keys)
