import pytest

from morer1_jax.task.answer import Outcome, Special, format_answer, read, read_steps

LABELS = ("none", "/per/org/member_of", "/per/org/member")
STEPS = ("one", "t w o", "as in Step 1: no", "<b>four", "fünf", "six")
# Bytes of the six that are no white space; "ü" is two.
EFFORT = 3 + 3 + 12 + 7 + 5 + 3
GOOD = format_answer(STEPS, LABELS[1]).encode()
FULL = Outcome(format=True, answer=1, effort=EFFORT)


def outcome(data, *after):
    return read([data, *(after or (Special.END,))], LABELS)


def test_a_formatted_answer_is_read():
    assert GOOD.startswith(b"<think>\nStep 1: one\nStep 2: t w o\n")
    assert GOOD.endswith(b"Step 6: six\n</think>\n<answer>/per/org/member_of</answer>")
    assert outcome(GOOD) == FULL
    assert read_steps(GOOD) == list(STEPS)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"<think>\nStep 1:", b"<think>Step 1:"),
        (b"<think>\nStep 1:", b"<think>\r\n\t Step 1:"),
        (b"\nStep 2:", b"\r\nStep 2:"),
        (b"\nStep 2:", b"\rStep 2:"),
        (b"six\n</think>\n<answer>/", b"six</think><answer> \r\n\t/"),
        (b"member_of</answer>", b"member_of\n </answer>\n \t\r"),
    ],
)
def test_white_space_is_free_where_the_grammar_says_so(old, new):
    assert old in GOOD
    assert outcome(GOOD.replace(old, new)) == FULL


@pytest.mark.parametrize(
    ("old", "new", "effort"),
    [
        # Prose, not headers: inside a line, indented, other words, two digits.
        (b"six", b"six Step 2: so", EFFORT + 8),
        (b"six", b"six\n Step 2: so", EFFORT + 8),
        (b"six", b"six\nstep 2: so", EFFORT + 8),
        (b"six", b"six\nStep 2 : so", EFFORT + 8),
        (b"six", b"six\nStep 12: so", EFFORT + 9),
        (b"six", b"six\nStep  2: so", EFFORT + 8),
        # No tags.
        (b"six", b"six <Think> <think >< /think></think", EFFORT + 7 + 6 + 2 + 14),
        # Bytes of a body are any bytes; vertical tab and the like are not white space here.
        (b"six", b"\xff\x00\x0b\xc3\xa0", EFFORT + 2),
    ],
)
def test_what_a_body_may_hold(old, new, effort):
    assert outcome(GOOD.replace(old, new)) == Outcome(format=True, answer=1, effort=effort)


