"""Written reasoning: in the grammar, right in its label and in every step to it."""

import itertools

from morer1_jax.task.answer import Special, read, read_steps
from morer1_jax.task.ontology import Ontology
from morer1_jax.world.prose import give_up, write_reasoning
from morer1_jax.world.scene import (
    COLOURS,
    KINDS,
    LABELS,
    VERBS,
    CastMember,
    Clause,
    PhotoObject,
    relation,
)

ONTOLOGY = Ontology(LABELS)


def scenes():
    """Every kind of thing, in two colours and out of place, by every clause and entity."""
    for verb in VERBS:
        clause = Clause(verb, CastMember(verb.types[0], 0), CastMember(verb.types[1], 1))
        for kind, index, entity in itertools.product(KINDS, (0, 1, 2), (clause.a, clause.b)):
            yield PhotoObject(kind, index), entity, (clause,), clause.text.split()


def test_all_reasoning_is_in_the_grammar_and_ends_in_the_gold_label():
    for thing, entity, clauses, title in scenes():
        text = write_reasoning(thing, entity, clauses, title, ONTOLOGY)
        outcome = read([text.encode(), Special.END], LABELS)
        assert outcome.format
        assert LABELS[outcome.answer] == relation(thing, entity, clauses)[0]
        steps = read_steps(text.encode())
        assert f"'{' '.join(title)}'" in steps[1]
        # Step 4 names both types, step 5 what they leave.
        assert KINDS[thing.kind].type in steps[3].split()
        assert entity.type in steps[3].replace(".", "").split()
        allowed = ONTOLOGY.allowed(thing.type, entity.type)
        assert all(f"'{label.rpartition('/')[2]}'" in steps[4] for label in allowed)


def test_reasoning_looks_first_and_says_whom_the_object_stands_for():
    for thing, entity, clauses, title in scenes():
        label = relation(thing, entity, clauses)[0]
        steps = read_steps(write_reasoning(thing, entity, clauses, title, ONTOLOGY).encode())
        assert thing.kind in steps[0]
        assert label not in " ".join(steps[:4])
        assert clauses[0].verb.word in steps[5]
        if thing.stands_for is None:
            assert "grey" in steps[0]
            assert "nobody" in steps[2]
            continue
        assert COLOURS[thing.index] in steps[0]
        assert thing.stands_for.name in steps[2]
        verdict = steps[2].rpartition(" ")[2]
        mentioned = any(thing.stands_for in (clause.a, clause.b) for clause in clauses)
        expected = "same" if thing.stands_for == entity else "another" if mentioned else "absent"
        assert verdict == f"{expected}."


def test_of_two_clauses_the_one_about_the_asked_entity_is_quoted():
    marries, wins = (next(verb for verb in VERBS if verb.word == w) for w in ("marries", "wins"))
    first = Clause(marries, CastMember("per", 0), CastMember("per", 1))
    second = Clause(wins, CastMember("per", 2), CastMember("misc", 3))
    title = [*first.text.split(), "as", *second.text.split()]
    for clause in (first, second):
        for entity in (clause.a, clause.b):
            text = write_reasoning(
                PhotoObject("person", 2), entity, (first, second), title, ONTOLOGY
            )
            assert f"'{clause.verb.word}'" in read_steps(text.encode())[5]


def test_giving_up_is_in_the_grammar_and_says_nothing_of_the_fact():
    for kind, index in itertools.product(("org", "per", "loc", "misc"), (0, 1)):
        entity = CastMember(kind, index)
        text = give_up(entity, ONTOLOGY)
        outcome = read([text.encode(), Special.END], LABELS)
        assert outcome.format
        assert LABELS[outcome.answer] == "none"
        steps = read_steps(text.encode())
        # What cannot be recognised is `misc`.
        assert f"misc and {entity.name} is {kind}." in steps[3]
        for label in ONTOLOGY.allowed("misc", kind):
            assert f"'{label.rpartition('/')[2]}'" in steps[4]
    tried = write_reasoning(*next(scenes()), ONTOLOGY)
    effort = read([tried.encode(), Special.END], LABELS).effort
    assert outcome.effort < 160 < 180 < effort
