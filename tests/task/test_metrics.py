import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from morer1_jax.task.fact import Fact
from morer1_jax.task.metrics import format_table, score
from morer1_jax.task.ontology import Ontology

A, B, C = "/per/org/a", "/per/loc/b", "/org/loc/c"
ONTOLOGY = Ontology((A, "none", B, C))


def make(label, line=1, image="1.jpg", entity=(0, 1), object_name="[OBJ0]"):
    return Fact(
        id=f"test:{line}",
        tokens=("x", "y", "z"),
        entity_name="xyz"[entity[0]],
        entity_span=entity,
        object_name=object_name,
        box=(0.5, 0.5, 0.5, 0.5),
        image=image,
        label=label,
    )


def facts_of(*labels):
    return [make(label, i + 1) for i, label in enumerate(labels)]


def some(scores, *keys):
    return {key: scores[key] for key in keys}


MICRO = ("accuracy", "micro_precision", "micro_recall", "micro_f1")
MACRO = ("macro_precision", "macro_recall", "macro_f1")


def test_by_hand():
    #        hit  miss  confused  false alarm  hit on none  unreadable x 2
    gold = (A, A, A, "none", "none", B, "none")
    said = (A, "none", B, A, "none", None, None)
    got = score(facts_of(*gold), said, ONTOLOGY)
    # 1 hit; predicted positives: A, B, A and the two unreadable; gold positives: A, A, A, B.
    assert some(got, *MICRO) == pytest.approx(
        {
            "accuracy": 200 / 7,
            "micro_precision": 100 / 5,
            "micro_recall": 100 / 4,
            "micro_f1": 200 / 9,
        }
    )
    # A: 1 of 2 predicted, 1 of 3 gold.  B: 0 of 1, 0 of 1.  C has no gold facts.
    assert some(got, *MACRO) == pytest.approx(
        {"macro_precision": 50 / 2, "macro_recall": 100 / 3 / 2, "macro_f1": 40 / 2}
    )
    assert got["unreadable"] == pytest.approx(200 / 7)
    assert got["facts"] == 7
    assert got["lenient"] == pytest.approx(
        {
            "accuracy": 300 / 7,
            "micro_precision": 100 / 3,
            "micro_recall": 100 / 4,
            "micro_f1": 200 / 7,
            "macro_precision": 25.0,
            "macro_recall": 50 / 3,
            "macro_f1": 20.0,
        }
    )
    assert got["per_label"][A] == pytest.approx(
        {"precision": 50.0, "recall": 100 / 3, "f1": 40.0, "support": 3}
    )
    assert got["per_label"]["none"] == pytest.approx(
        {"precision": 50.0, "recall": 100 / 3, "f1": 40.0, "support": 3}
    )
    assert got["per_label"][C] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}


def test_breakdown_by_hand():
    facts = [
        # One entity, one object.
        make(A, 1, "1.jpg"),
        # One entity, two objects; the objects' names recur in other photos.
        make(A, 2, "2.jpg"),
        make("none", 3, "2.jpg", object_name="[OBJ1]"),
        # Two entities, one object.
        make(B, 4, "3.jpg"),
        make("none", 5, "3.jpg", entity=(1, 2)),
        # Two entities, two objects, though no fact for every combination.
        make(C, 6, "4.jpg"),
        make("none", 7, "4.jpg", entity=(1, 2), object_name="[OBJ1]"),
    ]
    said = [A, B, A, None, "none", C, A]
    got = score(facts, said, ONTOLOGY)

    def cell(n, none, accuracy, p, r, f1):
        return dict(zip(("facts", "none", *MICRO), (n, none, accuracy, p, r, f1), strict=True))

    assert got["breakdown"] == {
        "1_entity_1_object": pytest.approx(cell(1, 0, 100, 100, 100, 100)),
        "1_entity_n_objects": pytest.approx(cell(2, 50, 0, 0, 0, 0)),
        "n_entities_1_object": pytest.approx(cell(2, 50, 50, 0, 0, 0)),
        "n_entities_n_objects": pytest.approx(cell(2, 50, 50, 50, 100, 200 / 3)),
    }
    # Photos 2 and 4: hit C; predicted B, A, C, A; gold A, C.
    assert got["multi_object"] == pytest.approx(
        {"facts": 4, "precision": 25.0, "recall": 50.0, "f1": 100 / 3}
    )


