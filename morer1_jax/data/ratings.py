"""How often a model solves each training fact, and the pool that this puts the fact into."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from morer1_jax.errors import DataError, TextError
from morer1_jax.files import read_text

FILE = "ratings.jsonl"
POOLS = ("easy", "hard", "dropped")


@dataclasses.dataclass(frozen=True)
class Rating:
    """A training fact's id, its pass rate (0 to 1), and the pool it belongs to."""

    fact: str
    pass_rate: float
    pool: str


def rating_line(rating: Rating) -> str:
    """Returns a rating as a line of a ratings file."""
    return json.dumps(dataclasses.asdict(rating)) + "\n"


def read_ratings(path: Path) -> list[Rating]:
    """Reads what `run_rate` wrote.

    Raises:
      DataError: the file is missing or empty, a line is not a rating, or a fact is there twice.
    """
    try:
        lines = read_text(path).rstrip().split("\n")
    except TextError as error:
        raise DataError(str(error)) from None
    except OSError as error:
        found = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise DataError(
            f"{path}: {found}; expected ratings, from the stage `rate` or tools/rate_difficulty.py"
        ) from None
    if lines == [""]:
        raise DataError(f"{path}: empty, expected a rating a line")
    ratings, seen = [], set()
    for number, line in enumerate(lines, start=1):
        try:
            rating = Rating(**json.loads(line))
            known = rating.pool in POOLS and 0.0 <= rating.pass_rate <= 1.0
        except (ValueError, TypeError):
            known = False
        if not known:
            raise DataError(
                f"{path}:{number}: {line[:80]!r} found, a rating "
                '{"fact": …, "pass_rate": …, "pool": …} expected'
            )
        if rating.fact in seen:
            raise DataError(f"{path}:{number}: {rating.fact} is rated twice, expected once")
        seen.add(rating.fact)
        ratings.append(rating)
    return ratings


def histogram(ratings: Sequence[Rating], width: int = 40) -> str:
    """The pass rates as a table of bars."""
    counts = Counter(rating.pass_rate for rating in ratings)
    most = max(counts.values())
    rows = [
        f"  {rate:5.2f} {'#' * round(width * counts[rate] / most):{width}} {counts[rate]}"
        for rate in sorted(counts)
    ]
    pools = Counter(rating.pool for rating in ratings)
    shown = ", ".join(f"{pools[name]} {name}" for name in POOLS)
    return "\n".join([f"pass rates of {len(ratings)} facts ({shown}):", *rows])
