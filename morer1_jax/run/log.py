"""Writes a run's logs: JSON lines and TensorBoard events.

A resumed run computes again the steps since its last checkpoint.  `resume_at` drops the records of
these steps, so that every (stage, step, kind) is in a file exactly once, also after a crash.  For
that a step's records must be written before the checkpoint of that step is saved.
"""

import json
import math
import os
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from morer1_jax.files import atomic_write, named, read_jsonl, sync_path
from morer1_jax.hosts import group

# Seconds between two flushes of TensorBoard's events.
_FLUSH_INTERVAL = 10.0


class RecordLog:
    """One stage's share of a file of JSON objects, one a line; stages may share the file.

    Only the first process of a run writes; on the others every method does nothing.
    """

    def __init__(self, path: str | os.PathLike[str], stage: str, writer: bool | None = None):
        """Opens the file, if it exists, and drops a last line that was cut off.

        Args:
            stage: name of the stage whose records are written.
            writer: whether this process writes; by default, whether it is the first.

        Raises:
            DataError: a line of the file is not a record.
        """
        self.path = Path(path)
        self.stage = stage
        self.writer = group.is_first() if writer is None else writer
        self._last: dict[str, int] = {}
        if self.writer:
            self._keep_until(math.inf)

    def resume_at(self, step: int | None, again: Collection[str] = ()) -> None:
        """Drops this stage's records of steps after `step`, a checkpoint's; all of them if None.

        Args:
            again: kinds of records of that step itself that will be written again.
        """
        if self.writer:
            self._keep_until(-math.inf if step is None else step, again)

    def write(self, step: int, records: Sequence[Mapping[str, Any]], kind: str = "train") -> None:
        """Appends the records of one step, all at once.

        A NaN or an infinity, which JSON does not have, is written as null and its key listed under
        `not_finite`.

        Args:
            step: higher than the last one of this kind.
            records: JSON values by name, a record a line.
            kind: such as `train` or `valid`.

        Raises:
            ValueError: the step, or a later one, was written already; or a record has a reserved
                key.
        """
        if not self.writer:
            return
        if step <= self._last.get(kind, -1):
            raise ValueError(
                f"{self.path}: {self.stage} {kind}: expected a step after {self._last[kind]}, "
                f"found {step}; call resume_at before going on from an earlier step"
            )
        text = "".join(self._line(step, kind, record) + "\n" for record in records)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with named(self.path), open(self.path, "ab") as file:
            file.write(text.encode())
        self._last[kind] = step

    def sync(self) -> None:
        """Flushes the records to the disk; call it before a checkpoint is saved."""
        if self.writer and self.path.exists():
            sync_path(self.path)

    def _line(self, step: int, kind: str, record: Mapping[str, Any]) -> str:
        head = {"stage": self.stage, "step": step, "kind": kind}
        if reserved := record.keys() & {*head, "not_finite"}:
            raise ValueError(
                f"{self.path}: expected no reserved key in a record, found {', '.join(reserved)}; "
                "rename it"
            )
        bad: list[str] = []
        body = _finite(record, "", bad)
        return json.dumps(
            head | body | ({"not_finite": bad} if bad else {}), ensure_ascii=False, allow_nan=False
        )

    def _keep_until(self, step: float, again: Collection[str] = ()) -> None:
        """Drops this stage's records after `step` and a partial last line; notes the last steps."""
        self._last = {}
        if not self.path.exists():
            return

        def keep(number: int, record: Mapping[str, Any]) -> int:
            """Returns the line's number, or 0 if the line is dropped."""
            stage, at, kind = record["stage"], record["step"], record["kind"]
            if stage == self.stage:
                if at > step or (at == step and kind in again):
                    return 0
                self._last[kind] = max(at, self._last.get(kind, -1))
            return number

        expected = "a JSON object with stage, step and kind"
        remedy = "delete the line or use a new --workdir"
        numbers = set(read_jsonl(self.path, keep, expected, remedy, partial=True))
        before = self.path.read_bytes()
        lines = enumerate(before.split(b"\n"), start=1)
        after = b"".join(line + b"\n" for number, line in lines if number in numbers)
        if after != before:
            atomic_write(self.path, after)


class MetricLog:
    """Scalars by step: `metrics.jsonl` for every stage, and `tensorboard/<stage>/`."""

    def __init__(
        self, workdir: str | os.PathLike[str], stage: str, writer: bool | None = None
    ) -> None:
        """Opens the workdir's `metrics.jsonl`; arguments and errors are those of `RecordLog`."""
        self._log = RecordLog(Path(workdir) / "metrics.jsonl", stage, writer)
        self._folder = Path(workdir) / "tensorboard" / stage
        self._events: _Events | None = None
        self._purge_step: int | None = None

    def resume_at(self, step: int | None, again: Collection[str] = ()) -> None:
        """Drops this stage's metrics as `RecordLog.resume_at` does."""
        self._log.resume_at(step, again)
        self.close()
        # Readers of event files ignore earlier files from this step on.
        self._purge_step = 0 if step is None else step + 1

    def write(self, step: int, metrics: Mapping[str, Any], kind: str = "train") -> None:
        """Writes one step's scalars (anything that `float` takes); see `RecordLog.write`."""
        values = {
            name: value if isinstance(value, bool | int | str) else float(value)
            for name, value in metrics.items()
        }
        self._log.write(step, [values], kind)
        if not self._log.writer:
            return
        if self._events is None:
            self._events = _Events(self._folder, self._purge_step)
        self._events.write(
            step,
            {
                f"{kind}/{name}": float(value)
                for name, value in values.items()
                if not isinstance(value, str)
            },
        )

    def sync(self) -> None:
        """Flushes the metrics to the disk; call it before a checkpoint is saved."""
        self._log.sync()
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        """Closes the file of events; a later `write` begins another."""
        if self._events is not None:
            self._events.close()
            self._events = None


class _Events:
    """A file of TensorBoard events, written by the calling thread.

    tensorboardX's own `SummaryWriter` passes events to a thread, whose queue its `flush` does not
    empty: a crash would lose the events of steps before a checkpoint.
    """

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        # Imported here: it takes seconds, and most importers of this module write no events.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        # By default the name has only the second, and a file of the same second is overwritten.
        self._writer = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        self._flushed = time.monotonic()
        if purge_step is not None:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._writer.write_event(
                self._event(wall_time=time.time(), step=purge_step, session_log=start)
            )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        summary = self._summary(
            value=[self._summary.Value(tag=tag, simple_value=v) for tag, v in values.items()]
        )
        self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=summary))
        if time.monotonic() - self._flushed > _FLUSH_INTERVAL:
            self.flush()

    def flush(self) -> None:
        with named(self._folder):
            self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        with named(self._folder):
            self._writer.close()


def _finite(value: Any, key: str, bad: list[str]) -> Any:
    """Returns `value` with None for NaN and infinity, whose dotted keys are added to `bad`."""
    if isinstance(value, Mapping):
        return {
            name: _finite(v, f"{key}.{name}" if key else name, bad) for name, v in value.items()
        }
    if isinstance(value, list | tuple):
        return [_finite(v, f"{key}.{index}", bad) for index, v in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        bad.append(key)
        return None
    return value
