"""Questions about photos of no dataset: how they are read, and how answers are shown."""

import json
from unicodedata import normalize

import numpy as np
import pytest
from PIL import Image

from morer1_jax.errors import DataError
from morer1_jax.run.batch_sampler import Answer
from morer1_jax.serve.predict import (
    as_json,
    as_question,
    as_text,
    draw_box,
    question,
    read_questions,
)
from morer1_jax.task.answer import format_answer

GIVEN = {
    "image": "photo.jpg",
    "box": [0.5, 0.5, 0.2, 0.4],
    "title": "After 4 Lopsided Games, Heat and Celtics Are Tied Up",
    "entity": "Heat",
}


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (200, 100), (9, 9, 9)).save(tmp_path / "photo.jpg")
    return tmp_path


@pytest.mark.parametrize(
    ("title", "entity", "words", "span"),
    [
        ("Heat and Celtics tied", "Celtics", "Heat and Celtics tied", (2, 3)),
        ("Games, Heat's and Heat, tied", "Heat", "Games, Heat 's and Heat, tied", (1, 2)),
        ("Beat the  Miami Heat!", "Miami Heat", "Beat the Miami Heat !", (2, 4)),
        ("Reheat the Heat", "Heat", "Reheat the Heat", (2, 3)),
        ("Straße in Köln.", "Köln", "Straße in Köln .", (2, 3)),
        ("(U.S.) wins", "U.S.", "( U.S. ) wins", (1, 2)),
    ],
)
def test_an_entity_is_found_in_its_title(folder, title, entity, words, span):
    fact = question(3, GIVEN | {"title": title, "entity": entity}, folder)
    assert fact.id == "question:3"
    assert fact.title == words
    assert fact.entity_span == span
    assert fact.entity_text == entity
    assert fact.image == str(folder / "photo.jpg")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"entity": "Bulls"}, "^entity: expected words of the title .* found 'Bulls'"),
        ({"entity": "elt"}, "^entity: expected words of the title .* found 'elt'"),
        ({"entity": " "}, "^entity: expected text, found ' '"),
        ({"title": 3}, "^title: expected text, found 3"),
        ({"title": "Heat \ud800"}, r"^title: expected Unicode text, found .* 'Heat \\ud800'"),
        ({"entity": "\udfff"}, r"^entity: expected Unicode text, found .* '\\udfff'"),
        (
            {"image": "none.jpg"},
            "^image: expected .* found no photo 'none.jpg' in /.*; give its path from there, or",
        ),
        ({"box": "middle"}, "^box: expected four numbers, found 'middle'"),
        ({"box": [0.5, 0.5, 0.2]}, "expected four numbers"),
        ({"box": [0.5, 0.5, 0.0, 0.2]}, "expected a width and height above 0"),
        ({"box": [0.9, 0.5, 0.4, 0.2]}, "expected fractions within 0 to 1"),
        ({"colour": "red"}, "expected the keys image, box, title, entity, found also colour"),
    ],
)
def test_a_bad_question_is_named(folder, change, message):
    with pytest.raises(DataError, match=message) as error:
        question(1, GIVEN | change, folder)
    assert "\n" not in str(error.value)


def test_a_key_that_is_missing_is_named(folder):
    given = {k: v for k, v in GIVEN.items() if k not in ("box", "title")}
    with pytest.raises(DataError, match=r"^expected the keys image, .*, found no box, title"):
        question(1, given, folder)


def test_what_is_asked_may_be_in_any_form_of_unicode(folder):
    """macOS types and keeps letters and their marks apart; others do not."""
    typed = {form: normalize(form, "\xe9t\xe9.jpg") for form in ("NFC", "NFD")}
    for kept, other in (("NFC", "NFD"), ("NFD", "NFC")):
        here = folder / kept
        here.mkdir()
        Image.new("RGB", (20, 10)).save(here / typed[kept])
        given = {
            "image": typed[other],
            "title": normalize(other, "Jos\xe9 meets Jos"),
            "entity": normalize(kept, "Jos\xe9"),
        }
        fact = question(1, GIVEN | given, here)
        assert fact.image == str(here / typed[kept])
        assert (fact.entity_text, fact.title) == ("Jos\xe9", "Jos\xe9 meets Jos")
        # A letter's mark is no end of a word.
        fact = question(1, GIVEN | given | {"entity": "Jos"}, here)
        assert fact.entity_span == (2, 3)


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
def test_a_photo_is_found_though_each_folder_above_has_a_form_of_its_own(folder, forms):
    inner = folder / normalize(forms[0], "\xe9quipe") / "x"
    inner.mkdir(parents=True)
    photo = inner / normalize(forms[1], "\xe9t\xe9.jpg")
    Image.new("RGB", (20, 10)).save(photo)
    # One of nearly the same name, without the photo.
    (folder / normalize({"NFC": "NFD", "NFD": "NFC"}[forms[0]], "\xe9quipe")).mkdir()
    for form in ("NFC", "NFD"):
        name = normalize(form, "\xe9quipe/x/\xe9t\xe9.jpg")
        for image in (name, f"./{name}", folder / name):
            assert question(1, GIVEN | {"image": str(image)}, folder).image == str(photo)
    with pytest.raises(DataError, match="no photo"):
        question(1, GIVEN | {"image": "\xe9quipe/y/\xe9t\xe9.jpg"}, folder)


