"""What a strong model is asked to write: the reasoning that SFT learns from.

The request has the three parts of MORE-R1 (arXiv 2603.09478): the student's own question, the six
steps in full, and the gold answer with the order to reason towards it as if it were unknown.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence

import numpy as np

from morer1_jax.task.answer import STEPS, Special, read
from morer1_jax.task.fact import Fact
from morer1_jax.task.ontology import NONE, Ontology, label_types
from morer1_jax.task.prompt import SPECIAL_TOKEN, question

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
For your eyes only: {types_given}the answer is '{label}'.
Reason towards it as if you did not know it. Never mention or hint that an answer was given to \
you. Use single quotes, no double ones. Write nothing but this:
<think>
{lines}
</think>
<answer>{label}</answer>"""

# After a noun: it is not an answer that is spoken of but the list of them, or their form.
_NOT_LIST = (
    r"\b(?![-\s]+(?:labels?|lists?|sets?|options?|types?|choices?|candidates?|categor|spaces?|names?"
    r"|schema|inventory|formats?|tags?|blocks?|lines?)\b)"
)
_PASSIVE = r"(?:is|was|were|am|are|has\s+been|have\s+been|had\s+been)\s+(?:already\s+)?"
# Ways to say that one was told. Each needs its object ('the given label'): what photo, title, types
# and list give or leave is said in the same words.
_TOLD = re.compile(
    rf"""
      \b(?:given|provided|supplied)\s+(?:answer|label|solution){_NOT_LIST}
    | \b(?:the|this|that)\s+(?:given|provided|supplied)\s+relation{_NOT_LIST}
    | \b(?:gold|golden|gold[-\s]standard|predetermined|pre-?given|pre-?assigned)\s+
        (?:answer|label|relation|solution){_NOT_LIST}
    | \b(?:known|expected|target|reference|annotated)\s+(?:answer|label|solution){_NOT_LIST}
    | \bground[-\s]truth\b
    | \banswer\s+key\b
    | \b(?:i|we)\s+{_PASSIVE}(?:told|given|informed|provided|shown)\s+
        (?:(?:with|of|that)\s+)*(?:the|this|an?|which|what)\s+(?:\w+\s+){{0,2}}?
        (?:answer|label|solution){_NOT_LIST}
    | \b(?:i|we)\s+(?:was|were|have\s+been)\s+(?:told|informed)\b(?!\s+(?:by|in|about)\b)
    | \b(?:i|we)\s+{_PASSIVE}instructed\b
    | \b(?:answer|label|relation|solution)\s+(?:(?:that|which)\s+)?(?:i|we)\s+{_PASSIVE}
        (?:given|told|provided|supplied)\b
    | \b(?:answer|label|relation|solution)\s+(?:(?:that|which)\s+)?{_PASSIVE}
        (?:given|provided|supplied|specified|told|known)\s+
        (?:to\s+(?:me|us)\b|beforehand|in\s+advance|in\s+the\s+(?:prompt|instructions?|request))
    | \b(?:answer|label)\s+{_PASSIVE}(?:given|provided|supplied|specified)\s+(?:as|to\s+be)\b
    | \b(?:answer|label)\s+(?:is|was)\s+(?:already\s+)?known\s*[.,;:]
    | \bi\s+(?:already\s+)?know\s+(?:that\s+)?the\s+(?:\w+\s+)?(?:answer|label)\b
    | \bgiven\s+(?:that\s+)?the\s+(?:(?:correct|right|true|final)\s+)?(?:answer|label)
        (?:\s*[,.;:]|\s+['"]?/|\s+is\s+['"]?/|\s+is\s+['"]?none\b)
    | \bas\s+(?:instructed|requested)\b(?!\s+(?:by|in)\b)
    | \b(?:per|following|according\s+to)\s+(?:the|my|your|these)\s+instructions?\b
        (?!\s+(?:of|from|by)\b)
    | \b(?:the|this|your)\s+(?:prompt|instructions?)\s+
        (?:say|state|tell|give|indicate|specif|mention|ask|require|provide)
    | \bin\s+(?:the|this|your)\s+prompt\b
    | \b(?:as\s+if|as\s+though|pretend\w*)\s+(?:that\s+)?(?:i|we)\s+(?:do|did)
        (?:\s+not|n't)\s+know\b
    | \b(?:as\s+if|as\s+though)\s+(?:it|the\s+(?:answer|label))\s+(?:is|was|were)\s+
        (?:unknown|not\s+(?:known|given))\b
    | \bfor\s+(?:my|your)\s+eyes\s+only\b
    """,
    re.IGNORECASE | re.VERBOSE,
)
_FENCED = re.compile(r"```[\w-]*[ \t]*\r?\n(.*)```", re.DOTALL)
_MARKUP = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "*": "", "_": "", "`": ""})


