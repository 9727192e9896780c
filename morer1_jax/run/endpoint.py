"""An OpenAI-compatible endpoint: one question, one answer, and what to make of its errors."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from morer1_jax.run.budget import Usage
from morer1_jax.run.config import ConfigError
from morer1_jax.task.fact import one_line

KEY, BASE_URL = "OPENAI_API_KEY", "OPENAI_BASE_URL"
# A shorter key is a placeholder for an endpoint that needs none, and may be a word of an answer.
_SECRET = 8
# In the error of a request whose photo or title a provider's content filter refuses.
_CONTENT = re.compile(
    r"content.?(?:filter|policy|management)|policy.?violation|safety|moderation|inspection"
    r"|flagged|invalid_prompt",
    re.IGNORECASE,
)


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
      retries: of a request after 408, 409, 429, 5xx, a cut connection or a time-out, after as long
        as the endpoint says (up to two minutes), else half a second, doubled each time up to eight.
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
      text: the answer, or None.
      problem: why there is no text, or none that is whole.
      answered: whether the model answered.
      lasting: whether it never will for this fact.
      fatal: why no request will be answered, and what to do; None if that is not so.
      usage: tokens billed; None: not known.
    """

    text: str | None = None
    problem: str | None = None
    answered: bool = True
    lasting: bool = False
    fatal: str | None = None
    usage: Usage | None = None


class Endpoint:
    """A client of an endpoint; use it as an async context manager.

    The key is read from the environment and kept out of whatever this class returns or raises.
    """

    def __init__(self, config: EndpointConfig) -> None:
        """Raises ConfigError: no package `openai`, no usable key, or no URL."""
        try:
            import openai
        except ImportError:
            raise ConfigError(
                "the package openai is not installed; pip install 'morer1-jax[write]'"
            ) from None
        self._openai = openai
        self._config = config
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
            api_key=self._key, base_url=url, max_retries=config.retries, timeout=config.timeout
        )

    async def __aenter__(self) -> Endpoint:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def ask(self, messages: Sequence[Mapping[str, Any]]) -> Reply:
        """Asks once, with the client's retries.

        The provider may bill a request that was retried after a time-out or a cut connection more
        than once; only the usage of the answer that came is known.
        """
        openai, config = self._openai, self._config
        limit = self._limit
        try:
            answer = await self._client.chat.completions.create(
                model=config.model,
                messages=messages,
                temperature=config.temperature,
                **{limit: config.max_tokens},
            )
        except openai.APITimeoutError:
            return Reply(problem="time-out", answered=False)
        except openai.APIConnectionError as error:
            problem = f"no connection: {self._clean(error.__cause__ or error)}"
            return Reply(problem=problem, answered=False)
        except openai.APIStatusError as error:
            if limit == "max_tokens" and (error.status_code, error.param) == (400, limit):
                self._limit = "max_completion_tokens"
                return await self.ask(messages)
            return self._status(error)
        except ValueError:
            return Reply(problem="no chat completion", answered=False)
        return self._reply(answer)

    def _reply(self, answer: Any) -> Reply:
        """Reads an answer; the client leaves its fields unchecked."""
        try:
            choice = answer.choices[0]
            text, refusal = choice.message.content, getattr(choice.message, "refusal", None)
            finish = choice.finish_reason
        except (AttributeError, IndexError, TypeError):
            return Reply(problem="no chat completion", answered=False)
        counts = [
            getattr(getattr(answer, "usage", None), name, None)
            for name in ("prompt_tokens", "completion_tokens")
        ]
        known = all(type(count) is int and count >= 0 for count in counts)
        usage = Usage(*counts) if known else None
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
        """What an HTTP status means: for this fact alone, for now, or for all requests."""
        status, model = error.status_code, repr(self._config.model)
        named = f"HTTP {status}" + (f", {self._clean(error.code)}" if error.code else "")
        reply = Reply(problem=named, answered=False, usage=Usage())
        said = f"({named}: {self._clean(error.message)})"
        if error.code == "insufficient_quota" or status == 402:
            fatal = f"no credit is left at the endpoint ({named}); top up"
        elif status in (408, 409, 429) or status >= 500:
            return reply
        elif status == 401:
            # Without what the endpoint says of the key, which may show a part of it.
            fatal = f"the endpoint refuses the key ({named}); correct {KEY}"
        elif _CONTENT.search(f"{error.code} {error.type} {said}"):
            return dataclasses.replace(reply, lasting=True)
        elif status == 403:
            fatal = f"the key may not use {model} {said}; choose another --model or {KEY}"
        elif status == 404:
            fatal = f"no model {model} there {said}; correct --model or --base-url"
        else:
            fatal = f"the endpoint refuses the request {said}; change the setting it names"
        return dataclasses.replace(reply, fatal=f"{fatal}, then start again")

    def _clean(self, value: Any) -> str:
        """Text of others, fit for a one-line message."""
        text = one_line(value) if isinstance(value, BaseException) else " ".join(str(value).split())
        return self._hide(text)[:200]

    def _hide(self, text: str) -> str:
        return text.replace(self._key, "[key]") if len(self._key) >= _SECRET else text


def _is_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
