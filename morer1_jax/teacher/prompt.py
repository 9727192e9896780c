"""Asks a strong model, the teacher, for the reasoning that SFT learns from.

The request has the three parts of MORE-R1 (arXiv 2603.09478): the student's own question, the six
steps in full, and the label with the order to reason towards it as if it were unknown.
"""

from __future__ import annotations

import hashlib

from morer1_jax.task.answer import STEPS
from morer1_jax.task.fact import Fact
from morer1_jax.task.ontology import NONE, Ontology, label_types
from morer1_jax.task.prompt import question

_STEPS = """\
Reason in these six steps, each one or two sentences on a line of its own:
Step 1: Say what the photo and the crop show, and what part the cropped object plays in the photo. \
If it is blurred, cannot be recognised or is a mere detail, 'none' is likely.
Step 2: Say whether the photo goes with the title, and why. If it does not, 'none' is likely.
Step 3: If it does, say which entity of the title the object stands for, if any. What the title \
says of that entity and the asked one then gives the answer.
Step 4: Give the type of the object and of the asked entity: {types}. An object that cannot be \
recognised is 'misc'.
Step 5: List the labels that this ordered pair of types leaves. 'none' always stays.
Step 6: Decide among them from photo and title."""

_GOLD = """\
For your eyes only: {types_clause}the answer is '{label}'.
Reason towards it as if you did not know it, and before step 5 name no label but 'none'. Never \
mention or hint that an answer was given to you. Use single quotes, no double ones. Write nothing \
but this:
<think>
{lines}
</think>
<answer>{label}</answer>"""


def teacher_prompt(fact: Fact, ontology: Ontology) -> str:
    """Returns the text of a request; photo and crop are attached to it, in this order.

    A label other than `none` implies the types of object and entity, which the text then states.

    Raises:
        DataError: the title or the entity holds a special token of the student.
    """
    types_clause = ""
    if fact.label != NONE:
        object_type, entity_type = label_types(fact.label)
        types_clause = (
            f"the object is of type '{object_type}', the entity '{fact.entity_text}' is of type "
            f"'{entity_type}', and "
        )
    steps = _STEPS.format(types=", ".join(f"'{name}'" for name in ontology.types))
    lines = "\n".join(f"Step {k}: ..." for k in range(1, STEPS + 1))
    gold = _GOLD.format(types_clause=types_clause, label=fact.label, lines=lines)
    return "\n\n".join([question(fact, ontology), steps, gold])


def prompt_digest(ontology: Ontology) -> str:
    """Returns the SHA-256 (hexadecimal) of the requests for an invented fact under every label.

    It changes with the wording and with the labels only.
    """
    digest = hashlib.sha256()
    for label in ontology.labels:
        fact = Fact("", ("a", "title"), "a", (0, 1), "[OBJ0]", (0.5, 0.5, 1.0, 1.0), "", label)
        digest.update(teacher_prompt(fact, ontology).encode() + b"\0")
    return digest.hexdigest()
