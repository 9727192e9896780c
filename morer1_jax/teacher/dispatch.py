"""Sends the requests of a run, several at a time, and journals each result before it counts."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
import signal
from collections import Counter, deque
from collections.abc import Callable, Sequence

from morer1_jax.errors import DataError
from morer1_jax.progress import progress
from morer1_jax.task.fact import Fact
from morer1_jax.task.ontology import Ontology
from morer1_jax.teacher.answers import rejection_reason, strip_wrapping
from morer1_jax.teacher.endpoint import Endpoint, EndpointError, Reply
from morer1_jax.teacher.journal import Journal, Outcome, RequestResult, RequestSent
from morer1_jax.teacher.ledger import Size
from morer1_jax.teacher.request import Request
from morer1_jax.teacher.results import Results

# Without an answer in between: number of facts given up after which the endpoint is taken to be
# down, and number of facts refused alike after which the request is taken to be at fault.
_MAX_GIVEN_UP, _MAX_REFUSED_ALIKE = 10, 5
# Seconds before a retry, as in OpenAI's client: the first, the maximum, and the maximum that the
# endpoint may ask for.
_FIRST_DELAY, _MAX_DELAY, _MAX_RETRY_AFTER = 0.5, 8.0, 120.0


class _OverBudget(Exception):
    """A request that does not fit the budget; its argument is the request's size."""


