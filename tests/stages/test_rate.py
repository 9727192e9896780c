"""Rating difficulty: which fact is easy or hard, and the file that says so."""

import dataclasses
import json
import os
import re
import types

import numpy as np
import pytest

from morer1_jax.config.settings import RateSettings
from morer1_jax.data.ratings import FILE, Rating, histogram, read_ratings
from morer1_jax.errors import ConfigError, DataError
from morer1_jax.run.store import Store
from morer1_jax.stages.rate import check_rating, classify, pool_again, rate, run_rate

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
    with pytest.raises(DataError, match=r"ratings\.jsonl:2: expected a rating .* found ") as error:
        read_ratings(path)
    assert "\n" not in str(error.value)


def test_bytes_that_are_no_text_are_a_malformed_line(tmp_path):
    path = tmp_path / "ratings.jsonl"
    path.write_bytes(b'{"fact": "\xff\xfe"}\n')
    with pytest.raises(DataError, match=r"ratings\.jsonl:1: "):
        read_ratings(path)


def test_a_missing_file_says_where_ratings_are_from(tmp_path):
    with pytest.raises(
        DataError, match=r"ratings\.jsonl: .* found No such file.*; .* the stage `rate` or to"
    ):
        read_ratings(tmp_path / "ratings.jsonl")
    with pytest.raises(DataError, match=r": expected a rating .* found Is a directory;"):
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
    run = types.SimpleNamespace(
        workdir=tmp_path,
        store=Store(tmp_path),
        prepared={},
        dataset=types.SimpleNamespace(splits={"train": FACTS}),
        settings=types.SimpleNamespace(rate=config),
    )
    (tmp_path / "rate").mkdir(exist_ok=True)
    run_rate(run)
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
        (RATINGS[1:], r"of the 4 .* found 3: 1 missing, such as \['train:1'\]"),
        ([*RATINGS, Rating("train:9", 1.0, "easy")], r"1 of no such fact, such as \['train:9'\]"),
        ([*RATINGS, RATINGS[1]], r"given\.jsonl:5: expected a rating a fact, found train:2 twice"),
        ([], r"given\.jsonl: expected a rating a line, found none"),
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

    def sample(self, params, facts, desc, done=frozenset()):
        for number, fact in enumerate(facts):
            if fact.id in done:
                continue
            if number == self.die_at:
                raise KeyboardInterrupt
            self.seen.append(fact.id)
            yield fact, types.SimpleNamespace(answer=np.where(np.arange(4) < number, 0, -1))


def test_a_rating_that_was_killed_goes_on_with_the_facts_that_are_left(tmp_path):
    out = tmp_path / "ratings.jsonl"
    with pytest.raises(KeyboardInterrupt):
        rate(Asked(die_at=3), None, FACTS, RATE, out, {"checkpoint": "a"})
    assert not out.exists()
    again = Asked()
    rate(again, None, FACTS, RATE, out, {"checkpoint": "a"})
    assert again.seen == ["train:4"]
    assert [rating.pass_rate for rating in read_ratings(out)] == [0, 0.25, 0.5, 0.75]


def test_facts_may_be_rated_in_any_order(tmp_path):
    """Ratings are written in that of the facts."""

    class Sorted(Asked):
        def sample(self, params, facts, desc, done=frozenset()):
            yield from reversed(list(super().sample(params, facts, desc, done)))

    out = tmp_path / "ratings.jsonl"
    rate(Sorted(), None, FACTS, RATE, out)
    assert [rating.fact for rating in read_ratings(out)] == ALL
    assert [rating.pass_rate for rating in read_ratings(out)] == [0, 0.25, 0.5, 0.75]


def kill(out, identity, die_at=3):
    """Rates until the fact of that number."""
    with pytest.raises(KeyboardInterrupt):
        rate(Asked(die_at), None, FACTS, RATE, out, identity)


def rated(out, identity):
    """The facts that are asked until `out` is whole."""
    again = Asked()
    rate(again, None, FACTS, RATE, out, identity)
    assert [rating.pass_rate for rating in read_ratings(out)] == [0, 0.25, 0.5, 0.75]
    return again.seen


ALL, REST = [fact.id for fact in FACTS], ["train:4"]


def test_ratings_of_another_kind_are_not_overwritten(tmp_path):
    out = tmp_path / "ratings.jsonl"
    mine = {"checkpoint": "a", "seed": 0, "photos": "p"}
    kill(out, mine)
    before = (tmp_path / "ratings.jsonl.unfinished").read_bytes()
    for changes, names in (
        ({"seed": 1}, r"seed \(expected 1, found 0\)"),
        ({"photos": "q"}, "photos"),
        ({"checkpoint": "b", "length": 8}, r"checkpoint, length \(expected 8, found None\)"),
    ):
        with pytest.raises(ConfigError) as error:
            rate(Asked(), None, FACTS, RATE, out, mine | changes)
        assert re.fullmatch(
            rf"{tmp_path}/ratings\.jsonl\.unfinished:1: expected ratings of the same settings, "
            rf"found others: {names}; give what they were begun with, or delete it to rate anew",
            str(error.value),
        )
        assert (tmp_path / "ratings.jsonl.unfinished").read_bytes() == before
    assert rated(out, mine) == REST
    assert os.listdir(tmp_path) == ["ratings.jsonl"]


