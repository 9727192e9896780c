"""What the real client makes of what an endpoint says."""

import asyncio
import dataclasses
import json
import re
import sys

import pytest

from morer1_jax.data.images import ImageConfig, ImageReader
from morer1_jax.run.budget import Usage
from morer1_jax.run.config import ConfigError
from morer1_jax.run.endpoint import Endpoint, EndpointConfig, Reply
from morer1_jax.run.request import build_request
from morer1_jax.task import more

USAGE = {"prompt_tokens": 9, "completion_tokens": 4}


@pytest.fixture(scope="module")
def asked(teachable):
    folder, facts = teachable(1)
    request = build_request(
        facts[0], more.read_ontology(folder), ImageReader(folder, ImageConfig())
    )
    return facts, request.messages


@pytest.fixture
def ask(teacher, asked, monkeypatch):
    """Sets the server's mode, asks once with the real client, gives the reply."""
    monkeypatch.setenv("OPENAI_API_KEY", teacher.key)
    config = EndpointConfig(model="teacher", base_url=teacher.url, retries=2, timeout=0.5)

    def run(times=1, settings=config, **mode):
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
        (completion(" \n"), Reply(text=" \n", problem="empty", usage=Usage(9, 4))),
        (completion(None), Reply(problem="empty", usage=Usage(9, 4))),
        (completion([{"type": "text"}]), Reply(problem="empty", usage=Usage(9, 4))),
        (completion(None, refusal="No."), Reply(problem="refusal", usage=Usage(9, 4))),
        (completion(finish="length"), Reply(text="text", problem="cut off", usage=Usage(9, 4))),
        (
            completion(finish="content_filter"),
            Reply(text="text", problem="content filter", usage=Usage(9, 4)),
        ),
        ({"choices": []}, Reply(problem="no chat completion", answered=False)),
        ({"error": {"message": "x"}}, Reply(problem="no chat completion", answered=False)),
        ({"choices": [{"message": None}]}, Reply(problem="no chat completion", answered=False)),
        ([], Reply(problem="no chat completion", answered=False)),
        ("<html>Welcome</html>", Reply(problem="no chat completion", answered=False)),
        ('{"choices": [', Reply(problem="no chat completion", answered=False)),
    ],
)
def test_an_answer_is_read_whatever_it_holds(ask, body, reply):
    assert ask(reply={"status": 200, "body": body}) == reply


def test_a_lone_surrogate_arrives(ask):
    assert ask(reply={"status": 200, "body": json.dumps(completion("a\ud800"))}).text == "a\ud800"


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503, 529])
def test_what_passes_is_tried_again_and_then_left(ask, teacher, status):
    reply = ask(reply={"status": status, "body": {}, "headers": {"retry-after-ms": "10"}})
    assert reply == Reply(problem=f"HTTP {status}", answered=False, usage=Usage())
    assert len(teacher.log()) == 3


def test_the_time_that_the_endpoint_asks_for_is_waited(ask, teacher):
    config = EndpointConfig(model="teacher", base_url=teacher.url, retries=5)
    ask(settings=config, fates={"busy": 1})
    times = [entry["at"] for entry in teacher.log()]
    assert len(times) == 6
    # Five times 0.05 s; of its own accord the client waits 11 s at least.
    assert 0.25 <= times[-1] - times[0] < 8


@pytest.mark.parametrize(("fate", "problem"), [("cut", "no connection: "), ("late", "time-out")])
def test_what_may_have_been_billed_has_no_usage(ask, fate, problem):
    reply = ask(fates={fate: 1})
    assert reply.problem.startswith(problem)
    assert dataclasses.replace(reply, problem=None) == Reply(answered=False)


def test_an_endpoint_that_is_not_there_is_said_to_be(ask, teacher):
    config = EndpointConfig(model="x", base_url="http://127.0.0.1:9/v1", retries=0)
    assert ask(settings=config).problem.startswith("no connection: ")


def error(message="Said the server.", **more):
    return {"error": {"message": message, **more}}


