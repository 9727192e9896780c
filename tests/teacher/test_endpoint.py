"""Replies of the real client to everything that an endpoint may send."""

import asyncio
import dataclasses
import json
import math
import re
import sys
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from morer1_jax.data.images import ImageReader
from morer1_jax.errors import ConfigError
from morer1_jax.model.config import ImageConfig
from morer1_jax.task import more
from morer1_jax.task.photos import PhotoFiles
from morer1_jax.teacher.endpoint import Endpoint, EndpointConfig, Reply
from morer1_jax.teacher.ledger import Usage
from morer1_jax.teacher.request import build_request

USAGE = {"prompt_tokens": 9, "completion_tokens": 4}


@pytest.fixture(scope="module")
def asked(teachable):
    folder, facts = teachable(1)
    request = build_request(
        facts[0], more.read_ontology(folder), ImageReader(PhotoFiles(folder), ImageConfig())
    )
    return facts, request.messages


@pytest.fixture
def ask(teacher, asked, monkeypatch):
    """Sets the server's mode, asks once with the real client, gives the reply."""
    monkeypatch.setenv("OPENAI_API_KEY", teacher.key)
    config = EndpointConfig(model="teacher", base_url=teacher.url, timeout=20.0)

    def run(times=1, settings=config, **mode):
        if "late" in mode.get("behaviours", ()):  # Only then: a machine may be busy.
            settings = dataclasses.replace(settings, timeout=0.5)
        facts, messages = asked
        teacher.set(facts, **mode)

        async def run():
            async with Endpoint(settings) as endpoint:
                return [await endpoint.ask(messages) for _ in range(times)]

        return asyncio.run(run())[-1]

    return run


def completion(content="text", finish="stop", usage=USAGE, **message):
    choice = {"index": 0, "finish_reason": finish, "message": {"content": content, **message}}
    return {"choices": [choice]} | ({} if usage is None else {"usage": usage})


@pytest.mark.parametrize(
    ("body", "reply"),
    [
        (completion(), Reply(text="text", usage=Usage(9, 4))),
        (completion(usage=None), Reply(text="text")),
        (completion(usage={"prompt_tokens": "9"}), Reply(text="text")),
        (completion(usage={**USAGE, "prompt_tokens": -1}), Reply(text="text")),
        # Hidden thoughts are billed, whether or not they are counted as the answer's.
        (completion(usage={**USAGE, "total_tokens": 30}), Reply(text="text", usage=Usage(9, 21))),
        (completion(usage={**USAGE, "total_tokens": 13}), Reply(text="text", usage=Usage(9, 4))),
        (completion(usage={**USAGE, "total_tokens": 2}), Reply(text="text", usage=Usage(9, 4))),
        (completion(usage={**USAGE, "total_tokens": None}), Reply(text="text", usage=Usage(9, 4))),
        (completion(" \n"), Reply(text=" \n", problem="empty", usage=Usage(9, 4))),
        (completion(None), Reply(problem="empty", usage=Usage(9, 4))),
        (completion([{"type": "text"}]), Reply(problem="empty", usage=Usage(9, 4))),
        (completion(None, refusal="No."), Reply(problem="refusal", usage=Usage(9, 4))),
        (completion(finish="length"), Reply(text="text", problem="cut off", usage=Usage(9, 4))),
        (
            completion(finish="content_filter"),
            Reply(text="text", problem="content filter", usage=Usage(9, 4)),
        ),
        ({"choices": []}, Reply("failed", problem="no chat completion")),
        ({"error": {"message": "x"}}, Reply("failed", problem="no chat completion")),
        ({"choices": [{"message": None}]}, Reply("failed", problem="no chat completion")),
        ([], Reply("failed", problem="no chat completion")),
        ("<html>Welcome</html>", Reply("failed", problem="no chat completion")),
        ('{"choices": [', Reply("failed", problem="no chat completion")),
    ],
)
def test_an_answer_is_read_whatever_it_holds(ask, body, reply):
    assert ask(reply={"status": 200, "body": body}) == reply


