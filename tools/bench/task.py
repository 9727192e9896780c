"""Defines a side of a comparison, and serves it in a process of its own.

A side is one program under measurement, made from a model folder and a preset; its `task(name)` can
be prepared, checked and run. The parent sends requests as lines of JSON (`serve`), so that the
sides share a machine but no process, and can take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

Numbers = dict[str, Any]
"""JSON-ready numbers by name, which must be equal on both sides."""


class Task(Protocol):
    """Work that is measured.

    Attributes:
        flops: of the matrix products of one run; None if they cannot be counted.
    """

    flops: float | None

    def prepare(self) -> None:
        """Runs once, so that all programs are compiled."""

    def numbers(self) -> Numbers:
        """Returns what one run computes from the folder's weights; called after `prepare`."""

    def run(self) -> None:
        """Runs once, until all devices have finished."""


class Side(Protocol):
    """A program under measurement."""

    def task(self, name: str) -> Task:
        """Returns the task of this name; see `compare.comparisons`."""

    def peak_bytes(self) -> int:
        """Returns the maximum memory held, in bytes.

        On a CPU by the process since the last call; on an accelerator by the device, for JAX since
        the process began.
        """


def process_peak() -> int:
    """Returns the maximum resident memory of this process since the last call, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets VmHWM
    return 1024 * int(line.split()[1])


def arguments() -> argparse.Namespace:
    """Parses a side's command line: the model's `--folder`, `--preset`, and `--form` of PyTorch."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--preset", required=True)
    parser.add_argument("--form", default="default")
    return parser.parse_args()


def serve(make: Callable[[], Side]) -> None:
    """Answers the parent's requests, a line of JSON each, until it closes the pipe.

    Requests are `{"do": "prepare", "task": name}`, `{"do": "flops"}`, `{"do": "numbers"}`,
    `{"do": "forget peak"}`, `{"do": "run"}` and `{"do": "close"}`.
    """
    # The pipe is for answers alone: what the program prints goes to stderr.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1, encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    # One request after another; `prepare` chooses the task of those that follow.
    side, task = make(), None
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        start = time.perf_counter()
        match request["do"]:
            case "prepare":
                task = side.task(request["task"])
                task.prepare()
            case "flops":
                answer["flops"] = task.flops
            case "numbers":
                answer["numbers"] = task.numbers()
            case "forget peak":
                side.peak_bytes()
            case "run":
                task.run()
                answer["seconds"] = time.perf_counter() - start
                answer["peak_bytes"] = side.peak_bytes()
            case "close":
                task = None
        answer.setdefault("seconds", time.perf_counter() - start)
        answers.write(json.dumps(answer) + "\n")
