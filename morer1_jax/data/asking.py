"""Batches of facts that are asked: sorted by size, each in the smallest of a few shapes.

Rating, evaluation, validation and prediction ask many facts once, in any order. Sorted by size,
those of a batch leave little of its shape empty. Both shapes and batches are a pure function of the
sizes, the same on any host and after a resume.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

from morer1_jax.data.shapes import (
    Cost,
    SampleSize,
    Shape,
    cheapest_levels,
    plan_prompts,
    share_images,
    widest,
)
from morer1_jax.task.fact import Fact


@dataclasses.dataclass(frozen=True)
class Asked:
    """A batch of facts.

    Attributes:
        places: of its rows' facts among all facts; the rows that fill the last batch of a size up
            repeat a fact.
        shape: of its rows.
    """

    places: tuple[int, ...]
    shape: Shape


@dataclasses.dataclass(frozen=True)
class AskPlan:
    """The sizes of facts, by their ids, and the shapes in which they are asked."""

    sizes: Mapping[str, SampleSize]
    shapes: tuple[Shape, ...]

    def batches(self, facts: Sequence[Fact], batch: int) -> list[Asked]:
        """Sorts facts into batches; see `asked_batches`."""
        return asked_batches([self.sizes[fact.id] for fact in facts], batch, self.shapes)


def asked_batches(sizes: Sequence[SampleSize], batch: int, shapes: Sequence[Shape]) -> list[Asked]:
    """Sorts facts into batches; the largest come first, so that what does not fit fails at once.

    Args:
        sizes: of the facts' prompts.
        batch: rows of a batch.
        shapes: of increasing size, as `plan_asked` chooses them. A batch that none of them holds,
            which facts that were not planned for may make, has a shape of its own.
    """
    sharing = shapes[0].sharing
    by_length: dict[int, list[int]] = {}
    for chunk in _chunks(sizes, batch, sharing):
        needed = max(sizes[place].prompt for place in chunk)
        lengths = (shape.length for shape in shapes if shape.length >= needed)
        by_length.setdefault(next(lengths, needed), []).extend(chunk)
    batches = []
    for length, places in by_length.items():
        # Only the last of a size is not full; it repeats the smallest of its facts.
        places += places[-1:] * (-len(places) % batch)
        # Rows that share images: large and small ones, from all batches of this length.
        order = share_images([sizes[place].slots for place in places], sharing)
        for start in range(0, len(places), batch):
            rows = tuple(places[number] for number in order[start : start + batch])
            content = widest([sizes[place] for place in rows], sharing)
            holding = (shape for shape in shapes if shape.holds(content))
            batches.append(Asked(rows, next(holding, content._replace(length=length))))
    return batches


def plan_asked(
    sets: Sequence[Sequence[SampleSize]],
    batch: int,
    cost: Cost,
    *,
    round_to: int = 16,
    max_shapes: int = 3,
    sharing: Sequence[int] = (1,),
) -> tuple[Shape, ...]:
    """Chooses the shapes that cost least where each of these sets of facts is asked once.

    Args:
        sets: sizes of the prompts of each set, none of which is empty.
        batch: rows of a batch.
        round_to: a row's tokens are a multiple of this.
        max_shapes: the most shapes; each takes a compiled program of its own.
        sharing: the numbers of rows that may share a row of images; all shapes have the same.
    """
    best: tuple[float, tuple[Shape, ...]] | None = None
    for rows_a_row in sharing:
        if rows_a_row == 1:
            draws = [
                [sizes[place] for place in chunk]
                for sizes in sets
                for chunk in _chunks(sizes, batch, 1)
            ]
            shapes = plan_prompts(draws, cost, round_to=round_to, max_shapes=max_shapes)
        else:
            shapes = _sharing_shapes(sets, batch, cost, round_to, max_shapes, rows_a_row)
        batches = itertools.chain(*(asked_batches(sizes, batch, shapes) for sizes in sets))
        total = sum(cost(asked.shape) for asked in batches)
        if best is None or total < best[0]:
            best = total, shapes
    return best[1]


def _sharing_shapes(
    sets: Sequence[Sequence[SampleSize]],
    batch: int,
    cost: Cost,
    round_to: int,
    max_shapes: int,
    sharing: int,
) -> tuple[Shape, ...]:
    """Returns shapes of batches whose rows share images with others of about their length."""
    # A batch's length, and the slots that its rows' images fill on average.
    contents = []
    for sizes in sets:
        for chunk in _chunks(sizes, batch, sharing):
            length = max(sizes[place].prompt for place in chunk)
            slots = -(-sharing * sum(sizes[place].slots for place in chunk) // len(chunk))
            contents.append(Shape(length, slots, sharing).rounded(round_to))

    def at(length: int) -> Shape:
        slots = max(content.slots for content in contents if content.length <= length)
        return Shape(length, slots, sharing)

    lengths = cheapest_levels(
        [content.length for content in contents], lambda length: cost(at(length)), max_shapes
    )
    # The slots of each length: what its batches fill once their rows are put together.
    drafts = [Shape(length, 0, sharing) for length in lengths]
    filled: dict[int, int] = {}
    for sizes in sets:
        for asked in asked_batches(sizes, batch, drafts):
            length, slots, _ = asked.shape
            filled[length] = max(filled.get(length, 0), slots)
    most = itertools.accumulate((filled[length] for length in lengths), max)
    return tuple(Shape(*of_level, sharing) for of_level in zip(lengths, most, strict=True))


def _chunks(sizes: Sequence[SampleSize], batch: int, sharing: int) -> list[list[int]]:
    """Returns the places of facts of about one size, the largest first.

    The length of tokens decides where rows share images, since these are put together afterwards.
    """

    def key(place: int) -> tuple[int, ...]:
        size = sizes[place]
        first = (size.prompt, size.slots) if sharing > 1 else (size.slots, size.prompt)
        return -first[0], -first[1], place

    order = sorted(range(len(sizes)), key=key)
    return [order[start : start + batch] for start in range(0, len(order), batch)]
