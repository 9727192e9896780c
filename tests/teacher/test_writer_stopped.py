"""The writer where the endpoint is down or refuses, and where a signal ends a run."""

import dataclasses
import os
import re
import signal
import threading
import time

import pytest

from morer1_jax.teacher.endpoint import EndpointError
from morer1_jax.teacher.writer import Writer

ERROR = {"message": "Said the server", "param": "temperature"}


def interrupted(folder, written, answers, *numbers):
    """A thread that sends this process signals once a journal has so many answers."""

    def interrupt():
        while len(written.answers(folder)) < answers:
            time.sleep(0.01)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.2)

    thread = threading.Thread(target=interrupt)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_requests_in_flight(
    teacher, teachable, settings, capsys, number, written
):
    folder, facts = teachable(40)
    teacher.set(facts, behaviours={"good": 1, "slow": 1})
    thread = interrupted(folder, written, 8, number)
    assert Writer(settings(folder, count=40, in_flight=4)).run() == 128 + number
    thread.join()
    kept, _ = written.outputs(folder)
    assert 8 <= len(kept) == len(written.answers(folder)) < 40
    assert written.lost(folder) == []
    assert len(teacher.log()) == len(kept)
    shown = capsys.readouterr().out
    assert re.search(rf"^{number.name}: waiting for \d requests in flight, up to 120 s", shown, 8)
    assert f"stopped by {number.name}; start again to go on" in shown
    assert re.search(rf"^total +{len(kept)} +0 +{40 - len(kept)}$", shown, re.MULTILINE)
    assert Writer(settings(folder, count=40)).run() == 0
    assert written.outputs(folder)[0].items() > kept.items()
    assert len(teacher.log()) == 40


def test_a_second_signal_gives_up_the_requests_in_flight(teacher, teachable, settings, written):
    folder, facts = teachable(8)
    teacher.set(facts, lasting={"": 1, "late": 1})
    thread = interrupted(folder, written, 2, signal.SIGINT, signal.SIGTERM)
    started = time.monotonic()
    assert Writer(settings(folder, count=8, in_flight=8)).run() == 128 + signal.SIGINT
    assert time.monotonic() - started < 1.5  # An answer that is late takes two seconds.
    thread.join()
    kept, _ = written.outputs(folder)
    assert len(kept) >= 2
    assert len(written.lost(folder)) == 8 - len(kept) > 0


def test_a_signal_waits_no_longer_than_the_time_out(teacher, teachable, settings, written):
    folder, facts = teachable(8)
    teacher.set(facts, lasting={"": 1, "late": 1})
    thread = interrupted(folder, written, 2, signal.SIGTERM)
    started = time.monotonic()
    config = settings(folder, count=8, in_flight=8, timeout=0.8)
    assert Writer(config).run() == 128 + signal.SIGTERM
    assert time.monotonic() - started < 1.8
    thread.join()


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "correct OPENAI_API_KEY"), (404, "correct --model or --base-url"), (400, "it names")],
)
def test_an_error_of_all_requests_ends_the_run(
    teacher, teachable, settings, status, message, written
):
    folder, facts = teachable(30)
    teacher.set(
        facts, reply={"status": status, "body": {"error": ERROR | {"message": teacher.key}}}
    )
    config = settings(folder, count=30, in_flight=4, budget_dollars=1.2)
    with pytest.raises(EndpointError, match=message) as error:
        Writer(config).run()
    assert teacher.key not in str(error.value)
    assert len(teacher.log()) <= 4
    assert (
        written.lost(folder) == []
    )  # An error is not billed, also of those sent at the same time.
    assert written.outputs(folder) == ({}, {})
    teacher.set(facts)
    assert Writer(config).run() == 0
    assert len(written.outputs(folder)[0]) == 30


