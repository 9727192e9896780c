"""The automata, run byte by byte, against the plain reader."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from morer1_jax.task.answer import Outcome, Special, format_answer, read
from morer1_jax.task.automaton import END, OTHER, answer_automaton, step_automaton

LABELS = ("none", "/per/org/member_of", "/per/org/member", "/per/loc/größe")
STEPS = step_automaton()
ANSWER = answer_automaton(LABELS)
GOOD = format_answer(("a b", "c", "Step 1: d", "<e", "f", "g"), LABELS[1]).encode()


def symbols(pieces):
    for piece in pieces:
        if isinstance(piece, bytes):
            yield from piece
        else:
            yield END if piece is Special.END else OTHER


def run(pieces):
    steps = answer = effort = 0
    for symbol in symbols(pieces):
        effort += STEPS.effort[symbol, steps]
        steps, answer = STEPS.next_state[symbol, steps], ANSWER.next_state[symbol, answer]
    label = ANSWER.outcome[answer]
    return Outcome(
        format=bool(STEPS.outcome[steps] >= 0 and label >= 0), answer=label, effort=effort
    )


fragments = st.sampled_from(
    [
        *(
            b"<think>",
            b"</think>",
            b"<answer>",
            b"</answer>",
            b"<",
            b"</",
            b"</th",
            b"<answe",
            b">",
        ),
        *(b"Step %d:" % k for k in range(8)),
        *(b"\nStep %d:" % k for k in range(1, 7)),
        *(b"\n", b"\r", b" ", b"\t", b"\x0b", b"\xff", b"a", b"\nStep", b"\nSte", b" 2", b":"),
        *(label.encode() for label in LABELS),
        *(b"/per/org/", b"member", b"_of", b"o", Special.END, Special.OTHER),
    ]
)
# A well-formed completion in which some parts are replaced, dropped or doubled.
PARTS = [b"<think>", b"\n"]
for k in range(1, 7):
    PARTS += [b"Step %d:" % k, b" x", b"\n"]
PARTS += [b"</think>", b"\n", b"<answer>", b"/per/org/member_of", b"</answer>", Special.END]


@st.composite
def nearly_formed(draw):
    parts = [[part] for part in PARTS]
    for _ in range(draw(st.integers(0, 3))):
        where = draw(st.integers(0, len(parts) - 1))
        parts[where] = draw(
            st.one_of(st.just([]), st.just(parts[where] * 2), st.lists(fragments, max_size=3))
        )
    return [piece for part in parts for piece in part]


@settings(max_examples=1500, deadline=None)
@given(st.one_of(nearly_formed(), st.lists(fragments, max_size=25)))
@example(PARTS)
@example([GOOD, Special.END])
def test_equals_the_plain_reader(pieces):
    assert run(pieces) == read(pieces, LABELS)


@pytest.mark.parametrize("automaton", [STEPS, ANSWER])
def test_no_two_states_behave_alike(automaton):
    """Checked by distinguishing pairs, another way than the refinement that built them."""
    n = len(automaton.outcome)
    key = np.column_stack([automaton.outcome, automaton.in_answer, automaton.effort.T])
    apart = (key[:, None] != key[None]).any(axis=2)
    while True:
        i, j = np.nonzero(~apart)
        moves = automaton.next_state
        wider = apart.copy()
        wider[i, j] |= apart[moves[:, i], moves[:, j]].any(axis=0)
        if (wider == apart).all():
            break
        apart = wider
    assert (apart == ~np.eye(n, dtype=bool)).all()


def test_states_are_few():
    """The device's tables grow with them."""
    assert len(STEPS.outcome) == 261
    assert len(ANSWER.outcome) < 60 + 14 * len(LABELS) + sum(map(len, LABELS))


def test_in_answer_is_where_the_answer_automaton_alone_decides():
    def steps_after(data):
        state = 0
        for byte in data:
            state = STEPS.next_state[byte, state]
        return STEPS.in_answer[state]

    assert not steps_after(GOOD[: GOOD.index(b"<answer>") + 7])
    assert steps_after(GOOD[: GOOD.index(b"<answer>") + 8])
    assert steps_after(GOOD)
    assert not steps_after(GOOD.replace(b"Step 3", b"Step 4"))
