"""The text of a request to the teacher."""

import dataclasses

import pytest

from morer1_jax.errors import DataError
from morer1_jax.task.fact import Fact
from morer1_jax.task.ontology import Ontology
from morer1_jax.task.prompt import question, student_prompt
from morer1_jax.teacher.prompt import prompt_digest, teacher_prompt

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


def test_none_reveals_no_types():
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


def test_the_teacher_is_told_when_it_may_name_a_label():
    assert "before step 5 name no label but 'none'" in teacher_prompt(FACT, ONTOLOGY)
