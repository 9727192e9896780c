"""Chooses the fixed shapes of a run's batches from its data.

A compiled program has fixed shapes, and a shape that fits the longest sample wastes most of its
places on the others. So a run has a few shapes, chosen to cost least on batches of its own data,
and each batch takes the smallest that holds it. Photos differ most: their patches lie in rows of
their own, each of which a few consecutive rows of tokens share, put together so that all fill
about as much of it. All of it is a pure function of the sizes and the draws, the same on any host.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

T = TypeVar("T")


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
    """The room of a row of tokens, and of the row of images that it shares with its neighbours.

    Attributes:
        length: tokens.
        slots: places of images in the vision tower's layout, in a row of images.
        sharing: number of consecutive rows of tokens that share a row of images.
    """

    length: int
    slots: int
    sharing: int = 1

    def holds(self, other: Shape) -> bool:
        """Returns whether rows of this shape have room for what fills `other`."""
        has_room = self.length >= other.length and self.slots >= other.slots
        return has_room and self.sharing == other.sharing

    def rounded(self, multiple: int) -> Shape:
        """Returns the shape with its tokens rounded up to a multiple."""
        return self._replace(length=round_up(self.length, multiple))


Cost = Callable[[Shape], float]
"""What one row of tokens of a shape costs, with its share of a row of images, in any unit."""


def share_images(slots: Sequence[int], sharing: int) -> list[int]:
    """Orders rows so that each `sharing` consecutive ones together fill about as many slots.

    Args:
        slots: of each row's images.

    Returns:
        The rows' places in `slots`; in their order if each has a row of images of its own.

    Raises:
        ValueError: `sharing` does not divide the rows.
    """
    if sharing == 1:
        return list(range(len(slots)))
    if len(slots) % sharing:
        raise ValueError(f"sharing: expected a divisor of {len(slots)} rows, found {sharing}")
    # The row that fills most first, each to the least filled group with room.
    groups: list[list[int]] = [[] for _ in range(len(slots) // sharing)]
    filled = [(0, number) for number in range(len(groups))]
    for place in sorted(range(len(slots)), key=lambda i: (-slots[i], i)):
        total, number = heapq.heappop(filled)
        groups[number].append(place)
        if len(groups[number]) < sharing:
            heapq.heappush(filled, (total + slots[place], number))
    return list(itertools.chain(*groups))


def shared_slots(slots: Sequence[int], sharing: int) -> int:
    """Returns the most slots that `sharing` consecutive rows fill together."""
    return max(sum(slots[i : i + sharing]) for i in range(0, len(slots), sharing))


def plan_prompts(
    draws: Iterable[Sequence[SampleSize]],
    cost: Cost,
    *,
    round_to: int = 16,
    max_shapes: int = 2,
    sharing: Sequence[int] = (1,),
) -> tuple[Shape, ...]:
    """Chooses shapes of batches of one prompt a row, which cost least on these batches.

    Args:
        draws: the sizes of every step's prompts; `share_images` orders them.
        round_to: a row's tokens are a multiple of this.
        max_shapes: the most shapes; each takes a compiled program of its own.
        sharing: the numbers of rows that may share a row of images; all shapes have the same.
    """
    draws = [list(draw) for draw in draws]
    keys = (lambda shape: shape.length, lambda shape: shape.slots)
    plans = []
    for rows_a_row in sharing:
        contents = []
        for draw in draws:
            order = share_images([size.slots for size in draw], rows_a_row)
            content = widest([draw[place] for place in order], rows_a_row)
            contents.append(content.rounded(round_to))
        plans += [nested_levels(contents, key, largest_shape, cost, max_shapes) for key in keys]
    return min(plans)[1]


def largest_shape(shapes: Sequence[Shape]) -> Shape:
    """Returns the least shape that holds all of these, which share images alike."""
    length, slots = (max(sizes) for sizes in list(zip(*shapes, strict=True))[:2])
    return shapes[0]._replace(length=length, slots=slots)


def widest(sizes: Sequence[SampleSize], sharing: int = 1) -> Shape:
    """Returns the least shape of rows that holds the prompts, which share images in this order."""
    slots = shared_slots([size.slots for size in sizes], sharing)
    return Shape(max(size.prompt for size in sizes), slots, sharing)


def smallest(shapes: Sequence[Shape], content: Shape) -> Shape:
    """Returns the first of the shapes that holds the content.

    Raises:
        ValueError: no shape holds the content.
    """
    for shape in shapes:
        if shape.holds(content):
            return shape
    raise ValueError(f"expected a batch of at most {shapes[-1]}, found {content}")


def nested_levels(
    contents: Sequence[T],
    key: Callable[[T], int],
    largest: Callable[[Sequence[T]], T],
    cost: Callable[[T], float],
    max_levels: int,
) -> tuple[float, tuple[T, ...]]:
    """Chooses levels, each of which holds all contents up to some value of the key.

    Returns:
        The sum of what the contents' levels cost, and the levels, in increasing order.
    """
    values = [key(content) for content in contents]
    at = {
        value: largest([content for content in contents if key(content) <= value])
        for value in set(values)
    }
    levels = cheapest_levels(values, lambda value: cost(at[value]), max_levels)
    of_value = {value: min(level for level in levels if level >= value) for value in set(values)}
    total = sum(cost(at[of_value[value]]) for value in values)
    return total, tuple(at[level] for level in levels)


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


def round_up(count: int, multiple: int) -> int:
    """Returns the least multiple that is at least `count`."""
    return -(-count // multiple) * multiple