def test_extremes():
    perfect = score(facts_of(A, B, "none"), (A, B, "none"), ONTOLOGY)
    assert set(some(perfect, *MICRO, *MACRO).values()) == {100.0}
    majority = score(facts_of(A, B, "none"), ("none",) * 3, ONTOLOGY)
    assert majority["accuracy"] == pytest.approx(100 / 3)
    assert set(some(majority, *MICRO[1:], *MACRO).values()) == {0.0}
    silent = score(facts_of("none"), (None,), ONTOLOGY)
    assert (silent["accuracy"], silent["unreadable"], silent["macro_f1"]) == (0, 100, 0)
    assert silent["lenient"]["accuracy"] == 100


labels = st.sampled_from(ONTOLOGY.labels)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(labels, st.one_of(st.none(), labels)), min_size=1, max_size=40))
def test_equals_a_confusion_matrix(pairs):
    gold, said = zip(*pairs, strict=True)
    got = score(facts_of(*gold), said, ONTOLOGY)
    # Rows gold, columns predicted, the last column unreadable.
    m = np.zeros((4, 5))
    for g, p in pairs:
        m[ONTOLOGY.ids[g], 4 if p is None else ONTOLOGY.ids[p]] += 1
    for scores, matrix in ((got, m), (got["lenient"], m[:, :4] + np.outer(m[:, 4], [0, 1, 0, 0]))):
        relations = [0, 2, 3]
        hits = np.diag(matrix)[relations].sum()
        gold_count = matrix[relations].sum()
        predicted = np.delete(matrix, 1, axis=1).sum()
        with np.errstate(invalid="ignore"):
            p, r = np.nan_to_num([hits / predicted, hits / gold_count])
            f1 = np.nan_to_num(2 * p * r / (p + r))
        assert scores["accuracy"] == pytest.approx(100 * np.trace(matrix[:, :4]) / len(pairs))
        assert [scores[k] for k in MICRO[1:]] == pytest.approx([100 * p, 100 * r, 100 * f1])
        each = []
        for i in relations:
            if matrix[i].any():
                r = matrix[i, i] / matrix[i].sum()
                p = matrix[i, i] / max(matrix[:, i].sum(), 1)
                each.append((p, r, 2 * p * r / (p + r) if p + r else 0))
        expected = 100 * np.mean(each, axis=0) if each else np.zeros(3)
        assert [scores[k] for k in MACRO] == pytest.approx(list(expected))
    assert {k: v["support"] for k, v in got["per_label"].items()} == {
        label: collections.Counter(gold)[label] for label in ONTOLOGY.labels
    }


@pytest.mark.parametrize(
    ("facts", "said", "message"),
    [
        ([], [], "found 0 predictions and 0 facts"),
        (facts_of(A), [A, B], "found 2 predictions and 1 facts"),
        (facts_of(A), ["/x/y/z"], "fact test:1: expected a label of the ontology, found '/x/y/z'"),
        (facts_of("/x/y/z"), [A], "fact test:1: expected a label of the ontology, found '/x/y/z'"),
    ],
)
def test_refuses(facts, said, message):
    with pytest.raises(ValueError, match=message):
        score(facts, said, ONTOLOGY)


def test_table():
    rows = {
        "SFT": score(facts_of(A, B, "none"), (A, None, "none"), ONTOLOGY),
        "MOREformer, published": {"accuracy": 83.5, "micro_f1": 62.75},
    }
    table = format_table(rows)
    head, rule, sft, published = table.split("\n")
    assert " ".join(head.split()) == "acc P R F1 macro P macro R macro F1 unread len acc len F1"
    assert set(rule) == {"-"}
    assert " ".join(sft.split()) == (
        "SFT 66.67 50.00 50.00 50.00 50.00 50.00 50.00 33.33 66.67 66.67"
    )
    assert " ".join(published.split()) == "MOREformer, published 83.50 - - 62.75 - - - - - -"
    # Columns line up on their right.
    assert [len(line) for line in (head, rule, sft, published)] == [len(rule)] * 4
