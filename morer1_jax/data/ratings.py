"""Reads and writes ratings: how often a model solves each training fact, and the fact's pool."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from morer1_jax.errors import DataError
from morer1_jax.files import read_jsonl, write_jsonl

FILE = "ratings.jsonl"
POOLS = ("easy", "hard", "dropped")
EXPECTED = 'a rating {"fact": …, "pass_rate": …, "pool": …}'
_REMEDY = "write it with the stage `rate` or tools/rate_difficulty.py"


@dataclasses.dataclass(frozen=True)
class Rating:
    """A training fact's id, its pass rate (0 to 1), and the pool it belongs to."""

    fact: str
    pass_rate: float
    pool: str


def read_ratings(path: Path) -> list[Rating]:
    """Reads a file of ratings.

    Raises:
        DataError: the file is missing or empty, a line is not a rating, or a fact occurs twice.
    """
    rated_facts: set[str] = set()

    def parse(_: int, value: dict[str, Any]) -> Rating:
        rating = Rating(**value)
        if rating.pool not in POOLS or not 0.0 <= rating.pass_rate <= 1.0:
            raise ValueError
        if rating.fact in rated_facts:
            raise DataError(f"expected a rating a fact, found {rating.fact} twice; {_REMEDY}")
        rated_facts.add(rating.fact)
        return rating

    ratings = read_jsonl(path, parse, EXPECTED, _REMEDY)
    if not ratings:
        raise DataError(f"{path}: expected a rating a line, found none; {_REMEDY}")
    return ratings


def write_ratings(path: Path, ratings: Sequence[Rating]) -> None:
    """Writes ratings, a line each, so that `read_ratings` returns the same."""
    write_jsonl(path, map(dataclasses.asdict, ratings))


def histogram(ratings: Sequence[Rating], width: int = 40) -> str:
    """Returns a text with the pass rates as a table of bars of at most `width` characters."""
    counts = Counter(rating.pass_rate for rating in ratings)
    max_count = max(counts.values())
    rows = [
        f"  {rate:5.2f} {'#' * round(width * counts[rate] / max_count):{width}} {counts[rate]}"
        for rate in sorted(counts)
    ]
    pools = Counter(rating.pool for rating in ratings)
    pool_counts = ", ".join(f"{pools[name]} {name}" for name in POOLS)
    return "\n".join([f"pass rates of {len(ratings)} facts ({pool_counts}):", *rows])
