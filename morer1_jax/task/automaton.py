"""The answer's grammar as two minimal byte automata that run side by side.

One follows the steps (*format* and *effort*), one the answer block (*answer*).  One automaton for
both would have to remember the label in each state of the format's end and be several times larger.
The step automaton therefore checks no label: it accepts anything between `<answer>` and
end-of-turn that has exactly one `<`, and *format* holds if both automata accept.  That is exact:
the answer automaton accepts only label and `</answer>` there.

Symbols are the 256 bytes, then `END` (end-of-turn) and `OTHER` (any other special token).
Each automaton is a function from a state, a small tuple, and a symbol to the next state and the
effort to add; it is explored from its start and then minimised.  A state's `pending` are the last
bytes read as far as they may become a tag or header; CR counts as LF there.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from morer1_jax.task.answer import ANSWER, END_ANSWER, END_THINK, SPACE, STEPS, TAGS, THINK

END, OTHER = 256, 257
SYMBOLS = 258

State = tuple[Hashable, ...]
Step = Callable[[State, int], tuple[State, int]]

_HEADERS = tuple(b"\nStep %d:" % k for k in range(10))


@dataclass(frozen=True)
class Automaton:
    """A deterministic automaton with outputs, minimal: no two states behave alike.

    Attributes:
        next_state: the state after a symbol.
        effort: what the symbol adds to the effort, read in that state; negative where the last
            byte of a tag or header takes back those before it.
        outcome: what a completion that ends in that state is: -1 not accepted, else the label's id
            (answer automaton) or 0 (step automaton).
        in_answer: whether `<answer>` has been read after a well-formed think block, after which the
            answer automaton alone decides.  It holds for the step automaton only.

    State 0 is the start.
    """

    next_state: Int[np.ndarray, "symbol state"]
    effort: Int[np.ndarray, "symbol state"]
    outcome: Int[np.ndarray, " state"]
    in_answer: Bool[np.ndarray, " state"]


def step_automaton() -> Automaton:
    """Returns the automaton of *format*, up to the label, and of *effort*."""
    return _build(("literal", THINK, b""), _step, b"".join(_HEADERS))


def answer_automaton(labels: Sequence[str]) -> Automaton:
    """Returns the automaton of *answer* for labels in id order."""
    return _build(("text", b""), _AnswerStep(labels), "".join(labels).encode())


_DEAD = ("dead",)


def _step(state: State, symbol: int) -> tuple[State, int]:
    """Returns the step automaton's next state and the effort to add."""
    kind = state[0]
    if kind in ("dead", "accept"):
        return state, 0
    if symbol >= END:
        return (("accept", 0) if kind == "closing" and symbol == END else _DEAD), 0
    byte = bytes([symbol])
    if kind == "body":
        return _body_step(state, byte)
    if kind == "literal":
        _, literal, prefix = state
        if not prefix and literal != THINK and byte in SPACE:
            return state, 0
        prefix += byte
        if not literal.startswith(prefix):
            return _DEAD, 0
        if prefix != literal:
            return ("literal", literal, prefix), 0
        if literal == THINK:
            return ("literal", _HEADERS[1][1:], b""), 0
        return (("inside",) if literal == ANSWER else ("body", 1, False, b"")), 0
    if kind == "inside":
        return (("closing",) if byte == b"<" else state), 0
    return (_DEAD if byte == b"<" else state), 0  # closing


def _body_step(state: State, byte: bytes) -> tuple[State, int]:
    _, step, has_text, pending = state
    weight = _effort(byte)
    read = pending + (b"\n" if byte == b"\r" else byte)
    if read in TAGS or read in _HEADERS:
        weight = -_effort(pending)
        if has_text and step == STEPS and read == END_THINK:
            return ("literal", ANSWER, b""), weight
        if has_text and step < STEPS and read == _HEADERS[step + 1]:
            return ("body", step + 1, False, b""), weight
        return _DEAD, weight
    pending = _longest_suffix(read, (*TAGS, *_HEADERS))
    has_text = has_text or _effort(read[: len(read) - len(pending)]) > 0
    return ("body", step, has_text, pending), weight