def test_a_web_page_points_to_the_url(ask):
    page = {"status": 200, "body": "<html>Hi</html>", "headers": {"Content-Type": "text/html"}}
    reply = ask(reply=page)
    assert (reply.kind, reply.transient) == ("failed", False)
    assert reply.problem.startswith("no chat completion: ")
    assert "correct --base-url" in reply.problem


def test_a_lone_surrogate_arrives(ask):
    assert ask(reply={"status": 200, "body": json.dumps(completion("a\ud800"))}).text == "a\ud800"


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503, 529])
def test_a_passing_error_is_sent_once_and_is_transient(ask, teacher, status):
    reply = ask(reply={"status": status, "body": {}})
    assert reply == Reply("failed", problem=f"HTTP {status}", transient=True, usage=Usage())
    assert len(teacher.log()) == 1


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7.0),
        ({"Retry-After": "0.05"}, 0.05),
        ({"Retry-After": "-3"}, 0.0),
        ({"Retry-After": "9", "retry-after-ms": "250"}, 0.25),
        ({"Retry-After": "1e999"}, math.inf),
        ({"Retry-After": "Sun, 06 Nov 1994 08:49:37 GMT"}, 0.0),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "nan"}, None),
        ({"Retry-After": "Sun, 06 Nov 1994 08:49:37"}, None),
        ({}, None),
    ],
)
def test_the_time_that_the_endpoint_asks_for_is_read(ask, headers, seconds):
    assert ask(reply={"status": 429, "body": {}, "headers": headers}).retry_after == seconds


def test_a_date_that_the_endpoint_asks_for_is_read_as_seconds_from_now(ask):
    moment = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    reply = ask(reply={"status": 503, "body": {}, "headers": {"Retry-After": moment}})
    assert 50 < reply.retry_after <= 60


@pytest.mark.parametrize(
    ("behaviour", "problem"), [("cut", "cut off by the network"), ("late", "time-out")]
)
def test_a_billed_request_that_did_not_arrive_has_no_usage(ask, teacher, behaviour, problem):
    reply = ask(behaviours={behaviour: 1})
    assert reply.problem.partition(":")[0] == problem
    assert dataclasses.replace(reply, problem=None) == Reply("failed", transient=True)
    assert [len(entry["tokens"]) for entry in teacher.log()] == [2]


@pytest.mark.parametrize(
    ("url", "proxy"),
    [
        ("http://127.0.0.1:9/v1", None),
        ("http://nowhere.invalid/v1", None),
        ("http://127.0.0.1:9/v1", "http://127.0.0.1:9"),
    ],
)
def test_a_request_that_was_never_sent_costs_nothing(ask, monkeypatch, url, proxy):
    if proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy)
        monkeypatch.setenv("NO_PROXY", "")
    reply = ask(settings=EndpointConfig(model="x", base_url=url))
    assert reply.problem.startswith("not reached: ")
    assert dataclasses.replace(reply, problem=None) == Reply(
        "failed", transient=True, usage=Usage()
    )


def error(message="Said the server.", **more):
    return {"error": {"message": message, **more}}


@pytest.mark.parametrize(
    ("status", "body", "advice"),
    [
        (401, error(), r"refuses the key; correct OPENAI_API_KEY"),
        (403, error(), r"may not use 'teacher'; choose another --model or OPENAI_API_KEY"),
        (403, error("Blocked by a policy: safety, moderation"), r"may not use 'teacher'"),
        (404, error(code="model_not_found"), r"no model 'teacher' there; correct --model"),
        (404, "<html>", r"correct --model or --base-url"),
        (404, error("No moderation here"), r"correct --model or --base-url"),
        (402, error(), "no credit is left at the endpoint"),
        (429, error(code="insufficient_quota"), "no credit is left at the endpoint"),
        (400, error(param="temperature"), "refuses the request; change the setting it names"),
        (400, error(param="max_completion_tokens"), "change the setting it names"),
        (422, error("Unsafe: safety", param="model"), "change the setting it names"),
        (405, error(), "refuses the request; correct --base-url"),
    ],
)
def test_an_error_of_all_requests_is_fatal(ask, teacher, status, body, advice):
    reply = ask(reply={"status": status, "body": body})
    assert (reply.kind, reply.transient, reply.usage) == ("fatal", False, Usage())
    assert re.search(advice, reply.advice)
    assert reply.problem.startswith(f"HTTP {status}")
    assert "\n" not in reply.problem
    assert len(teacher.log()) == 1


