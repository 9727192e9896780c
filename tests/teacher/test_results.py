"""The state after a journal's entries, and the closing table."""

import dataclasses

import pytest

from morer1_jax.task.fact import Fact
from morer1_jax.teacher.journal import RequestResult, RequestSent, RunStarted
from morer1_jax.teacher.ledger import Ledger, Prices, Size, Usage
from morer1_jax.teacher.results import Results

SIZE = Size(text=1000, pixels=5000, tiles=2, answer=100)
FACT = Fact(
    id="train:1",
    tokens=("A", "title"),
    entity_name="A",
    entity_span=(0, 1),
    object_name="[OBJ0]",
    box=(0.5, 0.5, 1.0, 1.0),
    image="1.jpg",
    label="none",
)
FACTS = [
    dataclasses.replace(FACT, id=f"train:{number}", label="none" if number < 4 else "/a/b/c")
    for number in range(1, 8)
]


def results_of(*ends, attempts=2, prices=Prices()):  # noqa: B008
    """The results of requests, each (number of its fact, outcome, reason)."""
    results = Results(attempts, Ledger(prices))
    results.apply(RunStarted(1))
    for number, (fact, outcome, reason) in enumerate(ends, start=1):
        results.apply(RequestSent(number, f"train:{fact}", SIZE))
        if outcome is not None:
            usage = Usage(400, 50) if outcome in ("kept", "rejected") else Usage()
            text = f" <think>{number} " if outcome == "kept" else None
            results.apply(RequestResult(number, f"train:{fact}", outcome, reason, usage, text))
    return results


def state(results, fact):
    fact = f"train:{fact}"
    return results.is_pending(fact), results.kept.get(fact), results.set_aside_reasons(fact)


def test_a_fact_is_pending_until_it_is_kept_or_set_aside():
    results = results_of(
        (1, "kept", None),
        (2, "rejected", "format"),
        (2, "kept", None),
        (3, "rejected", "format"),
        (4, "rejected", "format"),
        (4, "rejected", "refusal"),
        (5, "rejected", "empty"),
        (5, "refused", "HTTP 400"),
        (6, "unanswered", "HTTP 500"),
        (7, None, None),
    )
    assert results.requests == 10
    assert state(results, 1) == (False, "<think>1", None)
    assert state(results, 2) == (False, "<think>3", None)
    assert state(results, 3) == (True, None, None)
    assert state(results, 4) == (False, None, ["format", "refusal"])
    assert state(results, 5) == (False, None, ["empty", "HTTP 400"])
    assert state(results, 6) == (True, None, None)  # An earlier run gave it up.
    assert state(results, 7) == (True, None, None)
    assert state(results, 99) == (True, None, None)
    results.unanswered["train:6"] = "HTTP 500"
    assert state(results, 6) == (False, None, ["HTTP 500"])


def refused(*facts):
    return [(fact, "refused", "HTTP 400: no") for fact in facts]


@pytest.mark.parametrize(
    ("ends", "lasting"),
    [
        (refused(1, 2), []),  # Nothing shows that the endpoint answers at all.
        ([*refused(1, 2), (3, "unanswered", "HTTP 500")], []),
        ([*refused(1, 2, 3, 4, 5, 6), (7, "kept", None)], [1, 2, 3, 4, 5, 6]),
        ([*refused(1, 2), (7, "rejected", "format")], [1, 2]),
        ([(7, "kept", None), *refused(1, 2, 3, 4)], [1, 2, 3, 4]),
        ([(7, "kept", None), *refused(1, 2, 3, 4, 5)], []),
        ([*refused(1), (7, "kept", None), *refused(2, 3, 4, 5, 6)], [1]),
    ],
)
def test_a_refusal_is_final_if_the_endpoint_is_known_to_work(ends, lasting):
    results = results_of(*ends)
    seen = {fact for fact, outcome, _ in ends if outcome == "refused"}
    assert not any(results.is_pending(f"train:{fact}") for fact in seen)  # In this run.
    results.end_run()
    assert results.refused.keys() == {f"train:{fact}" for fact in lasting}
    assert not any(results.is_pending(f"train:{fact}") for fact in seen)
    # The next run asks for the others again, and an answer to it says nothing of this one.
    results.apply(RunStarted(2))
    results.apply(RequestSent(99, "train:7", SIZE))
    results.apply(RequestResult(99, "train:7", "kept", None, Usage(1, 1), "text"))
    results.apply(RunStarted(3))
    assert {fact for fact in seen if results.is_pending(f"train:{fact}")} == seen - set(lasting)


def test_more_attempts_make_a_fact_pending_again():
    ends = [(1, "rejected", "format")] * 2
    assert not results_of(*ends).is_pending("train:1")
    assert results_of(*ends, attempts=3).is_pending("train:1")


def test_the_table_counts_requests_and_facts():
    results = results_of(
        (1, "kept", None),
        (2, "rejected", "format"),
        (2, "rejected", "format"),
        (4, "rejected", "refusal"),
        (5, "refused", "HTTP 400: this"),
        (7, "refused", "HTTP 400: that"),
        (6, None, None),
        prices=Prices(2.5, 10.0),
    )
    text = results.table(FACTS, FACTS[:6], ("none", "/a/b/c", "/x/y/z"))
    assert text.splitlines() == [
        "requests: 7, kept: 1",
        "  rejected: format: 2",
        "  refused: HTTP 400: 2",
        "  rejected: refusal: 1",
        "1,600 tokens in, 200 out; cost: $0.0060",
        "requests of unknown cost: 1, at most $0.0022",
        "",
        "label     kept  set aside    left",
        "none         1          1       1",
        "/a/b/c       0          2       2",
        "/x/y/z       0          0       0",
        "total        1          3       3",
    ]


def test_without_prices_tokens_are_counted():
    results = results_of((1, "kept", None))
    assert results.cost() == "450 tokens"
    assert results.unknown_cost() is None
    assert "cost: 450 tokens" in results.table(FACTS, FACTS, ("none", "/a/b/c"))
