"""Chooses the stages of the decode loop, from the lengths that completions are likely to have.

A stage with few slots is cheap, and one with a long cache is dear; but where samples outlive a
stage and find no slot in the next one, they begin anew. So stages are the cheapest by the lengths
that are expected, among those in which no sample is dropped even if completions are longer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int

from morer1_jax.rollout.config import Stage

# Shares of the samples, and of the longest length, that stages may have.
_SHARES = (1.0, 0.8, 0.65, 0.5, 0.4, 0.3, 0.2, 0.14, 0.1, 0.07, 0.05, 0.03, 0.02)
_LENGTHS = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)
# Each stage is a loop to compile; one more must save this share of the time.
_WORTH = 0.03
_MOST = 8
# Completions may be longer by this factor than expected, and this share of them without an end; if
# memory does not suffice for that, as long as expected.
_MARGINS = ((1.25, 0.05), (1.1, 0.03), (1.0, 0.03))
# Standard deviations by which the open share of so many samples may differ from the one expected.
_DEVIATIONS = 2.0


@dataclasses.dataclass(frozen=True)
class StepCost:
    """What a token of all slots costs, in bytes that could be read meanwhile.

    Attributes:
        weights: bytes of the model's that are read for a token, however many slots there are.
        slot: a slot's products, as the bytes that could be read while they are computed.
        token: bytes of a token's keys and values.
    """

    weights: float
    slot: float
    token: float

    def __call__(self, slots: int, length: int) -> float:
        """Returns the cost with so many slots, whose cache has room for `length` tokens each."""
        return max(self.weights, slots * self.slot) + slots * length * self.token


def planned_stages(
    lengths: Sequence[int],
    samples: int,
    limit: int,
    cost: StepCost,
    memory: float = math.inf,
    round_to: int = 1,
) -> tuple[Stage, ...]:
    """Returns the stages for completions of about these lengths.

    Args:
        lengths: in tokens, of as many completions as are known; empty: nothing is known, and all
            samples have a slot to the end.
        samples: of each part of the mesh's rows.
        limit: most tokens of a completion.
        cost: of a token.
        memory: bytes that keys and values of completions may take, where two stages meet those of
            both; where no stages take so little, as little more as they can.
        round_to: tokens of which caches have a multiple, but for the last.
    """
    if not len(lengths):
        return ()
    expected = np.sort(np.asarray(lengths))
    rooms = sorted({min(limit, math.ceil(limit * part / round_to) * round_to) for part in _LENGTHS})
    while True:
        for margin in _MARGINS:
            law = _Law(expected, limit, samples, *margin)
            if stages := _cheapest(law, cost, memory, rooms):
                return stages
        memory *= 1.1


def _cheapest(
    law: _Law, cost: StepCost, memory: float, rooms: Sequence[int]
) -> tuple[Stage, ...] | None:
    """Returns the stages that cost least; None if there are none with so little memory.

    Args:
        rooms: lengths that a stage may have, in rising order.
    """
    limit, samples = law.limit, law.samples

    def size(stage: Stage) -> float:
        return stage.slots(samples) * stage.length * cost.token

    # The cheapest ways to come to a stage at a token, with one stage more each time: their cost
    # before this stage, and the stages before it.
    first = (Stage(1.0, room) for room in rooms)
    ways = {(stage, 0): (0.0, ()) for stage in first if size(stage) <= memory}
    found: list[tuple[float, tuple[Stage, ...]]] = []
    for number in range(1, _MOST + 1):
        longer: dict[tuple[Stage, int], tuple[float, tuple[Stage, ...]]] = {}
        for (stage, begins), (before, path) in ways.items():
            here, path = cost(stage.slots(samples), stage.length), (*path, stage)
            if stage.length == limit:
                total = before + here * (limit - begins)
                found.append((total * (1 + _WORTH * number), path))
            for following, ends in _following(stage, begins, rooms, law):
                if size(stage) + size(following) > memory:
                    continue
                sum_of = before + here * (ends - begins)
                known = longer.get((following, ends))
                if known is None or sum_of < known[0]:
                    longer[following, ends] = sum_of, path
        ways = longer
    return min(found, key=lambda way: way[0])[1] if found else None


class _Law:
    """The lengths that completions are expected to have.

    Args:
        lengths: in rising order.
        limit: most tokens of a completion.
        samples: that are drawn by this law.
        longer, endless: by which factor completions may be longer than expected, and which share of
            them without an end.
    """

    def __init__(
        self,
        lengths: Int[np.ndarray, " n"],
        limit: int,
        samples: int,
        longer: float,
        endless: float,
    ) -> None:
        self._lengths, self.limit, self.samples = lengths, limit, samples
        self._longer, self._endless = longer, endless

    def left_by(self, share: float) -> int:
        """Returns the number of tokens after which only this share of completions goes on."""
        ended = math.ceil((1.0 - share) * len(self._lengths))
        return min(self.limit, int(self._lengths[ended - 1])) if ended else 0

    def open_at_most(self, tokens: int) -> float:
        """Returns the largest share of completions that may go on after so many tokens."""
        ended = np.searchsorted(self._lengths, tokens / self._longer, side="right")
        share = 1.0 - ended / len(self._lengths)
        spread = math.sqrt(share * (1.0 - share) / self.samples)
        return min(1.0, share + self._endless + _DEVIATIONS * spread)


def _following(
    stage: Stage, begins: int, rooms: Sequence[int], law: _Law
) -> Iterator[tuple[Stage, int]]:
    """Yields the stages that may follow one, each with the token at which it begins.

    Args:
        rooms: lengths that a stage may have, in rising order.
    """
    least = 0.0 if stage.length == rooms[-1] else law.open_at_most(stage.length)
    for room in rooms:
        if room > stage.length:
            yield Stage(stage.share, room), stage.length
        if room >= stage.length:
            for share in _SHARES:
                if least <= share < stage.share:
                    yield Stage(share, room), max(begins, law.left_by(share))
