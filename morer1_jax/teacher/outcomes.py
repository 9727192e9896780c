"""What a journal says of each fact, and the closing table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from morer1_jax.task.fact import Fact
from morer1_jax.teacher.journal import Began, Entry, Sent
from morer1_jax.teacher.ledger import Ledger, money
from morer1_jax.teacher.prompt import unwrapped

# Facts refused in a row after which the endpoint's refusals are in doubt.
_DOUBT = 5


class Book:
    """The state that a journal's lines add up to.

    A refusal lasts only if something shows that the endpoint works: an answer after it in the same
    run, or one before it, with less than five facts refused since. Else the next run asks again.

    Attributes:
      ledger: the requests' cost.
      runs: how many began.
      requests: how many were sent.
      kept: fact id to its reasoning.
      rejected: fact id to why each of its answers was not kept.
      refused: fact id to why the endpoint will never answer for it.
      unanswered: the same for facts that this run gave up and the next asks for again.
      outcomes: how many requests ended in each (outcome, reason up to its first colon).
    """

    def __init__(self, attempts: int, ledger: Ledger) -> None:
        """Args: `attempts`: rejected answers after which a fact is set aside."""
        self.attempts = attempts
        self.ledger = ledger
        self.runs = 0
        self.requests = 0
        self.kept: dict[str, str] = {}
        self.rejected: dict[str, list[str]] = {}
        self.refused: dict[str, str] = {}
        self.unanswered: dict[str, str] = {}
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self._works = False
        self._streak: list[str] = []

    def apply(self, entry: Entry) -> None:
        """Takes in a line of the journal."""
        if isinstance(entry, Began):
            self.doubt()
            self.runs, self._works = entry.number, False
            self.unanswered.clear()
            return
        if isinstance(entry, Sent):
            self.requests = entry.number
            self.ledger.send(entry.number, entry.size)
            return
        self.ledger.settle(entry.number, entry.usage)
        reason = entry.reason or ""
        self.outcomes[entry.outcome, reason.partition(":")[0]] += 1
        if entry.outcome in ("kept", "rejected"):
            self._works = True
            self._streak.clear()
        if entry.outcome == "kept":
            self.kept[entry.fact] = unwrapped(entry.text or "")
        elif entry.outcome == "rejected":
            self.rejected.setdefault(entry.fact, []).append(reason)
        elif entry.outcome == "refused":
            self.refused[entry.fact] = reason
            self._streak.append(entry.fact)

    def doubt(self) -> None:
        """Ends a run: what was refused for a reason that may not last counts as unanswered."""
        if not self._works or len(self._streak) >= _DOUBT:
            for fact in self._streak:
                self.unanswered[fact] = self.refused.pop(fact)
        self._streak.clear()

    def is_open(self, fact: str) -> bool:
        """Whether the fact is to be asked for, for the first time or again."""
        return fact not in self.kept and self.why_set_aside(fact) is None

    def why_set_aside(self, fact: str) -> list[str] | None:
        """Why each answer for a fact was not kept, and why it is not asked for again; or None."""
        rejected = self.rejected.get(fact, [])
        if last := self.refused.get(fact) or self.unanswered.get(fact):
            return [*rejected, last]
        if fact not in self.kept and len(rejected) >= self.attempts:
            return rejected
        return None

    def cost(self) -> str:
        """What was spent so far, for a line of text."""
        return money(self.ledger.prices, self.ledger.spent)

    def unsettled(self) -> str | None:
        """What requests may have cost whose usage is not known, for a line of text; or None."""
        count = len(self.ledger.unsettled)
        if not count:
            return None
        most = money(self.ledger.prices, self.ledger.reserved())
        return f"requests of unknown cost: {count:,}, at most {most}"

    def table(self, facts: Iterable[Fact], chosen: Iterable[Fact], labels: Sequence[str]) -> str:
        """The closing table.

        Args:
          facts: all there are.
          chosen: those that were to be asked for.
          labels: in the order of the rows.
        """
        kept = sum(n for (outcome, _), n in self.outcomes.items() if outcome == "kept")
        rows = [f"requests: {self.requests:,}, kept: {kept:,}"]
        for (outcome, reason), count in sorted(self.outcomes.items(), key=lambda item: -item[1]):
            if outcome != "kept":
                rows.append(f"  {outcome}: {reason}: {count:,}")
        spent = self.ledger.spent
        rows.append(f"{spent.prompt:,} tokens in, {spent.answer:,} out; cost: {self.cost()}")
        if unsettled := self.unsettled():
            rows.append(unsettled)
        good, aside, left = Counter(), Counter(), Counter()
        for fact in facts:
            good[fact.label] += fact.id in self.kept
            aside[fact.label] += self.why_set_aside(fact.id) is not None
        for fact in chosen:
            left[fact.label] += self.is_open(fact.id)
        width = max(map(len, (*labels, "total")))
        line = f"{{:<{width}}} {{:>7}} {{:>10}} {{:>7}}"
        rows += ["", line.format("label", "kept", "set aside", "left")]
        rows += [line.format(x, good[x], aside[x], left[x]) for x in labels]
        rows.append(line.format("total", good.total(), aside.total(), left.total()))
        return "\n".join(rows)
