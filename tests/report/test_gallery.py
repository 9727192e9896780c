import dataclasses
import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from morer1_jax.data import more_tfds
from morer1_jax.errors import DataError
from morer1_jax.model.config import ImageConfig
from morer1_jax.report.gallery import choose, gallery_section, is_right, read_answers
from morer1_jax.run.batch_sampler import Answer
from morer1_jax.task import more
from morer1_jax.task.fact import Fact


def pair(number, gold, predicted):
    fact = Fact(
        f"test:{number}", ("A", "b"), "A", (0, 1), "[OBJ0]", (0.5, 0.5, 0.2, 0.2), "1.jpg", gold
    )
    return fact, Answer(fact.id, predicted, "", False, 0)


def pairs_of(rights, wrongs, labels=4):
    pairs = [pair(i, f"l{i % labels}", f"l{i % labels}") for i in range(rights)]
    return pairs + [pair(rights + i, f"l{i % labels}", None) for i in range(wrongs)]


@pytest.mark.parametrize(
    ("rights", "wrongs", "shown"),
    [(50, 50, (12, 12)), (3, 50, (3, 21)), (50, 3, (21, 3)), (2, 1, (2, 1)), (0, 0, (0, 0))],
)
def test_half_are_right_where_there_are_enough(rights, wrongs, shown):
    chosen = choose(pairs_of(rights, wrongs), 24, seed=0)
    right = sum(map(is_right, chosen))
    assert (right, len(chosen) - right) == shown


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 20), st.integers(0, 5))
def test_a_choice_is_distinct_full_and_by_turns(rights, wrongs, count, seed):
    chosen = choose(pairs_of(rights, wrongs), count, seed)
    assert len({fact.id for fact, _ in chosen}) == len(chosen) == min(count, rights + wrongs)
    marks = [is_right(p) for p in chosen]
    least = min(marks.count(True), marks.count(False))
    assert marks[: 2 * least] == [False, True] * least


def test_a_choice_is_spread_over_labels_however_rare():
    pairs = [pair(i, "common", "common") for i in range(500)]
    pairs += [pair(500 + i, f"rare{i}", f"rare{i}") for i in range(5)]
    chosen = choose(pairs, 12, seed=3)
    assert Counter(fact.label for fact, _ in chosen) == {
        "common": 7,
        **{f"rare{i}": 1 for i in range(5)},
    }


def test_a_choice_depends_on_the_seed_alone():
    pairs = pairs_of(200, 200)
    assert choose(pairs, 10, 1) == choose(list(pairs), 10, 1)
    assert choose(pairs, 10, 1) != choose(pairs, 10, 2)
    one_label = pairs_of(200, 200, labels=1)
    assert choose(one_label, 10, 1) != choose(one_label, 10, 2)


def test_answers_are_read_with_their_facts(tmp_path):
    path = tmp_path / "grpo.answers.jsonl"
    pairs = [pair(1, "a", "b"), pair(2, "a", None)]
    pairs[1] = (pairs[1][0], dataclasses.replace(pairs[1][1], text="a\u2028b"))
    lines = [json.dumps(dataclasses.asdict(a), ensure_ascii=False) for _, a in pairs]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    assert read_answers(path, [fact for fact, _ in pairs]) == pairs


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"answers.jsonl:2: expected an answer .*, found '\{'"),
        ('{"fact": "test:1"}', "answers.jsonl:2: expected an answer"),
        (
            '{"fact": "test:1", "label": 3, "text": "", "format": true, "effort": 0}',
            "expected an answer",
        ),
        (
            '{"fact": "test:9", "label": null, "text": "", "format": true, "effort": 0}',
            "a fact of the split, found 'test:9'",
        ),
    ],
)
def test_a_bad_answer_is_named(tmp_path, line, message):
    path = tmp_path / "answers.jsonl"
    fact, answer = pair(1, "a", "b")
    path.write_text(json.dumps(dataclasses.asdict(answer)) + "\n" + line + "\n")
    with pytest.raises(DataError, match=message):
        read_answers(path, [fact])


def test_absent_answers_are_named(tmp_path):
    with pytest.raises(
        DataError, match=r"sft.answers.jsonl: expected an answer .*, found No such file"
    ):
        read_answers(tmp_path / "sft.answers.jsonl", [])


def test_photos_are_those_of_either_form_of_the_dataset(small_world, tmp_path):
    more_tfds.build(small_world, tmp_path / "tfds")
    facts = more.read_split(small_world, "test", more.read_ontology(small_world))
    (tmp_path / "eval").mkdir()
    answers = [json.dumps(dataclasses.asdict(Answer(f.id, f.label, "", True, 0))) for f in facts]
    (tmp_path / "eval" / "sft.answers.jsonl").write_text("\n".join(answers))
    folders = (small_world, tmp_path / "tfds" / "more")
    ours, theirs = (
        gallery_section(tmp_path, folder, "test", ImageConfig(), 4, 0) for folder in folders
    )
    assert ours == theirs
    assert ours.count("data:image/jpeg;base64,") == 8
