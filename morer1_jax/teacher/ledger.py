"""Keeps a budget: what requests cost, and whether the next one fits whatever it will cost."""

from __future__ import annotations

import dataclasses
import math

# Tokens of an image, more than any known provider bills (GPT-4o mini: 48,169 for the largest).
_MAX_IMAGE_TOKENS = 50_000
_IMAGES = 2
# Factor on estimates from another request's usage: tokenizers do not count in proportion to bytes.
_MARGIN = 1.25


@dataclasses.dataclass(frozen=True)
class Size:
    """What the price of a request depends on.

    Attributes:
        text: UTF-8 bytes of its text.
        pixels: number of pixels of its images.
        tiles: number of squares of 512 × 512 pixels, partial ones included, that cover its images.
        answer: maximum number of tokens of the answer that the request permits.
    """

    text: int
    pixels: int
    tiles: int
    answer: int


@dataclasses.dataclass(frozen=True)
class Usage:
    """Tokens of prompt and answer, as the endpoint counts them."""

    prompt: int = 0
    answer: int = 0

    @property
    def total(self) -> int:
        """The tokens of both."""
        return self.prompt + self.answer

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.prompt + other.prompt, self.answer + other.answer)


@dataclasses.dataclass(frozen=True)
class Prices:
    """US dollars per million tokens of prompt and of answer; zeros: unknown."""

    prompt: float = 0.0
    answer: float = 0.0

    def dollars(self, usage: Usage) -> float:
        """Returns the cost of tokens in dollars."""
        return (usage.prompt * self.prompt + usage.answer * self.answer) / 1e6

    def format(self, usage: Usage) -> str:
        """Formats the cost of tokens, in dollars if a price is known."""
        if self.prompt or self.answer:
            return f"${self.dollars(usage):,.4f}"
        return f"{usage.total:,} tokens"


class Ledger:
    """Sums up what was spent and the maximum that requests of unknown usage can cost.

    The bound on a prompt: before the first usage is known, its bytes plus 50,000 tokens an image.
    Afterwards the most expensive prompt so far is the measure. A provider that counts a weighted
    sum of text, pixels and tiles, with weights that are not negative, bills another prompt at most
    that one's tokens times the largest of the three ratios; a quarter is added.

    The bound on an answer: the maximum that the request permits, or a quarter more than the longest
    answer so far, because some endpoints exceed the maximum, or bill hidden reasoning.

    Attributes:
        prices: the endpoint's.
        spent: tokens of the requests whose usage is known.
        billed: number of these requests, without those that cost nothing.
        unsettled: size by number of the other requests: in flight, or lost when a run was killed.
    """

    def __init__(
        self, prices: Prices, dollars: float | None = None, tokens: int | None = None
    ) -> None:
        """Sets the budget, in dollars and in tokens; None: no limit."""
        self.prices = prices
        self.spent = Usage()
        self.billed = 0
        self.unsettled: dict[int, Size] = {}
        self._max_dollars = math.inf if dollars is None else dollars
        self._max_tokens = math.inf if tokens is None else tokens
        self._largest_prompt: tuple[int, Size] | None = None
        self._longest_answer = 0

    def reserve(self, number: int, size: Size) -> None:
        """Reserves the maximum cost of a request until it is settled."""
        self.unsettled[number] = size

    def settle(self, number: int, usage: Usage | None) -> None:
        """Replaces a reservation by the request's usage; it stays if that is unknown (None)."""
        if usage is None:
            return
        size = self.unsettled.pop(number)
        self.spent += usage
        self._longest_answer = max(self._longest_answer, usage.answer)
        if usage.prompt:
            self.billed += 1
            if self._largest_prompt is None or usage.prompt > self._largest_prompt[0]:
                self._largest_prompt = usage.prompt, size

    def max_usage(self, size: Size) -> Usage:
        """Returns the maximum usage of a request of this size."""
        answer = max(size.answer, math.ceil(_MARGIN * self._longest_answer))
        if self._largest_prompt is None:
            return Usage(size.text + _IMAGES * _MAX_IMAGE_TOKENS, answer)
        prompt, base = self._largest_prompt
        ratio = max(1.0, size.text / base.text, size.pixels / base.pixels, size.tiles / base.tiles)
        return Usage(math.ceil(_MARGIN * ratio * prompt), answer)

    def reserved(self) -> Usage:
        """Returns the maximum usage of all unsettled requests."""
        return sum(map(self.max_usage, self.unsettled.values()), Usage())

    def fits(self, size: Size) -> bool:
        """Returns whether the budget covers the maximum of a new request and of all unsettled."""
        return self.covers(self.max_usage(size))

    def covers(self, usage: Usage) -> bool:
        """Returns whether the budget covers further usage beside the maximum of all unsettled."""
        total = self.spent + self.reserved() + usage
        return total.total <= self._max_tokens and self.prices.dollars(total) <= self._max_dollars
