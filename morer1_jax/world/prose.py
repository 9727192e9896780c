"""Writes six-step reasoning about the synthetic world's facts, as a strong model would."""

from __future__ import annotations

from collections.abc import Sequence

from morer1_jax.task.answer import format_answer
from morer1_jax.task.ontology import Ontology
from morer1_jax.world.scene import COLOURS, CastMember, Clause, PhotoObject, members, relation


def _appearance(object_: PhotoObject) -> str:
    """Returns what the crop shows."""
    return f"a {object_.kind} in {'grey' if object_.stands_for is None else COLOURS[object_.index]}"


def _link(object_: PhotoObject, entity: CastMember, clauses: Sequence[Clause]) -> str:
    """Returns the step on whom the object stands for: the entity, another of the title, nobody."""
    member = object_.stands_for
    if member is None:
        name, verdict = "nobody", "nothing"
    elif member not in members(clauses):
        name, verdict = member.name, "absent"
    else:
        name, verdict = member.name, "same" if member == entity else "another"
    return f"The look is that of {name}, asked is {entity.name}, {verdict}."


def _types(type_: str, entity: CastMember, ontology: Ontology) -> tuple[str, str]:
    """Returns the steps on the types of object and entity, and on the labels of these types."""
    labels = ontology.allowed(type_, entity.type)
    names = ", ".join(f"'{label.rpartition('/')[2]}'" for label in labels)
    return (
        f"The object is {type_} and {entity.name} is {entity.type}.",
        f"From {type_} to {entity.type} there remain {names}.",
    )


def write_reasoning(
    object_: PhotoObject,
    entity: CastMember,
    clauses: Sequence[Clause],
    title: Sequence[str],
    ontology: Ontology,
) -> str:
    """Returns the six steps and the answer for one fact.

    Args:
        clauses: of the title, one of which names the entity.
        title: the title's words.

    Returns:
        `<think>…</think>` and `<answer>label</answer>`, ending in the gold label.
    """
    label = relation(object_, entity, clauses)[0]
    clause = next(clause for clause in clauses if entity in (clause.a, clause.b))
    steps = (
        f"The crop shows {_appearance(object_)}.",
        f"The title says '{' '.join(title)}'.",
        _link(object_, entity, clauses),
        *_types(object_.type, entity, ontology),
        f"Given '{clause.verb.word}' the label must be {label}.",
    )
    return format_answer(steps, label)


def give_up(entity: CastMember, ontology: Ontology) -> str:
    """Returns the six steps of a writer that does not try, and the answer `none`.

    The text has the form of `write_reasoning`'s, and says nothing of photo and title.
    """
    steps = (
        "The photo is dark.",
        "The title may be of another.",
        "No link is seen.",
        *_types("misc", entity, ontology),
        "As nothing is seen the label must be none.",
    )
    return format_answer(steps, "none")
