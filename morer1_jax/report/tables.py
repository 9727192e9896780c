"""The report's score tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from morer1_jax.errors import DataError
from morer1_jax.report.charts import legend, paired_bars
from morer1_jax.report.page import Html, join, remark, table, tag
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
_SCORES = (
    ("Accuracy", "accuracy"),
    ("Precision", "micro_precision"),
    ("Recall", "micro_recall"),
    ("Micro F1", "micro_f1"),
    ("Macro F1", "macro_f1"),
    ("Unreadable", "unreadable"),
    ("Lenient F1", "lenient.micro_f1"),
)
_CELLS = {
    "1_entity_1_object": "1 entity, 1 object",
    "1_entity_n_objects": "1 entity, several objects",
    "n_entities_1_object": "several entities, 1 object",
    "n_entities_n_objects": "several entities, several objects",
}

Scores = Mapping[str, Mapping[str, Any]]


def name_of(system: str) -> str:
    return NAMES.get(system, system)


def get(tree: Any, dotted: str) -> Any:
    """A value within nested objects, or None."""
    for key in dotted.split("."):
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def number_in(tree: Any, dotted: str) -> float | None:
    value = get(tree, dotted)
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def decimals(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def score_section(scores: Scores) -> Html:
    if not scores:
        raise DataError("No scores in this workdir; run the stage `evaluate`.")
    facts = next((n for s in scores.values() if (n := number_in(s, "facts"))), None)
    caption = f"Percent, on {facts:,} test facts. Bold: the best." if facts else "Percent."
    none = tag("code", NONE)
    notes = (
        *(none, " is the negative class of precision, recall and F1. An answer that cannot be "),
        *("read is wrong and counts as a false positive; the lenient micro F1 takes it as ", none),
        *(". Macro F1 is the mean over the labels other than ", none, " that have test facts."),
    )
    return join(
        [
            _score_table(scores, caption),
            tag("p", *notes, class_="note"),
            tag("h3", "By the number of entities and objects of a title-photo pair"),
            _breakdown(scores),
            tag("h3", "Pairs with several objects"),
            _multi_object(scores),
            tag("h3", "F1 of each label"),
            _per_label(scores),
        ]
    )


def _score_table(scores: Scores, caption: str) -> Html:
    best = {
        key: max((number_in(s, key) or 0.0 for s in scores.values()), default=0.0)
        for _, key in _SCORES
        if key != "unreadable"
    }

    def cell(system: str, key: str) -> Html | str:
        value = number_in(scores[system], key)
        shown = decimals(value)
        return tag("b", shown) if value and value == best.get(key) else shown

    rows = [[name_of(system), *(cell(system, key) for _, key in _SCORES)] for system in scores]
    return table(["System", *(title for title, _ in _SCORES)], rows, caption)


def _breakdown(scores: Scores) -> Html:
    trained = [name for name in scores if name not in BLIND and get(scores[name], "breakdown")]
    if not trained:
        return remark("No scores of a trained model in this workdir.")
    first = scores[trained[0]]
    rows = []
    for key, title in _CELLS.items():
        facts = number_in(first, f"breakdown.{key}.facts") or 0
        row: list[object] = [title, f"{facts:,}"]
        values = [number_in(first, f"breakdown.{key}.none")]
        for system in trained:
            values += [
                number_in(scores[system], f"breakdown.{key}.{score}")
                for score in ("accuracy", "micro_f1")
            ]
        rows.append(row + [decimals(value if facts else None) for value in values])
    head = ["Pair", "Facts", "Gold none", *(("Accuracy", "Micro F1") * len(trained))]
    groups = [("", 3), *((name_of(system), 2) for system in trained)]
    return table(head, rows, "Percent but for facts.", groups)


def _multi_object(scores: Scores) -> Html:
    rows = [
        [
            name_of(system),
            *(decimals(number_in(s, f"multi_object.{k}")) for k in ("precision", "recall", "f1")),
        ]
        for system, s in scores.items()
        if number_in(s, "multi_object.facts")
    ]
    if not rows:
        return remark("No test facts of pairs with several objects.")
    facts = {number_in(s, "multi_object.facts") for s in scores.values()} - {None, 0}
    caption = f"Percent, on {max(facts):,} test facts."
    return table(["System", "Precision", "Recall", "F1"], rows, caption)


def _per_label(scores: Scores) -> Html:
    systems = [name for name in reversed(FINAL) if get(scores.get(name), "per_label")]
    if not systems:
        return remark("No scores of a trained model in this workdir.")
    per_label = {name: scores[name]["per_label"] for name in systems}
    support = {
        label: int(number_in(row, "support") or 0) for label, row in per_label[systems[0]].items()
    }
    shown = sorted((label for label in support if support[label]), key=lambda x: (-support[x], x))
    rows = []
    for label in shown:
        f1 = {name_of(name): number_in(per_label[name].get(label), "f1") or 0.0 for name in systems}
        rows.append(
            tag(
                "tr",
                tag("th", tag("code", label), class_="name", scope="row"),
                tag("td", paired_bars(f1), class_="bars"),
                *(tag("td", decimals(value)) for value in f1.values()),
                tag("td", f"{support[label]:,}"),
            )
        )
    head = ["Label", "", *map(name_of, systems), "Facts"]
    parts = [
        legend([name_of(name) for name in systems]),
        tag(
            "table",
            tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in head))),
            tag("tbody", *rows),
            class_="labels",
        ),
    ]
    if left_out := len(support) - len(shown):
        parts.append(remark(f"Left out, without test facts: {left_out} of {len(support)} labels."))
    return join(parts)