@pytest.mark.parametrize(
    ("old", "new", "effort"),
    [
        (b"<think>", b" <think>", 0),
        (b"<think>", b"", 0),
        (b"<think>", b"<think><think>", 0),
        (b"<think>\n", b"<think>\nWell. ", 0),
        (b"Step 1:", b"Step 2:", 0),
        (b"Step 1:", b"Step 1", 0),
        (b" one", b"", 0),
        (b" one", b" \t\r", 0),
        (b"\nStep 2:", b" Step 2:", 3 + 6 + 3),
        (b"Step 2:", b"Step 3:", 3),
        (b"Step 2:", b"Step 1:", 3),
        (b"t w o", b"tw\nStep 2: o", 3 + 2),
        (b"t w o", b"tw\nStep 0: o", 3 + 2),
        (b"\nStep 6: six", b"", EFFORT - 3),
        (b"six", b"six\nStep 7: seven", EFFORT),
        (b"six", b"", EFFORT - 3),
        (b"t w o", b"t<answer>", 4),
        (b"t w o", b"t</answer>", 4),
        (b"t w o", b"t</think>", 4),
        (b"t w o", b"t<think>", 4),
        (b"\n<answer>", b"\nSo <answer>", EFFORT),
        (b"<answer>/", b"</think><answer>/", EFFORT),
        (b"\n<answer>", b"\n<answer>none</answer></think><answer>", EFFORT),
    ],
)
def test_what_breaks_the_format_but_not_the_answer(old, new, effort):
    assert old in GOOD
    assert outcome(GOOD.replace(old, new, 1)) == Outcome(format=False, answer=1, effort=effort)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"</answer>", b"</answer>."),
        (b"</answer>", b"</answer></answer>"),
        (b"</answer>", b"</answer><answer>none</answer>"),
        (b"</answer>", b" none</answer>"),
        (b"</answer>", b", none</answer>"),
        (b"</answer>", b""),
        (b"</answer>", b"\x0b</answer>"),
        (b"</answer>", b"</Answer>"),
        (b"<answer>", b"<answer><answer>"),
        (b"<answer>", b"<answer>the "),
        (b"<answer>", b""),
        (b"<answer>", b"<think><answer>"),
        (b"<answer>/per/org/member_of", b"<answer>"),
        (b"/per/org/member_of", b"/per/org/member_"),
        (b"/per/org/member_of", b"/per/org/member_off"),
        (b"/per/org/member_of", b"/PER/org/member_of"),
        (b"member_of</answer>", b"member_of</answer></think>"),
    ],
)
def test_what_breaks_the_answer(old, new):
    assert old in GOOD
    assert outcome(GOOD.replace(old, new)) == Outcome(format=False, answer=-1, effort=EFFORT)


def test_a_label_that_begins_another_is_told_apart():
    assert outcome(GOOD.replace(b"member_of", b"member")).answer == 2


def test_a_direct_answer_is_read_but_an_answer_within_a_thought_is_not():
    assert outcome(b"It is <answer>none</answer>").answer == 0
    assert outcome(b"<think> Hm. <answer>none</answer>").answer == -1


def test_special_tokens_and_the_cut_off():
    assert outcome(GOOD, Special.END, b"<answer>", Special.OTHER) == FULL
    failed = Outcome(format=False, answer=-1, effort=EFFORT)
    assert outcome(GOOD, b"") == failed
    assert outcome(GOOD, Special.OTHER, Special.END) == failed
    middle = GOOD.index(b"w o")
    cut = Outcome(format=False, answer=-1, effort=3 + 1)
    assert outcome(GOOD[:middle], b"") == cut
    assert outcome(GOOD[:middle], Special.END) == cut
    assert outcome(GOOD[:middle], Special.OTHER, GOOD[middle:], Special.END) == cut
    # A tag or header that is not whole yet is still prose.
    assert outcome(GOOD[:middle] + b"\nStep 3", b"").effort == 3 + 1 + 5
    assert outcome(GOOD[:middle] + b"\nStep 3:", b"").effort == 3 + 1
    assert outcome(GOOD[:middle] + b"</answer", b"").effort == 3 + 1 + 8
    assert outcome(GOOD[:middle] + b"</answer>", b"").effort == 3 + 1
    assert read([], LABELS) == Outcome(format=False, answer=-1, effort=0)


def test_cuts_between_pieces_make_no_difference():
    for size in (1, 2, 5, 11):
        pieces = [GOOD[i : i + size] for i in range(0, len(GOOD), size)]
        assert read([*pieces, Special.END], LABELS) == FULL


def test_read_steps_shows_broken_text_and_refuses_broken_steps():
    assert read_steps(GOOD.replace(b"six", b" s\xffx "))[5] == "s\N{REPLACEMENT CHARACTER}x"
    assert read_steps(GOOD.replace(b"Step 4:", b"Step 5:")) is None
    assert read_steps(b"") is None


@pytest.mark.parametrize(
    "steps", [STEPS[:5], (*STEPS, "seven"), (*STEPS[:5], " "), (*STEPS[:5], "a\nStep 2: b")]
)
def test_format_answer_refuses_what_it_cannot_write(steps):
    with pytest.raises(ValueError, match="not in the answer's grammar"):
        format_answer(steps, "none")
