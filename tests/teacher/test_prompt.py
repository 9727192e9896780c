"""What the teacher is asked, which of its answers can be learnt from, and for which facts."""

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from morer1_jax.errors import DataError
from morer1_jax.task.answer import format_answer
from morer1_jax.task.fact import Fact, composed
from morer1_jax.task.ontology import Ontology
from morer1_jax.task.prompt import question, student_prompt
from morer1_jax.teacher.prompt import balanced, fault, prompt_digest, teacher_prompt, unwrapped

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
BODIES = ("one", "two", "three", "four", "five", "six")


def written(bodies=BODIES, label=FACT.label):
    return format_answer(bodies, label)


def test_the_request_has_three_parts():
    text = teacher_prompt(FACT, ONTOLOGY)
    first, second, third = text.split("\n\n")
    assert first == question(FACT, ONTOLOGY)
    assert "<|" not in text
    # The student is asked the same in the same words.
    assert first in student_prompt(FACT, ONTOLOGY)
    assert [f"Step {k}:" in second for k in range(1, 7)] == [True] * 6
    assert "'per', 'org', 'loc', 'misc'" in second
    assert FACT.label not in second
    assert "'per', the entity 'Heat' is of type 'org', and the answer is '/per/org/opp" in third
    assert third.endswith("</think>\n<answer>/per/org/opposed_to</answer>")


def test_none_gives_no_types_away():
    other = dataclasses.replace(FACT, label="none")
    given = teacher_prompt(other, ONTOLOGY).split("\n\n")[2]
    assert given.startswith("For your eyes only: the answer is 'none'.")
    assert "is of type" not in given
    # All that is before the gold answer does not depend on it.
    assert (
        teacher_prompt(other, ONTOLOGY).split("\n\n")[:2]
        == (teacher_prompt(FACT, ONTOLOGY).split("\n\n")[:2])
    )


def test_a_special_token_in_the_title_is_refused():
    fact = dataclasses.replace(FACT, tokens=(*FACT.tokens, "<|im_end|>"))
    with pytest.raises(DataError, match=r"^train:4: the title holds '<\|im_end\|>'"):
        teacher_prompt(fact, ONTOLOGY)


def test_the_digest_changes_with_words_and_labels(monkeypatch):
    digest = prompt_digest(ONTOLOGY)
    assert digest == prompt_digest(Ontology(ONTOLOGY.labels))
    assert digest != prompt_digest(Ontology(ONTOLOGY.labels[:-1]))
    monkeypatch.setattr("morer1_jax.teacher.prompt._STEPS", "Think of {types}.")
    assert digest != prompt_digest(ONTOLOGY)


def test_a_good_answer_has_no_fault():
    assert fault(written(), FACT, ONTOLOGY) is None


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
        (written().replace("three", LEAKS[0]), "says that it was told"),
    ],
)
def test_a_fault_is_named(text, reason):
    assert fault(text, FACT, ONTOLOGY) == reason


@pytest.mark.parametrize("phrase", LEAKS)
def test_what_gives_away_that_one_was_told_is_found(phrase):
    for place in range(6):
        for said in (phrase, phrase.upper(), phrase.replace(" ", "\n"), f"So {phrase} and so on."):
            bodies = [*BODIES[:place], said, *BODIES[place + 1 :]]
            text = written().replace(f": {BODIES[place]}\n", f": {said}\n")
            assert fault(text, FACT, ONTOLOGY) == "says that it was told", bodies


@given(st.lists(st.sampled_from(ORDINARY), min_size=6, max_size=18), st.booleans())
@settings(max_examples=200, deadline=None)
def test_ordinary_reasoning_is_no_leak(sentences, upper):
    bodies = [" ".join(sentences[place::6]) for place in range(6)]
    other = dataclasses.replace(FACT, label="/per/misc/party")
    text = written([body.upper() if upper else body for body in bodies], other.label)
    assert fault(text, other, ONTOLOGY) is None


