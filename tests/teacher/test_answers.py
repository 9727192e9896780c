"""Which of the teacher's answers SFT may learn from."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from morer1_jax.task.answer import format_answer
from morer1_jax.task.fact import Fact, composed
from morer1_jax.task.ontology import Ontology
from morer1_jax.teacher.answers import rejection_reason, strip_wrapping

ONTOLOGY = Ontology(("none", "/per/org/opposed_to", "/per/misc/party", "/per/per/self"))
FACT = Fact(
    id="train:4",
    tokens=("After", "4", "{Lopsided}", "Games", ",", "What", "We", "Were", "Told", "by", "Heat"),
    entity_name="Heat",
    entity_span=(10, 11),
    object_name="[OBJ0]",
    box=(0.5, 0.4, 0.25, 0.5),
    image="1.jpg",
    label="/per/org/opposed_to",
)


def lines_of(name):
    return Path(__file__).with_name(name).read_text(encoding="utf-8").splitlines()


# What reasoning says without having been told.  Much of it is near to what gives a leak away.
ORDINARY = (
    "The answer follows from the relation between the two clubs.",
    "Given the photo, the crop and the title, the man plays for the Celtics.",
    "Given the relation between Heat and Celtics, the label must be '/per/org/opposed_to'.",
    "Given that the answer must fit the pair of types, three labels are left.",
    "From the label list given in the question, two remain.",
    "The given label list has 22 entries, and the provided labels for (per, org) are three.",
    "The provided photo shows a player in green.",
    "We are given a photo and a crop of it.",
    "We are told in the title that the games were lopsided.",
    "We were told by the title that they are tied.",
    "I am shown a man in a green jersey.",
    "There is no known relation between the two.",
    "The relation is given by the verb, and the types are given in the list.",
    "The most likely answer given the photo is an opponent.",
    "The correct label is therefore '/per/org/opposed_to'.",
    "The expected relation of a player and his club's rival is opposition.",
    "The answer is already clear from the jersey.",
    "'none' is the label provided that nothing links the two.",
    "The target of the tackle is a known player; his label on the shirt is provided by a sponsor.",
    "As requested by the coach, the player leaves the pitch.",
    "Following the instructions of the referee, he stands still.",
    "The truth is that nothing in the photo tells.",
    "It looks as if he does not know the answer to the press.",
    "The solution, given the types, is 'none'.",
    "Step 5 leaves the given options, so the answer options are two.",
    "I know the team by its shirt.",
    "Their relation is known to be strained.",
    "The title says that the minister was told that the label went bankrupt.",
    "The president told reporters that the answer is no.",
    "I conclude that the label is '/per/org/opposed_to'.",
    "We are left with the label '/per/org/opposed_to', and I'm sure that the answer is right.",
    "We can't see a label on the bottle, so we are looking for another answer.",
    "We can label the object 'misc', and so I answer 'none' with the label that stays.",
    *lines_of("held_out_ordinary.txt"),
)
LEAKS = (
    "the given label is '/per/org/opposed_to'",
    "This agrees with the provided answer.",
    "it matches the **given** label",
    "the gold label says so",
    "The ground truth is opposed_to.",
    "this is the ground-truth relation",
    "the expected answer is '/per/org/opposed_to'",
    "the known answer points to opposition",
    "I was told that they are opponents.",
    "We are told that the answer is opposed_to.",
    "we’ve no doubt, as I have been given the correct label",
    "I am instructed to reason towards it",
    "the answer I was given",
    "the label that was provided to me",
    "The answer was given in the prompt.",
    "The relation is known in advance.",
    "the label is given as '/per/org/opposed_to'",
    "since the answer is already known, we look for support",
    "I already know the correct answer.",
    "Given the answer, the player must be a Celtic.",
    "given that the answer is '/per/org/opposed_to'",
    "Given the label /per/org/opposed_to, he plays for the rival.",
    "As instructed, single quotes are used.",
    "According to the instructions the types are per and org.",
    "the prompt states the types",
    "I reason as if I did not know it",
    "as if the answer were unknown",
    "For my eyes only: opposed_to",
    "the answer key",
    "the label is specified to be 'none'",
    *lines_of("leaks.txt"),
)
REVEALS = "reveals that the label was known"
BODIES = ("one", "two", "three", "four", "five", "six")


def written(bodies=BODIES, label=FACT.label):
    return format_answer(bodies, label)


def test_a_good_answer_has_no_rejection_reason():
    assert rejection_reason(written(), FACT, ONTOLOGY) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "format"),
        (written().replace("Step 4", "Step four"), "format"),
        (written() + " That is all.", "format"),
        ("Here it is:\n" + written(), "format"),
        (f"```\n{written()}\n```", "format"),  # Unwrapped before, or not at all.
        (written().replace("opposed_to<", "opposed_too<"), "format"),
        (written(label="none"), "another label"),
        (written().replace("three", "<|im_end|>"), "special token"),
        (written().replace("three", "th\ud800ree"), "lone surrogate"),
        (written().replace("three", LEAKS[0]), REVEALS),
    ],
)
def test_a_rejection_names_its_reason(text, reason):
    assert rejection_reason(text, FACT, ONTOLOGY) == reason


@pytest.mark.parametrize("phrase", LEAKS)
def test_phrases_that_reveal_a_known_label_are_found(phrase):
    for place in range(6):
        for said in (phrase, phrase.upper(), phrase.replace(" ", "\n"), f"So {phrase} and so on."):
            bodies = [*BODIES[:place], said, *BODIES[place + 1 :]]
            text = written().replace(f": {BODIES[place]}\n", f": {said}\n")
            assert rejection_reason(text, FACT, ONTOLOGY) == REVEALS, bodies


@given(st.lists(st.sampled_from(ORDINARY), min_size=6, max_size=18), st.booleans())
@settings(max_examples=200, deadline=None)
def test_ordinary_reasoning_is_no_leak(sentences, upper):
    bodies = [" ".join(sentences[place::6]) for place in range(6)]
    other = dataclasses.replace(FACT, label="/per/misc/party")
    text = written([body.upper() if upper else body for body in bodies], other.label)
    assert rejection_reason(text, other, ONTOLOGY) is None


def test_held_out_leaks_are_often_found():
    """The held-out lines were written before the filter, and are not to be used to widen it."""
    leaks = lines_of("held_out_leaks.txt")
    found = [rejection_reason(written((*BODIES[:5], said)), FACT, ONTOLOGY) for said in leaks]
    assert found.count(REVEALS) >= 0.45 * len(leaks)


@pytest.mark.parametrize(
    "naming",
    [
        "'/per/org/opposed_to'",
        "/PER/ORG/OPPOSED_TO",
        "`per/org/opposed_to`",
        "**/per/org/opposed_to**",
        "per / org / opposed_to",
    ],
)
def test_the_label_is_named_from_step_five_on(naming):
    for place in range(6):
        bodies = (*BODIES[:place], f"This looks like {naming}, it seems.", *BODIES[place + 1 :])
        reason = "names the label too early" if place < 4 else None
        assert rejection_reason(written(bodies), FACT, ONTOLOGY) == reason
        # Another label may be named, and 'none' is what steps 1 and 2 ask for.
        other = dataclasses.replace(FACT, label="/per/misc/party")
        assert rejection_reason(written(bodies, other.label), other, ONTOLOGY) is None
        unsure = (*BODIES[:place], "As it is blurred, 'none' is likely.", *BODIES[place + 1 :])
        nothing = dataclasses.replace(FACT, label="none")
        assert rejection_reason(written(unsure, "none"), nothing, ONTOLOGY) is None


def test_a_sentence_ends_with_its_step():
    for place in range(6):
        bodies = [*BODIES[:place], "We don't know who he is", *BODIES[place + 1 :]]
        bodies[-1] += ", so the answer follows from the title"
        found = rejection_reason(written(bodies), FACT, ONTOLOGY)
        assert found == (None if place < 5 else REVEALS)


def test_a_longer_label_is_another():
    ontology = Ontology(("none", "/per/org/member", "/per/org/member_of"))
    fact = dataclasses.replace(FACT, label="/per/org/member")
    bodies = ("Is it '/per/org/member_of'?", *BODIES[1:])
    assert rejection_reason(written(bodies, fact.label), fact, ontology) is None


def test_a_quotation_of_the_title_is_no_leak():
    quoted = ("The title says 'After 4 {Lopsided} Games, What We Were Told by Heat'.", *BODIES[1:])
    assert rejection_reason(written(quoted), FACT, ONTOLOGY) is None
    fact = dataclasses.replace(FACT, tokens=("I", "Was", "Told", "That", "Heat", "Won"))
    quoted = ("The title is 'I was told that Heat won'.", *BODIES[1:])
    assert rejection_reason(written(quoted), fact, ONTOLOGY) is None
    # It is with another title, or beside the quotation.
    assert rejection_reason(written(quoted), FACT, ONTOLOGY) == REVEALS
    quoted = (quoted[0], "I was told that it is so.", *BODIES[2:])
    assert rejection_reason(written(quoted), fact, ONTOLOGY) == REVEALS


@given(
    st.sampled_from(["", "```", "```xml", "```text \r"]),
    st.text(" \n\t\r", max_size=4),
    st.text(" \n\t\r", max_size=4),
)
def test_only_the_wrapping_is_removed(fence, before, after):
    text = f"{fence}\n{written()}\n```" if fence else written()
    assert strip_wrapping(before + text + after) == written()


@given(st.text(max_size=40) | st.text("`\n x", max_size=20))
def test_nothing_within_is_changed(text):
    assert strip_wrapping(text) in composed(text)
