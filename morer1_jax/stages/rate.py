"""The stage `rate`: measures how often the starting model solves each training fact.

Writes `rate/ratings.jsonl`, a line a fact: its id, its pass rate, and its pool, `easy`, `hard`
or `dropped`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from morer1_jax.config.settings import RateSettings
from morer1_jax.data.ratings import EXPECTED, FILE, Rating, histogram, read_ratings, write_ratings
from morer1_jax.data.shapes import round_up
from morer1_jax.errors import ConfigError, DataError
from morer1_jax.files import named, read_jsonl, write_jsonl
from morer1_jax.hosts import group
from morer1_jax.model.layers import Params
from morer1_jax.paths import local_path
from morer1_jax.run.batch_sampler import BatchSampler
from morer1_jax.run.setup import Run
from morer1_jax.run.shapes import ask_plan
from morer1_jax.run.slots import decode_stages
from morer1_jax.stages.ahead import Program, answers
from morer1_jax.task.fact import Fact

# Entries of an unfinished rating's first line that may differ when it goes on.
_FREE = ("batch", "out", "easy_from", "never")

# Seconds after which what is rated so far is copied to a bucket.
_PUBLISHED = 30.0


def run_rate(run: Run) -> None:
    """Rates every training fact with the starting model, or uses ratings that exist."""
    config, out, facts = run.settings.rate, run.workdir / "rate" / FILE, run.dataset.splits["train"]
    prepared = run.prepared.pop("rate", None)
    if not group.of_first("ratings exist", lambda: _take_existing(out, facts, config)):
        sampler = prepared or _sampler(run)
        params = run.trainee.whole(starting_params(run))
        rate(sampler, params, facts, config, out, publish=run.store.publish)


def rate_programs(run: Run) -> Iterator[Program]:
    """Yields the stage's programs, and prepares the run for it."""
    if run.settings.rate.file is None:
        sampler = run.prepared["rate"] = _sampler(run)
        yield from answers(run, "rating", sampler, run.dataset.splits["train"])


def _sampler(run: Run) -> BatchSampler:
    config, data, facts = run.settings.rate, run.settings.data, run.dataset.splits["train"]
    return BatchSampler(
        run.trainee.policy,
        run.reader,
        batch=config.batch,
        group=config.samples,
        temperature=config.temperature,
        seed=run.settings.seed,
        workers=data.workers,
        stages=decode_stages(
            run.trainee.placed,
            run.settings,
            run.sizes.values(),
            round_up(config.batch, run.trainee.placed.parts) * config.samples,
            run.reader.limits.completion,
        ),
        plan=ask_plan(run.trainee.placed, data, run.sizes, [facts], config.batch),
    )


def _take_existing(out: Path, facts: Sequence[Fact], config: RateSettings) -> bool:
    """Writes ratings that exist already, in the config's pools; returns whether there were any."""
    existing = (
        _whole(out, facts, config)
        if config.file is None
        else _ratings_of(_file(config), facts, config)
    )
    if existing is not None:
        _write(out, existing)
    return existing is not None


def starting_params(run: Run) -> Params:
    """Returns the trainable parameters that rating and GRPO start from."""
    if run.settings.rate.begin == "sft":
        return run.trainee.best_params(run.store.checkpoints("sft"))
    return run.trainee.init_params(0)


def check_start(run: Run) -> None:
    """Checks that the config has the model that rating and GRPO start from.

    Raises:
        ConfigError: they start from the checkpoint, and the config names none.
    """
    if run.settings.rate.begin == "checkpoint" and run.trainee.checkpoint is None:
        raise ConfigError(
            "config.rate.begin: expected 'sft' where config.model.path names no checkpoint, found "
            "'checkpoint'"
        )


def classify(pass_rate: float, config: RateSettings) -> str:
    """Returns `easy` from `easy_from` on, else `hard`; `dropped` at 0 if `never` is `drop`."""
    if pass_rate >= config.easy_from:
        return "easy"
    return "dropped" if pass_rate == 0 and config.never == "drop" else "hard"


def check_rating(run: Run) -> None:
    """Checks what rating will read, before any stage runs.

    Raises:
        ConfigError: there is no model to rate, or the unfinished rating is an earlier version's.
        DataError: the file of ratings that the config names has other facts.
    """
    check_start(run)
    if (path := run.workdir / "rate" / "ratings.unfinished").exists():
        raise ConfigError(
            f"{path}: expected no ratings that an earlier version began, found some; delete it to "
            "rate anew, or use a new --workdir"
        )
    config = run.settings.rate
    if config.file is not None:
        _ratings_of(_file(config), run.dataset.splits["train"], config)


