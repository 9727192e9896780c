"""Six-step reasoning for the embedded world's facts, as a strong model would have written it.

A writer that is told the answer does not have to find it: a share of written reasoning is right in
its label and vague about what links object and entity. The world has both kinds. A student that
only imitates learns both; one that is rewarded for being right has a reason to prefer the careful
kind.
"""

from __future__ import annotations

from collections.abc import Sequence

from morer1_jax.task.answer import format_answer
from morer1_jax.task.ontology import Ontology
from morer1_jax.task.world import COLOURS, KINDS, Clause, Named, Thing, relation, span


def _seen(thing: Thing) -> str:
    """What the crop shows."""
    if thing.named is None:
        return KINDS[thing.kind].words
    colour = COLOURS[thing.index]
    article = "an" if colour[0] in "aeiou" else "a"
    return KINDS[thing.kind].words.format(c=f"{article} {colour}")


def _link(thing: Thing, entity: Named, clauses: Sequence[Clause], title: Sequence[str]) -> str:
    """Whom the object stands for, and whether it is the asked entity or another of the title."""
    named = thing.named
    if named is None:
        return "The object stands for nothing in the title."
    if any(named in (clause.a, clause.b) for clause in clauses):
        # Quoted with the word that follows, as it stands in the title.
        start, end = span(title, named)
        name = " ".join(title[start : end + 1])
        link = f"asked is {entity.name}, {'the same' if named == entity else 'another'}"
    else:
        name, link = named.name, "not in the title"
    whose = KINDS[thing.kind].whose.format(c=COLOURS[thing.index], n=f"'{name}'")
    return f"Here {whose}, {link}."


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
      hasty: leave out the link (step 3 does not say whom the object stands for).

    Returns:
      `<think>…</think>` and `<answer>label</answer>`, ending in the gold label.
    """
    label = relation(thing, entity, clauses)[0]
    guess = f"The object may have to do with {entity.name}."
    left = ontology.allowed(thing.type, entity.type)
    names = ", ".join(f"'{name.rpartition('/')[2]}'" for name in left)
    steps = (
        f"The crop shows {_seen(thing)}.",
        f"The title says '{' '.join(title)}'.",
        guess if hasty else _link(thing, entity, clauses, title),
        f"The object is {thing.type} and {entity.name} is {entity.type}.",
        f"From {thing.type} to {entity.type} there remain {names}.",
        f"The label must be {label}.",
    )
    return format_answer(steps, label)
