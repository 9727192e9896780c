"""Lifts the answer's automata from bytes to the tokens of a vocabulary, as NumPy tables.

A token moves each state to a next one and adds effort; tokens that do the same in every state form
one class.  A compiled decode loop follows a completion with three look-ups a token:

    c = token_class[token]
    effort += effort_added[c, steps]
    steps, answer = steps_next[c, steps], answer_next[c, answer]

from steps = answer = effort = 0.  `steps` follows the format and `answer` the label.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Bool, Int16

from morer1_jax.task.answer import Outcome, Piece, Special
from morer1_jax.task.automaton import END, OTHER, SYMBOLS, answer_automaton, step_automaton

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

UNREACHABLE = np.iinfo(np.int16).max


class GrammarTables(NamedTuple):
    """The automata over a vocabulary.  State 0 is the start of both.

    Attributes:
        token_class: the class of each row of the embedding.
        steps_next: the step automaton's next state.
        answer_next: the answer automaton's next state.
        effort_added: bytes to add to the effort.
        steps_accept: whether the steps' part of *format* holds; *format* is this and an answer.
        answer_label: the label's id if the completion is an *answer*, else -1.
        steps_distance, answer_distance: the least number of tokens, end-of-turn among them, to the
            end of a completion with *format*: `steps_distance` if above 0, else `answer_distance`.
            `UNREACHABLE` if there is no way.
    """

    token_class: Int16[np.ndarray, " v"]
    steps_next: Int16[np.ndarray, "class steps"]
    answer_next: Int16[np.ndarray, "class answer"]
    effort_added: Int16[np.ndarray, "class steps"]
    steps_accept: Bool[np.ndarray, " steps"]
    answer_label: Int16[np.ndarray, " answer"]
    steps_distance: Int16[np.ndarray, " steps"]
    answer_distance: Int16[np.ndarray, " answer"]

    @property
    def nbytes(self) -> int:
        """Size of all tables in bytes."""
        return sum(table.nbytes for table in self)


def token_bytes(
    tokenizer: "PreTrainedTokenizerFast", rows: int, end_of_turn: str = "<|im_end|>"
) -> list[Piece]:
    """Returns the bytes or the special token of each row of an embedding.

    Args:
        tokenizer: a byte-level BPE tokenizer.  Its added tokens are special if it says so, and the
            bytes of their text if not.
        rows: the number of rows of the embedding; those beyond the tokenizer's are `Special.OTHER`.
        end_of_turn: the token that ends an answer.

    Raises:
        ValueError: the tokenizer is not byte-level, lacks `end_of_turn` or has more tokens than
            rows.
    """
    byte_of = _bytes_of_characters()
    pieces: list[Piece] = [Special.OTHER] * rows
    added_tokens = tokenizer.added_tokens_decoder
    vocabulary = tokenizer.get_vocab()
    if vocabulary.get(end_of_turn) not in added_tokens:
        raise ValueError(f"tokenizer: expected an added token {end_of_turn!r}, found none")
    for text, i in vocabulary.items():
        if i >= rows:
            raise ValueError(f"token {i}: expected more rows in the embedding, found {rows}")
        if text == end_of_turn:
            pieces[i] = Special.END
        elif i in added_tokens:
            pieces[i] = Special.OTHER if added_tokens[i].special else text.encode()
        elif not text or not set(text) <= byte_of.keys():
            raise ValueError(f"token {i}: expected a token of a byte-level BPE, found {text!r}")
        else:
            pieces[i] = bytes(byte_of[c] for c in text)
    return pieces


def build_tables(pieces: Sequence[Piece], labels: Sequence[str]) -> GrammarTables:
    """Returns the tables of a vocabulary.

    Args:
        pieces: the bytes or special token of each row of the embedding; at least one is
            `Special.END`.
        labels: the labels in id order.

    Raises:
        ValueError: no token ends a turn, or there are more classes than int16 counts.
    """
    if Special.END not in pieces:
        raise ValueError("vocabulary: expected at least one end-of-turn token, found none")
    # Classes of tokens that do the same in both automata.
    steps, answer = step_automaton(), answer_automaton(labels)
    steps_class, steps_next, effort_added = _lift(pieces, steps.next_state, steps.effort)
    answer_class, answer_next, _ = _lift(pieces, answer.next_state, answer.effort)
    class_pairs, token_class = np.unique(
        np.stack([steps_class, answer_class]), axis=1, return_inverse=True
    )
    if class_pairs.shape[1] > np.iinfo(np.int16).max:
        raise ValueError(
            f"vocabulary: expected under 32768 token classes, found {class_pairs.shape[1]}"
        )
    steps_next, effort_added = steps_next[class_pairs[0]], effort_added[class_pairs[0]]
    answer_next = answer_next[class_pairs[1]]
    # The least numbers of tokens to the end of a completion with *format*.
    accept = steps.outcome >= 0
    steps_distance, answer_distance = _distances(
        steps_next, answer_next, accept, answer.outcome >= 0, steps.in_answer
    )
    return GrammarTables(
        token_class=token_class.astype(np.int16),
        steps_next=steps_next,
        answer_next=answer_next,
        effort_added=effort_added,
        steps_accept=accept,
        answer_label=answer.outcome.astype(np.int16),
        steps_distance=steps_distance,
        answer_distance=answer_distance,
    )


def run(tables: GrammarTables, tokens: Iterable[int]) -> Outcome:
    """Returns the outcome of a completion, token by token: the reference for compiled loops."""
    steps = answer = effort = 0
    for token in tokens:
        c = tables.token_class[token]
        effort += int(tables.effort_added[c, steps])
        steps, answer = tables.steps_next[c, steps], tables.answer_next[c, answer]
    label = int(tables.answer_label[answer])
    return Outcome(
        format=bool(tables.steps_accept[steps]) and label >= 0, answer=label, effort=effort
    )


def _lift(
    pieces: Sequence[Piece], next_state: np.ndarray, effort: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the class of each token, and each class's next states and efforts by state.

    All tokens advance together, a byte at a time.  Only distinct pairs of (class of the bytes so
    far, next byte) are computed, a few thousand for a real vocabulary.
    """
    # The symbols of all tokens, one token after another.
    symbols = [_symbols(piece) for piece in pieces]
    lengths = np.array([len(s) for s in symbols])
    flat = np.concatenate(symbols)
    begins = np.cumsum(lengths) - lengths
    # The classes so far: next states, efforts and number. Class 0 is that of no bytes.
    moves = [np.arange(next_state.shape[1], dtype=np.int16)]
    efforts = [np.zeros(next_state.shape[1], np.int16)]
    class_of = {moves[0].tobytes() + efforts[0].tobytes(): 0}
    token_class = np.zeros(len(pieces), np.int64)
    # Advance the tokens that have another byte to the class of their longer prefix.
    for position in range(lengths.max()):
        active = np.flatnonzero(lengths > position)
        key = token_class[active] * SYMBOLS + flat[begins[active] + position]
        distinct, inverse = np.unique(key, return_inverse=True)
        classes = np.empty(len(distinct), np.int64)
        for n, (prefix, symbol) in enumerate(zip(*divmod(distinct, SYMBOLS), strict=True)):
            row = next_state[symbol, moves[prefix]].astype(np.int16)
            effort_row = (efforts[prefix] + effort[symbol, moves[prefix]]).astype(np.int16)
            classes[n] = class_of.setdefault(row.tobytes() + effort_row.tobytes(), len(moves))
            if classes[n] == len(moves):
                moves.append(row)
                efforts.append(effort_row)
        token_class[active] = classes[inverse]
    # Drop the classes in which no token ends.
    final_classes, token_class = np.unique(token_class, return_inverse=True)
    return (
        token_class,
        np.stack([moves[i] for i in final_classes]),
        np.stack([efforts[i] for i in final_classes]),
    )


