"""Six-step reasoning for the embedded world's facts, as a strong model would have written it.

A writer that is told the answer does not have to look: a share of written reasoning is right in
its label and vague about the evidence. The world has both kinds. A student that only imitates
learns both; one that is rewarded for being right has a reason to prefer the careful kind.
"""

from __future__ import annotations

from collections.abc import Sequence

from morer1_jax.task.answer import format_answer
from morer1_jax.task.ontology import Ontology
from morer1_jax.task.world import COLOURS, KINDS, Clause, Named, Thing, relation


def _looked(thing: Thing, entity: Named, clauses: Sequence[Clause]) -> tuple[str, str, str]:
    kind, named = KINDS[thing.kind], thing.named
    if named is None:
        return (
            f"The crop shows {kind.words}, nobody could say of what.",
            "It does not tell whether the photo fits the title.",
            "The object stands for nothing in the title.",
        )
    words = kind.words.format(c=COLOURS[thing.index])
    whose = kind.whose.format(c=COLOURS[thing.index], n=named.name)
    first = f"The crop shows {words}."
    if not any(named in (clause.a, clause.b) for clause in clauses):
        return (
            first,
            f"Here {whose}, but the title does not name it.",
            "The object stands for nothing in the title.",
        )
    second = f"Here {whose}, and the title names it."
    clause = relation(thing, entity, clauses)[1]
    if named == entity:
        return first, second, f"The object stands for {named.name} itself."
    if clause is None:
        return (
            first,
            second,
            f"The object stands for {named.name}, not linked to {entity.name}.",
        )
    return (
        first,
        second,
        f"The object stands for {named.name}, and '{clause.text}'.",
    )


def _hasty(entity: Named) -> tuple[str, str, str]:
    return (
        "The crop shows one part of the photo.",
        "The photo may well fit the title.",
        f"The object may have to do with {entity.name}.",
    )


def write_reasoning(
    thing: Thing,
    entity: Named,
    clauses: Sequence[Clause],
    ontology: Ontology,
    *,
    hasty: bool,
) -> str:
    """The six steps and the answer for one fact.

    Args:
      thing: the object the question is about.
      entity: the asked entity.
      clauses: what the title says.
      ontology: the labels of the world's `rel2id.json`.
      hasty: leave out the evidence (steps 1 to 3 say nothing that was seen).

    Returns:
      `<think>…</think>` and `<answer>label</answer>`, ending in the gold label.
    """
    label = relation(thing, entity, clauses)[0]
    one, two, three = _hasty(entity) if hasty else _looked(thing, entity, clauses)
    left = ontology.allowed(thing.type, entity.type)
    names = ", ".join(f"'{name.rpartition('/')[2]}'" for name in left)
    steps = (
        one,
        two,
        three,
        f"The object is {thing.type} and {entity.name} is {entity.type}.",
        f"From {thing.type} to {entity.type} there remain {names}.",
        f"The label must be {label}.",
    )
    return format_answer(steps, label)
