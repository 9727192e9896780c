"""Six-step reasoning for the embedded world's facts, as a strong model would have written it.

A writer that is told the answer does not have to look: a share of written reasoning is right in
its label and vague about the evidence. The world has both kinds. A student that only imitates
learns both; one that is rewarded for being right has a reason to prefer the careful kind.
"""

from __future__ import annotations

from collections.abc import Sequence

from morer1_jax.task.answer import format_answer
from morer1_jax.task.ontology import Ontology
from morer1_jax.task.world import COLOURS, KINDS, Clause, Named, Thing, relation, span


def _looked(
    thing: Thing, entity: Named, clauses: Sequence[Clause], title: Sequence[str]
) -> tuple[str, str]:
    """What the object is, and whom it stands for in the title."""
    kind, named = KINDS[thing.kind], thing.named
    if named is None:
        return (
            f"The crop shows {kind.words}.",
            "The object stands for nothing in the title.",
        )
    colour = COLOURS[thing.index]
    words = kind.words.format(c=f"an {colour}" if colour[0] in "aeiou" else f"a {colour}")
    if any(named in (clause.a, clause.b) for clause in clauses):
        # Quoted with the word that follows, as it stands in the title.
        start, end = span(title, named)
        name = " ".join(title[start : end + 1])
        link = f"asked is {entity.name}, {'the same' if named == entity else 'another'}"
    else:
        name, link = named.name, "not in the title"
    whose = kind.whose.format(c=colour, n=f"'{name}'")
    return f"The crop shows {words}.", f"Here {whose}, {link}."


def _hasty(entity: Named) -> tuple[str, str]:
    return (
        "The crop shows one part of the photo.",
        f"The object may have to do with {entity.name}.",
    )


def write_reasoning(
    thing: Thing,
    entity: Named,
    clauses: Sequence[Clause],
    title: Sequence[str],
    ontology: Ontology,
    *,
    hasty: bool,
) -> str:
    """The six steps and the answer for one fact.

    Args:
      thing: the object the question is about.
      entity: the asked entity.
      clauses: what the title says.
      title: its words.
      ontology: the labels of the world's `rel2id.json`.
      hasty: leave out the evidence (steps 1 and 3 say nothing that was seen).

    Returns:
      `<think>…</think>` and `<answer>label</answer>`, ending in the gold label.
    """
    label = relation(thing, entity, clauses)[0]
    seen, link = _hasty(entity) if hasty else _looked(thing, entity, clauses, title)
    left = ontology.allowed(thing.type, entity.type)
    names = ", ".join(f"'{name.rpartition('/')[2]}'" for name in left)
    steps = (
        seen,
        f"The title says '{' '.join(title)}'.",
        link,
        f"The object is {thing.type} and {entity.name} is {entity.type}.",
        f"From {thing.type} to {entity.type} there remain {names}.",
        f"The label must be {label}.",
    )
    return format_answer(steps, label)
