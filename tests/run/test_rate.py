"""Rating difficulty: which fact is easy or hard, and the file that says so."""

import dataclasses
import json
import types

import numpy as np
import pytest

from morer1_jax.run.rate import (
    FILE,
    Rating,
    classify,
    histogram,
    pool_again,
    rate,
    read_ratings,
    run_rate,
)
from morer1_jax.run.settings import RateSettings
from morer1_jax.task.fact import DataError

RATE = RateSettings(
    begin="sft", file=None, samples=4, batch=8, temperature=1.0, easy_from=0.5, never="hard"
)
RATINGS = [
    Rating("train:1", 1.0, "easy"),
    Rating("train:2", 0.5, "easy"),
    Rating("train:3", 0.25, "hard"),
    Rating("train:4", 0.0, "dropped"),
]


@pytest.mark.parametrize(
    ("pass_rate", "easy_from", "never", "pool"),
    [
        (1.0, 0.5, "hard", "easy"),
        (0.5, 0.5, "hard", "easy"),
        (0.25, 0.5, "hard", "hard"),
        (0.25, 0.5, "drop", "hard"),
        (0.25, 0.25, "drop", "easy"),
        (0.0, 0.5, "hard", "hard"),
        (0.0, 0.5, "drop", "dropped"),
        (0.75, 1.0, "hard", "hard"),
        (1.0, 1.0, "drop", "easy"),
    ],
)
def test_pools(pass_rate, easy_from, never, pool):
    assert classify(pass_rate, dataclasses.replace(RATE, easy_from=easy_from, never=never)) == pool


def write(path, *lines):
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_what_is_written_is_read(tmp_path):
    lines = [json.dumps(dataclasses.asdict(rating)) for rating in RATINGS]
    path = write(tmp_path / "ratings.jsonl", *lines)
    assert read_ratings(path) == RATINGS
    # As editors on Windows save it.
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_ratings(path) == RATINGS


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "3",
        '{"fact": "train:1", "pass_rate": 1.0}',
        '{"fact": "train:1", "pass_rate": 1.0, "pool": "easy", "more": 1}',
        '{"fact": "train:1", "pass_rate": 1.0, "pool": "middling"}',
        '{"fact": "train:1", "pass_rate": 1.5, "pool": "easy"}',
        '{"fact": "train:1", "pass_rate": "all", "pool": "easy"}',
        '{"fact": "train:1", "pass_rate": NaN, "pool": "easy"}',
    ],
)
def test_a_malformed_line_is_named(tmp_path, line):
    good = json.dumps(dataclasses.asdict(RATINGS[0]))
    path = write(tmp_path / "ratings.jsonl", good, line, good)
    with pytest.raises(DataError, match=r"ratings\.jsonl:2: .* a rating .* expected") as error:
        read_ratings(path)
    assert "\n" not in str(error.value)


def test_bytes_that_are_no_text_are_a_malformed_line(tmp_path):
    path = tmp_path / "ratings.jsonl"
    path.write_bytes(b'{"fact": "\xff\xfe"}\n')
    with pytest.raises(DataError, match=r"ratings\.jsonl:1: "):
        read_ratings(path)


def test_a_missing_file_says_where_ratings_are_from(tmp_path):
    with pytest.raises(DataError, match=r"ratings\.jsonl: no such file; .* the stage `rate` or to"):
        read_ratings(tmp_path / "ratings.jsonl")
    with pytest.raises(DataError, match=r": Is a directory; expected ratings"):
        read_ratings(tmp_path)


def test_histogram_counts_facts_by_pass_rate():
    ratings = [*RATINGS, *(Rating(f"train:{i}", 1.0, "easy") for i in range(5, 8))]
    title, *rows = histogram(ratings, width=8).splitlines()
    assert title == "pass rates of 7 facts (5 easy, 1 hard, 1 dropped):"
    assert [(float(r.split()[0]), r.count("#"), int(r.split()[-1])) for r in rows] == [
        (0.0, 2, 1),
        (0.25, 2, 1),
        (0.5, 2, 1),
        (1.0, 8, 4),
    ]


FACTS = [types.SimpleNamespace(id=rating.fact, label="none") for rating in RATINGS]


def given(tmp_path, ratings, **changes):
    """The stage, with ratings made before."""
    lines = [json.dumps(dataclasses.asdict(rating)) for rating in ratings]
    path = write(tmp_path / "given.jsonl", *lines)
    config = dataclasses.replace(RATE, file=str(path), **changes)
    job = types.SimpleNamespace(
        workdir=tmp_path,
        facts={"train": FACTS},
        settings=types.SimpleNamespace(rate=config),
    )
    (tmp_path / "rate").mkdir(exist_ok=True)
    run_rate(job, None)
    return read_ratings(tmp_path / "rate" / FILE)


def test_ratings_made_before_get_the_configs_pools_and_the_facts_order(tmp_path):
    assert [rating.pool for rating in given(tmp_path, RATINGS[::-1], easy_from=0.25)] == [
        "easy",
        "easy",
        "easy",
        "hard",
    ]


