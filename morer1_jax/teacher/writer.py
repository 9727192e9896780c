"""Has a strong model write the reasoning that SFT learns from, and keeps what may be learnt from.

`journal.jsonl` (see `journal.py`) is the truth: a run that is killed at any moment and started
again loses only what was in flight. `reasoning.jsonl` and `set_aside.jsonl` are made from it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etils import epath

from morer1_jax.data.images import ImageReader
from morer1_jax.data.source import open_source
from morer1_jax.errors import ConfigError, DataError, one_line
from morer1_jax.files import write_jsonl
from morer1_jax.model.config import ImageConfig
from morer1_jax.task import more
from morer1_jax.task.fact import Fact
from morer1_jax.task.photos import check_photos
from morer1_jax.teacher.dispatch import Dispatcher
from morer1_jax.teacher.endpoint import Endpoint, EndpointConfig
from morer1_jax.teacher.journal import Entry, Journal, RequestSent, RunStarted, read_journal
from morer1_jax.teacher.ledger import Ledger, Prices, Usage
from morer1_jax.teacher.prompt import prompt_digest, teacher_prompt
from morer1_jax.teacher.request import JPEG_QUALITY, Request, build_request
from morer1_jax.teacher.results import Results
from morer1_jax.teacher.selection import select_balanced, select_listed

JOURNAL, KEPT, SET_ASIDE = "journal.jsonl", "reasoning.jsonl", "set_aside.jsonl"
# For an estimate before the first answer: number of requests to build, and tokens of an answer.
_SAMPLE, _ANSWER_TOKENS = 32, 350


@dataclasses.dataclass(frozen=True)
class WriterConfig:
    """What to ask for, and how much it may cost.

    Attributes:
        data: a dataset's folder, local or in a bucket (`gs://…`); see `open_source`.
        endpoint, images, prices: which model to ask, image sizes, what tokens cost.
        out: the folder to write to, on a local disk; None: `data`.
        count: number of training facts, balanced over the labels.
        facts: a file of fact ids, one a line, instead of `count`.
        seed: of the selection.
        attempts: answers asked for a fact before it is set aside.
        in_flight: maximum number of requests in flight.
        budget_dollars, budget_tokens: of all runs with this journal together; None: no limit.

    Raises:
        ConfigError: fields that contradict each other.
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
            raise ConfigError("expected one of --count and --facts, found both or none; give one")
        if self.budget_dollars is not None and not (self.prices.prompt and self.prices.answer):
            raise ConfigError(
                "--budget-dollars: expected --price-in and --price-out beside it, found one or "
                "none; give both"
            )
        if "://" in os.fspath(self.data if self.out is None else self.out):
            place = "none, and --data in a bucket" if self.out is None else os.fspath(self.out)
            raise ConfigError(
                f"--out: expected a folder on a local disk, which the journal needs, found {place}"
            )

    @property
    def folder(self) -> Path:
        """The folder that everything is written to."""
        return Path(self.data if self.out is None else self.out)