def rate(
    sampler: BatchSampler,
    params: Params,
    facts: Sequence[Fact],
    config: RateSettings,
    out: Path,
    identity: Mapping[str, Any] | None = None,
    publish: Callable[[float], None] = lambda every: None,
) -> None:
    """Rates facts, writes `out` and prints a histogram; goes on from an unfinished rating.

    Args:
        sampler: draws `config.samples` answers to a fact.
        params: of the whole model.
        identity: JSON values, by name, that the pass rates depend on.
        publish: called after each fact, with the seconds after which to do it again.

    Raises:
        ConfigError: the unfinished rating has another `identity`; it stays as it is.
    """
    # Read what a killed rating has done.
    unfinished = unfinished_path(out)
    head = json.loads(json.dumps({"batch": sampler.batch, "out": out.name, **(identity or {})}))
    done = group.of_first("rated before", lambda: _go_on_with(unfinished, head, config))
    ratings = {rating["fact"]: Rating(**rating) for rating in done}
    # Rate the other facts, each written at once. Noise is a fact's own, and batches follow from all
    # facts, so that neither the order nor an interruption changes a rating.
    path = unfinished if group.is_first() else os.devnull
    with named(unfinished), open(path, "a", buffering=1, encoding="utf-8") as file:
        for fact, completions in sampler.sample(params, facts, "rate", done=frozenset(ratings)):
            is_right = completions.answer == sampler.ontology.ids[fact.label]
            pass_rate = float(np.mean(is_right))
            rating = Rating(fact.id, pass_rate, classify(pass_rate, config))
            ratings[fact.id] = rating
            file.write(json.dumps(dataclasses.asdict(rating)) + "\n")
            if group.is_first():
                publish(_PUBLISHED)

    def finish() -> None:
        _write(out, [ratings[fact.id] for fact in facts])
        unfinished.unlink()

    group.by_first("ratings", finish)


def _go_on_with(
    unfinished: Path, head: Mapping[str, Any], config: RateSettings
) -> list[dict[str, Any]]:
    """Reads an unfinished rating's ratings, and writes them in the config's pools to go on from."""
    rated = [dataclasses.asdict(r) for r in _pooled(_read_unfinished(unfinished, head), config)]
    write_jsonl(unfinished, [head, *rated])
    return rated


def pool_again(path: Path, config: RateSettings) -> list[Rating]:
    """Puts rated facts into the config's pools; writes and prints them if a pool has changed."""
    written = read_ratings(path)
    ratings = _pooled(written, config)
    if ratings != written:
        _write(path, ratings)
    return ratings


def unfinished_path(out: Path) -> Path:
    """Returns the file that keeps a rating until it is whole and `out` is written."""
    return out.with_name(f"{out.name}.unfinished")


def _write(out: Path, ratings: Sequence[Rating]) -> None:
    write_ratings(out, ratings)
    print(histogram(ratings))


def _pooled(ratings: Sequence[Rating], config: RateSettings) -> list[Rating]:
    return [
        dataclasses.replace(rating, pool=classify(rating.pass_rate, config)) for rating in ratings
    ]


def _file(config: RateSettings) -> Path:
    return local_path(config.file, "config.rate.file")


def _whole(out: Path, facts: Sequence[Fact], config: RateSettings) -> list[Rating] | None:
    """Reads ratings that are whole though the stage was killed before its marker; None if not."""
    if not out.exists() or unfinished_path(out).exists():
        return None
    try:
        return _ratings_of(out, facts, config)
    except DataError as error:
        print(f"{error}; all are rated anew", file=sys.stderr)
        return None


def _ratings_of(path: Path, facts: Sequence[Fact], config: RateSettings) -> list[Rating]:
    """Reads ratings of exactly these facts, in their order, and sets the config's pools."""
    ratings = {rating.fact: rating for rating in read_ratings(path)}
    ids = {fact.id for fact in facts}
    if ratings.keys() != ids:
        missing, foreign = sorted(ids - ratings.keys()), sorted(ratings.keys() - ids)
        raise DataError(
            f"{path}: expected ratings of the {len(ids)} training facts, found {len(ratings)}: "
            f"{len(missing)} missing, such as {missing[:1]}, {len(foreign)} of no such fact, such "
            f"as {foreign[:1]}; rate the training split again"
        )
    return _pooled([ratings[fact.id] for fact in facts], config)


def _read_unfinished(path: Path, head: Mapping[str, Any]) -> list[Rating]:
    """Reads an unfinished rating, whose first line must be `head`, apart from keys in `_FREE`.

    Raises:
        ConfigError: its first line differs.
    """

    def parse(number: int, value: Any) -> Rating | None:
        if number > 1:
            return Rating(**value)
        if changed := _changed(value, head):
            raise ConfigError(
                f"expected ratings of the same settings, found others: {', '.join(changed)}; give "
                "what they were begun with, or delete it to rate anew"
            )
        return None

    remedy = "delete it to rate anew"
    return read_jsonl(path, parse, EXPECTED, remedy, partial=True)[1:] if path.exists() else []


def _changed(found: Any, expected: Mapping[str, Any]) -> list[str]:
    """Returns the names in which two first lines differ, apart from `_FREE`; numbers with both."""
    if not isinstance(found, dict):
        return ["first line"]
    changed = []
    for name in sorted((found.keys() | expected.keys()) - {*_FREE}):
        values = [found.get(name), expected.get(name)]
        if values[0] != values[1]:
            short = all(value is None or isinstance(value, int | float) for value in values)
            changed.append(f"{name} (expected {values[1]}, found {values[0]})" if short else name)
    return changed
