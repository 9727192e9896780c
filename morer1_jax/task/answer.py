"""The answer's grammar, and its plain reader.

    <think> ws Step 1: body  Step 2: body  …  Step 6: body </think>
    ws <answer> ws label ws </answer> ws  end-of-turn

All is over bytes.  `ws` is any run, also none, of space, tab, CR and LF.  A completion is a
sequence of pieces, one a token: its bytes, or which `Special` it is.  How bytes are cut into
pieces makes no difference; pieces after the first end-of-turn are not looked at.

Three outcomes are read off a completion:

*format*: the completion is the above from its first byte to end-of-turn.  `Step k:`, k one decimal
digit, is a header where it stands right after CR or LF, and for `Step 1:` where the grammar has
it; elsewhere it is prose.  A body has a byte that is no white space, none of the four tags and no
header, so a header out of order, double, or of a step 0 or 7 breaks the format.

*answer*: what lies after the last `</think>`, or the whole completion if there is none (a model
may answer without thinking), is text without any of the four tags, then `<answer>` ws label ws
`</answer>` ws end-of-turn.  What lies before, the steps and any earlier answer, is not looked at.
A `<think>` that is not closed takes what follows into the thought, so that is no answer.

*effort*: the bytes that are no white space in the bodies, up to the first place where the steps are
over or broken: any tag, a header that is not the next or comes after an empty body, a special
token, or the end.  Tags and headers themselves do not count.  For a completion with *format* these
are its six bodies; for one cut off, what it wrote so far.

Without end-of-turn, or with any other special token before it, *format* and *answer* fail.
"""

import enum
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

THINK, END_THINK = b"<think>", b"</think>"
ANSWER, END_ANSWER = b"<answer>", b"</answer>"
TAGS = (THINK, END_THINK, ANSWER, END_ANSWER)
SPACE = b" \t\r\n"
STEPS = 6


class Special(enum.Enum):
    """A token that does not stand for bytes."""

    END = "end-of-turn"
    OTHER = "any other special token, padding, or a row that the tokenizer does not use"


Piece = bytes | Special


@dataclass(frozen=True)
class Outcome:
    """What is read off a completion: format, answer (a label's id, or -1 for none) and effort."""

    format: bool
    answer: int
    effort: int


_WS = rb"[ \t\r\n]*"
_TAG = re.compile(rb"</?(?:think|answer)>")
_BEGIN = re.compile(rb"<think>%bStep 1:" % _WS)
_TAG_OR_HEADER = re.compile(rb"%b|(?<=[\r\n])Step ([0-9]):" % _TAG.pattern)
_BLOCK = re.compile(rb"%b<answer>%b([^<]*?)%b</answer>%b" % (_WS, _WS, _WS, _WS))


def read(pieces: Iterable[Piece], labels: Sequence[str]) -> Outcome:
    """Reads a completion, in plain Python; the reference for the automaton.

    Args:
        pieces: one a token; those after the first end-of-turn are ignored.
        labels: the labels in id order.
    """
    data = b""
    stopped_by = None
    for piece in pieces:
        if isinstance(piece, Special):
            stopped_by = piece
            break
        data += piece
    bodies, rest = _split(data)
    effort = sum(len(body.translate(None, SPACE)) for body in bodies)
    if stopped_by is not Special.END:
        return Outcome(format=False, answer=-1, effort=effort)
    ids = {label.encode(): i for i, label in enumerate(labels)}
    block = _BLOCK.fullmatch(rest) if rest is not None else None
    return Outcome(
        format=block is not None and block[1] in ids,
        answer=_answer(data.rpartition(END_THINK)[2], ids),
        effort=effort,
    )


def read_steps(data: bytes) -> list[str] | None:
    """Returns the six steps' texts, or None if the think block is not as the grammar says."""
    bodies, rest = _split(data)
    return None if rest is None else [body.decode(errors="replace").strip() for body in bodies]


def format_answer(steps: Sequence[str], label: str) -> str:
    """Writes six steps and a label in the answer's grammar, without end-of-turn.

    Raises:
        ValueError: there are not six steps, or one is empty or holds a tag or a header.
    """
    lines = "\n".join(f"Step {k}: {step.strip()}" for k, step in enumerate(steps, start=1))
    text = f"<think>\n{lines}\n</think>\n<answer>{label}</answer>"
    if len(steps) != STEPS or not read([text.encode(), Special.END], [label]).format:
        raise ValueError(f"{text!r}: not in the answer's grammar, expected {STEPS} plain steps")
    return text


def _split(data: bytes) -> tuple[list[bytes], bytes | None]:
    """Returns the bodies that *effort* counts, and what follows a well-formed think block."""
    begin = _BEGIN.match(data)
    if begin is None:
        return [], None
    bodies = []
    start = begin.end()
    for mark in _TAG_OR_HEADER.finditer(data, start):
        body = data[start : mark.start()]
        bodies.append(body)
        if not body.strip(SPACE):
            return bodies, None
        if len(bodies) == STEPS:
            return bodies, data[mark.end() :] if mark[0] == END_THINK else None
        if mark[1] != b"%d" % (len(bodies) + 1):
            return bodies, None
        start = mark.end()
    return [*bodies, data[start:]], None


def _answer(tail: bytes, ids: Mapping[bytes, int]) -> int:
    tags = list(_TAG.finditer(tail))
    if [tag[0] for tag in tags] != [ANSWER, END_ANSWER] or tail[tags[1].end() :].strip(SPACE):
        return -1
    return ids.get(tail[tags[0].end() : tags[1].start()].strip(SPACE), -1)