@dataclasses.dataclass
class Dispatcher:
    """Asks for the reasoning of facts with a fixed number of workers; for one run.

    A request that failed for a passing reason is retried, as a request of its own: after as long as
    the endpoint asks for, up to two minutes, otherwise after half a second, doubled up to eight.

    SIGINT and SIGTERM end the run: the requests in flight may arrive until the endpoint's time-out.
    A second signal gives them up.

    Attributes:
        build: builds a fact's request; called in a thread.
        max_in_flight: number of workers.
        stopped_by: the signal that ended the run, if one did.
    """

    endpoint: Endpoint
    journal: Journal
    results: Results
    ontology: Ontology
    build: Callable[[Fact], Request]
    max_in_flight: int
    stopped_by: signal.Signals | None = None

    def __post_init__(self) -> None:
        self._queue: deque[Fact] = deque()
        self._workers: set[asyncio.Task[None]] = set()
        self._in_flight: set[asyncio.Task[None] | None] = set()  # Workers that await a reply.
        self._arrival = asyncio.Event()  # Of the next reply.
        self._turn = asyncio.Lock()  # One worker at a time waits for the budget.
        self._answered = False
        self._last_problem = ""
        self._fatal: str | None = None
        # Since the last answer.
        self._given_up = 0
        self._refused: Counter[str] = Counter()

    async def run(self, facts: Sequence[Fact], done: int = 0) -> Size | None:
        """Asks for each fact until it is kept or set aside, or a request does not fit the budget.

        Before it returns or raises an EndpointError, requests in flight may arrive until the
        endpoint's time-out. If the journal cannot be written they are given up.

        Args:
            facts: the facts, in order.
            done: number of facts done before, which the progress bar counts.

        Returns:
            The size of the request that did not fit, if any.

        Raises:
            EndpointError: the endpoint refuses all requests, has answered none, or has not answered
                for ten facts in a row.
            DataError: a photo cannot be read, or the journal cannot be written.
        """
        for stop_signal in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(stop_signal, self._stop, stop_signal)
        self._queue.extend(facts)
        total = done + len(facts)
        self._bar = progress(desc="reasoning", total=total, initial=done, unit="fact")
        # A request over budget ends the workers as an error does, but is a result.
        unaffordable = None
        try:
            async with self.endpoint, asyncio.TaskGroup() as group:
                self._workers = {group.create_task(self._work()) for _ in range(self.max_in_flight)}
        except BaseExceptionGroup as errors:
            if not isinstance(errors.exceptions[0], _OverBudget):
                raise errors.exceptions[0] from None
            [unaffordable] = errors.exceptions[0].args
        finally:
            self._bar.close()
        # A base URL or model without a single answer is an error, too.
        if self.stopped_by:
            return None
        if self._last_problem and not self._answered:
            raise EndpointError(
                f"no request was answered (last: {self._last_problem}); correct --base-url or "
                "--model, or start again later"
            )
        return unaffordable

    def _stop(self, stop_signal: signal.Signals) -> None:
        """Sends no more requests; at a second signal, gives up those in flight."""
        if self.stopped_by:
            for worker in self._workers:
                worker.cancel()
            return
        self.stopped_by = stop_signal
        timeout = self.endpoint.config.timeout
        for worker in self._workers - self._in_flight:
            worker.cancel()
        for worker in self._in_flight:
            asyncio.get_running_loop().call_later(timeout, worker.cancel)
        self._bar.write(
            f"{stop_signal.name}: waiting for {len(self._in_flight):,} requests in flight, up to "
            f"{timeout:g} s; a second signal gives them up"
        )

    async def _work(self) -> None:
        """Asks for one fact after another until the queue is empty."""
        while self._queue and not self.stopped_by:
            await self._ask(self._queue.popleft())
        if not self.stopped_by:
            await self._check_endpoint()

    async def _ask(self, fact: Fact) -> None:
        """Asks for a fact once, with retries, and queues it again if it is still pending."""
        request, retries = None, self.endpoint.config.retries
        for attempt in range(retries + 1):
            # Not released after an error, so that no other worker sends a request.
            await self._turn.acquire()
            request = request or await self._build(fact)
            sent = await self._admit(fact, request)
            self._turn.release()
            try:
                reply = await self.endpoint.ask(request.messages)
            finally:
                self._in_flight.remove(asyncio.current_task())
                self._arrival.set()  # Waiters run at the next await, after `_record`.
                self._arrival = asyncio.Event()
            self._record(sent, reply, fact)
            delay = _retry_delay(reply, attempt)
            if delay is None or attempt == retries:
                break
            if self.stopped_by:
                return
            await asyncio.sleep(delay)
        if reply.kind == "failed":
            self.results.unanswered[fact.id] = reply.problem or ""
            self._given_up += 1
        if self.results.is_pending(fact.id):
            self._queue.append(fact)
        else:
            self._bar.update()
        cost = f"{len(self.results.kept):,} kept, {self.results.cost()}"
        self._bar.set_postfix_str(cost, refresh=False)

    async def _build(self, fact: Fact) -> Request:
        try:
            return await asyncio.to_thread(self.build, fact)
        except DataError:
            await self._await_arrivals(until=lambda: False)
            raise

    async def _admit(self, fact: Fact, request: Request) -> RequestSent:
        """Journals a request once the budget covers it, after which it is to be sent.

        Raises:
            _OverBudget: the budget does not cover it, and no reply in flight can change that.
        """
        ledger, size = self.results.ledger, request.size(self.endpoint.config.max_tokens)
        await self._check_endpoint()
        while not ledger.fits(size):
            if not self._in_flight:
                raise _OverBudget(size)
            await self._arrival.wait()
            await self._check_endpoint()
        sent = RequestSent(self.results.requests + 1, fact.id, size, request.photo)
        self.journal.add(sent)
        self.results.apply(sent)
        self._in_flight.add(asyncio.current_task())
        return sent

    def _record(self, sent: RequestSent, reply: Reply, fact: Fact) -> None:
        """Journals a reply, and notes whether it shows that the endpoint works."""
        result = judge(sent, reply, fact, self.ontology)
        self.journal.add(result)
        self.results.apply(result)
        if reply.kind == "answer":
            self._answered, self._given_up = True, 0
            self._refused.clear()
            return
        self._last_problem = f"{fact.id}: {reply.problem}"
        if reply.kind == "refused":
            self._refused[(reply.problem or "").partition(":")[0]] += 1
        elif reply.kind == "fatal" and self._fatal is None:
            self._fatal = f"{reply.advice}, then start again ({self._last_problem})"

    async def _check_endpoint(self) -> None:
        """Raises EndpointError if further requests are useless, whatever is still in flight."""
        await self._await_arrivals(until=lambda: self._trouble() is None)
        if trouble := self._trouble():
            raise EndpointError(trouble)

    async def _await_arrivals(self, until: Callable[[], bool]) -> None:
        """Waits until a condition holds, none is in flight, or the endpoint's time-out is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.endpoint.config.timeout):
                while self._in_flight and not until():
                    await self._arrival.wait()

    def _trouble(self) -> str | None:
        """Returns why further requests are useless; None if they are not."""
        if self._fatal:
            return self._fatal
        if self._given_up >= _MAX_GIVEN_UP:
            return (
                f"{self._given_up} facts in a row were not answered (last: {self._last_problem}); "
                "the answers so far are kept, start again later"
            )
        refused_alike = max(self._refused.values(), default=0)
        if refused_alike >= _MAX_REFUSED_ALIKE:
            return (
                f"{refused_alike} facts in a row were refused alike (last: {self._last_problem}); "
                "change the setting that it names, or leave these facts out, then start again"
            )
        return None


def judge(sent: RequestSent, reply: Reply, fact: Fact, ontology: Ontology) -> RequestResult:
    """Returns what the journal says of a reply."""
    outcome: Outcome
    reason = reply.problem
    if reply.kind == "answer":
        reason = reason or rejection_reason(strip_wrapping(reply.text or ""), fact, ontology)
        outcome = "rejected" if reason else "kept"
    else:
        outcome = "refused" if reply.kind in ("filtered", "refused") else "unanswered"
    return RequestResult(sent.number, sent.fact, outcome, reason, reply.usage, reply.text)


def _retry_delay(reply: Reply, attempt: int) -> float | None:
    """Returns the seconds to wait before a retry; None: there is no use in one."""
    if not reply.transient or (reply.retry_after or 0) > _MAX_RETRY_AFTER:
        return None
    if reply.retry_after is not None:
        return reply.retry_after
    # Random, since requests that failed together would otherwise be sent together again.
    return random.uniform(0.75, 1) * min(_FIRST_DELAY * 2**attempt, _MAX_DELAY)
