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

from morer1_jax.task.answer import STEPS, Special, read, read_steps
from morer1_jax.task.fact import Fact, composed
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
Reason towards it as if you did not know it, and before step 5 name no label but 'none'. Never \
mention or hint that an answer was given to you. Use single quotes, no double ones. Write nothing \
but this:
<think>
{lines}
</think>
<answer>{label}</answer>"""

# After a noun: it is not an answer that is spoken of but the list of them, or their form.
_NOT_LIST = (
    r"\b(?![-\s]+(?:labels?|lists?|sets?|options?|types?|choices?|candidates?|categor|spaces?|names?"
    r"|schema|inventory|formats?|tags?|blocks?|lines?)\b)"
)
_GIVEN = (
    r"(?:pre-?)?(?:given|told|provided|supplied|specified|stated|mentioned|indicated|shown|handed"
    r"|assigned|fixed|determined|confirmed|revealed|disclosed)"
)
_PASSIVE = (
    r"(?:is|was|were|am|are|(?:has|have|had)\s+been)\s+(?:(?:already|also|just|only|all)\s+)*"
)
_PROMPT = (
    r"(?:task|question|prompt|request|instructions?|user|hint|dataset|(?:system\s+)?message|system)"
)
_ANSWER = rf"(?:answer|label|solution){_NOT_LIST}"
_OR_RELATION = rf"(?:answer|label|solution|relation){_NOT_LIST}"
_THE = r"(?:the|this|an?|which|what)\s+(?:\w+\s+){0,2}?"
# What one may do who speaks of an answer in the first person: find it.
_FINDS = r"""(?:choose|chose|pick|conclude|decide|infer|select|settle|list|keep|find|found|see|read
    |exclude|rule|get|reach|deduce|derive|consider|give|assign|obtain|drop|prefer|take|arrive|look
    |check|compare|think|believe|narrow|go|seek|search|label|answer
    |(?:am|are)\s+(?:left|sure|certain|confident|looking))"""
_MAY = r"""(?:can|could|may|might|must|would|should|will|now|thus|therefore|then|finally|also|do
    |have|not|cannot)"""
_SENTENCE = r"(?:(?!\bstep\s+[1-6]:)[^.!?<])*"
# Ways to say that one was told. Each needs its object ('the given label'): what photo, title, types
# and list give or leave is said in the same words.
_TOLD = re.compile(
    rf"""
      \b(?:{_GIVEN}|required|desired|intended|expected|official|known|target|reference|annotated
        |gold|golden|gold[-\s]standard)\s+(?:output|{_ANSWER}){_NOT_LIST}
    | \b(?:the|this|that)\s+(?:gold|{_GIVEN})\s+relation{_NOT_LIST}
    | \bpre-?{_GIVEN}\s+relation{_NOT_LIST}
    | \bground[-\s]truth\b
    | \banswer\s+key\b
    | \bannotat(?:ions?|ors?)\b
    | \b(?:i|we|you)\s+(?!(?:{_MAY}\s+)*{_FINDS}\b){_SENTENCE}\b{_ANSWER}
    | \b(?:i|we)\s+(?:was|were|have\s+been)\s+(?:told|informed)\b(?!\s+(?:by|in|about)\b)
    | \b(?:i|we)\s+{_PASSIVE}instructed\b
    | \b(?:i|we)\s+{_PASSIVE}(?:supposed|asked|expected|meant|required|told)\s+to\s+
        (?:conclude|arrive|reach|end|justify|support|argue|reason|explain)\b
    | \b(?:you|(?:the|this|your|my)\s+{_PROMPT})\s+(?:(?:have|has|had|already|also)\s+)*
        (?:tell|told|sa[iy]|state|give|gave|provide|indicate|specif|inform|mention|reveal|show
        |contain)\w*\s+(?:(?:me|us|that|with|of|about)\s+)*{_THE}{_OR_RELATION}
    | \bit\s+{_PASSIVE}{_GIVEN}\s+that\s+{_THE}{_OR_RELATION}
    | \b{_OR_RELATION}(?:,?\s+(?:that|which))?\s+(?:i|we|you)\s+(?:{_PASSIVE}|have\s+|had\s+)?
        (?:gave|{_GIVEN})\b
    | \b{_OR_RELATION}\s+(?:(?:that|which)\s+)?{_PASSIVE}(?:{_GIVEN}|known)\s+
        (?:to\s+(?:me|us)\b|beforehand|in\s+advance|in\s+the\s+{_PROMPT})
    | \b{_ANSWER}(?:,?\s+(?:that|which))?\s+{_PASSIVE}{_GIVEN}\b(?!\s+(?:by|in|on|at|from)\b)
    | \b{_ANSWER}\s+{_GIVEN}
        (?:\s*[.,;:!)]|\s+(?:is|was|as|above|here|to|must|should|matches|fits)\b)
    | \b{_ANSWER},?\s+as\s+{_GIVEN}\b(?!\s+(?:by|in)\b)
    | \b{_ANSWER}(?:\s+(?:of|for)(?:\s+\w+){{1,3}})?\s+(?:is|was)\s+(?:already\s+)?known\s*
        (?:[.,;:]|to\s+be\b)
    | \bgiven\s+(?:that\s+)?the\s+(?:(?:correct|right|true|final)\s+)?(?:answer|label)
        (?:\s*[.,;:]|\s+['"]?/|\s+is\s+['"]?/|\s+is\s+['"]?none\b)
    | \b(?:not|never|without|avoid)\s+(?:to\s+)?(?:reveal|disclos|mention|divulg|hint|admit)\w*\s+
        (?:(?:at|to|that)\s+)*{_THE}{_ANSWER}
    | \bas\s+(?:instructed|requested)\b(?!\s+(?:by|in)\b)
    | \bas\s+(?:\w+\s+)?(?:instructed|requested|required|said|{_GIVEN})\s+(?:by|in)\s+
        (?:the|this|your|my)\s+{_PROMPT}\b
    | \baccording\s+to\s+the\s+{_GIVEN}\s+\w+,?\s+the\s+{_OR_RELATION}\s+is\b
    | \b(?:per|following|according\s+to)\s+(?:the|my|your|these)\s+instructions?\b
        (?!\s+(?:of|from|by)\b)
    | \b(?:the|this|your)\s+(?:prompt|instructions?)\s+
        (?:say|state|tell|give|indicate|specif|mention|ask|require|provide)
    | \bin\s+(?:the|this|your)\s+prompt\b
    | \b(?:as\s+if|as\s+though|pretend\w*)\s+(?:that\s+)?(?:i|we)\s+(?:do|did)\s+not\s+know\b
    | \b(?:as\s+if|as\s+though)\s+(?:it|the\s+(?:answer|label))\s+(?:is|was|were)\s+
        (?:unknown|not\s+(?:known|given))\b
    | \bfor\s+(?:my|your)\s+eyes\s+only\b
    """,
    re.IGNORECASE | re.VERBOSE,
)
_CONTRACTED = tuple(
    (re.compile(short, re.IGNORECASE), long)
    for short, long in (
        (r"\bwon't\b", "will not"),
        (r"\bcan't\b", "can not"),
        (r"n't\b", " not"),
        (r"'ve\b", " have"),
        (r"'m\b", " am"),
        (r"'re\b", " are"),
        (r"\b(i|we|you)'d\b", r"\1 had"),
        (r"'s(?=\s+been\b)", " has"),
        (r"\b(answer|label|solution)'s\b", r"\1 is"),
    )
)
# The first step that may name a label; before it the types that leave it are not yet known.
_LABELS_STEP = 5
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

    Nothing within is changed but that it is composed, and what remains must be exact for `fault` to
    accept it.
    """
    text = composed(text).strip()
    if fenced := _FENCED.fullmatch(text):
        text = fenced[1].strip()
    return text


def fault(text: str, fact: Fact, ontology: Ontology) -> str | None:
    """Why a written answer cannot be learnt from, in a few words; None if it can.

    It can if the plain reader accepts its format and reads the fact's label, it holds no special
    token, does not name that label before its types have left it in step 5 ('none' may be named at
    any time), and does not say that its writer was told. What it quotes of the title is not held
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
    if _TOLD.search(_plain(said)):
        return "says that it was told"
    early = "\n".join((read_steps(data) or [])[: _LABELS_STEP - 1])
    if fact.label != NONE and re.search(rf"{re.escape(_bare(fact.label))}(?!\w)", _bare(early)):
        return "names the label too early"
    return None


def _plain(text: str) -> str:
    """Text without markup and contractions."""
    text = text.translate(_MARKUP)
    for short, long in _CONTRACTED:
        text = short.sub(long, text)
    return text


def _bare(text: str) -> str:
    """What a label and its namings have in common, whatever the marks around and within it."""
    return re.sub(r"\s*/\s*", "/", text.translate(_MARKUP)).lower().strip("/")


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
