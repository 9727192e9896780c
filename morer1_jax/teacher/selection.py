"""Selects the training facts to ask the teacher about."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from etils import epath

from morer1_jax.errors import ConfigError, DataError
from morer1_jax.files import read_lines
from morer1_jax.task.fact import Fact


def balanced(facts: Sequence[Fact], count: int, seed: int) -> list[Fact]:
    """Selects `count` facts in random order, as evenly over the labels as the facts permit.

    Each label is selected as often as any other, plus or minus one, until its facts are used up. A
    smaller count gives a prefix of a larger one's selection: what was written for few facts serves
    when more are requested, and a run that stops early is balanced, too.
    """
    rng = np.random.default_rng(seed)
    by_label: dict[str, list[Fact]] = {}
    for index in rng.permutation(len(facts)):
        by_label.setdefault(facts[index].label, []).append(facts[index])
    selection: list[Fact] = []
    # Each row holds a fact of every label that has one left.
    for row in itertools.zip_longest(*(by_label[label] for label in sorted(by_label))):
        selection += [row[index] for index in rng.permutation(len(row)) if row[index] is not None]
    return selection[:count]


def select_balanced(facts: Sequence[Fact], count: int, seed: int) -> list[Fact]:
    """Selects as `balanced` does.

    Raises:
        ConfigError: there are fewer than `count` facts.
    """
    if count > len(facts):
        raise ConfigError(
            f"--count: expected at most {len(facts)}, the number of training facts, found {count}"
        )
    return balanced(facts, count, seed)


def select_listed(facts: Sequence[Fact], path: epath.PathLike) -> list[Fact]:
    """Selects the facts whose ids a file lists, one a line, in its order; blank lines are skipped.

    Raises:
        DataError: the file cannot be read or is empty, or an id is unknown or listed twice.
    """
    expected = "the ids of training facts, like train:1, one a line and each once"
    by_id = {fact.id: fact for fact in facts}
    selection: dict[str, Fact] = {}
    lines = read_lines(path, expected, "name another file with --facts")
    for number, fact_id in enumerate(map(str.strip, lines), start=1):
        if fact_id and (fact_id not in by_id or fact_id in selection):
            problem = "a second time" if fact_id in selection else "which is unknown"
            raise DataError(
                f"{path}:{number}: expected {expected}, found {fact_id!r} {problem}; correct the "
                "line"
            )
        if fact_id:
            selection[fact_id] = by_id[fact_id]
    if not selection:
        raise DataError(f"{path}: expected {expected}, found an empty file; list some")
    return list(selection.values())
