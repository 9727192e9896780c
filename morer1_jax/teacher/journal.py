"""The writer's journal: every request sent and every answer, a line each, in this order.

    {"journal": {"model": …, "temperature": …, …}}        what the answers depend on
    {"run": 1}                                            a run begins
    {"sent": 1, "fact": "train:7", "text": …, …}          a request, of a photo of this digest,
                                                          written before it is sent
    {"answered": 1, "fact": "train:7", "outcome": …, …}   what became of it

An answer is flushed to the disk before it counts. A request without an answer was on its way when
a run was killed, or its answer never came; it may have been billed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from morer1_jax.config.binding import flatten
from morer1_jax.errors import ConfigError, DataError, one_line
from morer1_jax.files import sync_path
from morer1_jax.run.lock import hold
from morer1_jax.teacher.ledger import Size, Usage

Outcome = Literal["kept", "rejected", "refused", "unanswered"]
_OUTCOMES = ("kept", "rejected", "refused", "unanswered")
_EXPECTED = (
    'a line {"journal": {"model": …}}',
    "the next run or request, or the only answer to a request",
)
_ABSENT = object()


@dataclasses.dataclass(frozen=True)
class Began:
    """A run began; runs are numbered 1, 2, 3, …"""

    number: int

    def line(self) -> dict[str, Any]:
        return {"run": self.number}


@dataclasses.dataclass(frozen=True)
class Sent:
    """A request, of a fact's first try or a later one.

    Attributes:
      number: 1, 2, 3, … in the journal's order.
      fact: the id of the fact it is for.
      size: what its price depends on.
      photo: SHA-256 of the photo's file; None in journals of before it was kept.
    """

    number: int
    fact: str
    size: Size
    photo: str | None = None

    def line(self) -> dict[str, Any]:
        line = {"sent": self.number, "fact": self.fact, **dataclasses.asdict(self.size)}
        return line if self.photo is None else line | {"photo": self.photo}


@dataclasses.dataclass(frozen=True)
class Answered:
    """What became of a request.

    Attributes:
      number, fact: the request's.
      outcome: `kept`; `rejected`: an answer that cannot be learnt from; `refused`: the endpoint
        will not answer for this fact; `unanswered`: it failed to.
      reason: why it was not kept, in a few words; None if it was.
      usage: tokens billed; None: not known.
      text: the answer as it came; None if there was none.
    """

    number: int
    fact: str
    outcome: Outcome
    reason: str | None = None
    usage: Usage | None = None
    text: str | None = None

    def line(self) -> dict[str, Any]:
        return {
            "answered": self.number,
            "fact": self.fact,
            "outcome": self.outcome,
            "reason": self.reason,
            "prompt_tokens": None if self.usage is None else self.usage.prompt,
            "answer_tokens": None if self.usage is None else self.usage.answer,
            "text": self.text,
        }


Entry = Began | Sent | Answered


class Journal:
    """A journal that is written by this process alone; use it as a context manager.

    Attributes:
      entries: what it held when it was opened.
      repaired: the line that was cut because a kill tore it, as `path:line`; None if none was.
    """

    def __init__(self, path: str | os.PathLike[str], identity: Mapping[str, Any]) -> None:
        """Opens a journal or begins it, and cuts a torn last line.

        Args:
          identity: what the answers depend on; the journal's must be the same.

        Raises:
          ConfigError: another process writes it, or it belongs to another identity.
          DataError: a whole line is damaged, or the file cannot be written.
        """
        self.path = Path(path)
        try:
            with contextlib.ExitStack() as closing:
                closing.enter_context(hold(self.path))
                self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
                closing.callback(os.close, self._file)
                self._open(identity)
                self._closing = closing.pop_all()
        except OSError as error:
            raise DataError(
                f"{self.path}: {one_line(error)}; give an --out on a local disk that can be written"
            ) from None

    def _open(self, identity: Mapping[str, Any]) -> None:
        data = self.path.read_bytes()
        self.entries, self._length = _parse(data, self.path, identity)
        self.repaired: str | None = None
        if self._length < len(data):
            lines = data.count(b"\n", 0, self._length)
            self.repaired = f"{self.path}:{lines + 1}"
            os.ftruncate(self._file, self._length)
        if not self._length:
            self._write({"journal": dict(identity)})
        os.fsync(self._file)
        sync_path(self.path.parent)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def add(self, entry: Entry) -> None:
        """Appends a line; an answer is on the disk when this returns.

        A request's line outlives this process at once and the machine from the next answer on.

        Raises:
          DataError: it cannot be written; the journal is as it was.
        """
        self._write(entry.line(), sync=isinstance(entry, Answered))

    def _write(self, line: Mapping[str, Any], sync: bool = False) -> None:
        data = json.dumps(line).encode() + b"\n"
        try:
            try:
                written = os.write(self._file, data)
                if written < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                if sync:
                    os.fsync(self._file)
            except OSError:
                os.ftruncate(self._file, self._length)
                raise
        except OSError as error:
            raise DataError(
                f"{self.path}: {one_line(error)}; make room and start again, what was answered "
                "is kept"
            ) from None
        self._length += len(data)


def read_journal(path: str | os.PathLike[str], identity: Mapping[str, Any]) -> list[Entry]:
    """What a journal holds, torn last line left out; nothing if there is none, or it is empty.

    Raises:
      ConfigError: it belongs to another identity.
      DataError: a whole line is damaged.
    """
    path = Path(path)
    return _parse(path.read_bytes(), path, identity)[0] if path.exists() else []


def _parse(data: bytes, path: Path, identity: Mapping[str, Any]) -> tuple[list[Entry], int]:
    """The entries and the length of the whole lines, in bytes."""
    entries: list[Entry] = []
    open_: dict[int, str] = {}
    runs = last = 0
    *lines, torn = data.split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
            if number == 1:
                _check_identity(value["journal"], identity, path)
                continue
            entry = _entry(value)
            if isinstance(entry, Began):
                runs += 1
                if entry.number != runs:
                    raise ValueError
            elif isinstance(entry, Sent):
                last += 1
                if entry.number != last:
                    raise ValueError
                open_[last] = entry.fact
            elif open_.pop(entry.number) != entry.fact:
                raise ValueError
        except ConfigError:
            raise
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DataError(
                f"{path}:{number}: {line[:60].decode(errors='replace')!r} found, "
                f"{_EXPECTED[number > 1]} expected; restore the file, or use another --out"
            ) from None
        entries.append(entry)
    return entries, len(data) - len(torn)


def _entry(value: Any) -> Entry:
    """Raises KeyError, TypeError or ValueError if it is not an entry's `line`."""
    entry: Entry
    if "run" in value:
        entry = Began(value["run"])
    elif "sent" in value:
        size = Size(*(value[field.name] for field in dataclasses.fields(Size)))
        if not all(type(n) is int and n > 0 for n in dataclasses.astuple(size)):
            raise ValueError
        entry = Sent(value["sent"], value["fact"], size, value.get("photo"))
        if not isinstance(entry.photo, str | None):
            raise ValueError
    else:
        tokens = value["prompt_tokens"], value["answer_tokens"]
        usage = None if tokens == (None, None) else Usage(*tokens)
        if usage and not all(type(n) is int and n >= 0 for n in tokens):
            raise ValueError
        entry = Answered(
            value["answered"],
            value["fact"],
            value["outcome"],
            value["reason"],
            usage,
            value["text"],
        )
        known = entry.outcome in _OUTCOMES and isinstance(entry.reason, str | None)
        if not (known and isinstance(entry.text, str | None)):
            raise ValueError
        if (entry.outcome == "kept") != (entry.reason is None) or (
            entry.outcome == "kept" and entry.text is None
        ):
            raise ValueError
    if type(entry.number) is not int:
        raise ValueError
    if not isinstance(entry, Began) and not isinstance(entry.fact, str):
        raise ValueError
    return entry


def _check_identity(there: Any, here: Mapping[str, Any], path: Path) -> None:
    if not isinstance(there, Mapping):
        raise ValueError
    before, now = flatten(there), flatten(here)
    changed = [
        f"{key}: {_show(before.get(key, _ABSENT))} there, {_show(now.get(key, _ABSENT))} here"
        for key in sorted(before.keys() | now.keys())
        if before.get(key, _ABSENT) != now.get(key, _ABSENT)
    ]
    if changed:
        raise ConfigError(
            f"{path} was written with other settings: {'; '.join(changed)}; set these back, or "
            "use another --out"
        )


def _show(value: Any) -> str:
    return "absent" if value is _ABSENT else json.dumps(value, ensure_ascii=False)
