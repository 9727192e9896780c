"""Keeps requests on their way, and journals what comes of each before it counts."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import deque
from collections.abc import Callable, Sequence

from tqdm import tqdm

from morer1_jax.run.book import Book
from morer1_jax.run.budget import Size
from morer1_jax.run.endpoint import Endpoint, EndpointError, Reply
from morer1_jax.run.journal import Answered, Journal, Outcome, Sent
from morer1_jax.run.request import Request
from morer1_jax.task.fact import Fact
from morer1_jax.task.ontology import Ontology
from morer1_jax.task.teacher import fault, unwrapped

# Requests in a row without an answer after which the endpoint is taken to be down.
_SILENCE = 10
# Seconds that requests on their way may still take when a run ends because of the endpoint.
_GRACE = 2.0


@dataclasses.dataclass(frozen=True)
class Desk:
    """What a dispatch works with.

    Attributes:
      build: makes a fact's request; called in a thread.
      in_flight: most requests on their way at once.
      max_tokens: most tokens of an answer.
      bar: moves on by one when a fact is kept or set aside.
    """

    endpoint: Endpoint
    journal: Journal
    book: Book
    ontology: Ontology
    build: Callable[[Fact], Request]
    in_flight: int
    max_tokens: int
    bar: tqdm


def judge(sent: Sent, reply: Reply, fact: Fact, ontology: Ontology) -> Answered:
    """What the journal says of a reply."""
    outcome: Outcome
    if reply.answered:
        reason = reply.problem or fault(unwrapped(reply.text or ""), fact, ontology)
        outcome = "rejected" if reason else "kept"
    else:
        reason, outcome = reply.problem, "refused" if reply.lasting else "unanswered"
    return Answered(sent.number, sent.fact, outcome, reason, reply.usage, reply.text)


async def dispatch(desk: Desk, facts: Sequence[Fact]) -> Size | None:
    """Asks for each fact until it is kept or set aside, or a request does not fit the budget.

    When it is cancelled, or fails, what has arrived is journaled and what has not is given up.

    Returns:
      The size of the request that did not fit, if one did not.

    Raises:
      EndpointError: the endpoint refuses all requests, or has not answered ten in a row.
      DataError: a photo that cannot be read, or a journal that cannot be written.
    """
    book = desk.book
    queue = deque(facts)
    flights: dict[asyncio.Task[Reply], tuple[Sent, Fact]] = {}
    ready: tuple[Fact, Request] | None = None
    silence = 0

    def land(task: asyncio.Task[Reply]) -> Reply:
        (sent, fact), reply = flights.pop(task), task.result()
        entry = judge(sent, reply, fact, desk.ontology)
        desk.journal.add(entry)
        book.apply(entry)
        if entry.outcome == "unanswered" and not reply.fatal:
            book.unanswered[fact.id] = entry.reason or ""
        if book.is_open(fact.id):
            queue.append(fact)
        else:
            desk.bar.update()
        desk.bar.set_postfix_str(f"{len(book.kept):,} kept, {book.cost()}", refresh=False)
        return reply

    try:
        while True:
            while len(flights) < desk.in_flight and (ready or queue):
                if ready is None:
                    fact = queue.popleft()
                    ready = fact, await asyncio.to_thread(desk.build, fact)
                fact, request = ready
                size = request.size(desk.max_tokens)
                if not book.ledger.fits(size):
                    break
                sent = Sent(book.requests + 1, fact.id, size)
                desk.journal.add(sent)
                book.apply(sent)
                flights[asyncio.create_task(desk.endpoint.ask(request.messages))] = sent, fact
                ready = None
            if not flights:
                return size if ready else None
            done, _ = await asyncio.wait(flights, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                reply = land(task)
                silence = 0 if reply.answered else silence + 1
                trouble = reply.fatal
                if silence >= _SILENCE:
                    trouble = trouble or (
                        f"{silence} requests in a row were not answered (last: {reply.problem}); "
                        "what was answered is kept, start again later"
                    )
                if trouble:
                    if flights:
                        await asyncio.wait(flights, timeout=_GRACE)
                    raise EndpointError(trouble)
    finally:
        for task in flights:
            task.cancel()
        if flights:
            await asyncio.wait(flights)
        for task in list(flights):
            if not task.cancelled() and task.exception() is None:
                land(task)
