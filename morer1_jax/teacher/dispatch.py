"""Keeps requests on their way, and journals what comes of each before it counts."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
from collections import Counter, deque
from collections.abc import Callable, Sequence

from tqdm import tqdm

from morer1_jax.errors import DataError
from morer1_jax.task.fact import Fact
from morer1_jax.task.ontology import Ontology
from morer1_jax.teacher.endpoint import Endpoint, EndpointError, Reply
from morer1_jax.teacher.journal import Answered, Journal, Outcome, Sent
from morer1_jax.teacher.ledger import Size
from morer1_jax.teacher.outcomes import Book
from morer1_jax.teacher.prompt import fault, unwrapped
from morer1_jax.teacher.request import Request

# Facts given up in a row, without an answer, after which the endpoint is taken to be down; and
# facts refused alike, after which it is the request that is wrong.
_SILENCE, _ALIKE = 10, 5
# Seconds before a request is sent again: before the first time, at most, and at most if the
# endpoint asks for more.
_PAUSE, _LONG_PAUSE, _PATIENCE = 0.5, 8.0, 120.0


@dataclasses.dataclass(frozen=True)
class Desk:
    """What a dispatch works with.

    Attributes:
      build: makes a fact's request; called in a thread.
      in_flight: most requests on their way, or waiting to be sent again, at once.
      bar: moves on by one when a fact is kept or set aside.
    """

    endpoint: Endpoint
    journal: Journal
    book: Book
    ontology: Ontology
    build: Callable[[Fact], Request]
    in_flight: int
    bar: tqdm


def judge(sent: Sent, reply: Reply, fact: Fact, ontology: Ontology) -> Answered:
    """What the journal says of a reply."""
    outcome: Outcome
    if reply.outcome == "answer":
        reason = reply.problem or fault(unwrapped(reply.text or ""), fact, ontology)
        outcome = "rejected" if reason else "kept"
    else:
        lasting = reply.outcome in ("filtered", "refused")
        reason, outcome = reply.problem, "refused" if lasting else "unanswered"
    return Answered(sent.number, sent.fact, outcome, reason, reply.usage, reply.text)


class Dispatch:
    """The requests of one run.

    A request that failed for now is sent again, as another request: after as long as the endpoint
    says, up to two minutes, else after half a second, doubled each time up to eight.
    """

    def __init__(self, desk: Desk, facts: Sequence[Fact]) -> None:
        self._desk = desk
        self._queue = deque(facts)
        # Built and next to be sent; on their way; waiting to be sent again.
        self._ready: deque[tuple[Fact, Request]] = deque()
        self._flights: dict[asyncio.Task[Reply], tuple[Sent, Fact, Request]] = {}
        self._pauses: dict[asyncio.Task[None], tuple[Fact, Request]] = {}
        self._tries: Counter[str] = Counter()
        self._stopping = asyncio.Event()
        self._answered = False
        self._fatal: str | None = None
        # Since the last answer: facts given up, what was refused alike, what was said last.
        self._silence = 0
        self._alike: Counter[str] = Counter()
        self._last = ""

    @property
    def in_flight(self) -> int:
        """How many requests are on their way."""
        return len(self._flights)

    def stop(self) -> None:
        """Sends no more; `run` ends when what is on its way has arrived, or is late."""
        self._stopping.set()

    async def run(self) -> Size | None:
        """Asks for each fact until it is kept or set aside, or a request does not fit the budget.

        Before it ends, also with an EndpointError, what is on its way may arrive until the
        endpoint's time-out. When it is cancelled, or the journal fails, that is given up.

        Returns:
          The size of the request that did not fit, if one did not.

        Raises:
          EndpointError: the endpoint refuses all requests, has answered none, or has not answered
            for ten facts in a row.
          DataError: a photo that cannot be read, or a journal that cannot be written.
        """
        stopped = asyncio.create_task(self._stopping.wait())
        try:
            await self._work(stopped)
        except BaseException:
            with contextlib.suppress(DataError):  # The first error is the one to be told.
                await self._give_up()
            raise
        finally:
            stopped.cancel()
        await self._give_up()
        if self._stopping.is_set():
            return None
        if self._last and not self._answered:
            raise EndpointError(
                f"no request was answered (last: {self._last}); correct --base-url or --model, "
                "or start again later"
            )
        return self._size(self._ready[0][1]) if self._ready else None

    async def _work(self, stopped: asyncio.Task[bool]) -> None:
        while not self._stopping.is_set():
            await self._fill()
            if not self._flights and (self._ready or not self._pauses):
                return
            tasks = {*self._flights, *self._pauses, stopped}
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done & self._pauses.keys():
                self._ready.append(self._pauses.pop(task))
            self._land(done)
            if self._trouble():
                await self._drain()
                if trouble := self._trouble():  # No answer has come that speaks against it.
                    raise EndpointError(trouble)
        await self._drain()

    async def _fill(self) -> None:
        """Sends until enough are on their way, none is left, or the budget cannot bear the next."""
        desk = self._desk
        while len(self._flights) + len(self._pauses) < desk.in_flight:
            if not self._ready:
                if not self._queue:
                    return
                fact = self._queue.popleft()
                try:
                    self._ready.append((fact, await asyncio.to_thread(desk.build, fact)))
                except DataError:
                    await self._drain()
                    raise
            fact, request = self._ready[0]
            size = self._size(request)
            if self._stopping.is_set() or not desk.book.ledger.fits(size):
                return
            sent = Sent(desk.book.requests + 1, fact.id, size, request.photo)
            desk.journal.add(sent)
            desk.book.apply(sent)
            self._ready.popleft()
            task = asyncio.create_task(desk.endpoint.ask(request.messages))
            self._flights[task] = sent, fact, request

    def _land(self, done: set[asyncio.Task]) -> None:
        """Journals what has arrived, and takes up each fact again, or not."""
        desk, book = self._desk, self._desk.book
        for task in done & self._flights.keys():
            (sent, fact, request), reply = self._flights.pop(task), task.result()
            entry = judge(sent, reply, fact, desk.ontology)
            desk.journal.add(entry)
            book.apply(entry)
            if reply.outcome == "answer":
                self._answered, self._silence = True, 0
                self._alike.clear()
                del self._tries[fact.id]
            else:
                self._last = f"{fact.id}: {reply.problem}"
            if self._is_again(fact, reply):
                self._pause(fact, request, reply)
                continue
            if reply.outcome == "failed":
                book.unanswered[fact.id] = entry.reason or ""
                self._silence += 1
            elif reply.outcome == "refused":
                self._alike[(reply.problem or "").partition(":")[0]] += 1
            elif reply.outcome == "fatal" and self._fatal is None:
                self._fatal = f"{reply.advice}, then start again ({self._last})"
            if book.is_open(fact.id):
                self._queue.append(fact)
            else:
                desk.bar.update()
            desk.bar.set_postfix_str(f"{len(book.kept):,} kept, {book.cost()}", refresh=False)

    def _is_again(self, fact: Fact, reply: Reply) -> bool:
        patient = reply.after is None or reply.after <= _PATIENCE
        return reply.retry and patient and self._tries[fact.id] < self._desk.endpoint.config.retries

    def _pause(self, fact: Fact, request: Request, reply: Reply) -> None:
        seconds = reply.after
        if seconds is None:
            # Not all at once: what failed together would fail together again.
            longest = min(_PAUSE * 2 ** self._tries[fact.id], _LONG_PAUSE)
            seconds = random.uniform(0.75, 1) * longest
        self._tries[fact.id] += 1
        self._pauses[asyncio.create_task(asyncio.sleep(seconds))] = fact, request

    def _trouble(self) -> str | None:
        """Why there is no sense in going on, if so."""
        if self._fatal:
            return self._fatal
        if self._silence >= _SILENCE:
            return (
                f"{self._silence} facts in a row were not answered (last: {self._last}); what was "
                "answered is kept, start again later"
            )
        if max(self._alike.values(), default=0) >= _ALIKE:
            return (
                f"{max(self._alike.values())} facts in a row were refused alike (last: "
                f"{self._last}); change the setting that it names, or leave these facts out, then "
                "start again"
            )
        return None

    async def _drain(self) -> None:
        """Lets what is on its way arrive, until the endpoint's time-out."""
        clock = asyncio.get_running_loop()
        end = clock.time() + self._desk.endpoint.config.timeout
        while self._flights and (left := end - clock.time()) > 0:
            done, _ = await asyncio.wait(
                self._flights, timeout=left, return_when=asyncio.FIRST_COMPLETED
            )
            self._land(done)

    async def _give_up(self) -> None:
        """Cancels what is on its way or waits; what has arrived by now is journaled."""
        tasks = {*self._flights, *self._pauses}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._land(
            {task for task in self._flights if not task.cancelled() and not task.exception()}
        )
        for task in self._pauses:
            task.cancel()

    def _size(self, request: Request) -> Size:
        return request.size(self._desk.endpoint.config.max_tokens)
