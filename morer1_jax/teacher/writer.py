"""Asks a strong model for the reasoning that SFT learns from, and keeps what can be learnt from.

`journal.jsonl` is the truth (see `journal.py`): a run that is killed at any moment and started
again asks only for what was on its way. `reasoning.jsonl` and `set_aside.jsonl` are made from it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etils import epath

from morer1_jax.data.images import ImageReader
from morer1_jax.errors import ConfigError, DataError, one_line
from morer1_jax.files import atomic_write, read_text
from morer1_jax.model.config import ImageConfig
from morer1_jax.progress import progress
from morer1_jax.task import more
from morer1_jax.task.fact import Fact
from morer1_jax.teacher.dispatch import Desk, Dispatch
from morer1_jax.teacher.endpoint import Endpoint, EndpointConfig
from morer1_jax.teacher.journal import Began, Entry, Journal, Sent, read_journal
from morer1_jax.teacher.ledger import Ledger, Prices, Size, Usage, money
from morer1_jax.teacher.outcomes import Book
from morer1_jax.teacher.prompt import balanced, prompt_digest, teacher_prompt
from morer1_jax.teacher.request import JPEG_QUALITY, Request, build_request, photo_digests

JOURNAL, KEPT, SET_ASIDE = "journal.jsonl", "reasoning.jsonl", "set_aside.jsonl"
# Of an estimate before anything was asked: how many facts' requests are built, tokens of an answer.
_SAMPLE, _ANSWER = 32, 350


@dataclasses.dataclass(frozen=True)
class WriterConfig:
    """What to ask for, and how much it may cost.

    Attributes:
      data: a folder in MORE's released form, local or in a bucket (`gs://…`).
      endpoint, images, prices: whom to ask, what the pictures are like, what it costs.
      out: where to write, on a local disk; None: to `data`.
      count: how many training facts, balanced over the labels.
      facts: a file of fact ids, one a line, instead of `count`.
      seed: of the choice.
      attempts: answers asked for a fact before it is set aside.
      in_flight: most requests on their way at once.
      budget_dollars, budget_tokens: for all in the journal, earlier runs included; None: no limit.
    """

    data: epath.Path
    endpoint: EndpointConfig
    images: ImageConfig
    prices: Prices
    out: epath.Path | None = None
    count: int | None = None
    facts: epath.Path | None = None
    seed: int = 0
    attempts: int = 3
    in_flight: int = 16
    budget_dollars: float | None = None
    budget_tokens: int | None = None

    def __post_init__(self) -> None:
        if (self.count is None) == (self.facts is None):
            raise ConfigError("give --count or --facts, one of the two")
        for name, value, least in (
            ("count", self.count, 1),
            ("seed", self.seed, 0),
            ("attempts", self.attempts, 1),
            ("in-flight", self.in_flight, 1),
            ("max-tokens", self.endpoint.max_tokens, 1),
            ("retries", self.endpoint.retries, 0),
            ("max-pixels", self.images.max_pixels, self.images.min_pixels),
            ("crop-margin", self.images.crop_margin, 0),
            ("crop-least", self.images.crop_least, 1),
            ("temperature", self.endpoint.temperature, 0),
            ("price-in", self.prices.prompt, 0),
            ("price-out", self.prices.answer, 0),
            ("budget-tokens", self.budget_tokens, 1),
        ):
            if value is not None and not value >= least:
                raise ConfigError(f"--{name}: {value} found, at least {least} expected")
        if not self.endpoint.timeout > 0:
            raise ConfigError(f"--timeout: {self.endpoint.timeout} found, seconds above 0 expected")
        if self.budget_dollars is not None and not self.budget_dollars > 0:
            raise ConfigError(f"--budget-dollars: {self.budget_dollars} found, above 0 expected")
        if self.budget_dollars is not None and not (self.prices.prompt and self.prices.answer):
            raise ConfigError("--budget-dollars: needs the endpoint's --price-in and --price-out")
        if "://" in os.fspath(self.data if self.out is None else self.out):
            found = "none, and --data in a bucket" if self.out is None else os.fspath(self.out)
            raise ConfigError(
                f"--out: {found} found, a folder on a local disk expected, which the journal needs"
            )

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        return Path(self.data if self.out is None else self.out)


class Writer:
    """One run over one journal."""

    def __init__(self, config: WriterConfig) -> None:
        """Reads the data and chooses the facts.

        Raises:
          ConfigError, DataError: what the user can put right, in one line.
        """
        self.config = config
        self.ontology = more.read_ontology(config.data)
        self.facts = more.read_split(config.data, "train", self.ontology)
        self.by_id = {fact.id: fact for fact in self.facts}
        self.chosen = self._choose()
        self.reader = ImageReader(config.data, config.images)
        self.ledger = Ledger(config.prices, config.budget_dollars, config.budget_tokens)
        self.book = Book(config.attempts, self.ledger)
        self.signal: signal.Signals | None = None
        path = config.folder / KEPT
        if path.exists() and not (config.folder / JOURNAL).exists():
            raise DataError(
                f"{path}: there already, and not from a journal; move it away, or give another "
                "--out"
            )

    @property
    def identity(self) -> dict[str, Any]:
        """What the answers depend on; a journal serves no other."""
        endpoint, images = self.config.endpoint, self.config.images
        digests = more.digests(self.config.data)
        return {
            "model": endpoint.model,
            "temperature": endpoint.temperature,
            "prompt": prompt_digest(self.ontology),
            "images": {
                "max_pixels": images.max_pixels,
                "crop_margin": images.crop_margin,
                "crop_least": images.crop_least,
                "jpeg_quality": JPEG_QUALITY,
            },
            "data": {name: digests[name] for name in ("rel2id.json", "txt/train.txt")},
        }

    def open_facts(self) -> list[Fact]:
        """The chosen facts that are to be asked for, in order."""
        return [fact for fact in self.chosen if self.book.is_open(fact.id)]

    def run(self) -> int:
        """Asks, and writes the outputs whatever happens; returns the exit code.

        Raises:
          EndpointError: the endpoint refuses all, or is down; what was answered is kept.
          ConfigError, DataError: what the user can put right, in one line.
        """
        endpoint = Endpoint(self.config.endpoint)
        path = self.config.folder / JOURNAL
        with Journal(path, self.identity) as journal:
            if journal.repaired:
                print(f"{journal.repaired}: torn when a run was killed; cut off")
            journal.add(self._replay(journal.entries))
            facts = self.open_facts()
            for fact in facts:
                teacher_prompt(fact, self.ontology)  # A bad title is found before the first dollar.
            if facts:
                more.photo_sizes(facts, self.config.data)
            try:
                refused = asyncio.run(self._ask(endpoint, journal, facts))
            except BaseException:
                try:
                    self._write_outputs()
                except DataError as error:  # Not in place of the one on its way.
                    print(f"error: {error}", file=sys.stderr)
                raise
            self._write_outputs()
        if unanswered := len(self.book.unanswered):
            print(f"{unanswered:,} facts were not answered; start again to ask for them anew")
        if self.signal is not None:
            print(f"stopped by {self.signal.name}; start again to go on")
            return 128 + self.signal
        if refused is not None:
            most = money(self.config.prices, self.ledger.most(refused))
            print(
                f"stopped: the next request may cost {most}, which the budget cannot bear; "
                f"{len(self.open_facts()):,} facts are left, raise it and start again to go on"
            )
        return 0

    def dry_run(self) -> int:
        """Prints one prompt and what all would cost; asks nothing and writes nothing."""
        self._replay(read_journal(self.config.folder / JOURNAL, self.identity))
        facts = self.open_facts()
        if not facts:
            print(f"nothing is left to ask of {len(self.chosen):,} facts")
            return 0
        requests = [self._build(fact) for fact in facts[:: -(-len(facts) // _SAMPLE)]]
        first = requests[0]
        print(f"{facts[0].id}:\n\n{first.prompt}\n")
        for name, (width, height), image in zip(
            ("photo", "crop"), first.shapes, first.images, strict=True
        ):
            print(f"{name}: {width} × {height} pixels, {len(image) / 1000:.1f} kB as JPEG")
        print(self._estimate(requests, len(facts)))
        return 0

    def _choose(self) -> list[Fact]:
        config = self.config
        if config.facts is None:
            if config.count > len(self.facts):
                raise ConfigError(
                    f"--count: {config.count} found, at most {len(self.facts)} training facts there"
                )
            return balanced(self.facts, config.count, config.seed)
        try:
            lines = read_text(config.facts).split("\n")
        except (OSError, ValueError) as error:
            raise DataError(f"--facts: {one_line(error)}; expected a fact's id a line") from None
        ids: dict[str, None] = {}
        for number, line in enumerate(lines, start=1):
            name = line.strip()
            if name and (name not in self.by_id or name in ids):
                problem = "there twice" if name in ids else "unknown"
                raise DataError(
                    f"{config.facts}:{number}: {name!r} is {problem}, a training fact's id like "
                    "train:1 expected, each once"
                )
            if name:
                ids[name] = None
        if not ids:
            raise DataError(f"{config.facts}: empty, expected a fact's id a line")
        return [self.by_id[name] for name in ids]

    def _replay(self, entries: Sequence[Entry]) -> Began:
        """Takes in the journal, and that this run begins, which is returned."""
        for entry in entries:
            if not isinstance(entry, Began) and entry.fact not in self.by_id:
                raise DataError(
                    f"{self.config.folder / JOURNAL}: {entry.fact!r} is no training fact of "
                    f"{self.config.data}; restore the file, or use another --out"
                )
            self.book.apply(entry)
        self._check_photos(entries)
        if unsettled := self.book.unsettled():
            print(f"from earlier runs: {unsettled}")
        began = Began(self.book.runs + 1)
        self.book.apply(began)
        return began

    def _check_photos(self, entries: Sequence[Entry]) -> None:
        """Raises DataError if an answer is about a photo that has been replaced since."""
        asked = [entry for entry in entries if isinstance(entry, Sent) and entry.photo is not None]
        found = photo_digests((self.by_id[entry.fact] for entry in asked), self.config.data)
        changed = {
            entry.fact: None
            for entry in asked
            if found[self.by_id[entry.fact].photo] != entry.photo
        }
        if changed:
            first = next(iter(changed))
            others = f" and {len(changed) - 1} facts more" if len(changed) > 1 else ""
            raise DataError(
                f"{self.config.folder / JOURNAL}: {first}{others} asked about with another photo "
                f"than {more.photo_path(self.config.data, self.by_id[first])} is now; put back "
                "what was there, or use another --out"
            )

    def _build(self, fact: Fact) -> Request:
        return build_request(fact, self.ontology, self.reader)

    async def _ask(
        self, endpoint: Endpoint, journal: Journal, facts: Sequence[Fact]
    ) -> Size | None:
        """Asks for the facts; see `Dispatch.run`.

        The first signal lets what is on its way arrive, the second gives it up.
        """
        total = len(self.chosen)
        bar = progress(desc="reasoning", total=total, initial=total - len(facts), unit="fact")
        desk = Desk(
            endpoint=endpoint,
            journal=journal,
            book=self.book,
            ontology=self.ontology,
            build=self._build,
            in_flight=self.config.in_flight,
            bar=bar,
        )
        dispatch = Dispatch(desk, facts)
        asking = asyncio.create_task(dispatch.run())

        def stop(number: signal.Signals) -> None:
            if self.signal is not None:
                asking.cancel()
                return
            self.signal = number
            dispatch.stop()
            bar.write(
                f"{number.name}: waits for {dispatch.in_flight:,} requests on their way, up to "
                f"{self.config.endpoint.timeout:g} s; a second signal gives them up"
            )

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop, number)
        with bar:
            async with endpoint:
                await asyncio.wait([asking])
        return None if asking.cancelled() else asking.result()

    def _write_outputs(self) -> None:
        """Writes what the journal holds, in the facts' order, and prints the closing table.

        Raises:
          DataError: a file cannot be written; the journal holds it all the same.
        """
        self.book.doubt()
        kept = {
            fact.id: self.book.kept[fact.id] for fact in self.facts if fact.id in self.book.kept
        }
        lines = [
            {
                "fact": fact.id,
                "reasons": reasons,
                "attempts": len(self.book.rejected.get(fact.id, [])),
            }
            for fact in self.facts
            if (reasons := self.book.why_set_aside(fact.id)) is not None
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        try:
            if kept:
                more.write_reasoning(self.config.folder / KEPT, kept)
            atomic_write(self.config.folder / SET_ASIDE, text)
        except OSError as error:
            raise DataError(
                f"{self.config.folder}: {one_line(error)}; make room and start again, what was "
                "answered is kept in the journal"
            ) from None
        print(self.book.table(self.facts, self.chosen, self.ontology.labels))

    def _estimate(self, requests: Sequence[Request], count: int) -> str:
        """What asking for `count` facts will cost, judged by some of their requests."""
        ledger, times = self.ledger, self.config.attempts
        most = self.config.endpoint.max_tokens
        if ledger.answered:
            each = Usage(
                ledger.spent.prompt // ledger.answered, ledger.spent.answer // ledger.answered
            )
            source = f"as in {ledger.answered:,} answers so far"
        else:
            sizes = [request.size(most) for request in requests]
            # Four bytes a token, and images as GPT-4o counts them: 85 tokens each, 170 a tile.
            prompt = sum(s.text / 4 + 170 + 170 * s.tiles for s in sizes) / len(sizes)
            each = Usage(round(prompt), min(_ANSWER, most))
            source = "images counted as GPT-4o does"
        once = Usage(each.prompt * count, each.answer * count)
        worst = Usage(each.prompt * count * times, most * count * times)
        first, short = requests[0].size(most), ""
        if not ledger.fits(first):
            dear = money(ledger.prices, ledger.most(first))
            short = f"\nthe budget cannot bear the first request, which may cost {dear}; raise it"
        elif not ledger.bears(once):
            short = "\nthe budget ends before each is asked once; raise it, or ask for fewer"
        return (
            f"{count:,} facts to ask for of {len(self.chosen):,}; a request about {each.prompt:,} "
            f"tokens in and {each.answer:,} out ({source})\n"
            f"about {money(ledger.prices, once)} if each is asked once; "
            f"{money(ledger.prices, worst)} if each is asked {times} times for {most:,} tokens"
            f"{short}"
        )
