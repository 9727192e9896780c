"""The selection of the facts to ask about."""

import dataclasses
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from morer1_jax.task.fact import Fact
from morer1_jax.teacher.selection import balanced

FACT = Fact(
    id="train:1",
    tokens=("A", "title"),
    entity_name="A",
    entity_span=(0, 1),
    object_name="[OBJ0]",
    box=(0.5, 0.5, 1.0, 1.0),
    image="1.jpg",
    label="none",
)


@st.composite
def unbalanced(draw):
    """Facts of a few labels, some of them rare."""
    counts = draw(st.lists(st.integers(0, 30), min_size=1, max_size=5))
    labels = [f"label {i}" for i, count in enumerate(counts) for _ in range(count)]
    return [
        dataclasses.replace(FACT, id=f"train:{number}", label=label)
        for number, label in enumerate(labels, start=1)
    ]


@given(unbalanced(), st.integers(0, 150), st.integers(0, 150), st.integers(0, 3))
@settings(deadline=None)
def test_a_smaller_count_gives_the_first_of_a_larger_one(facts, few, many, seed):
    few, many = sorted((few, many))
    chosen = balanced(facts, many, seed)
    assert balanced(facts, few, seed) == chosen[:few]
    assert len(chosen) == min(many, len(facts))
    assert len({fact.id for fact in chosen}) == len(chosen)


@given(unbalanced(), st.integers(0, 150), st.integers(0, 3))
@settings(deadline=None)
def test_labels_are_chosen_evenly_until_they_are_used_up(facts, count, seed):
    there = Counter(fact.label for fact in facts)
    chosen = Counter(fact.label for fact in balanced(facts, count, seed))
    most = max(chosen.values(), default=0)
    for label, number in there.items():
        assert chosen[label] >= min(number, most - 1)


def test_the_selection_depends_on_the_seed():
    facts = [dataclasses.replace(FACT, id=f"train:{number}") for number in range(1, 51)]
    assert balanced(facts, 20, 0) == balanced(facts, 20, 0)
    assert balanced(facts, 20, 0) != balanced(facts, 20, 1)
    assert balanced(facts, 50, 0) != facts
