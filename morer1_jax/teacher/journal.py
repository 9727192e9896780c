"""Keeps the writer's journal: a JSON line for every request and for every result, in this order.

    {"journal": {"model": …, "temperature": …, …}}        what the answers depend on
    {"run": 1}                                            a run starts
    {"sent": 1, "fact": "train:7", "text": …, …}          a request and its size, written before it
                                                          is sent
    {"answered": 1, "fact": "train:7", "outcome": …, …}   its result, flushed to the disk before it
                                                          counts

A request without a result was in flight when a run was killed, or its answer was late; it may have
been billed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args

from morer1_jax.config.binding import differences, flatten
from morer1_jax.errors import ConfigError, DataError, one_line
from morer1_jax.files import read_jsonl, sync_path
from morer1_jax.run.lock import hold
from morer1_jax.teacher.ledger import Size, Usage

Outcome = Literal["kept", "rejected", "refused", "unanswered"]


@dataclasses.dataclass(frozen=True)
class RunStarted:
    """The start of a run, numbered 1, 2, 3, and so on."""

    number: int

    def line(self) -> dict[str, Any]:
        """Returns the JSON object of its line."""
        return {"run": self.number}


@dataclasses.dataclass(frozen=True)
class RequestSent:
    """A request; each retry is one of its own.

    Attributes:
        number: 1, 2, 3, … in the journal's order.
        fact: the fact's id.
        size: what its price depends on.
        photo: SHA-256 of the photo's file; None in journals of versions that did not keep it.
    """

    number: int
    fact: str
    size: Size
    photo: str | None = None

    def line(self) -> dict[str, Any]:
        """Returns the JSON object of its line."""
        line = {"sent": self.number, "fact": self.fact, **dataclasses.asdict(self.size)}
        return line if self.photo is None else line | {"photo": self.photo}


@dataclasses.dataclass(frozen=True)
class RequestResult:
    """The result of a request.

    Attributes:
        number, fact: the request's.
        outcome: `kept`; `rejected`: an answer that must not be learnt from; `refused`: the endpoint
            will not answer for this fact; `unanswered`: it did not answer.
        reason: why the answer was not kept, in a few words; None if it was.
        usage: tokens billed; None: unknown.
        text: the answer as it arrived; None if there is none.
    """

    number: int
    fact: str
    outcome: Outcome
    reason: str | None = None
    usage: Usage | None = None
    text: str | None = None

    def line(self) -> dict[str, Any]:
        """Returns the JSON object of its line."""
        return {
            "answered": self.number,
            "fact": self.fact,
            "outcome": self.outcome,
            "reason": self.reason,
            "prompt_tokens": None if self.usage is None else self.usage.prompt,
            "answer_tokens": None if self.usage is None else self.usage.answer,
            "text": self.text,
        }


Entry = RunStarted | RequestSent | RequestResult


class Journal:
    """A journal that this process alone writes; use it as a context manager.

    Attributes:
        entries: its contents when it was opened.
        repaired: place (`path:line`) of a last line that a kill tore and that was cut off, or None.
    """

    def __init__(self, path: str | os.PathLike[str], identity: Mapping[str, Any]) -> None:
        """Opens a journal or creates it, and cuts off a torn last line.

        Args:
            path: the journal's file, on a local disk.
            identity: what the answers depend on; must equal the journal's.

        Raises:
            ConfigError: another process writes it, or its identity differs.
            DataError: a whole line is damaged, or the file cannot be written.
        """
        self.path = Path(path)
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(hold(self.path))
                self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
                stack.callback(os.close, self._file)
                self._open(identity)
                self._stack = stack.pop_all()
        except OSError as error:
            raise DataError(
                f"{self.path}: {one_line(error)}; give an --out on a local disk that can be written"
            ) from None

    def _open(self, identity: Mapping[str, Any]) -> None:
        self.entries = read_journal(self.path, identity)
        data = self.path.read_bytes()
        self._length = data.rfind(b"\n") + 1
        self.repaired: str | None = None
        if self._length < len(data):
            whole_lines = data.count(b"\n")
            self.repaired = f"{self.path}:{whole_lines + 1}"
            os.ftruncate(self._file, self._length)
        if not self._length:
            self._append({"journal": dict(identity)})
        os.fsync(self._file)
        sync_path(self.path.parent)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, entry: Entry) -> None:
        """Appends a line; a result is on the disk when this returns.

        A request's line survives this process from now on, and the machine from the next result on.

        Raises:
            DataError: it cannot be written; the journal is as before.
        """
        self._append(entry.line(), sync=isinstance(entry, RequestResult))

    def _append(self, line: Mapping[str, Any], sync: bool = False) -> None:
        data = json.dumps(line).encode() + b"\n"
        try:
            if os.write(self._file, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if sync:
                os.fsync(self._file)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._length)
            raise DataError(
                f"{self.path}: {one_line(error)}; make room and start again, the answers so far "
                "are kept"
            ) from None
        self._length += len(data)


def read_journal(path: str | os.PathLike[str], identity: Mapping[str, Any]) -> list[Entry]:
    """Returns the entries of a journal without a torn last line; none if there is no journal.

    Raises:
        ConfigError: its identity differs.
        DataError: a whole line is damaged.
    """
    pending: dict[int, str] = {}  # Fact by number, of requests without a result.
    count = {RunStarted: 0, RequestSent: 0}

    def parse(line: int, value: Any) -> Entry | None:
        if line == 1:
            return _check_identity(_typed(value, "journal", dict), identity)
        entry = _entry(value)
        if isinstance(entry, RequestResult):
            in_order = pending.pop(entry.number) == entry.fact
        else:
            count[type(entry)] += 1
            in_order = entry.number == count[type(entry)]
        if isinstance(entry, RequestSent):
            pending[entry.number] = entry.fact
        if not in_order:
            raise ValueError
        return entry

    if not Path(path).exists():
        return []
    expected = "the journal's settings, then its runs, requests and results in order"
    remedy = "restore the file, or use another --out"
    return read_jsonl(path, parse, expected, remedy, partial=True)[1:]


def _entry(line: Any) -> Entry:
    """Parses a line; raises KeyError, TypeError or ValueError if it is not an entry's `line()`."""
    if "run" in line:
        return RunStarted(_typed(line, "run", int))
    fact = _typed(line, "fact", str)
    if "sent" in line:
        size = Size(*(_typed(line, field.name, int) for field in dataclasses.fields(Size)))
        if min(dataclasses.astuple(size)) < 1:
            raise ValueError
        photo = _typed({"photo": None, **line}, "photo", str, NoneType)
        return RequestSent(_typed(line, "sent", int), fact, size, photo)
    usage = None
    if (line["prompt_tokens"], line["answer_tokens"]) != (None, None):
        usage = Usage(_typed(line, "prompt_tokens", int), _typed(line, "answer_tokens", int))
        if min(dataclasses.astuple(usage)) < 0:
            raise ValueError
    outcome = _typed(line, "outcome", str)
    reason, text = (_typed(line, key, str, NoneType) for key in ("reason", "text"))
    kept = outcome == "kept"
    if outcome not in get_args(Outcome) or kept != (reason is None) or (kept and text is None):
        raise ValueError
    return RequestResult(_typed(line, "answered", int), fact, outcome, reason, usage, text)


def _typed(line: Any, key: str, *types: type) -> Any:
    """Returns `line[key]`; raises TypeError if it is of none of the types (a bool is no int)."""
    if type(line[key]) not in types:
        raise TypeError
    return line[key]


def _check_identity(written: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    if changed := differences(flatten(written), flatten(current)):
        raise ConfigError(
            f"was written with other settings: {'; '.join(changed)}; set these back, or use "
            "another --out"
        )
