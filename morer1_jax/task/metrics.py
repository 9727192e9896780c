"""The benchmark's scores, in percent.

`none` is the negative class.  An answer that cannot be read is wrong and costs: it counts as a
predicted positive of no label.  Beside this strict count stands the lenient one of published
scripts, in which such an answer is a predicted `none`.  A ratio whose denominator is zero is 0.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from morer1_jax.task.fact import Fact
from morer1_jax.task.ontology import NONE, Ontology

Scores = dict[str, Any]

_COLUMNS = (
    ("accuracy", "acc"),
    ("micro_precision", "P"),
    ("micro_recall", "R"),
    ("micro_f1", "F1"),
    ("macro_precision", "macro P"),
    ("macro_recall", "macro R"),
    ("macro_f1", "macro F1"),
    ("unreadable", "unread"),
)
_LENIENT_COLUMNS = (("accuracy", "len acc"), ("micro_f1", "len F1"))


def score(facts: Sequence[Fact], predictions: Sequence[str | None], ontology: Ontology) -> Scores:
    """Scores one split.

    Args:
        facts: all facts of the split: pairs of title and photo are counted from them, as the facts
            that share a photo.
        predictions: a label for each fact, or None where the answer could not be read.

    Returns:
        In percent but for counts:
        `accuracy`, `micro_*` and `macro_*` each `precision`, `recall`, `f1`, and `unreadable`;
        `facts`: their number;
        `lenient`: the first seven again, unreadable answers read as `none`;
        `breakdown`: `1_entity_1_object`, `1_entity_n_objects`, `n_entities_1_object` and
        `n_entities_n_objects`, each the `facts` of such pairs, the share of `none` among their gold
        labels as `none`, their `accuracy` and `micro_*`;
        `multi_object`: `facts`, `precision`, `recall` and `f1` (micro) on pairs with several
        objects;
        `per_label`: each label's `precision`, `recall`, `f1`, and `support`, its gold facts.
        Macro scores are means over the labels other than `none` that have support.

    Raises:
        ValueError: there are no facts, the predictions are not one a fact, or a label is not the
            ontology's.
    """
    if not facts or len(facts) != len(predictions):
        raise ValueError(
            f"expected one prediction a fact and at least one fact, found {len(predictions)} "
            f"predictions and {len(facts)} facts"
        )
    for fact, predicted in zip(facts, predictions, strict=True):
        for label in (fact.label, predicted):
            if label is not None and label not in ontology.ids:
                raise ValueError(
                    f"fact {fact.id}: expected a label of the ontology, found {label!r}"
                )
    # Gold and predicted labels, with the kind of photo: several entities, objects.
    pairs = [(fact.label, p) for fact, p in zip(facts, predictions, strict=True)]
    lenient = [(gold, NONE if p is None else p) for gold, p in pairs]
    entities, objects = _count_per_photo(facts)
    kinds = [(entities[fact.photo] > 1, objects[fact.photo] > 1) for fact in facts]

    def where(in_group: Callable[[tuple[bool, bool]], bool]) -> list[tuple[str, str | None]]:
        return [pair for pair, kind in zip(pairs, kinds, strict=True) if in_group(kind)]

    # Scores by kind of photo.
    breakdown = {}
    for n, entity in enumerate(("1_entity", "n_entities")):
        for m, object_ in enumerate(("1_object", "n_objects")):
            cell_pairs = where(lambda kind, cell=(n == 1, m == 1): kind == cell)
            breakdown[f"{entity}_{object_}"] = {
                "facts": len(cell_pairs),
                "none": _percent(sum(gold == NONE for gold, _ in cell_pairs), len(cell_pairs)),
                **_micro(cell_pairs),
            }
    multi_object_pairs = where(lambda kind: kind[1])
    return {
        "facts": len(facts),
        **_summary(pairs, ontology),
        "unreadable": _percent(sum(p is None for _, p in pairs), len(pairs)),
        "lenient": _summary(lenient, ontology),
        "breakdown": breakdown,
        "multi_object": {
            "facts": len(multi_object_pairs),
            **{k: _micro(multi_object_pairs)[f"micro_{k}"] for k in ("precision", "recall", "f1")},
        },
        "per_label": {label: _one_label(pairs, label) for label in ontology.labels},
    }


def format_table(rows: Mapping[str, Scores]) -> str:
    """Returns a plain-text table, one row a system; a missing score is a dash."""
    lines = [["", *(title for _, title in (*_COLUMNS, *_LENIENT_COLUMNS))]]
    for system, scores in rows.items():
        values = [scores.get(key) for key, _ in _COLUMNS]
        values += [scores.get("lenient", {}).get(key) for key, _ in _LENIENT_COLUMNS]
        lines.append([system, *("-" if v is None else f"{v:.2f}" for v in values)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    ]
    text.insert(1, "-" * len(text[0]))
    return "\n".join(line.rstrip() for line in text)


def _summary(pairs: Sequence[tuple[str, str | None]], ontology: Ontology) -> Scores:
    label_scores = [_one_label(pairs, label) for label in ontology.labels if label != NONE]
    supported_scores = [scores for scores in label_scores if scores["support"]]
    return {
        **_micro(pairs),
        **{
            f"macro_{k}": sum(scores[k] for scores in supported_scores) / len(supported_scores)
            if supported_scores
            else 0.0
            for k in ("precision", "recall", "f1")
        },
    }


def _micro(pairs: Sequence[tuple[str, str | None]]) -> Scores:
    scores = _ratios(
        hits=sum(gold == p != NONE for gold, p in pairs),
        predicted=sum(p != NONE for _, p in pairs),
        gold=sum(gold != NONE for gold, _ in pairs),
    )
    return {
        "accuracy": _percent(sum(gold == p for gold, p in pairs), len(pairs)),
        **{f"micro_{k}": v for k, v in scores.items()},
    }


def _one_label(pairs: Sequence[tuple[str, str | None]], label: str) -> Scores:
    support = sum(gold == label for gold, _ in pairs)
    hits = sum(gold == p == label for gold, p in pairs)
    predicted = sum(p == label for _, p in pairs)
    return {**_ratios(hits, predicted, support), "support": support}


def _ratios(hits: int, predicted: int, gold: int) -> Scores:
    """Returns precision, recall and F1 = 2 hits / (predicted + gold), their harmonic mean."""
    return {
        "precision": _percent(hits, predicted),
        "recall": _percent(hits, gold),
        "f1": _percent(2 * hits, predicted + gold),
    }


def _percent(part: int, whole: int) -> float:
    return 100.0 * part / whole if whole else 0.0


def _count_per_photo(facts: Sequence[Fact]) -> tuple[dict[str, int], dict[str, int]]:
    """Returns the numbers of distinct entities and of distinct objects by photo."""
    entities, objects = defaultdict(set), defaultdict(set)
    for fact in facts:
        entities[fact.photo].add((fact.entity_span, fact.entity_name))
        objects[fact.photo].add(fact.object_name)
    return tuple({k: len(v) for k, v in names.items()} for names in (entities, objects))