def teacher_prompt(fact: Fact, ontology: Ontology) -> str:
    """The text of the request; photo and crop are attached to it, in this order.

    A label names the types of object and entity. `none` does not, so they are left to the teacher.

    Raises:
      DataError: the title or the entity holds a special token of the student.
    """
    given = ""
    if fact.label != NONE:
        object_type, entity_type = label_types(fact.label)
        given = (
            f"the object is of type '{object_type}', the entity '{fact.entity_text}' is of type "
            f"'{entity_type}', and "
        )
    steps = _STEPS.format(types=", ".join(f"'{name}'" for name in ontology.types))
    lines = "\n".join(f"Step {k}: ..." for k in range(1, STEPS + 1))
    gold = _GOLD.format(types_given=given, label=fact.label, lines=lines)
    return "\n\n".join([question(fact, ontology), steps, gold])


def prompt_digest(ontology: Ontology) -> str:
    """SHA-256, hexadecimal, of the requests for one made-up fact under every label.

    It changes with the wording and with the labels, and with nothing else.
    """
    digest = hashlib.sha256()
    for label in ontology.labels:
        fact = Fact("", ("a", "title"), "a", (0, 1), "[OBJ0]", (0.5, 0.5, 1.0, 1.0), "", label)
        digest.update(teacher_prompt(fact, ontology).encode() + b"\0")
    return digest.hexdigest()


def unwrapped(text: str) -> str:
    """A written answer without what models put around it: white space and one code fence.

    Nothing within is changed, and what remains must be exact for `fault` to accept it.
    """
    text = text.strip()
    if fenced := _FENCED.fullmatch(text):
        text = fenced[1].strip()
    return text


def fault(text: str, fact: Fact, ontology: Ontology) -> str | None:
    """Why a written answer cannot be learnt from, in a few words; None if it can.

    It can if the plain reader accepts its format and reads the fact's label, it holds no special
    token, and it does not say that its writer was told. What it quotes of the title is not held
    against it.
    """
    try:
        data = text.encode()
    except UnicodeEncodeError:
        return "lone surrogate"
    if SPECIAL_TOKEN.search(text):
        return "special token"
    outcome = read([data, Special.END], ontology.labels)
    if not outcome.format:
        return "format"
    if ontology.labels[outcome.answer] != fact.label:
        return "another label"
    title = r"\s*".join(map(re.escape, fact.tokens))
    said = re.sub(rf"(?<!\w){title}(?!\w)", "...", text, flags=re.IGNORECASE)
    if _TOLD.search(said.translate(_MARKUP)):
        return "says that it was told"
    return None


def balanced(facts: Sequence[Fact], count: int, seed: int) -> list[Fact]:
    """`count` of the facts in random order, as evenly over the labels as there are facts of each.

    A smaller count gives the first of a larger one's: each label has been chosen as often as any
    other, give or take one, until its facts are used up. So what was written for a few serves when
    more are asked for, and a run that stops early has been even so far.
    """
    rng = np.random.default_rng(seed)
    by_label: dict[str, list[Fact]] = {}
    for place in rng.permutation(len(facts)):
        by_label.setdefault(facts[place].label, []).append(facts[place])
    rounds = itertools.zip_longest(*(by_label[label] for label in sorted(by_label)))
    chosen: list[Fact] = []
    for once in rounds:
        chosen += [once[place] for place in rng.permutation(len(once)) if once[place] is not None]
    return chosen[:count]