@pytest.mark.parametrize(
    ("status", "body", "problem"),
    [
        (400, error("line 1\nline 2", param="messages"), "^HTTP 400: line 1 line 2$"),
        (400, error(code="invalid_image"), r"^HTTP 400, invalid_image: Said the server\.$"),
        (413, "<html>", "^HTTP 413: <html>$"),
        (413, "", "^HTTP 413$"),
        (422, {"detail": [{"loc": ["messages"]}]}, "^HTTP 422: .*loc"),
    ],
)
def test_an_error_of_one_fact_is_a_refusal(ask, status, body, problem):
    reply = ask(reply={"status": status, "body": body})
    assert dataclasses.replace(reply, problem=None) == Reply("refused", usage=Usage())
    assert re.search(problem, reply.problem)
    assert "\n" not in reply.problem


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, error(code="content_filter")),
        (400, error(code="content_policy_violation")),
        (400, error("Rejected by our safety system", type="invalid_request_error")),
        (400, error(code="data_inspection_failed")),
        (403, error(code="moderation_blocked")),
        (422, error(code="ResponsibleAIPolicyViolation")),
    ],
)
def test_a_content_filters_refusal_has_its_own_kind(ask, status, body):
    reply = ask(reply={"status": status, "body": body})
    assert dataclasses.replace(reply, problem=None) == Reply("filtered", usage=Usage())
    assert reply.problem.startswith(f"HTTP {status}")


def test_a_model_that_expects_max_completion_tokens_gets_it(ask, teacher):
    reply = ask(times=2, refuse="max_tokens")
    assert reply.problem is None
    limits = [entry["limits"] for entry in teacher.log()]
    assert limits == [["max_tokens"], ["max_completion_tokens"], ["max_completion_tokens"]]
    reply = ask(refuse="temperature")
    assert reply.kind == "fatal"
    assert "Unsupported parameter: temperature" in reply.problem


def test_the_key_is_redacted_in_every_reply(ask, teacher):
    for mode in (
        {"behaviours": {"echo": 1}},
        {"behaviours": {"broken": 1}},
        {"reply": {"status": 400, "body": error(f"no {teacher.key}", code=teacher.key)}},
        {"reply": {"status": 401, "body": error(f"no {teacher.key[:12]}")}},
    ):
        assert teacher.key[:12] not in repr(ask(**mode))
    assert "which is [key]." in ask(behaviours={"echo": 1}).text


def test_a_placeholder_is_no_secret(ask, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "the")
    assert ask(reply={"status": 200, "body": completion("the text")}).text == "the text"


@pytest.mark.parametrize(
    ("key", "url", "message"),
    [
        (None, "http://h/v1", "OPENAI_API_KEY is not set"),
        ("", "http://h/v1", "OPENAI_API_KEY is not set"),
        ("sk-secret-secret\n", "http://h/v1", "OPENAI_API_KEY: expected ASCII without white space"),
        ("sk-schön-geheim", "http://h/v1", "OPENAI_API_KEY: expected ASCII without white space"),
        ("sk-secret-secret", "localhost:80", "--base-url or OPENAI_BASE_URL: expected a URL"),
        ("sk-secret-secret", "http://", "expected a URL like"),
        ("sk-secret-secret", "http://[", "expected a URL like"),
        ("sk-secret-secret", "http://h:99999", "expected a URL like"),
    ],
)
def test_a_bad_key_or_url_is_named_before_anything_is_sent(monkeypatch, key, url, message):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    with pytest.raises(ConfigError, match=message) as error:
        Endpoint(EndpointConfig(model="teacher"))
    assert "sk-" not in str(error.value)


def test_a_missing_client_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ConfigError, match=r"pip install 'morer1-jax\[write\]'"):
        Endpoint(EndpointConfig(model="teacher"))
