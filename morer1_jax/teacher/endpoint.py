"""An OpenAI-compatible endpoint: one question, one answer, and what to make of its errors."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal
from urllib.parse import urlsplit

from morer1_jax.cli import needs_extra
from morer1_jax.errors import ConfigError, one_line
from morer1_jax.teacher.ledger import Usage

KEY, BASE_URL = "OPENAI_API_KEY", "OPENAI_BASE_URL"
# A shorter key is a placeholder for an endpoint that needs none, and may be a word of an answer.
_SECRET = 8
# Names of the client's errors, whichever HTTP library it uses, after which nothing was sent.
_NOT_SENT = {"ConnectError", "ConnectTimeout", "PoolTimeout", "ProxyError", "UnsupportedProtocol"}
# Settings that are the same in all requests, as an error's `param` names them; so is `max_…`.
_SETTINGS = {"model", "temperature"}
# In the error of a request whose photo or title a provider's content filter refuses.
_CONTENT = re.compile(
    r"content.?(?:filter|policy|management)|policy.?violation|safety|moderation|inspection"
    r"|flagged|invalid_prompt",
    re.IGNORECASE,
)


Outcome = Literal["answer", "failed", "filtered", "refused", "fatal"]


class EndpointError(ConfigError):
    """The endpoint refuses every request, or answers none."""


@dataclasses.dataclass(frozen=True)
class EndpointConfig:
    """Whom to ask, and how.

    Attributes:
      model: its name at the endpoint.
      base_url: of the endpoint; None: OpenAI's.
      temperature: of sampling.
      max_tokens: most tokens of an answer.
      retries: of a request after 408, 409, 429, 5xx, a time-out or a connection that was cut or
        could not be made.
      timeout: seconds without a byte after which a connection is given up.
    """

    model: str
    base_url: str | None = None
    temperature: float = 1.0
    max_tokens: int = 1024
    retries: int = 8
    timeout: float = 120.0


@dataclasses.dataclass(frozen=True)
class Reply:
    """What came of a question.

    Attributes:
      outcome: `answer`: the model answered; `failed`: it did not; `filtered`: nor will it, for the
        provider's content filter refuses the request; `refused`: nor will it, for another reason
        that seems to lie in this request; `fatal`: it will answer no request.
      text: the answer, or None.
      problem: why there is no text, or none that is whole. Of a kind is what is before a colon.
      retry: whether the same request may be answered a little later.
      after: seconds to wait before that, if the endpoint says so.
      advice: what to do if it is fatal.
      usage: tokens billed; None: not known.
    """

    outcome: Outcome = "answer"
    text: str | None = None
    problem: str | None = None
    retry: bool = False
    after: float | None = None
    advice: str | None = None
    usage: Usage | None = None


class Endpoint:
    """A client of an endpoint; use it as an async context manager.

    The key is read from the environment and kept out of whatever this class returns or raises.

    Attributes:
      config: whom it asks, and how.
    """

    def __init__(self, config: EndpointConfig) -> None:
        """Raises ConfigError: no package `openai`, no usable key, or no URL."""
        with needs_extra("write"):
            import openai
        self._openai = openai
        self.config = config
        self._key = os.environ.get(KEY, "")
        if not self._key:
            raise ConfigError(
                f"{KEY} is not set; export the endpoint's key (any word for one that needs none)"
            )
        if not re.fullmatch("[!-~]+", self._key):
            raise ConfigError(f"{KEY} holds white space or what is not ASCII; export it anew")
        url = config.base_url or os.environ.get(BASE_URL) or None
        if url is not None and not _is_url(url):
            raise ConfigError(
                f"--base-url or {BASE_URL}: no URL, one like https://host/v1 expected"
            )
        # Newer models refuse `max_tokens`, older servers ignore its successor.
        self._limit = "max_tokens"
        self._client = openai.AsyncOpenAI(
            # A client that tries again by itself is billed for what no ledger saw.
            api_key=self._key,
            base_url=url,
            max_retries=0,
            timeout=config.timeout,
        )

    async def __aenter__(self) -> Endpoint:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def ask(self, messages: Sequence[Mapping[str, Any]]) -> Reply:
        """Asks once.

        It is billed at most once: a request is sent anew only after the endpoint refused it for the
        name of the limit on tokens.
        """
        openai, config = self._openai, self.config
        limit = self._limit
        try:
            answer = await self._client.chat.completions.create(
                model=config.model,
                messages=messages,
                temperature=config.temperature,
                **{limit: config.max_tokens},
            )
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            if _NOT_SENT & {kind.__name__ for kind in type(cause).__mro__}:
                said = self._clean(cause)
                return Reply("failed", problem=f"not reached: {said}", retry=True, usage=Usage())
            late = isinstance(error, openai.APITimeoutError)
            problem = "time-out" if late else f"cut off by the network: {self._clean(cause)}"
            return Reply("failed", problem=problem, retry=True)
        except openai.APIStatusError as error:
            if limit == "max_tokens" and (error.status_code, error.param) == (400, limit):
                self._limit = "max_completion_tokens"
                return await self.ask(messages)
            return self._status(error)
        except ValueError:
            return Reply("failed", problem="no chat completion")
        return self._reply(answer)

    def _reply(self, answer: Any) -> Reply:
        """Reads an answer; the client leaves its fields unchecked."""
        if isinstance(answer, str):  # The client's way with what is not JSON.
            advice = "a text such as a web page; correct --base-url"
            return Reply("failed", problem=f"no chat completion: {advice}")
        try:
            choice = answer.choices[0]
            text, refusal = choice.message.content, getattr(choice.message, "refusal", None)
            finish = choice.finish_reason
        except (AttributeError, IndexError, TypeError):
            return Reply("failed", problem="no chat completion")
        usage = _usage(getattr(answer, "usage", None))
        text = self._hide(text) if isinstance(text, str) else None
        problem = None
        if refusal:
            problem = "refusal"
        elif finish == "content_filter":
            problem = "content filter"
        elif finish == "length":
            problem = "cut off"
        elif not text or not text.strip():
            problem = "empty"
        return Reply(text=text, problem=problem, usage=usage)

    def _status(self, error: Any) -> Reply:
        """What an HTTP status means: for now, for this fact alone, or for all requests."""
        status, code, model = error.status_code, error.code, repr(self.config.model)
        kind = f"HTTP {status}" + (f", {self._clean(code)}" if code else "")
        body = error.body
        said = body["message"] if isinstance(body, Mapping) and body.get("message") else body
        problem, advice = f"{kind}: {self._clean(said)}" if said else kind, None
        outcome: Outcome = "fatal"
        # Free text may speak of policies also where the key is not allowed to do something.
        known = code or "" if status == 403 else f"{code} {error.type} {said}"
        if code == "insufficient_quota" or status == 402:
            advice = "no credit is left at the endpoint; top up"
        elif status in (408, 409, 429) or status >= 500:
            after = _after(error.response.headers)
            return Reply("failed", problem=kind, retry=True, after=after, usage=Usage())
        elif status in (400, 422) and _is_setting(error.param):
            advice = "the endpoint refuses the request; change the setting it names"
        elif status == 401:
            # Without what the endpoint says of the key, which may show a part of it.
            problem, advice = kind, f"the endpoint refuses the key; correct {KEY}"
        elif status in (400, 403, 422) and _CONTENT.search(known):
            outcome = "filtered"
        elif status == 403:
            advice = f"the key may not use {model}; choose another --model or {KEY}"
        elif status == 404:
            advice = f"no model {model} there; correct --model or --base-url"
        elif status in (400, 413, 422):
            outcome = "refused"
        else:
            advice = "the endpoint refuses the request; correct --base-url"
        return Reply(outcome, problem=problem, advice=advice, usage=Usage())

    def _clean(self, value: Any) -> str:
        """Text of others, fit for a one-line message."""
        if isinstance(value, BaseException):
            value = one_line(value)
        return self._hide(" ".join(str(value).split()))[:200]

    def _hide(self, text: str) -> str:
        return text.replace(self._key, "[key]") if len(self._key) >= _SECRET else text


def _is_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _usage(counts: Any) -> Usage | None:
    """Tokens as an answer's `usage` states them; None if it does not."""
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    prompt, answer, total = (getattr(counts, name, None) for name in names)
    if not all(type(count) is int and count >= 0 for count in (prompt, answer)):
        return None
    # Some endpoints count hidden thoughts, which are billed as the answer is, in the total alone.
    return Usage(prompt, max(answer, total - prompt if type(total) is int else 0))


def _is_setting(param: Any) -> bool:
    return isinstance(param, str) and (param in _SETTINGS or param.startswith("max_"))


def _after(headers: Mapping[str, str]) -> float | None:
    """Seconds after which the endpoint asks to be tried again, if it does.

    `Retry-After` is a number or a date (RFC 9110, 10.2.3); `retry-after-ms` is OpenAI's own.
    """
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = unit * float(headers[name])
        except (KeyError, ValueError):
            continue
        if not math.isnan(seconds):
            return max(seconds, 0.0)
    try:
        moment = parsedate_to_datetime(headers["retry-after"])
        return max((moment - datetime.now(UTC)).total_seconds(), 0.0)
    except (KeyError, ValueError, TypeError):  # Absent, no date, or one without a time zone.
        return None
