"""Written reasoning: in the grammar, right in its label, and hasty where it should be."""

import itertools

import pytest

from morer1_jax.task.answer import Special, read, read_steps
from morer1_jax.task.ontology import Ontology
from morer1_jax.task.prose import write_reasoning
from morer1_jax.task.world import COLOURS, KINDS, LABELS, VERBS, Clause, Named, Thing, relation

ONTOLOGY = Ontology(LABELS)


def scenes():
    """Every kind of thing, in two colours and out of place, by every clause and entity."""
    clauses = [
        Clause(verb, Named(verb.types[0], 0), Named(verb.types[1], 1), phrase)
        for verb in VERBS
        for phrase in range(len(verb.phrases))
    ]
    for clause in clauses:
        for kind, index, entity in itertools.product(KINDS, (0, 1, 2), (clause.a, clause.b)):
            yield Thing(kind, index), entity, (clause,), clause.text.split()


@pytest.mark.parametrize("hasty", [False, True])
def test_all_reasoning_is_in_the_grammar_and_ends_in_the_gold_label(hasty):
    for thing, entity, clauses, title in scenes():
        text = write_reasoning(thing, entity, clauses, title, ONTOLOGY, hasty=hasty)
        outcome = read([text.encode(), Special.END], LABELS)
        assert outcome.format
        assert LABELS[outcome.answer] == relation(thing, entity, clauses)[0]
        steps = read_steps(text.encode())
        # Step 4 names both types, step 5 what they leave.
        assert KINDS[thing.kind].type in steps[3].split()
        assert entity.type in steps[3].replace(".", "").split()
        allowed = ONTOLOGY.allowed(thing.type, entity.type)
        assert all(f"'{label.rpartition('/')[2]}'" in steps[4] for label in allowed)


def test_both_kinds_say_what_is_seen_and_only_careful_reasoning_whom_it_stands_for():
    for thing, entity, clauses, title in scenes():
        if thing.named is None:
            continue
        careful, hasty = (
            read_steps(
                write_reasoning(thing, entity, clauses, title, ONTOLOGY, hasty=hasty).encode()
            )
            for hasty in (False, True)
        )
        assert COLOURS[thing.index] in careful[0]
        assert careful[0] == hasty[0]
        assert thing.named.name in careful[2]
        assert COLOURS[thing.index] not in hasty[2]
        mentioned = any(thing.named in (clause.a, clause.b) for clause in clauses)
        assert ("not in the title" in careful[2]) != mentioned
        assert ("the same" in careful[2]) == (mentioned and thing.named == entity)
        # Whoever wears another colour is somebody else, but not to one who does not say who.
        other = Thing(thing.kind, 3)
        if thing.index != 3:
            rewritten = write_reasoning(other, entity, clauses, title, ONTOLOGY, hasty=False)
            assert read_steps(rewritten.encode())[2] != careful[2]
            rewritten = write_reasoning(other, entity, clauses, title, ONTOLOGY, hasty=True)
            assert read_steps(rewritten.encode())[2] == hasty[2]
