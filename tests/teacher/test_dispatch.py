"""Requests that fail, that are refused, and that are in flight when a run is to end."""

import asyncio
import dataclasses
import os
import re
import signal
import threading
import time

import pytest

from morer1_jax.errors import DataError
from morer1_jax.task.answer import format_answer
from morer1_jax.task.ontology import Ontology
from morer1_jax.teacher import dispatch
from morer1_jax.teacher.dispatch import Dispatcher
from morer1_jax.teacher.endpoint import EndpointConfig, EndpointError, Reply
from morer1_jax.teacher.journal import Journal, RequestResult, RequestSent, RunStarted, read_journal
from morer1_jax.teacher.ledger import Ledger, Prices, Usage
from morer1_jax.teacher.request import Request
from morer1_jax.teacher.results import Results

FAILED = Reply("failed", problem="HTTP 500", transient=True, usage=Usage())
REFUSED = Reply("refused", problem="HTTP 400: Said the server", usage=Usage())
LOST = Reply("failed", problem="time-out", transient=True)


def good(fact):
    text = format_answer(("one", "two", "three", "four", "five", "six"), fact.label)
    return Reply(text=text, usage=Usage(100, 50))


class Fake:
    """An endpoint that replies by the fact's script, or else with an answer."""

    def __init__(self, facts, script, **config):
        self.config = EndpointConfig(model="fake", **{"retries": 3, "timeout": 0.3} | config)
        self.facts = {fact.id: fact for fact in facts}
        self.script = {name: list(replies) for name, replies in script.items()}
        self.asked = []

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        pass

    async def ask(self, messages):
        name = messages[0]["content"][-1]["text"]
        self.asked.append(name)
        await SLEEP(0)  # Others are sent meanwhile.
        replies = self.script.get(name, [])
        reply = replies.pop(0) if replies else good(self.facts[name])
        if isinstance(reply, tuple):  # Seconds, and what comes then.
            await SLEEP(reply[0])
            reply = reply[1]
        return reply


SLEEP = asyncio.sleep


@pytest.fixture
def attempt(teachable, tmp_path, monkeypatch):
    """Dispatches facts to a fake endpoint; gives the result or error, the endpoint, the results."""
    _, facts = teachable(30)
    path = tmp_path / "journal.jsonl"
    pauses = []

    async def sleep(seconds):
        pauses.append(seconds)
        await SLEEP(0)

    async def to_thread(function, *args):
        return function(*args)  # In an order that does not depend on threads.

    monkeypatch.setattr(dispatch.asyncio, "sleep", sleep)
    monkeypatch.setattr(dispatch.asyncio, "to_thread", to_thread)
    monkeypatch.setattr(dispatch.random, "uniform", lambda low, high: high)

    def run(count, script, in_flight=1, build=None, budget=None, **config):
        endpoint = Fake(facts, script, **config)
        results = Results(2, Ledger(Prices(), tokens=budget))
        labels = dict.fromkeys(fact.label for fact in facts)
        with Journal(path, {}) as journal:
            for entry in journal.entries:
                results.apply(entry)
            journal.add(began := RunStarted(results.runs + 1))
            results.apply(began)
            asked = [fact for fact in facts[:count] if results.is_pending(fact.id)]
            dispatcher = Dispatcher(
                endpoint=endpoint,
                journal=journal,
                results=results,
                ontology=Ontology(tuple(labels)),
                build=build or (lambda fact: Request(fact.id, (), ((8, 8),))),
                max_in_flight=in_flight,
            )
            try:
                result = asyncio.run(dispatcher.run(asked))
            except (EndpointError, DataError) as error:
                result = error
        return Run(result, endpoint.asked, results, pauses, read_journal(path, {}))

    return run


@dataclasses.dataclass
class Run:
    """What came of a dispatch: what it returned or raised, who was asked for in what order."""

    result: object
    asked: list
    results: Results
    pauses: list
    journal: list

    @property
    def ends(self):
        """Outcome and known usage of each request, in the journal's order."""
        return [
            (line.fact, line.outcome, line.usage is not None)
            for line in self.journal
            if isinstance(line, RequestResult)
        ]