def _symbols(piece: Piece) -> np.ndarray:
    if isinstance(piece, Special):
        return np.array([END if piece is Special.END else OTHER])
    return np.frombuffer(piece, np.uint8).astype(np.int64)


def _distances(
    steps_next: np.ndarray,
    answer_next: np.ndarray,
    steps_accept: np.ndarray,
    answer_accept: np.ndarray,
    in_answer: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the least numbers of tokens to a completion with *format*, by state.

    Before the answer the distance is a property of the step state, which the answer automaton's
    follows from; in the answer it is one of the answer state.
    """
    # The pairs of states that can occur, as one number each, and their next pairs.
    width = answer_next.shape[1]
    pairs = np.array([0])
    while True:
        steps, answer = np.divmod(pairs, width)
        next_pairs = steps_next[:, steps].astype(np.int64) * width + answer_next[:, answer]
        wider_pairs = np.union1d(pairs, next_pairs)
        if len(wider_pairs) == len(pairs):
            break
        pairs = wider_pairs
    # Shortest ways to an accepting pair.
    next_index = np.searchsorted(pairs, next_pairs)
    distance = np.where(steps_accept[steps] & answer_accept[answer], 0, UNREACHABLE)
    while True:
        shorter = np.minimum(distance, distance[next_index].min(axis=0) + 1)
        if (shorter == distance).all():
            break
        distance = shorter
    # The least over the pairs of each state.
    steps_distance = np.full(len(steps_accept), UNREACHABLE)
    answer_distance = np.full(len(answer_accept), UNREACHABLE)
    inside = in_answer[steps]
    np.minimum.at(steps_distance, steps[~inside], distance[~inside])
    np.minimum.at(answer_distance, answer[inside], distance[inside])
    steps_distance[in_answer] = 0
    return steps_distance.astype(np.int16), answer_distance.astype(np.int16)


def _bytes_of_characters() -> dict[str, int]:
    """Returns the byte of each character of a byte-level BPE token, by GPT-2's table.

    Bytes that print in Latin-1 stand for themselves; the others, in order, for U+0100 and on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0x100)} - {0xAD}
    hidden = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(hidden)}