def test_a_byte_order_mark_is_no_part_of_a_question(folder):
    path = folder / "questions.jsonl"
    path.write_text(json.dumps(GIVEN), encoding="utf-8-sig")
    assert [fact.id for fact in read_questions(path)] == ["question:1"]
    path.write_text(json.dumps(GIVEN), encoding="utf-16")
    with pytest.raises(DataError, match=rf"^{path}: expected UTF-8 text, found UTF-16"):
        read_questions(path)


def test_questions_of_a_file(folder):
    path = folder / "questions.jsonl"
    path.write_text(json.dumps(GIVEN) + "\n\n" + json.dumps(GIVEN | {"entity": "Celtics"}) + "\n")
    assert [(fact.id, fact.entity_text) for fact in read_questions(path)] == [
        ("question:1", "Heat"),
        ("question:3", "Celtics"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a question a line, found none"),
        ("\n[1]\n", r"jsonl:2: expected a question, a JSON object, found '\[1\]'"),
        ("{\n", "jsonl:1: .* found '{'"),
        (json.dumps(GIVEN | {"entity": "Bulls"}), "jsonl:1: entity: .* found 'Bulls'"),
    ],
)
def test_a_bad_file_is_named_with_its_line(folder, text, message):
    path = folder / "questions.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_questions(path)
    with pytest.raises(DataError, match=r"absent\.jsonl"):
        read_questions(folder / "absent.jsonl")


STEPS = [f"the {k}th." for k in range(1, 7)]


def test_how_an_answer_is_shown(folder):
    fact = question(1, GIVEN, folder)
    text = format_answer(STEPS, "/per/org/opposed_to")
    answer = Answer(fact.id, "/per/org/opposed_to", text, True, 30)
    lines = as_text(answer).splitlines()
    assert lines[:6] == [f"Step {k}: {step}" for k, step in enumerate(STEPS, start=1)]
    assert lines[-1] == "Answer: /per/org/opposed_to"
    shown = json.loads(as_json(fact, answer))
    assert shown == {
        "image": str(folder / "photo.jpg"),
        "box": [0.5, 0.5, 0.2, 0.4],
        "title": "After 4 Lopsided Games, Heat and Celtics Are Tied Up",
        "entity": "Heat",
        "label": "/per/org/opposed_to",
        "steps": STEPS,
        "text": text,
        "format": True,
        "effort": 30,
    }


def test_questions_about_one_photo_are_told_apart(folder):
    changes = ({}, {"box": [0.5, 0.5, 0.25, 0.4]}, {"entity": "Celtics"}, {"title": "Heat win"})
    shown = [as_question(question(1, GIVEN | change, folder)) for change in changes]
    assert shown[0].endswith(f"photo.jpg [0.5,0.5,0.2,0.4] 'Heat' in {GIVEN['title']!r}:")
    assert len(set(shown)) == len(shown)


def test_an_answer_that_cannot_be_read_is_shown_as_it_is(folder):
    fact = question(1, GIVEN, folder)
    answer = Answer(fact.id, None, "well, hm", False, 0)
    assert as_text(answer) == "well, hm\n\nAnswer: unreadable"
    shown = json.loads(as_json(fact, answer))
    assert shown["label"] is None
    assert shown["steps"] is None


def test_the_box_is_drawn_where_it_is(folder):
    picture = np.asarray(draw_box(question(1, GIVEN, folder)))
    drawn = np.argwhere((picture > 200).any(-1))
    assert picture.shape == (100, 200, 3)
    np.testing.assert_allclose(drawn.min(0), (30, 80), atol=3)
    np.testing.assert_allclose(drawn.max(0), (70, 120), atol=3)
    assert (picture[50, 100] < 30).all()
