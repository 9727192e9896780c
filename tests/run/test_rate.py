"""Rating difficulty: which fact is easy or hard, and the file that says so."""

import dataclasses
import json

import pytest

from morer1_jax.run.rate import Rating, classify, histogram, read_ratings
from morer1_jax.run.settings import RateSettings
from morer1_jax.task.fact import DataError

RATE = RateSettings(file=None, samples=4, batch=8, temperature=1.0, easy_from=0.5, never="hard")
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
    assert read_ratings(write(tmp_path / "ratings.jsonl", *lines)) == RATINGS


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


def test_a_missing_file_says_which_stage_to_run(tmp_path):
    with pytest.raises(DataError, match=r"ratings\.jsonl: no ratings; run the stage `rate` first"):
        read_ratings(tmp_path / "ratings.jsonl")


def test_histogram_counts_facts_by_pass_rate():
    ratings = [*RATINGS, *(Rating(f"train:{i}", 1.0, "easy") for i in range(5, 8))]
    title, *rows = histogram(ratings, width=8).splitlines()
    assert title == "pass rates of 7 facts (5 easy, 1 hard, 1 dropped):"
    assert [(float(r.split()[0]), r.count("█"), int(r.split()[-1])) for r in rows] == [
        (0.0, 2, 1),
        (0.25, 2, 1),
        (0.5, 2, 1),
        (1.0, 8, 4),
    ]
