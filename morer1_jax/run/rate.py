"""The stage `rate`: how often the SFT model solves each training fact, and which are easy or hard.

Writes `rate/ratings.jsonl`, a line a fact: its id, its pass rate, and its pool, `easy`, `hard`
or `dropped`.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from morer1_jax.files import atomic_write
from morer1_jax.run.answers import Asker
from morer1_jax.run.job import Job
from morer1_jax.run.settings import RateSettings
from morer1_jax.task.fact import DataError

FILE = "ratings.jsonl"
POOLS = ("easy", "hard", "dropped")


@dataclasses.dataclass(frozen=True)
class Rating:
    """A training fact's id, its pass rate (0 to 1), and the pool it belongs to."""

    fact: str
    pass_rate: float
    pool: str


def classify(pass_rate: float, config: RateSettings) -> str:
    """`easy` from `easy_from` on, else `hard`; `dropped` if never solved and so configured."""
    if pass_rate >= config.easy_from:
        return "easy"
    return "dropped" if pass_rate == 0 and config.never == "drop" else "hard"


def run_rate(job: Job, params: Any) -> dict[str, int]:
    """Rates every training fact with `params` and writes the file; returns the pools' sizes."""
    rate = job.settings.rate
    asker = Asker(
        job, job.encoder, batch=rate.batch, group=rate.samples, temperature=rate.temperature
    )
    ratings = []
    for fact, scored in asker.ask(params, job.facts["train"], "rate"):
        gold = job.ontology.ids[fact.label]
        passed = float(np.mean(scored.rollout.answer == gold))
        ratings.append(Rating(fact.id, passed, classify(passed, rate)))
    lines = [json.dumps(dataclasses.asdict(rating)) + "\n" for rating in ratings]
    atomic_write(job.workdir / "rate" / FILE, "".join(lines))
    print(histogram(ratings))
    return dict(Counter(rating.pool for rating in ratings))


def read_ratings(path: Path) -> list[Rating]:
    """Reads what `run_rate` wrote.

    Raises:
      DataError: the file is missing, or a line is not a rating.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        raise DataError(f"{path}: no ratings; run the stage `rate` first") from None
    ratings = []
    for number, line in enumerate(lines, start=1):
        try:
            rating = Rating(**json.loads(line))
            known = rating.pool in POOLS and 0.0 <= rating.pass_rate <= 1.0
        except (ValueError, TypeError):
            known = False
        if not known:
            found = line[:80].decode(errors="replace")
            raise DataError(
                f"{path}:{number}: {found!r} found, a rating "
                '{"fact": …, "pass_rate": …, "pool": …} expected'
            )
        ratings.append(rating)
    return ratings


def histogram(ratings: Sequence[Rating], width: int = 40) -> str:
    """The pass rates as a table of bars."""
    counts = Counter(rating.pass_rate for rating in ratings)
    most = max(counts.values())
    rows = [
        f"  {rate:5.2f} {'█' * round(width * counts[rate] / most):{width}} {counts[rate]}"
        for rate in sorted(counts)
    ]
    pools = Counter(rating.pool for rating in ratings)
    shown = ", ".join(f"{pools[name]} {name}" for name in POOLS)
    return "\n".join([f"pass rates of {len(ratings)} facts ({shown}):", *rows])
