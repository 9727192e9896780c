"""Sums up a journal: what became of each fact, what was spent, and the closing table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from morer1_jax.task.fact import Fact
from morer1_jax.teacher.answers import strip_wrapping
from morer1_jax.teacher.journal import Entry, RequestSent, RunStarted
from morer1_jax.teacher.ledger import Ledger

# Number of facts refused in a row from which on the endpoint, not the facts, may be the cause.
_MAX_REFUSALS = 5


class Results:
    """The state after a journal's entries.

    A refusal is final only where the endpoint is known to work: after an answer in the same run,
    with fewer than five facts refused since, or before one. Otherwise the next run asks again.

    Attributes:
        attempts: rejected answers after which a fact is set aside.
        ledger: what the requests cost.
        runs: number of runs.
        requests: number of requests.
        kept: reasoning by fact id.
        rejected: by fact id, why each of its answers was not kept.
        refused: by fact id, why the endpoint will never answer for it.
        unanswered: the same for facts that this run gave up; the next one asks for them again.
        outcomes: number of requests by (outcome, reason up to its first colon).
    """

    def __init__(self, attempts: int, ledger: Ledger) -> None:
        self.attempts = attempts
        self.ledger = ledger
        self.runs = 0
        self.requests = 0
        self.kept: dict[str, str] = {}
        self.rejected: dict[str, list[str]] = {}
        self.refused: dict[str, str] = {}
        self.unanswered: dict[str, str] = {}
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self._run_has_answers = False
        self._refused_in_a_row: list[str] = []

    def apply(self, entry: Entry) -> None:
        """Applies a journal's next entry."""
        if isinstance(entry, RunStarted):
            self.end_run()
            self.runs, self._run_has_answers = entry.number, False
            self.unanswered.clear()
            return
        if isinstance(entry, RequestSent):
            self.requests = entry.number
            self.ledger.reserve(entry.number, entry.size)
            return
        self.ledger.settle(entry.number, entry.usage)
        reason = entry.reason or ""
        self.outcomes[entry.outcome, reason.partition(":")[0]] += 1
        if entry.outcome in ("kept", "rejected"):
            self._run_has_answers = True
            self._refused_in_a_row.clear()
        if entry.outcome == "kept":
            self.kept[entry.fact] = strip_wrapping(entry.text or "")
        elif entry.outcome == "rejected":
            self.rejected.setdefault(entry.fact, []).append(reason)
        elif entry.outcome == "refused":
            self.refused[entry.fact] = reason
            self._refused_in_a_row.append(entry.fact)

    def end_run(self) -> None:
        """Counts the run's last refusals as unanswered where they may not be final."""
        if not self._run_has_answers or len(self._refused_in_a_row) >= _MAX_REFUSALS:
            for fact in self._refused_in_a_row:
                self.unanswered[fact] = self.refused.pop(fact)
        self._refused_in_a_row.clear()

    def is_pending(self, fact: str) -> bool:
        """Returns whether a fact is to be asked about, for the first time or again."""
        return fact not in self.kept and self.set_aside_reasons(fact) is None

    def set_aside_reasons(self, fact: str) -> list[str] | None:
        """Returns why each answer was rejected and why no more are asked for; None if pending."""
        rejected = self.rejected.get(fact, [])
        if last := self.refused.get(fact) or self.unanswered.get(fact):
            return [*rejected, last]
        if fact not in self.kept and len(rejected) >= self.attempts:
            return rejected
        return None

    def cost(self) -> str:
        """Formats what was spent."""
        return self.ledger.prices.format(self.ledger.spent)

    def unknown_cost(self) -> str | None:
        """Formats the maximum cost of the requests of unknown usage; None if there are none."""
        count = len(self.ledger.unsettled)
        max_cost = self.ledger.prices.format(self.ledger.reserved())
        return f"requests of unknown cost: {count:,}, at most {max_cost}" if count else None

    def table(self, facts: Iterable[Fact], selection: Iterable[Fact], labels: Sequence[str]) -> str:
        """Formats the closing table.

        Args:
            facts: all of the split.
            selection: those to ask about.
            labels: in the order of the rows.
        """
        # Requests by outcome, and their cost.
        kept = sum(n for (outcome, _), n in self.outcomes.items() if outcome == "kept")
        rows = [f"requests: {self.requests:,}, kept: {kept:,}"]
        for (outcome, reason), count in self.outcomes.most_common():
            if outcome != "kept":
                rows.append(f"  {outcome}: {reason}: {count:,}")
        spent = self.ledger.spent
        rows.append(f"{spent.prompt:,} tokens in, {spent.answer:,} out; cost: {self.cost()}")
        if unknown := self.unknown_cost():
            rows.append(unknown)

        # Facts by label.
        kept_facts, set_aside, pending = Counter(), Counter(), Counter()
        for fact in facts:
            kept_facts[fact.label] += fact.id in self.kept
            set_aside[fact.label] += self.set_aside_reasons(fact.id) is not None
        for fact in selection:
            pending[fact.label] += self.is_pending(fact.id)
        width = max(map(len, (*labels, "total")))
        row = f"{{:<{width}}} {{:>7}} {{:>10}} {{:>7}}".format
        rows += ["", row("label", "kept", "set aside", "left")]
        rows += [row(x, kept_facts[x], set_aside[x], pending[x]) for x in labels]
        rows.append(row("total", kept_facts.total(), set_aside.total(), pending.total()))
        return "\n".join(rows)
