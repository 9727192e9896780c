"""What requests cost, and whether another one can be paid for whatever it turns out to cost."""

from __future__ import annotations

import dataclasses
import math

# More than any provider known bills for one image (GPT-4o mini: 48,169 for the largest).
_IMAGE_TOKENS = 50_000
_IMAGES = 2
# On what a request may cost, judged by another's usage: tokenizers do not count in proportion.
_MARGIN = 1.25


@dataclasses.dataclass(frozen=True)
class Size:
    """What decides the price of a request.

    Attributes:
      text: bytes of its text in UTF-8.
      pixels: of its images.
      tiles: squares of 512 pixels' side, also parts of one, that cover its images.
      answer: most tokens of the answer, as the endpoint was asked to keep to.
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
        return self.prompt + self.answer

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.prompt + other.prompt, self.answer + other.answer)


@dataclasses.dataclass(frozen=True)
class Prices:
    """US dollars for a million tokens of prompt and of answer."""

    prompt: float = 0.0
    answer: float = 0.0

    def dollars(self, usage: Usage) -> float:
        return (usage.prompt * self.prompt + usage.answer * self.answer) / 1e6


def money(prices: Prices, usage: Usage) -> str:
    """What tokens cost, in dollars where there are prices, for a line of text."""
    if prices.prompt or prices.answer:
        return f"${prices.dollars(usage):,.4f}"
    return f"{usage.total:,} tokens"


class Ledger:
    """What was spent, and the most that the requests without a known usage can cost.

    Before the first usage is known, a prompt is taken to cost no more than its bytes and 50,000
    tokens an image. Afterwards the dearest prompt so far is the measure: a provider whose count is
    a sum of text, pixels and tiles, each at a price of its own that is not negative, bills no other
    prompt more than that one times the largest of the three ratios, and a quarter is added.
    An answer is taken to cost what the endpoint was asked to keep to, or a quarter more than the
    dearest so far: some endpoints do not keep to it, or bill thoughts that they do not show.

    Attributes:
      spent: tokens of the requests whose usage is known.
      answered: how many these are.
      unsettled: the other requests, by number: on their way, or lost when a run was killed.
    """

    def __init__(
        self, prices: Prices, dollars: float | None = None, tokens: int | None = None
    ) -> None:
        """Args: `dollars`, `tokens`: the budget; None: no limit."""
        self.prices = prices
        self.spent = Usage()
        self.answered = 0
        self.unsettled: dict[int, Size] = {}
        self._limit_dollars = math.inf if dollars is None else dollars
        self._limit_tokens = math.inf if tokens is None else tokens
        self._dearest: tuple[int, Size] | None = None
        self._longest = 0

    def send(self, number: int, size: Size) -> None:
        """Reserves the most a request can cost."""
        self.unsettled[number] = size

    def settle(self, number: int, usage: Usage | None) -> None:
        """Takes a request's usage in place of its reservation; None: not known, so it stays."""
        if usage is None:
            return
        size = self.unsettled.pop(number)
        self.spent += usage
        self._longest = max(self._longest, usage.answer)
        if usage.prompt:
            self.answered += 1
            if self._dearest is None or usage.prompt > self._dearest[0]:
                self._dearest = usage.prompt, size

    def most(self, size: Size) -> Usage:
        """The most tokens a request of this size can cost."""
        answer = max(size.answer, math.ceil(_MARGIN * self._longest))
        if self._dearest is None:
            return Usage(size.text + _IMAGES * _IMAGE_TOKENS, answer)
        prompt, seen = self._dearest
        ratio = max(1.0, size.text / seen.text, size.pixels / seen.pixels, size.tiles / seen.tiles)
        return Usage(math.ceil(_MARGIN * ratio * prompt), answer)

    def reserved(self) -> Usage:
        """The most that the unsettled requests can cost."""
        return sum(map(self.most, self.unsettled.values()), Usage())

    def fits(self, size: Size) -> bool:
        """Whether the budget holds though this request, and all unsettled, cost their most."""
        return self.bears(self.most(size))

    def bears(self, usage: Usage) -> bool:
        """Whether the budget holds though this is spent, and all unsettled cost their most."""
        total = self.spent + self.reserved() + usage
        return (
            total.total <= self._limit_tokens and self.prices.dollars(total) <= self._limit_dollars
        )