def test_each_file_has_its_own_beginning(tmp_path):
    """Also one whose name is as what is begun of another is called."""
    outs = [tmp_path / name for name in ("ratings.3b", "ratings.7b", "ratings")]
    for out in outs:
        kill(out, {"checkpoint": "the same"})
    (tmp_path / "whole").mkdir()
    whole = tmp_path / "whole" / "ratings.unfinished"
    assert rated(whole, {"checkpoint": "a"}) == ALL
    before = whole.read_bytes()
    assert rated(tmp_path / "whole" / "ratings.3b", {"checkpoint": "a"}) == ALL
    assert whole.read_bytes() == before
    for out in outs:
        assert rated(out, {"checkpoint": "the same"}) == REST
    assert sorted(os.listdir(tmp_path)) == ["ratings", "ratings.3b", "ratings.7b", "whole"]


def test_what_is_no_beginning_is_refused_and_a_torn_one_is_none(tmp_path):
    out, unfinished = tmp_path / "ratings.jsonl", tmp_path / "ratings.jsonl.unfinished"
    unfinished.write_text("notes\n")
    with pytest.raises(DataError, match=r"unfinished:1: .* found 'notes'; delete it to rate anew"):
        rated(out, None)
    unfinished.write_text('{"batch": 2')
    assert rated(out, None) == ALL


def staged(tmp_path, monkeypatch, **changes):
    """The stage; gives the facts that it asks."""
    asked = Asked()
    monkeypatch.setattr("morer1_jax.stages.rate.BatchSampler", lambda *_, **__: asked)
    monkeypatch.setattr("morer1_jax.stages.rate.starting_params", lambda run: None)
    monkeypatch.setattr("morer1_jax.stages.rate.ask_plan", lambda *_: None)
    monkeypatch.setattr("morer1_jax.stages.rate.decode_stages", lambda *_: ())
    run = types.SimpleNamespace(
        workdir=tmp_path,
        store=Store(tmp_path),
        prepared={},
        dataset=types.SimpleNamespace(splits={"train": FACTS}),
        trainee=types.SimpleNamespace(
            policy=None, placed=types.SimpleNamespace(parts=1), whole=lambda params: params
        ),
        reader=types.SimpleNamespace(limits=types.SimpleNamespace(completion=8)),
        sizes={},
        settings=types.SimpleNamespace(
            rate=dataclasses.replace(RATE, **changes),
            seed=0,
            data=types.SimpleNamespace(workers=0),
        ),
    )
    run_rate(run)
    return asked.seen


def test_whole_ratings_are_not_made_again_for_want_of_a_marker(tmp_path, monkeypatch, capsys):
    """Such as of a run that failed as it printed their histogram."""
    out = tmp_path / "rate" / FILE
    out.parent.mkdir()
    assert staged(tmp_path, monkeypatch) == ALL
    assert staged(tmp_path, monkeypatch, easy_from=0.25, never="drop") == []
    assert [rating.pool for rating in read_ratings(out)] == ["dropped", "easy", "easy", "easy"]
    assert "pass rates of 4 facts (3 easy, 0 hard, 1 dropped)" in capsys.readouterr().out
    # What was begun goes before what was whole; what is torn, or of other facts, is none.
    kill(out, None)
    assert staged(tmp_path, monkeypatch) == REST
    for lines in (out.read_text()[:-3], out.read_text().replace("train:4", "train:5")):
        out.write_text(lines)
        assert staged(tmp_path, monkeypatch) == ALL
        error = capsys.readouterr().err
        assert error.startswith(f"{out}:")
        assert error.endswith("; all are rated anew\n")
    assert staged(tmp_path, monkeypatch) == []


def test_what_an_earlier_version_began_to_rate_is_named(tmp_path):
    run = types.SimpleNamespace(
        workdir=tmp_path,
        store=Store(tmp_path),
        settings=types.SimpleNamespace(rate=RATE),
    )
    check_rating(run)
    (tmp_path / "rate").mkdir()
    (tmp_path / "rate" / "ratings.unfinished").write_text('{"batch": 2}\n')
    with pytest.raises(ConfigError, match=r"ratings\.unfinished: .*delete it to rate anew"):
        check_rating(run)


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
    assert again.seen == ["train:4"]
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
    assert error.value.filename == f"{out}.unfinished"
    again = Asked()
    rate(again, None, facts, RATE, out)
    assert 0 < len(again.seen) < 40
    assert [rating.fact for rating in read_ratings(out)] == [fact.id for fact in facts]
