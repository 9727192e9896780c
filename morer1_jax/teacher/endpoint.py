"""Talks to an OpenAI-compatible endpoint: one request, one reply, and what its errors mean.

Each attempt is one request. The client's own retries stay off: an attempt that times out may be
billed, so the ledger must reserve its cost before it is sent, and the client would also retry what
no waiting mends, such as an account without credit.
"""

from __future__ import annotations

import contextlib
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
# A shorter key is a placeholder for an endpoint without keys, and may be a word of an answer.
_MIN_SECRET = 8
# Errors after which nothing was sent, by name, as the client's HTTP library is not always httpx.
_NOT_SENT = {"ConnectError", "ConnectTimeout", "PoolTimeout", "ProxyError", "UnsupportedProtocol"}
# The wording of errors of a content filter that refuses a photo or a title.
_CONTENT_FILTER = re.compile(
    r"content.?(?:filter|policy|management)|policy.?violation|safety|moderation|inspection"
    r"|flagged|invalid_prompt",
    re.IGNORECASE,
)

ReplyKind = Literal["answer", "failed", "filtered", "refused", "fatal"]


class EndpointError(ConfigError):
    """The endpoint refuses every request, or answers none."""


@dataclasses.dataclass(frozen=True)
class EndpointConfig:
    """Which model to ask, and how.

    Attributes:
        model: its name at the endpoint.
        base_url: the endpoint's; None: OpenAI's.
        temperature: of sampling.
        max_tokens: maximum number of tokens of an answer.
        retries: number of retries after a time-out, a failed connection or HTTP 408, 409, 429, 5xx.
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
    """The outcome of one request.

    Attributes:
        kind: `answer`: the model answered; `failed`: it did not; `filtered`: it never will, because
            the provider's content filter refuses the request; `refused`: it never will, for another
            reason in this request; `fatal`: it will answer no request.
        text: the answer, or None.
        problem: why there is no text, or an incomplete one; the part before a colon names the
            class.
        transient: whether the same request may succeed later.
        retry_after: seconds to wait before that, if the endpoint says so.
        advice: what the user can do about a fatal error.
        usage: tokens billed; None: unknown.
    """

    kind: ReplyKind = "answer"
    text: str | None = None
    problem: str | None = None
    transient: bool = False
    retry_after: float | None = None
    advice: str | None = None
    usage: Usage | None = None


class Endpoint:
    """A client of an endpoint; use it as an async context manager.

    The key is read from the environment and redacted in everything that is returned or raised.
    """

    def __init__(self, config: EndpointConfig) -> None:
        """Opens a client.

        Raises:
            ConfigError: the package `openai` or a usable key is missing, or a URL is malformed.
        """
        with needs_extra("write"):
            import openai
        self._openai = openai
        self.config = config
        self._key = os.environ.get(KEY, "")
        if not self._key:
            raise ConfigError(
                f"{KEY} is not set; export the endpoint's key (any word where it needs none)"
            )
        if not re.fullmatch("[!-~]+", self._key):
            raise ConfigError(
                f"{KEY}: expected ASCII without white space, found other characters; export the "
                "key anew"
            )
        url = config.base_url or os.environ.get(BASE_URL) or None
        if url is not None and not _is_url(url):
            raise ConfigError(
                f"--base-url or {BASE_URL}: expected a URL like https://host/v1, found another "
                "text; correct it"
            )
        # Newer models refuse `max_tokens`, older servers ignore `max_completion_tokens`.
        self._limit_name = "max_tokens"
        self._client = openai.AsyncOpenAI(
            api_key=self._key, base_url=url, max_retries=0, timeout=config.timeout
        )

    async def __aenter__(self) -> Endpoint:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def ask(self, messages: Sequence[Mapping[str, Any]]) -> Reply:
        """Sends one request, which is billed at most once.

        It is repeated only where the endpoint refuses the name of the limit on tokens.
        """
        openai, config, limit_name = self._openai, self.config, self._limit_name
        try:
            completion = await self._client.chat.completions.create(
                model=config.model,
                messages=messages,
                temperature=config.temperature,
                **{limit_name: config.max_tokens},
            )
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            if _NOT_SENT & {kind.__name__ for kind in type(cause).__mro__}:
                problem = f"not reached: {self._clean(cause)}"
                return Reply("failed", problem=problem, transient=True, usage=Usage())
            timed_out = isinstance(error, openai.APITimeoutError)
            problem = "time-out" if timed_out else f"cut off by the network: {self._clean(cause)}"
            return Reply("failed", problem=problem, transient=True)
        except openai.APIStatusError as error:
            if limit_name == "max_tokens" and (error.status_code, error.param) == (400, limit_name):
                self._limit_name = "max_completion_tokens"
                return await self.ask(messages)
            return self._read_status(error)
        except ValueError:
            return Reply("failed", problem="no chat completion")
        return self._read_completion(completion)

    def _read_completion(self, completion: Any) -> Reply:
        """Reads a completion, whose fields the client leaves unchecked."""
        if isinstance(completion, str):  # What the client returns for a body that is not JSON.
            advice = "a text such as a web page; correct --base-url"
            return Reply("failed", problem=f"no chat completion: {advice}")
        try:
            choice = completion.choices[0]
            text, refusal = choice.message.content, getattr(choice.message, "refusal", None)
            finish_reason = choice.finish_reason
        except (AttributeError, IndexError, TypeError):
            return Reply("failed", problem="no chat completion")
        text = self._redact(text) if isinstance(text, str) else None
        problem = None
        if refusal:
            problem = "refusal"
        elif finish_reason == "content_filter":
            problem = "content filter"
        elif finish_reason == "length":
            problem = "cut off"
        elif not text or not text.strip():
            problem = "empty"
        return Reply(text=text, problem=problem, usage=_usage(getattr(completion, "usage", None)))

    def _read_status(self, error: Any) -> Reply:
        """Tells HTTP errors that pass, that concern this fact alone, and that concern all."""
        # What the error says.
        status, code, body, model = error.status_code, error.code, error.body, self.config.model
        status_name = f"HTTP {status}" + (f", {self._clean(code)}" if code else "")
        message = body["message"] if isinstance(body, Mapping) and body.get("message") else body
        problem = f"{status_name}: {self._clean(message)}" if message else status_name
        # A 403's free text may speak of policies where the key merely lacks a permission.
        filter_text = code or "" if status == 403 else f"{code} {error.type} {message}"
        # A parameter that is the same in all requests.
        setting = error.param in ("model", "temperature") or str(error.param).startswith("max_")
        # What it means: three kinds return at once, the others are fatal and come with advice.
        if code == "insufficient_quota" or status == 402:
            advice = "no credit is left at the endpoint; top up"
        elif status in (408, 409, 429) or status >= 500:
            wait = _retry_after(error.response.headers)
            return Reply(
                "failed", problem=status_name, transient=True, retry_after=wait, usage=Usage()
            )
        elif status in (400, 422) and setting:
            advice = "the endpoint refuses the request; change the setting it names"
        elif status == 401:
            problem = status_name  # The endpoint's message may show a part of the key.
            advice = f"the endpoint refuses the key; correct {KEY}"
        elif status in (400, 403, 422) and _CONTENT_FILTER.search(filter_text):
            return Reply("filtered", problem=problem, usage=Usage())
        elif status == 403:
            advice = f"the key may not use {model!r}; choose another --model or {KEY}"
        elif status == 404:
            advice = f"no model {model!r} there; correct --model or --base-url"
        elif status in (400, 413, 422):
            return Reply("refused", problem=problem, usage=Usage())
        else:
            advice = "the endpoint refuses the request; correct --base-url"
        return Reply("fatal", problem=problem, advice=advice, usage=Usage())

    def _clean(self, value: Any) -> str:
        """Formats foreign text for a one-line message."""
        value = one_line(value) if isinstance(value, BaseException) else str(value)
        return self._redact(" ".join(value.split()))[:200]

    def _redact(self, text: str) -> str:
        return text.replace(self._key, "[key]") if len(self._key) >= _MIN_SECRET else text


def _is_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _usage(counts: Any) -> Usage | None:
    """Reads a completion's `usage`; None if it states none."""
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    prompt, answer, total = (getattr(counts, name, None) for name in names)
    if not all(type(count) is int and count >= 0 for count in (prompt, answer)):
        return None
    # Some endpoints count hidden reasoning, which is billed as the answer is, in the total alone.
    return Usage(prompt, max(answer, total - prompt if type(total) is int else 0))


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Reads the seconds after which the endpoint may be asked again; None if it states none.

    `Retry-After` is a number or a date (RFC 9110, 10.2.3); `retry-after-ms` is OpenAI's own.
    """
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        with contextlib.suppress(KeyError, ValueError):
            seconds = unit * float(headers[name])
            if not math.isnan(seconds):
                return max(seconds, 0.0)
    # Absent, not a date, or a date without a time zone.
    with contextlib.suppress(KeyError, ValueError, TypeError):
        date = parsedate_to_datetime(headers["retry-after"])
        return max((date - datetime.now(UTC)).total_seconds(), 0.0)
    return None