class Writer:
    """One run over one journal."""

    def __init__(self, config: WriterConfig) -> None:
        """Reads the dataset and selects the facts.

        Raises:
            ConfigError, DataError: bad settings or data, named in one line.
        """
        self.config = config
        self.source = open_source(config.data, "--data")
        self.ontology = self.source.ontology
        self.facts = self.source.facts("train")
        if config.facts is None:
            self.selection = select_balanced(self.facts, config.count, config.seed)
        else:
            self.selection = select_listed(self.facts, config.facts)
        self.reader = ImageReader(self.source, config.images)
        self.ledger = Ledger(config.prices, config.budget_dollars, config.budget_tokens)
        self.results = Results(config.attempts, self.ledger)
        self._journal_path = config.folder / JOURNAL
        kept = config.folder / KEPT
        if kept.exists() and not self._journal_path.exists():
            raise DataError(
                f"{kept}: expected no file, or one beside the {JOURNAL} it was made from, found "
                "one alone; move it away, or use another --out"
            )

    @property
    def identity(self) -> dict[str, Any]:
        """What the answers depend on; a journal is for one identity."""
        endpoint, images = self.config.endpoint, self.config.images
        digests = self.source.digests()
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

    def run(self) -> int:
        """Asks for the pending facts, writes the outputs, and returns the exit code.

        The outputs are written whatever happens.

        Raises:
            EndpointError: the endpoint refuses all requests, or is down; the answers are kept.
            ConfigError, DataError: bad settings or data, named in one line.
        """
        endpoint = Endpoint(self.config.endpoint)
        with Journal(self._journal_path, self.identity) as journal:
            if journal.repaired:
                print(f"{journal.repaired}: cut off, because a kill had torn the line")
            journal.add(self._replay(journal.entries))

            # Errors in the pending facts must end the run before the first request is paid for.
            facts = self._pending()
            for fact in facts:
                teacher_prompt(fact, self.ontology)
            if facts:
                check_photos(facts, self.source)

            # The requests; the outputs are written even if these end with an error.
            dispatcher = Dispatcher(
                endpoint=endpoint,
                journal=journal,
                results=self.results,
                ontology=self.ontology,
                build=self._build,
                max_in_flight=self.config.in_flight,
            )
            try:
                done = len(self.selection) - len(facts)
                unaffordable = asyncio.run(dispatcher.run(facts, done))
            except BaseException:
                try:
                    self._write_outputs()
                except DataError as error:  # Must not replace the first error.
                    print(f"error: {error}", file=sys.stderr)
                raise
            self._write_outputs()

        # What is left for the next run.
        if unanswered := len(self.results.unanswered):
            print(f"{unanswered:,} facts were not answered; start again to ask for them again")
        if dispatcher.stopped_by:
            print(f"stopped by {dispatcher.stopped_by.name}; start again to go on")
            return 128 + dispatcher.stopped_by
        if unaffordable is not None:
            cost = self.config.prices.format(self.ledger.max_usage(unaffordable))
            print(
                f"stopped: the next request may cost {cost}, which exceeds the budget; "
                f"{len(self._pending()):,} facts are left, raise it and start again to go on"
            )
        return 0

    def dry_run(self) -> int:
        """Prints one prompt and an estimate of the cost; sends and writes nothing."""
        self._replay(read_journal(self._journal_path, self.identity))
        facts = self._pending()
        if not facts:
            print(f"nothing is left to ask for of {len(self.selection):,} facts")
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

    def _pending(self) -> list[Fact]:
        """Returns the selected facts that are to be asked for, in order."""
        return [fact for fact in self.selection if self.results.is_pending(fact.id)]

    def _replay(self, entries: Sequence[Entry]) -> RunStarted:
        """Applies a journal's entries and the start of this run, which it returns.

        Raises:
            DataError: an entry is about an unknown fact, or a photo that has been replaced since.
        """
        # The results of earlier runs.
        by_id = {fact.id: fact for fact in self.facts}
        for entry in entries:
            if not isinstance(entry, RunStarted) and entry.fact not in by_id:
                raise DataError(
                    f"{self._journal_path}: expected training facts of {self.config.data}, found "
                    f"{entry.fact!r}; restore the file, or use another --out"
                )
            self.results.apply(entry)

        # Their photos, which must be those that were sent.
        sent = {x.fact: x.photo for x in entries if isinstance(x, RequestSent) and x.photo}
        photos = check_photos((by_id[x] for x in sent), self.source) if sent else {}
        replaced = [fact for fact in sent if photos[by_id[fact].photo].digest != sent[fact]]
        if replaced:
            first, *rest = replaced
            and_rest = f" and {len(rest)} more facts" if rest else ""
            path = self.source.name(by_id[first])
            raise DataError(
                f"{self._journal_path}: {first}{and_rest}: expected the photo that was sent, "
                f"found another as {path}; put back the old one, or use another --out"
            )

        # The start of this run.
        if unknown_cost := self.results.unknown_cost():
            print(f"from earlier runs: {unknown_cost}")
        started = RunStarted(self.results.runs + 1)
        self.results.apply(started)
        return started

    def _build(self, fact: Fact) -> Request:
        return build_request(fact, self.ontology, self.reader)

    def _write_outputs(self) -> None:
        """Writes what the journal holds, in the facts' order, and prints the closing table.

        Raises:
            DataError: a file cannot be written; the journal is not affected.
        """
        results = self.results
        results.end_run()
        ids = [fact.id for fact in self.facts]
        kept = {fact: results.kept[fact] for fact in ids if fact in results.kept}
        set_aside = [
            {"fact": fact, "reasons": reasons, "attempts": len(results.rejected.get(fact, []))}
            for fact in ids
            if (reasons := results.set_aside_reasons(fact)) is not None
        ]
        try:
            if kept:
                more.write_reasoning(self.config.folder / KEPT, kept)
            write_jsonl(self.config.folder / SET_ASIDE, set_aside)
        except OSError as error:
            raise DataError(
                f"{self.config.folder}: {one_line(error)}; make room and start again, the journal "
                "holds the answers"
            ) from None
        print(results.table(self.facts, self.selection, self.ontology.labels))

    def _estimate(self, requests: Sequence[Request], count: int) -> str:
        """Formats the estimated cost of asking for `count` facts, from a sample of requests."""
        ledger, attempts = self.ledger, self.config.attempts
        max_tokens = self.config.endpoint.max_tokens
        sizes = [request.size(max_tokens) for request in requests]
        if billed := ledger.billed:
            mean = Usage(ledger.spent.prompt // billed, ledger.spent.answer // billed)
            source = f"as in {billed:,} answers so far"
        else:
            # Four bytes a token, and images as GPT-4o counts them: 85 tokens each, 170 a tile.
            prompt = sum(s.text / 4 + 170 + 170 * s.tiles for s in sizes) / len(sizes)
            mean = Usage(round(prompt), min(_ANSWER_TOKENS, max_tokens))
            source = "images counted as GPT-4o does"
        asked_once = Usage(mean.prompt * count, mean.answer * count)
        maximum = Usage(mean.prompt * count * attempts, max_tokens * count * attempts)
        cost = ledger.prices.format
        text = (
            f"{count:,} facts to ask for of {len(self.selection):,}; a request about "
            f"{mean.prompt:,} tokens in and {mean.answer:,} out ({source})\n"
            f"about {cost(asked_once)} if each is asked once; {cost(maximum)} if each is asked "
            f"{attempts} times for {max_tokens:,} tokens"
        )
        if not ledger.fits(sizes[0]):
            first = cost(ledger.max_usage(sizes[0]))
            text += (
                f"\nthe budget does not cover the first request, which may cost {first}; raise it"
            )
        elif not ledger.covers(asked_once):
            text += "\nthe budget ends before each is asked once; raise it, or ask for fewer"
        return text