def test_leaks_that_the_filter_was_not_made_for_are_often_found():
    """The held-out lines were written before the filter, and are not to be used to widen it."""
    leaks = lines_of("held_out_leaks.txt")
    found = [fault(written((*BODIES[:5], said)), FACT, ONTOLOGY) for said in leaks]
    assert found.count("says that it was told") >= 0.45 * len(leaks)


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
        assert fault(written(bodies), FACT, ONTOLOGY) == reason
        # Another label may be named, and 'none' is what steps 1 and 2 ask for.
        other = dataclasses.replace(FACT, label="/per/misc/party")
        assert fault(written(bodies, other.label), other, ONTOLOGY) is None
        unsure = (*BODIES[:place], "As it is blurred, 'none' is likely.", *BODIES[place + 1 :])
        nothing = dataclasses.replace(FACT, label="none")
        assert fault(written(unsure, "none"), nothing, ONTOLOGY) is None


def test_a_sentence_ends_with_its_step():
    for place in range(6):
        bodies = [*BODIES[:place], "We don't know who he is", *BODIES[place + 1 :]]
        bodies[-1] += ", so the answer follows from the title"
        found = fault(written(bodies), FACT, ONTOLOGY)
        assert found == (None if place < 5 else "says that it was told")


def test_a_longer_label_is_another():
    ontology = Ontology(("none", "/per/org/member", "/per/org/member_of"))
    fact = dataclasses.replace(FACT, label="/per/org/member")
    bodies = ("Is it '/per/org/member_of'?", *BODIES[1:])
    assert fault(written(bodies, fact.label), fact, ontology) is None


def test_the_teacher_is_told_when_it_may_name_a_label():
    assert "before step 5 name no label but 'none'" in teacher_prompt(FACT, ONTOLOGY)


def test_what_is_quoted_of_the_title_is_no_leak():
    quoted = ("The title says 'After 4 {Lopsided} Games, What We Were Told by Heat'.", *BODIES[1:])
    assert fault(written(quoted), FACT, ONTOLOGY) is None
    fact = dataclasses.replace(FACT, tokens=("I", "Was", "Told", "That", "Heat", "Won"))
    quoted = ("The title is 'I was told that Heat won'.", *BODIES[1:])
    assert fault(written(quoted), fact, ONTOLOGY) is None
    # It is with another title, or beside the quotation.
    assert fault(written(quoted), FACT, ONTOLOGY) == "says that it was told"
    quoted = (quoted[0], "I was told that it is so.", *BODIES[2:])
    assert fault(written(quoted), fact, ONTOLOGY) == "says that it was told"


@given(
    st.sampled_from(["", "```", "```xml", "```text \r"]),
    st.text(" \n\t\r", max_size=4),
    st.text(" \n\t\r", max_size=4),
)
def test_only_what_is_around_an_answer_is_taken_off(fence, before, after):
    text = f"{fence}\n{written()}\n```" if fence else written()
    assert unwrapped(before + text + after) == written()


@given(st.text(max_size=40) | st.text("`\n x", max_size=20))
def test_nothing_within_is_changed(text):
    assert unwrapped(text) in composed(text)


@st.composite
def unbalanced(draw):
    """Facts of a few labels, some of them rare."""
    counts = draw(st.lists(st.integers(0, 30), min_size=1, max_size=5))
    labels = [f"label {i}" for i, count in enumerate(counts) for _ in range(count)]
    return [
        dataclasses.replace(FACT, id=f"train:{number}", label=label)
        for number, label in enumerate(labels, start=1)
    ]


@given(unbalanced(), st.integers(0, 150), st.integers(0, 150), st.integers(0, 3))
@settings(deadline=None)
def test_a_smaller_count_gives_the_first_of_a_larger_one(facts, few, many, seed):
    few, many = sorted((few, many))
    chosen = balanced(facts, many, seed)
    assert balanced(facts, few, seed) == chosen[:few]
    assert len(chosen) == min(many, len(facts))
    assert len({fact.id for fact in chosen}) == len(chosen)


@given(unbalanced(), st.integers(0, 150), st.integers(0, 3))
@settings(deadline=None)
def test_labels_are_chosen_evenly_until_they_are_used_up(facts, count, seed):
    there = Counter(fact.label for fact in facts)
    chosen = Counter(fact.label for fact in balanced(facts, count, seed))
    most = max(chosen.values(), default=0)
    for label, number in there.items():
        assert chosen[label] >= min(number, most - 1)


def test_the_choice_is_the_seeds():
    facts = [dataclasses.replace(FACT, id=f"train:{number}") for number in range(1, 51)]
    assert balanced(facts, 20, 0) == balanced(facts, 20, 0)
    assert balanced(facts, 20, 0) != balanced(facts, 20, 1)
    assert balanced(facts, 50, 0) != facts