def test_an_endpoint_that_is_down_ends_the_run_and_costs_no_fact(
    teacher, teachable, settings, written
):
    folder, facts = teachable(30)
    teacher.set(facts, reply={"status": 503, "body": {}})
    config = settings(folder, count=30, in_flight=4, retries=0)
    with pytest.raises(EndpointError, match=r"1\d facts in a row .* \(last: train:\d+: HTTP 503\)"):
        Writer(config).run()
    assert 10 <= len(teacher.log()) <= 14
    teacher.set(facts)
    assert Writer(config).run() == 0
    assert len(written.outputs(folder)[0]) == 30


def test_a_run_that_reaches_nothing_ends_with_an_error_and_costs_nothing(
    teacher, teachable, settings, written
):
    folder, facts = teachable(4)
    config = settings(folder, count=4, budget_dollars=1.2)
    away = dataclasses.replace(config.endpoint, base_url="http://127.0.0.1:9/v1", retries=1)
    for _ in range(3):
        with pytest.raises(
            EndpointError, match=r"no request was answered \(last: train:\d: not re"
        ):
            Writer(dataclasses.replace(config, endpoint=away)).run()
    assert len(written.answers(folder)) == 3 * 4 * 2
    assert written.lost(folder) == []
    _, aside = written.outputs(folder)
    assert {line["reasons"][0].partition(":")[0] for line in aside.values()} == {"not reached"}
    teacher.set(facts)
    assert Writer(config).run() == 0
    assert len(written.outputs(folder)[0]) == 4


def test_facts_that_the_endpoint_refuses_are_set_aside_for_good(
    teacher, teachable, settings, capsys, written
):
    folder, facts = teachable(24)
    teacher.set(facts, lasting={"": 4, "unfit": 1, "blocked": 1})
    config = settings(folder, count=24)
    assert Writer(config).run() == 0
    kept, aside = written.outputs(folder)
    assert len(kept) + len(aside) == 24
    assert {tuple(line["reasons"]) for line in aside.values()} == {
        ("HTTP 400, invalid_image: Invalid image, [key]",),
        ("HTTP 400, content_filter: The response was filtered",),
    }
    assert re.search(r"^  refused: HTTP 400, invalid_image: \d$", capsys.readouterr().out, 8)
    assert Writer(config).run() == 0
    assert len(teacher.log()) == 24


def test_refusals_of_every_fact_cost_no_fact(teacher, teachable, settings, written):
    folder, facts = teachable(30)
    config = settings(folder, count=30, in_flight=4)
    teacher.set(facts, lasting={"unfit": 1})
    alike = r"facts in a row were refused alike \(last: train:\d+: HTTP 400, invalid_image: Inv"
    with pytest.raises(EndpointError, match=alike):
        Writer(config).run()
    assert 5 <= len(teacher.log()) <= 5 + 4
    teacher.set(facts, lasting={"blocked": 1})  # A filter may refuse many, and is asked for all.
    with pytest.raises(
        EndpointError, match=r"no request was answered .* The response was filtered"
    ):
        Writer(config).run()
    assert len(teacher.log()) == len(written.outputs(folder)[1]) == 30
    teacher.set(facts)
    assert Writer(config).run() == 0
    assert len(written.outputs(folder)[0]) == 30


def test_a_fact_that_is_never_answered_is_set_aside_until_the_next_run(
    teacher, teachable, settings, capsys, written
):
    folder, facts = teachable(12)
    teacher.set(facts, lasting={"": 3, "broken": 1})
    assert Writer(settings(folder, count=12, retries=1)).run() == 0
    kept, aside = written.outputs(folder)
    assert len(kept) + len(aside) == 12
    assert {tuple(line["reasons"]) for line in aside.values()} == {("HTTP 500",)}
    assert f"{len(aside)} facts were not answered; start again" in capsys.readouterr().out
    teacher.set(facts)
    assert Writer(settings(folder, count=12)).run() == 0
    assert {entry["fact"] for entry in teacher.log()} == aside.keys()
    assert len(written.outputs(folder)[0]) == 12
