"""The stage `rate`: how often the SFT model solves each training fact, and which are easy or hard.

Writes `rate/ratings.jsonl`, a line a fact: its id, its pass rate, and its pool, `easy`, `hard`
or `dropped`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from morer1_jax.config.settings import RateSettings
from morer1_jax.data.ratings import EXPECTED, FILE, Rating, histogram, read_ratings, write_ratings
from morer1_jax.errors import ConfigError, DataError
from morer1_jax.files import named, read_jsonl, read_text, write_jsonl
from morer1_jax.paths import local_path
from morer1_jax.run.batch_sampler import BatchSampler
from morer1_jax.run.job import Job
from morer1_jax.run.shapes import widest_prompt_shape
from morer1_jax.task.fact import Fact


def classify(pass_rate: float, config: RateSettings) -> str:
    """`easy` from `easy_from` on, else `hard`; `dropped` if never solved and so configured."""
    if pass_rate >= config.easy_from:
        return "easy"
    return "dropped" if pass_rate == 0 and config.never == "drop" else "hard"


def run_rate(job: Job, params: Any) -> dict[str, int]:
    """The stage: rates every training fact with a whole model's `params`, or takes a given file.

    Returns:
      The pools' sizes.
    """
    config, out = job.settings.rate, job.workdir / "rate" / FILE
    if config.file is not None:
        given = _given(_file(config), job.facts["train"], config)
        write_ratings(out, given)
        print(histogram(given))
        return dict(Counter(rating.pool for rating in given))
    if (whole := _whole(out, job.facts["train"], config)) is not None:
        write_ratings(out, whole)
        print(histogram(whole))
        return dict(Counter(rating.pool for rating in whole))
    sampler = BatchSampler(
        job.policy,
        job.encoder,
        batch=config.batch,
        group=config.samples,
        temperature=config.temperature,
        seed=job.settings.seed,
        workers=job.settings.data.workers,
        shape=widest_prompt_shape(job, job.encoder),
    )
    return rate(sampler, params, job.facts["train"], config, out)


def check_given(job: Job) -> None:
    """Finds out whether the ratings that the config names, if any, are those of its facts.

    Raises:
      DataError: they are not.
    """
    config = job.settings.rate
    if config.file is not None:
        _given(_file(config), job.facts["train"], config)


def rate(
    sampler: BatchSampler,
    params: Any,
    facts: Sequence[Fact],
    config: RateSettings,
    out: Path,
    identity: Mapping[str, Any] | None = None,
) -> dict[str, int]:
    """Rates facts, writes `out` and prints a histogram; if it was killed it goes on where it was.

    Args:
      sampler: draws `config.samples` answers to a fact.
      identity: what the pass rates depend on.

    Returns:
      The pools' sizes.

    Raises:
      ConfigError: what was begun depends on something else; it stays as it is.
    """
    unfinished, before = unfinished_paths(out)
    head = json.loads(json.dumps({"batch": sampler.batch, "out": out.name, **(identity or {})}))
    taken = before.exists() and _is_of_before(before, head)
    begun = unfinished if unfinished.exists() or not taken else before
    done = _pooled(_begun(begun, head), config)
    # Whole batches, so that each fact is asked in the company it would have had. Under another
    # batch those rated so far stay: noise is a fact's own, company changes rounding alone.
    done = done[: len(done) // sampler.batch * sampler.batch]
    write_jsonl(unfinished, [head, *map(dataclasses.asdict, done)])
    if taken:
        before.unlink()
    with named(unfinished), open(unfinished, "a", buffering=1, encoding="utf-8") as file:
        for fact, drawn in sampler.ask(params, facts, "rate", start=len(done)):
            passed = float(np.mean(drawn.answer == sampler.ontology.ids[fact.label]))
            done.append(Rating(fact.id, passed, classify(passed, config)))
            file.write(json.dumps(dataclasses.asdict(done[-1])) + "\n")
    write_ratings(out, done)
    unfinished.unlink()
    print(histogram(done))
    return dict(Counter(rating.pool for rating in done))


def _begun(path: Path, head: Mapping[str, Any]) -> list[Rating]:
    """The ratings of a run that was killed, which began with the same head but for the batch.

    Raises:
      ConfigError: it began with another.
    """

    def parse(number: int, value: Any) -> Rating | None:
        if number > 1:
            return Rating(**value)
        if changed := _changed(value, head):
            raise ConfigError(
                f"ratings that were begun with another {', '.join(changed)}; give what "
                "they were begun with, or delete it to rate anew"
            )
        return None

    remedy = "delete it to rate anew"
    return read_jsonl(path, parse, EXPECTED, remedy, partial=True)[1:] if path.exists() else []


def _file(config: RateSettings) -> Path:
    return local_path(config.file, "config.rate.file")


def unfinished_paths(out: Path) -> tuple[Path, Path]:
    """Where what is begun of `out` lies until it is whole, and where earlier versions had it.

    They left out the suffix, so that theirs may be of another file.
    """
    return out.with_name(f"{out.name}.unfinished"), out.with_suffix(".unfinished")


def _is_of_before(path: Path, head: Mapping[str, Any]) -> bool:
    """Whether a file is what an earlier version began of these ratings; if of others, says so."""
    try:
        found = json.loads(read_text(path).partition("\n")[0])
    except ValueError:
        return False
    if not isinstance(found, dict) or "batch" not in found or "out" in found:
        return False
    if changed := _changed(found, head):
        print(
            f"{path}: left as it is, ratings that an earlier version began with another "
            f"{', '.join(changed)}",
            file=sys.stderr,
        )
    return not changed


def _changed(found: Any, wanted: Mapping[str, Any]) -> list[str]:
    """What two heads differ in, of what pass rates depend on; numbers and names with both."""
    if not isinstance(found, dict):
        return ["first line"]
    # Those of earlier versions have the pools' keys too, and say nothing of photos.
    free = {"batch", "out", "easy_from", "never", *({"photos"} - found.keys())}
    changed = []
    for name in sorted((found.keys() | wanted.keys()) - free):
        values = [found.get(name), wanted.get(name)]
        if values[0] != values[1]:
            short = all(value is None or isinstance(value, int | float) for value in values)
            changed.append(f"{name} ({values[0]} there, {values[1]} here)" if short else name)
    return changed


def _whole(out: Path, facts: Sequence[Fact], config: RateSettings) -> list[Rating] | None:
    """The ratings of a stage that was killed after its last fact and before it was marked."""
    if not out.exists() or any(path.exists() for path in unfinished_paths(out)):
        return None
    try:
        return _given(out, facts, config)
    except DataError as error:
        print(f"{error}; all are rated anew", file=sys.stderr)
        return None


def _pooled(ratings: Sequence[Rating], config: RateSettings) -> list[Rating]:
    """The ratings in the config's pools."""
    return [
        dataclasses.replace(rating, pool=classify(rating.pass_rate, config)) for rating in ratings
    ]


def pool_again(path: Path, config: RateSettings) -> list[Rating]:
    """Puts facts rated before into the config's pools, and writes that down where it is news."""
    before = read_ratings(path)
    ratings = _pooled(before, config)
    if ratings != before:
        write_ratings(path, ratings)
        print(histogram(ratings))
    return ratings


def _given(path: Path, facts: Sequence[Fact], config: RateSettings) -> list[Rating]:
    """Ratings made before, of exactly these facts; the pools are the config's."""
    given = {rating.fact: rating for rating in read_ratings(path)}
    wanted = {fact.id for fact in facts}
    if given.keys() != wanted:
        lacking, foreign = sorted(wanted - given.keys()), sorted(given.keys() - wanted)
        raise DataError(
            f"{path}: ratings of {len(given)} facts found, of the {len(wanted)} training facts "
            f"expected; {len(lacking)} missing, such as {lacking[:1]}, {len(foreign)} of no such "
            f"fact, such as {foreign[:1]}; rate the training split again"
        )
    return _pooled([given[fact.id] for fact in facts], config)