def test_each_retry_is_a_request_of_its_own_in_journal_and_ledger(attempt):
    run = attempt(2, {"train:1": [FAILED, LOST, FAILED]})
    assert run.result is None
    assert [end for end in run.ends if end[0] == "train:1"] == [
        ("train:1", "unanswered", True),
        ("train:1", "unanswered", False),
        ("train:1", "unanswered", True),
        ("train:1", "kept", True),
    ]
    assert sum(isinstance(line, RequestSent) for line in run.journal) == 5
    # A status costs nothing; a lost request may have been billed.
    assert len(run.results.ledger.unsettled) == 1
    assert run.results.ledger.spent == Usage(200, 100)
    assert run.results.kept.keys() == {"train:1", "train:2"}


def test_delays_double_up_to_eight_seconds_or_are_the_endpoints(attempt):
    after = dataclasses.replace(FAILED, retry_after=33.0)
    run = attempt(1, {"train:1": [*(FAILED,) * 3, after, *(FAILED,) * 3]}, retries=8)
    assert run.pauses == [0.5, 1, 2, 33, 8, 8, 8]
    assert run.results.kept.keys() == {"train:1"}


def test_after_an_answer_retries_begin_anew(attempt):
    script = [FAILED, FAILED, Reply(text="?", usage=Usage(1, 1)), FAILED, FAILED]
    run = attempt(1, {"train:1": script}, retries=2)
    assert run.pauses == [0.5, 1, 0.5, 1]
    assert run.results.kept.keys() == {"train:1"}


@pytest.mark.parametrize(
    ("reply", "tries"),
    [
        (FAILED, 3),
        (LOST, 3),
        (dataclasses.replace(FAILED, retry_after=121.0), 1),  # That long no run waits.
        (dataclasses.replace(FAILED, transient=False), 1),
    ],
)
def test_a_fact_that_fails_too_often_is_given_up_in_this_run(attempt, reply, tries):
    run = attempt(2, {"train:1": [reply] * tries}, retries=2)
    assert run.asked.count("train:1") == tries
    assert run.results.unanswered == {"train:1": reply.problem}
    assert run.results.kept.keys() == {"train:2"}
    assert attempt(2, {}).results.kept.keys() == {"train:1", "train:2"}


def test_a_retry_that_waits_does_not_delay_other_facts(attempt):
    run = attempt(3, {"train:1": [FAILED]}, in_flight=2)
    assert run.asked.index("train:2") < len(run.asked) - 1
    assert run.results.kept.keys() == {"train:1", "train:2", "train:3"}


def test_a_retry_that_exceeds_the_budget_is_not_sent(attempt):
    # 100,007 bytes and images, and 1,024 of the answer; what was lost may have cost as much.
    run = attempt(2, {"train:1": [LOST] * 2}, budget=150_000)
    assert isinstance(run.result, EndpointError)  # Of an endpoint that never answered.
    assert run.asked == ["train:1"]
    run = attempt(2, {}, budget=210_000)
    assert run.asked == ["train:1", "train:2"]
    run = attempt(4, {"train:3": [LOST] * 9}, budget=2_600)
    assert run.asked == ["train:3"]


def test_requests_wait_for_the_budget_in_order(attempt):
    def build(fact):
        side = 5120 if fact.id == "train:3" else 8
        return Request(fact.id, (), ((side, side),))

    assert attempt(1, {}).result is None  # From now on it is known what a prompt costs.
    script = {"train:2": [(0.1, Reply(problem="empty", usage=Usage(1, 1)))]}
    run = attempt(4, script, in_flight=3, build=build, budget=5_000)
    assert run.asked == ["train:2"]  # The fourth would fit, but is not sent before the third.
    assert run.result.tiles == 100


def test_facts_given_up_in_a_row_end_the_run_after_the_requests_in_flight(attempt):
    script = {f"train:{n}": [dataclasses.replace(FAILED, transient=False)] for n in range(1, 13)}
    script["train:11"] = [(0.1, Reply(problem="empty", usage=Usage(1, 1)))]
    # The one that answers late is waited for, and shows that the endpoint is up.
    run = attempt(14, script, in_flight=11)
    assert run.result is None
    assert len(run.results.unanswered) == 11
    assert run.results.kept.keys() == {"train:11", "train:13", "train:14"}
    run = attempt(30, {f"train:{n}": [FAILED] for n in range(1, 31)}, retries=0, in_flight=2)
    assert re.match("1[01] facts in a row were not answered", str(run.result))
    assert run.results.ledger.unsettled == {}


