"""Decides which of the teacher's answers SFT may learn from."""

from __future__ import annotations

import re

from morer1_jax.task.answer import Special, read, read_steps
from morer1_jax.task.fact import Fact, composed
from morer1_jax.task.ontology import NONE, Ontology
from morer1_jax.task.prompt import SPECIAL_TOKEN

# Fails where the noun before it speaks of a list of labels, or of their form, and not of an answer.
_NOT_A_LIST = (
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
_REQUEST = (
    r"(?:task|question|prompt|request|instructions?|user|hint|dataset|(?:system\s+)?message|system)"
)
_ANSWER = rf"(?:answer|label|solution){_NOT_A_LIST}"
_ANSWER_OR_RELATION = rf"(?:answer|label|solution|relation){_NOT_A_LIST}"
_ARTICLE = r"(?:the|this|an?|which|what)\s+(?:\w+\s+){0,2}?"
# What a writer who finds the answer by reasoning does, after `I`, `we` or `you`.
_FINDS = r"""(?:choose|chose|pick|conclude|decide|infer|select|settle|list|keep|find|found|see|read
    |exclude|rule|get|reach|deduce|derive|consider|give|assign|obtain|drop|prefer|take|arrive|look
    |check|compare|think|believe|narrow|go|seek|search|label|answer
    |(?:am|are)\s+(?:left|sure|certain|confident|looking))"""
_AUXILIARY = r"""(?:can|could|may|might|must|would|should|will|now|thus|therefore|then|finally|also
    |do|have|not|cannot)"""
_REST_OF_SENTENCE = r"(?:(?!\bstep\s+[1-6]:)[^.!?<])*"
# Phrases which reveal that the writer knew the answer. Each needs its object ('the given label'),
# because what the photo, title, types and list give is said with the same verbs.
_LEAK = re.compile(
    rf"""
      \b(?:{_GIVEN}|required|desired|intended|expected|official|known|target|reference|annotated
        |gold|golden|gold[-\s]standard)\s+(?:output|{_ANSWER}){_NOT_A_LIST}
    | \b(?:the|this|that)\s+(?:gold|{_GIVEN})\s+relation{_NOT_A_LIST}
    | \bpre-?{_GIVEN}\s+relation{_NOT_A_LIST}
    | \bground[-\s]truth\b
    | \banswer\s+key\b
    | \bannotat(?:ions?|ors?)\b
    | \b(?:i|we|you)\s+(?!(?:{_AUXILIARY}\s+)*{_FINDS}\b){_REST_OF_SENTENCE}\b{_ANSWER}
    | \b(?:i|we)\s+(?:was|were|have\s+been)\s+(?:told|informed)\b(?!\s+(?:by|in|about)\b)
    | \b(?:i|we)\s+{_PASSIVE}instructed\b
    | \b(?:i|we)\s+{_PASSIVE}(?:supposed|asked|expected|meant|required|told)\s+to\s+
        (?:conclude|arrive|reach|end|justify|support|argue|reason|explain)\b
    | \b(?:you|(?:the|this|your|my)\s+{_REQUEST})\s+(?:(?:have|has|had|already|also)\s+)*
        (?:tell|told|sa[iy]|state|give|gave|provide|indicate|specif|inform|mention|reveal|show
        |contain)\w*\s+(?:(?:me|us|that|with|of|about)\s+)*{_ARTICLE}{_ANSWER_OR_RELATION}
    | \bit\s+{_PASSIVE}{_GIVEN}\s+that\s+{_ARTICLE}{_ANSWER_OR_RELATION}
    | \b{_ANSWER_OR_RELATION}(?:,?\s+(?:that|which))?\s+(?:i|we|you)\s+
        (?:{_PASSIVE}|have\s+|had\s+)?(?:gave|{_GIVEN})\b
    | \b{_ANSWER_OR_RELATION}\s+(?:(?:that|which)\s+)?{_PASSIVE}(?:{_GIVEN}|known)\s+
        (?:to\s+(?:me|us)\b|beforehand|in\s+advance|in\s+the\s+{_REQUEST})
    | \b{_ANSWER}(?:,?\s+(?:that|which))?\s+{_PASSIVE}{_GIVEN}\b(?!\s+(?:by|in|on|at|from)\b)
    | \b{_ANSWER}\s+{_GIVEN}
        (?:\s*[.,;:!)]|\s+(?:is|was|as|above|here|to|must|should|matches|fits)\b)
    | \b{_ANSWER},?\s+as\s+{_GIVEN}\b(?!\s+(?:by|in)\b)
    | \b{_ANSWER}(?:\s+(?:of|for)(?:\s+\w+){{1,3}})?\s+(?:is|was)\s+(?:already\s+)?known\s*
        (?:[.,;:]|to\s+be\b)
    | \bgiven\s+(?:that\s+)?the\s+(?:(?:correct|right|true|final)\s+)?(?:answer|label)
        (?:\s*[.,;:]|\s+['"]?/|\s+is\s+['"]?/|\s+is\s+['"]?none\b)
    | \b(?:not|never|without|avoid)\s+(?:to\s+)?(?:reveal|disclos|mention|divulg|hint|admit)\w*\s+
        (?:(?:at|to|that)\s+)*{_ARTICLE}{_ANSWER}
    | \bas\s+(?:instructed|requested)\b(?!\s+(?:by|in)\b)
    | \bas\s+(?:\w+\s+)?(?:instructed|requested|required|said|{_GIVEN})\s+(?:by|in)\s+
        (?:the|this|your|my)\s+{_REQUEST}\b
    | \baccording\s+to\s+the\s+{_GIVEN}\s+\w+,?\s+the\s+{_ANSWER_OR_RELATION}\s+is\b
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
_CONTRACTIONS = tuple(
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
# The first step that may name a label: before it the types that leave it possible are unknown.
_FIRST_LABEL_STEP = 5
_CODE_FENCE = re.compile(r"```[\w-]*[ \t]*\r?\n(.*)```", re.DOTALL)
_MARKUP = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "*": "", "_": "", "`": ""})


def strip_wrapping(text: str) -> str:
    """Removes the white space and the code fence that models put around an answer.

    Nothing inside changes but its Unicode form (NFC). What remains must be exact to be accepted by
    `rejection_reason`.
    """
    text = composed(text).strip()
    if fenced := _CODE_FENCE.fullmatch(text):
        text = fenced[1].strip()
    return text


def rejection_reason(text: str, fact: Fact, ontology: Ontology) -> str | None:
    """Returns why an answer must not be learnt from, in a few words; None if it may be.

    An answer is accepted if

      - the plain reader accepts its format and reads the fact's label,
      - it holds no special token,
      - it does not name that label before step 5, where the types leave it possible (`none` may be
        named in any step), and
      - it does not reveal that its writer knew the label. Quotations of the title do not count.

    Args:
        text: an answer from `strip_wrapping`.
        fact: the fact that it is about.
        ontology: the labels.
    """
    # Its format and its label.
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
    # Signs that the label came before the reasoning.
    if _reveals_label(text, fact):
        return "reveals that the label was known"
    early_steps = "\n".join((read_steps(data) or [])[: _FIRST_LABEL_STEP - 1])
    label = rf"{re.escape(_without_marks(fact.label))}(?!\w)"
    if fact.label != NONE and re.search(label, _without_marks(early_steps)):
        return "names the label too early"
    return None


def _reveals_label(text: str, fact: Fact) -> bool:
    """Returns whether a text, quotations of the title left out, says that its writer was told."""
    title = r"\s*".join(map(re.escape, fact.tokens))
    text = re.sub(rf"(?<!\w){title}(?!\w)", "...", text, flags=re.IGNORECASE)
    text = text.translate(_MARKUP)
    for contraction, words in _CONTRACTIONS:
        text = contraction.sub(words, text)
    return _LEAK.search(text) is not None


def _without_marks(text: str) -> str:
    """Normalises a label, or a text that may name it, so that both can be compared."""
    return re.sub(r"\s*/\s*", "/", text.translate(_MARKUP)).lower().strip("/")
