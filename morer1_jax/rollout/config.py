"""How completions are sampled, and how many at a time."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

from morer1_jax.bounds import above, at_least, check_bounds
from morer1_jax.errors import FieldError

# Tokens that the completions' cache has room for at first, where completions may be longer.
_MIN_CACHE_LENGTH = 64


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the decode loop, with slots for some of the samples.

    It ends where its cache is full, or where the next stage has slots for all that have not ended.
    If more than that go on when the cache is full, the others begin anew after the last stage.

    Attributes:
        share: of the samples, how many there are slots for.
        length: tokens of a completion that the cache has room for.

    Raises:
        FieldError: a field is out of its bounds.
    """

    share: float = above(0)
    length: int = at_least(1)

    def __post_init__(self) -> None:
        check_bounds(self)

    def slots(self, samples: int) -> int:
        """Returns the slots for so many samples, at least one."""
        # A millionth of a sample is rounding.
        return max(1, min(samples, math.ceil(self.share * samples - 1e-6)))


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """How completions are sampled.

    Attributes:
        group: samples of each prompt.
        length: most tokens of a completion, end-of-turn among them.
        temperature: logits are divided by it; 0 takes the likeliest token (greedy).
        ends: the ids that end a completion, as a rule end-of-turn alone; if empty, none does.
        guided: whether only those tokens are permitted after which the rest of the length suffices
            to end in *format*.
        stages: of the decode loop; beyond rounding no token depends on them. Shares begin with 1
            and do not rise, lengths do not fall and end with `length`. Empty: all samples have a
            slot to the end.

    Raises:
        FieldError: a field is out of its bounds.
    """

    group: int = at_least(1)
    length: int = at_least(1)
    temperature: float = at_least(0)
    ends: tuple[int, ...]
    guided: bool = False
    stages: tuple[Stage, ...] = ()

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.stages:
            check_stages("stages", self.stages, self.length)

    @property
    def whole_stages(self) -> tuple[Stage, ...]:
        """The stages; those in which a cache for all samples grows, if none are given."""
        return self.stages or tuple(Stage(1.0, length) for length in cache_lengths(self.length))


def check_stages(field: str, stages: Sequence[Stage], length: int) -> None:
    """Checks that stages are in order, and have a cache of `length` tokens in the end.

    Raises:
        FieldError: they do not; the error names the field.
    """
    if (
        stages[0].share != 1
        or stages[-1].length != length
        or any(a.share < b.share or a.length > b.length for a, b in itertools.pairwise(stages))
    ):
        raise FieldError(
            field,
            "expected shares that begin with 1 and do not rise, and lengths that do not fall and "
            f"end with the {length} tokens of the longest completion, found "
            f"{format_stages(stages)!r}",
        )


def slots_again(config: SampleConfig, samples: int) -> int:
    """Returns the slots for samples that begin anew; 0 if none ever does.

    With caches for the longest completion they take as much memory as the stages' largest.

    Args:
        samples: of a part of the mesh's rows.
    """
    sizes = [(stage.slots(samples), stage.length) for stage in config.whole_stages]
    pairs = itertools.pairwise(sizes)
    if not any(b[0] < a[0] and a[1] < config.length for a, b in pairs):
        return 0
    return max(1, max(slots * length for slots, length in sizes) // config.length)


def parse_stages(text: str) -> tuple[Stage, ...]:
    """Returns the stages of a text such as `1:256,0.5:512,0.2:1024`, shares and lengths.

    Raises:
        ValueError: the text has another form.
    """
    parts = [part.split(":") for part in text.split(",")]
    return tuple(Stage(float(share), int(length)) for share, length in parts)


def format_stages(stages: Sequence[Stage]) -> str:
    """Undoes `parse_stages`."""
    return ",".join(f"{stage.share!r}:{stage.length}" for stage in stages)


def cache_lengths(length: int) -> tuple[int, ...]:
    """Returns the lengths that the completions' cache grows through, up to `length` tokens."""
    return tuple(sorted({min(length, max(_MIN_CACHE_LENGTH, length // n)) for n in (4, 2, 1)}))
