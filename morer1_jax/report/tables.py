"""The report's score tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from morer1_jax.errors import DataError
from morer1_jax.report.page import render
from morer1_jax.task.ontology import NONE

# In the order of the tables: what does not see or read, then what was trained, the result last.
NAMES = {
    "majority": "Majority label",
    "title_hidden": "Title hidden",
    "photo_hidden": "Photo hidden",
    "sft": "SFT",
    "control": "SFT for longer",
    "no_mixing": "GRPO without mixing",
    "grpo": "GRPO",
}
BLIND = ("majority", "title_hidden", "photo_hidden")
FINAL = ("grpo", "sft")
_SCORES = {
    "accuracy": "Accuracy",
    "micro_precision": "Precision",
    "micro_recall": "Recall",
    "micro_f1": "Micro F1",
    "macro_f1": "Macro F1",
    "unreadable": "Unreadable",
    "lenient.micro_f1": "Lenient F1",
}
_CELLS = {
    "1_entity_1_object": "1 entity, 1 object",
    "1_entity_n_objects": "1 entity, several objects",
    "n_entities_1_object": "several entities, 1 object",
    "n_entities_n_objects": "several entities, several objects",
}

Scores = Mapping[str, Mapping[str, Any]]


def name_of(system: str) -> str:
    """Returns what the report calls a system."""
    return NAMES.get(system, system)


def get(tree: Any, dotted: str) -> Any:
    """Returns a value within nested objects, or None."""
    for key in dotted.split("."):
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def number_in(tree: Any, dotted: str) -> float | None:
    """Returns a finite number within nested objects, or None."""
    value = get(tree, dotted)
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def decimals(value: float | None) -> str:
    """Returns a score as text, a dash for None."""
    return "–" if value is None else f"{value:.1f}"


def score_section(scores: Scores) -> Markup:
    """Returns the tables of all systems.

    Raises:
        DataError: there are no scores.
    """
    if not scores:
        raise DataError("No scores in this workdir; run the stage `evaluate`.")
    trained = [s for s in scores if s not in BLIND and get(scores[s], "breakdown")]
    compared = [s for s in reversed(FINAL) if get(scores.get(s), "per_label")]
    labels, labels_without_facts = _per_label(scores, compared)
    return render(
        "scores.html",
        negative=NONE,
        facts=next((n for s in scores.values() if (n := number_in(s, "facts"))), None),
        score_names=list(_SCORES.values()),
        scores=_score_rows(scores),
        trained=list(map(name_of, trained)),
        breakdown=_breakdown_rows(scores, trained) if trained else [],
        several_facts=max(number_in(s, "multi_object.facts") or 0 for s in scores.values()),
        several=_several_rows(scores),
        compared=list(map(name_of, compared)),
        labels=labels,
        labels_without_facts=labels_without_facts,
    )


def _score_rows(scores: Scores) -> list[list[str]]:
    """Returns a row for each system, the best of each column in bold."""
    best = {key: max(number_in(s, key) or 0.0 for s in scores.values()) for key in _SCORES}
    best["unreadable"] = 0.0  # Less is better: nothing is bold.
    rows = []
    for system in scores:
        row = [name_of(system)]
        for key in _SCORES:
            value = number_in(scores[system], key)
            bold = value and value == best[key]
            row.append(Markup("<b>{}</b>").format(decimals(value)) if bold else decimals(value))
        rows.append(row)
    return rows


def _breakdown_rows(scores: Scores, trained: list[str]) -> list[list[str]]:
    """Returns a row for each kind of title-photo pair: facts, share of `none`, systems' scores."""
    rows = []
    for key, title in _CELLS.items():
        cell = f"breakdown.{key}"
        facts = number_in(scores[trained[0]], f"{cell}.facts") or 0
        values = [number_in(scores[trained[0]], f"{cell}.none")]
        for system in trained:
            values += [number_in(scores[system], f"{cell}.{s}") for s in ("accuracy", "micro_f1")]
        rows.append([title, f"{facts:,}", *(decimals(v if facts else None) for v in values)])
    return rows


def _several_rows(scores: Scores) -> list[list[str]]:
    """Returns a row for each system that answered facts of pairs with several objects."""
    keys = [f"multi_object.{score}" for score in ("precision", "recall", "f1")]
    return [
        [name_of(system), *(decimals(number_in(s, key)) for key in keys)]
        for system, s in scores.items()
        if number_in(s, "multi_object.facts")
    ]


def _per_label(scores: Scores, systems: list[str]) -> tuple[list[dict[str, Any]], int]:
    """Returns F1 and number of facts of each label that has facts, and how many have none.

    Args:
        scores: of all systems.
        systems: whose F1, in percent, are compared; the first says how many facts a label has.
    """
    if not systems:
        return [], 0
    tables = [scores[system]["per_label"] for system in systems]
    facts = {label: int(number_in(row, "support") or 0) for label, row in tables[0].items()}
    labels = sorted(filter(facts.get, facts), key=lambda label: (-facts[label], label))
    rows = [
        {
            "label": label,
            "f1": [number_in(table.get(label), "f1") or 0.0 for table in tables],
            "facts": facts[label],
        }
        for label in labels
    ]
    return rows, len(facts) - len(labels)