@pytest.mark.parametrize(
    ("status", "body", "fatal"),
    [
        (401, error(), r"refuses the key \(HTTP 401\); correct OPENAI_API_KEY"),
        (
            403,
            error(),
            r"may not use 'teacher' \(HTTP 403: .*Said the server.*; choose another --m",
        ),
        (404, error(code="model_not_found"), r"no model 'teacher' there \(HTTP 404, model_not_fou"),
        (404, "<html>", r"correct --model or --base-url, then start again$"),
        (402, error(), "no credit is left at the endpoint"),
        (429, error(code="insufficient_quota"), "no credit is left at the endpoint"),
        (400, error(param="temperature"), r"refuses the request \(HTTP 400: .*Said the server"),
        (400, error("line 1\nline 2"), "line 1 line 2"),
        (413, error(), "refuses the request"),
        (422, {"detail": [{"loc": ["model"]}]}, "refuses the request"),
    ],
)
def test_what_holds_for_all_requests_is_fatal(ask, teacher, status, body, fatal):
    reply = ask(reply={"status": status, "body": body, "headers": {"retry-after-ms": "1"}})
    assert (reply.answered, reply.lasting, reply.usage) == (False, False, Usage())
    assert re.search(fatal, reply.fatal)
    assert "\n" not in reply.fatal
    assert len(teacher.log()) == (3 if status == 429 else 1)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, error(code="content_filter")),
        (400, error(code="content_policy_violation")),
        (400, error("Rejected by our safety system", type="invalid_request_error")),
        (400, error(code="data_inspection_failed")),
        (403, error("Your input was flagged by moderation")),
        (422, error(code="ResponsibleAIPolicyViolation")),
    ],
)
def test_what_a_content_filter_refuses_is_for_this_fact_alone(ask, status, body):
    reply = ask(reply={"status": status, "body": body})
    assert (reply.answered, reply.lasting, reply.fatal) == (False, True, None)
    assert reply.usage == Usage()
    assert reply.problem.startswith(f"HTTP {status}")


def test_a_model_that_wants_the_other_name_for_the_limit_gets_it(ask, teacher):
    reply = ask(times=2, refuse="max_tokens")
    assert reply.problem is None
    limits = [entry["limits"] for entry in teacher.log()]
    assert limits == [["max_tokens"], ["max_completion_tokens"], ["max_completion_tokens"]]
    reply = ask(refuse="temperature")
    assert "Unsupported parameter: temperature" in reply.fatal


def test_the_key_shows_in_nothing_that_comes_back(ask, teacher):
    for mode in (
        {"fates": {"echo": 1}},
        {"fates": {"broken": 1}},
        {"reply": {"status": 400, "body": error(f"no {teacher.key}", code=teacher.key)}},
        {"reply": {"status": 401, "body": error(f"no {teacher.key[:12]}")}},
    ):
        assert teacher.key[:12] not in repr(ask(**mode))
    assert "which is [key]." in ask(fates={"echo": 1}).text


def test_a_placeholder_is_no_secret(ask, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "the")
    assert ask(reply={"status": 200, "body": completion("the text")}).text == "the text"


@pytest.mark.parametrize(
    ("key", "url", "message"),
    [
        (None, "http://h/v1", "OPENAI_API_KEY is not set"),
        ("", "http://h/v1", "OPENAI_API_KEY is not set"),
        ("sk-secret-secret\n", "http://h/v1", "OPENAI_API_KEY holds white space"),
        ("sk-schön-geheim", "http://h/v1", "OPENAI_API_KEY holds white space or what is not ASCII"),
        ("sk-secret-secret", "localhost:80", "--base-url or OPENAI_BASE_URL: no URL"),
        ("sk-secret-secret", "http://", "no URL"),
        ("sk-secret-secret", "http://[", "no URL"),
        ("sk-secret-secret", "http://h:99999", "no URL"),
    ],
)
def test_a_bad_key_or_url_is_named_before_anything_is_asked(monkeypatch, key, url, message):
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