def test_facts_given_up_at_the_end_are_an_error_too(attempt):
    failed = dataclasses.replace(FAILED, transient=False)
    run = attempt(11, {f"train:{n}": [failed] for n in range(2, 12)})
    assert str(run.result).startswith("10 facts in a row were not answered (last: train:11: HTTP")
    assert len(run.asked) == 11


def test_a_signal_waits_no_longer_than_the_time_out_for_what_trickles_in(attempt):
    empty = Reply(problem="empty", usage=Usage(1, 1))
    started = time.monotonic()
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    run = attempt(9, {"train:1": [(9.0, empty)], "train:2": [(0.3, empty)]}, in_flight=2)
    assert time.monotonic() - started < 5
    assert run.result is None
    assert run.asked == ["train:1", "train:2"]
    assert run.results.ledger.unsettled.keys() == {1}


def test_a_signal_ends_what_waits_for_a_retry(attempt, monkeypatch):
    monkeypatch.setattr(dispatch.asyncio, "sleep", SLEEP)
    started = time.monotonic()
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    run = attempt(1, {"train:1": [dataclasses.replace(FAILED, retry_after=60.0)]})
    assert time.monotonic() - started < 30
    assert run.result is None
    assert run.asked == ["train:1"]


def test_an_answer_between_shows_that_only_facts_are_refused(attempt):
    script = {f"train:{n}": [REFUSED] for n in (1, 2, 3, 4, 6, 7, 8, 9)}
    run = attempt(10, script)
    assert run.result is None
    assert run.results.refused.keys() == script.keys()
    assert run.asked == [f"train:{n}" for n in range(1, 11)]
    assert attempt(10, {}).asked == []


def test_an_answer_in_flight_shows_that_the_endpoint_works(attempt):
    script = {f"train:{n}": [REFUSED] for n in range(1, 6)}
    script["train:6"] = [(0.1, Reply(problem="empty", usage=Usage(1, 1)))]
    run = attempt(8, script, in_flight=6)
    assert run.result is None
    assert run.results.refused.keys() == script.keys() - {"train:6"}
    assert run.results.kept.keys() == {"train:6", "train:7", "train:8"}


def test_five_facts_refused_alike_end_the_run_and_are_asked_for_again(attempt):
    other = dataclasses.replace(REFUSED, problem="HTTP 413")
    script = {f"train:{n}": [REFUSED] for n in range(1, 20)} | {"train:2": [other]}
    run = attempt(20, script)
    assert re.match(
        r"5 facts in a row were refused alike \(last: train:6: HTTP 400: Said", str(run.result)
    )
    run.results.end_run()
    assert run.results.refused == {}
    assert len(run.results.unanswered) == 6
    assert len(attempt(20, {}).results.kept) == 20


def test_a_fatal_reply_waits_for_the_requests_in_flight(attempt):
    fatal = Reply("fatal", problem="HTTP 401", advice="correct it", usage=Usage())
    empty = Reply(problem="empty", usage=Usage(1, 1))
    script = {"train:1": [fatal], "train:2": [(0.1, empty)], "train:3": [(9.0, empty)]}
    run = attempt(9, script, in_flight=4)
    assert str(run.result) == "correct it, then start again (train:1: HTTP 401)"
    ends = {(fact, outcome) for fact, outcome, _ in run.ends}
    assert ends == {("train:1", "unanswered"), ("train:2", "rejected"), ("train:4", "kept")}
    # Beyond the time-out nothing is waited for; it may have been billed.
    assert len(run.results.ledger.unsettled) == 1
    assert len(run.asked) == 4


def test_a_photo_that_disappears_loses_no_answer(attempt):
    def build(fact):
        if fact.id == "train:3":
            raise DataError("3.jpg is gone")
        return Request(fact.id, (), ((8, 8),))

    script = {f"train:{n}": [(0.1, Reply(problem="empty", usage=Usage(1, 1)))] for n in (1, 2)}
    run = attempt(3, script, in_flight=3, build=build)
    assert str(run.result) == "3.jpg is gone"
    assert {fact for fact, outcome, _ in run.ends if outcome == "rejected"} == script.keys()
    assert run.asked == ["train:1", "train:2"]  # Nothing is sent meanwhile.
