"""The world's rules: which label follows from a thing, an entity and a title."""

import itertools

import pytest

from morer1_jax.task.ontology import Ontology, label_types
from morer1_jax.world.scene import (
    COLOURS,
    KINDS,
    LABELS,
    NAMES,
    REMARKS,
    SELF_LABELS,
    VERBS,
    CastMember,
    Clause,
    PhotoObject,
    relation,
    span,
)


def test_the_labels_are_an_ontology_over_all_types():
    assert Ontology(LABELS).labels == LABELS
    assert len(LABELS) > 12
    for position in (0, 1):
        types = {label_types(label)[position] for label in LABELS if label != "none"}
        assert types == {"per", "org", "loc", "misc"}


def test_every_name_has_its_own_look():
    names = [name for listed in NAMES.values() for name in listed]
    assert len(set(names)) == len(names)
    assert {len(listed) for listed in NAMES.values()} == {len(COLOURS)} == {len(set(COLOURS))}
    # No word of a name says which type another has, and no name is a part of another.
    assert not [(a, b) for a, b in itertools.permutations(names, 2) if a in b]


def test_labels_have_the_types_of_what_they_relate():
    for verb in VERBS:
        kind = KINDS[verb.kind]
        assert label_types(verb.label) == (kind.type, verb.types[1])
        assert kind.stands_for == verb.types[0]
        assert not verb.symmetric or verb.types[0] == verb.types[1]
    for name, label in SELF_LABELS.items():
        assert label_types(label) == (KINDS[name].type, KINDS[name].stands_for)
    assert SELF_LABELS.keys() == {kind.name for kind in KINDS.values() if kind.stands_for}


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.label)
def test_a_clause_gives_its_label_in_its_direction_to_its_kind(verb):
    a, b = CastMember(verb.types[0], 0), CastMember(verb.types[1], 1)
    clause = Clause(verb, a, b)
    assert a.name in clause.text
    assert b.name in clause.text
    assert sorted(clause.text.split()) == sorted([a.name, verb.word, b.name])
    for kind in KINDS.values():
        if kind.stands_for != a.type:
            continue
        label, because = relation(PhotoObject(kind.name, 0), b, [clause])
        if kind.name == verb.kind:
            assert (label, because) == (verb.label, clause)
        else:
            assert (label, because) == ("none", None)
    if verb.types[0] == verb.types[1]:
        backwards = relation(PhotoObject(verb.kind, 1), a, [clause])
        assert backwards == ((verb.label, clause) if verb.symmetric else ("none", None))


def test_what_is_not_named_or_not_linked_is_none():
    verb = next(verb for verb in VERBS if verb.symmetric)
    other = next(v for v in VERBS if v.types != verb.types)
    first = Clause(verb, CastMember(verb.types[0], 0), CastMember(verb.types[1], 1))
    second = Clause(other, CastMember(other.types[0], 2), CastMember(other.types[1], 3))
    # Another colour: somebody the title does not name.
    assert relation(PhotoObject(verb.kind, 2), first.b, [first]) == ("none", None)
    # Named, but in another clause.
    assert relation(PhotoObject(verb.kind, 0), second.b, [first, second]) == ("none", None)
    assert relation(PhotoObject("blur", 0), first.a, [first]) == ("none", None)


@pytest.mark.parametrize(("kind", "label"), SELF_LABELS.items())
def test_a_thing_that_stands_for_the_entity_itself(kind, label):
    stands_for = KINDS[kind].stands_for
    verb = next(verb for verb in VERBS if stands_for in verb.types)
    pair = [CastMember(one, i) for i, one in enumerate(verb.types)]
    clause = Clause(verb, *pair)
    entity = next(one for one in pair if one.type == stands_for)
    assert relation(PhotoObject(kind, entity.index), entity, [clause]) == (label, None)


def test_span_finds_a_name_of_several_words():
    several = next(
        CastMember(kind, i)
        for kind, names in NAMES.items()
        for i, name in enumerate(names)
        if " " in name
    )
    words = several.name.split()
    title = ["Today", words[-1], *words, "again"]
    assert span(title, several) == (2, 2 + len(words))


def test_a_remark_relates_nothing_but_a_thing_to_itself():
    for verb in REMARKS:
        a, b = CastMember(verb.types[0], 0), CastMember(verb.types[1], 1)
        clause = Clause(verb, a, b)
        for kind in KINDS.values():
            if kind.stands_for == a.type:
                assert relation(PhotoObject(kind.name, a.index), b, [clause]) == ("none", None)
                assert (
                    relation(PhotoObject(kind.name, a.index), a, [clause])[0]
                    == SELF_LABELS[kind.name]
                )
    # Names alone must not give the label: every pair of types that has a relation has a remark.
    assert {verb.types for verb in VERBS} == {verb.types for verb in REMARKS}
