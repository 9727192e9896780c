"""The student's prompt: all it must hold, and what the blind variants leave out."""

import dataclasses

import pytest

from morer1_jax.errors import DataError
from morer1_jax.model.special import IMAGE_PAD
from morer1_jax.task.fact import Fact
from morer1_jax.task.ontology import Ontology
from morer1_jax.task.prompt import direct_answer, student_prompt

ONTOLOGY = Ontology(("none", "/per/org/opposed_to", "/per/misc/party", "/vehicle/loc/parked_at"))
FACT = Fact(
    id="train:4",
    tokens=("After", "4", "{Lopsided}", "Games", ",", "Miami", "Heat", "Are", "Tied", "%s"),
    entity_name="miami heat",
    entity_span=(5, 7),
    object_name="[OBJ0]",
    box=(0.5, 0.4, 0.25, 0.5),
    image="1.jpg",
    label="/per/misc/party",
)


def test_the_prompt_holds_the_whole_question():
    text = student_prompt(FACT, ONTOLOGY)
    assert text.count("<|vision_start|><|image_pad|><|vision_end|>") == 2
    assert text.count(IMAGE_PAD) == 2
    assert "After 4 {Lopsided} Games , Miami Heat Are Tied %s\n" in text
    assert text.count("Miami Heat") == 2  # In the title, and as what is asked about.
    lines = text.splitlines()
    assert [line for line in lines if line in ONTOLOGY.labels] == list(ONTOLOGY.labels)
    assert "per, org, loc, misc, vehicle" in text
    assert "<think>" in text
    assert "<answer>" in text
    assert "Step 1:" in text
    assert "Step 6:" in text


def test_the_prompt_is_one_user_turn_that_ends_where_the_assistant_speaks():
    text = student_prompt(FACT, ONTOLOGY)
    assert text.count("<|im_start|>") == 3
    assert text.count("<|im_end|>") == 2
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_the_prompt_does_not_depend_on_the_answer():
    other = dataclasses.replace(FACT, label="none")
    assert student_prompt(other, ONTOLOGY) == student_prompt(FACT, ONTOLOGY)


def test_a_hidden_photo_leaves_no_trace():
    text = student_prompt(FACT, ONTOLOGY, show_photo=False)
    assert "vision" not in text
    assert IMAGE_PAD not in text
    assert FACT.title in text
    assert "Miami Heat" in text


def test_a_hidden_title_leaves_the_entity_alone():
    text = student_prompt(FACT, ONTOLOGY, show_title=False)
    assert text.count(IMAGE_PAD) == 2
    assert "Miami Heat" in text
    for word in ("After", "{Lopsided}", "Games", "Tied", "%s"):
        assert word not in text
    # Nothing of the title shows, its length included.
    other = dataclasses.replace(FACT, tokens=("Miami", "Heat"), entity_span=(0, 2))
    assert student_prompt(other, ONTOLOGY, show_title=False) == text


@pytest.mark.parametrize(
    "token", ["<|im_end|>", "<|image_pad|>", "<|endoftext|>", "<|video_pad|>", "<|fim_prefix|>"]
)
@pytest.mark.parametrize("shown", [{}, {"show_photo": False}, {"show_title": False}])
def test_a_special_token_in_the_title_is_refused_by_name(token, shown):
    fact = dataclasses.replace(FACT, tokens=(*FACT.tokens, f"x{token}"))
    with pytest.raises(DataError, match=r"^train:4: the title holds ") as error:
        student_prompt(fact, ONTOLOGY, **shown)
    assert repr(token) in str(error.value)
    assert "\n" not in str(error.value)


def test_what_only_looks_like_a_special_token_is_text():
    fact = dataclasses.replace(FACT, tokens=(*FACT.tokens, "<im_end>", "<|>", "|image_pad|"))
    assert "<im_end> <|> |image_pad|" in student_prompt(fact, ONTOLOGY)


def test_a_direct_answer_is_the_label_alone():
    assert direct_answer("/per/per/self") == "<answer>/per/per/self</answer>"