@pytest.mark.parametrize(
    ("ratings", "message"),
    [
        (RATINGS[1:], r"of 3 facts found, of the 4 .* 1 missing, such as \['train:1'\]"),
        ([*RATINGS, Rating("train:9", 1.0, "easy")], r"1 of no such fact, such as \['train:9'\]"),
        ([*RATINGS, RATINGS[1]], r"given\.jsonl:5: train:2 is rated twice, expected once"),
        ([], r"given\.jsonl: empty, expected a rating a line"),
    ],
)
def test_ratings_of_other_facts_are_refused(tmp_path, ratings, message):
    with pytest.raises(DataError, match=message):
        given(tmp_path, ratings)


class Asked:
    """Answers a fact rightly in as many of four samples as its number says; may die."""

    batch = 2
    ontology = types.SimpleNamespace(ids={"none": 0})

    def __init__(self, die_at=None):
        self.die_at, self.seen = die_at, []

    def ask(self, params, facts, desc, start=0):
        for number, fact in enumerate(facts[start:], start=start):
            if number == self.die_at:
                raise KeyboardInterrupt
            self.seen.append(fact.id)
            yield fact, types.SimpleNamespace(answer=np.where(np.arange(4) < number, 0, -1))


def test_a_rating_that_was_killed_goes_on_at_its_last_whole_batch(tmp_path):
    out = tmp_path / "ratings.jsonl"
    with pytest.raises(KeyboardInterrupt):
        rate(Asked(die_at=3), None, FACTS, RATE, out, {"checkpoint": "a"})
    assert not out.exists()
    again = Asked()
    rate(again, None, FACTS, RATE, out, {"checkpoint": "a"})
    assert again.seen == ["train:3", "train:4"]
    assert [rating.pass_rate for rating in read_ratings(out)] == [0, 0.25, 0.5, 0.75]


def test_a_rating_of_another_checkpoint_begins_anew(tmp_path):
    out = tmp_path / "ratings.jsonl"
    with pytest.raises(KeyboardInterrupt):
        rate(Asked(die_at=3), None, FACTS, RATE, out, {"checkpoint": "a"})
    again = Asked()
    rate(again, None, FACTS, RATE, out, {"checkpoint": "b"})
    assert again.seen == [fact.id for fact in FACTS]


def test_a_rating_goes_on_under_another_batch_with_what_was_rated(tmp_path):
    """So that one that is out of memory loses nothing."""
    out = tmp_path / "ratings.jsonl"
    with pytest.raises(KeyboardInterrupt):
        rate(Asked(die_at=3), None, FACTS, RATE, out, {"checkpoint": "a"})
    smaller = Asked()
    smaller.batch = 1
    rate(smaller, None, FACTS, RATE, out, {"checkpoint": "a"})
    assert smaller.seen == ["train:4"]
    assert [rating.pass_rate for rating in read_ratings(out)] == [0, 0.25, 0.5, 0.75]


def test_a_rating_goes_on_under_other_pools(tmp_path):
    out = tmp_path / "ratings.jsonl"
    # As earlier versions began it, the pools' keys among what it depends on.
    with pytest.raises(KeyboardInterrupt):
        rate(Asked(die_at=3), None, FACTS, RATE, out, {"easy_from": 0.5, "never": "hard", "a": 1})
    again, other = Asked(), dataclasses.replace(RATE, easy_from=0.25, never="drop")
    rate(again, None, FACTS, other, out, {"a": 1})
    assert again.seen == ["train:3", "train:4"]
    assert [rating.pool for rating in read_ratings(out)] == ["dropped", "easy", "easy", "easy"]


def test_pools_follow_from_the_pass_rates_that_are_there(tmp_path, capsys):
    lines = [json.dumps(dataclasses.asdict(rating)) for rating in RATINGS]
    path = write(tmp_path / "ratings.jsonl", *lines)
    other = dataclasses.replace(RATE, easy_from=0.25)
    ratings = pool_again(path, other)
    assert [rating.pool for rating in ratings] == ["easy", "easy", "easy", "hard"]
    assert read_ratings(path) == ratings
    assert "pass rates of 4 facts (3 easy, 1 hard, 0 dropped)" in capsys.readouterr().out
    before = path.stat().st_mtime_ns
    assert pool_again(path, other) == ratings
    assert path.stat().st_mtime_ns == before


def test_a_rating_that_finds_no_room_is_kept_whole(tmp_path, file_limit):
    out = tmp_path / "ratings.jsonl"
    facts = [types.SimpleNamespace(id=f"train:{i}", label="none") for i in range(40)]
    with file_limit(1000), pytest.raises(OSError, match="File too large") as error:
        rate(Asked(), None, facts, RATE, out)
    assert error.value.filename == str(out.with_suffix(".unfinished"))
    again = Asked()
    rate(again, None, facts, RATE, out)
    assert 0 < len(again.seen) < 40
    assert [rating.fact for rating in read_ratings(out)] == [fact.id for fact in facts]
