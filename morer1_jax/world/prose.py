"""Six-step reasoning for the embedded world's facts, as a strong model would have written it."""

from __future__ import annotations

from collections.abc import Sequence

from morer1_jax.task.answer import format_answer
from morer1_jax.task.ontology import Ontology
from morer1_jax.world.scene import COLOURS, Clause, Named, Thing, relation


def _seen(thing: Thing) -> str:
    """What the crop shows."""
    return f"a {thing.kind} in {'grey' if thing.named is None else COLOURS[thing.index]}"


def _link(thing: Thing, entity: Named, clauses: Sequence[Clause]) -> str:
    """Whom the object stands for, and whether it is the asked entity or another of the title."""
    named = thing.named
    if named is None:
        name, verdict = "nobody", "nothing"
    elif not any(named in (clause.a, clause.b) for clause in clauses):
        name, verdict = named.name, "absent"
    else:
        name, verdict = named.name, "same" if named == entity else "another"
    return f"The look is that of {name}, asked is {entity.name}, {verdict}."


def _types(type_: str, entity: Named, ontology: Ontology) -> tuple[str, str]:
    """The types of object and entity, and the labels they leave."""
    left = ontology.allowed(type_, entity.type)
    names = ", ".join(f"'{name.rpartition('/')[2]}'" for name in left)
    return (
        f"The object is {type_} and {entity.name} is {entity.type}.",
        f"From {type_} to {entity.type} there remain {names}.",
    )


def write_reasoning(
    thing: Thing,
    entity: Named,
    clauses: Sequence[Clause],
    title: Sequence[str],
    ontology: Ontology,
) -> str:
    """The six steps and the answer for one fact.

    Args:
      thing: the object the question is about.
      entity: the asked entity.
      clauses: what the title says.
      title: its words.
      ontology: the labels of the world's `rel2id.json`.

    Returns:
      `<think>…</think>` and `<answer>label</answer>`, ending in the gold label.
    """
    label = relation(thing, entity, clauses)[0]
    said = next(clause for clause in clauses if entity in (clause.a, clause.b))
    steps = (
        f"The crop shows {_seen(thing)}.",
        f"The title says '{' '.join(title)}'.",
        _link(thing, entity, clauses),
        *_types(thing.type, entity, ontology),
        f"Given '{said.verb.word}' the label must be {label}.",
    )
    return format_answer(steps, label)


def give_up(entity: Named, ontology: Ontology) -> str:
    """The six steps of a writer that does not try, and the answer `none`.

    Args:
      entity: the asked entity.
      ontology: the labels of the world's `rel2id.json`.

    Returns:
      Text of the same form as `write_reasoning`'s, which says nothing of photo and title.
    """
    steps = (
        "The photo is dark.",
        "The title may be of another.",
        "No link is seen.",
        *_types("misc", entity, ontology),
        "As nothing is seen the label must be none.",
    )
    return format_answer(steps, "none")