class _AnswerStep:
    """Computes the answer automaton's next state, and the effort to add, which is 0."""

    def __init__(self, labels: Sequence[str]) -> None:
        self.ids = {label.encode(): i for i, label in enumerate(labels)}
        self.prefixes = {label[:i] for label in self.ids for i in range(1, len(label) + 1)}

    def __call__(self, state: State, symbol: int) -> tuple[State, int]:
        return self._next(state, symbol), 0

    def _next(self, state: State, symbol: int) -> State:
        kind = state[0]
        if kind in ("dead", "accept"):
            return state
        if symbol >= END:
            return ("accept", state[1]) if kind == "closed" and symbol == END else _DEAD
        # Before the answer block: text, or lost until the next `</think>`.
        byte = bytes([symbol])
        if kind == "text":
            read = state[1] + byte
            if read in TAGS:
                return {END_THINK: ("text", b""), ANSWER: ("label", b"")}.get(read, ("lost", b""))
            return ("text", _longest_suffix(read, TAGS))
        if kind == "lost":
            return _lost(state[1] + byte)
        # White space and the label.
        if kind == "label":
            read = state[1] + byte
            if read in self.prefixes:
                return ("label", read)
            if byte in SPACE and not state[1]:
                return state
            if state[1] in self.ids and (byte in SPACE or byte == b"<"):
                return ("close", self.ids[state[1]], byte.strip(SPACE))
            return _lost(read)
        # `</answer>`, then white space to the end.
        if kind == "close":
            _, label, prefix = state
            if not prefix and byte in SPACE:
                return state
            prefix += byte
            if not END_ANSWER.startswith(prefix):
                return _lost(prefix)
            return ("closed", label) if prefix == END_ANSWER else ("close", label, prefix)
        return state if byte in SPACE else _lost(byte)  # closed


def _lost(read: bytes) -> State:
    """Returns the state without an answer until a `</think>`, which `read` may end in a part of."""
    if read.endswith(END_THINK):
        return ("text", b"")
    return ("lost", _longest_suffix(read, (END_THINK,)))


def _longest_suffix(read: bytes, patterns: Sequence[bytes]) -> bytes:
    """Returns the longest suffix of `read` that is a prefix of a pattern."""
    return next(
        read[i:] for i in range(len(read) + 1) if any(p.startswith(read[i:]) for p in patterns)
    )


def _effort(data: bytes) -> int:
    return len(data.translate(None, SPACE))


def _build(start: State, step: Step, literals: bytes) -> Automaton:
    """Explores the states from `start` and merges those that behave alike.

    Args:
        start: the first state.
        step: returns the next state and the effort to add, from a state and a symbol.
        literals: the bytes that `step` tells apart beside those of the tags and white space; all
            others act alike, so one of them is tried for all.
    """
    # Explore, with one byte in place of all that act alike.
    distinct_bytes = set(literals + SPACE + b"".join(TAGS))
    other_byte = min(set(range(END)) - distinct_bytes)
    distinct_symbols = sorted({*distinct_bytes, other_byte, END, OTHER})
    row_of_symbol = [
        distinct_symbols.index(symbol if symbol in distinct_bytes or symbol >= END else other_byte)
        for symbol in range(SYMBOLS)
    ]
    ids = {start: 0}
    next_state, effort = [], []
    states = [start]
    for state in states:  # Grows as it goes.
        moves = [step(state, symbol) for symbol in distinct_symbols]
        for target, _ in moves:
            if target not in ids:
                ids[target] = len(states)
                states.append(target)
        next_state.append([ids[target] for target, _ in moves])
        effort.append([weight for _, weight in moves])
    # The outputs of each state.
    moves, weights = np.array(next_state), np.array(effort)
    outcome = np.array([s[1] if s[0] == "accept" else -1 for s in states])
    in_answer = np.array([s[0] in ("inside", "closing", "accept") for s in states])
    # Merge alike states by Moore's refinement: their outputs and next states are alike.
    block = _rank(np.column_stack([outcome, in_answer, weights]))
    while True:
        finer_block = _rank(np.column_stack([block, block[moves]]))
        if finer_block.max() == block.max():
            break
        block = finer_block
    # Take each block's first state for the block, and a row for every symbol.
    _, first_state = np.unique(block, return_index=True)
    order = np.argsort(first_state)  # Blocks in order of discovery, so the start stays 0.
    merged_id = np.argsort(order)[block]
    first_state = first_state[order]
    return Automaton(
        next_state=merged_id[moves[first_state]].T[row_of_symbol],
        effort=weights[first_state].T[row_of_symbol],
        outcome=outcome[first_state],
        in_answer=in_answer[first_state],
    )


def _rank(rows: np.ndarray) -> np.ndarray:
    return np.unique(rows, axis=0, return_inverse=True)[1]
