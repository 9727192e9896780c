"""What a side of a comparison offers, and the process it runs in.

A side is a class made from a model folder and a preset; its `task(name)` is something that can be
prepared, checked and run. The parent talks to it in lines of JSON (`serve`), so that the two sides
share a machine but no process, and can take turns.
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
"""JSON-ready figures that must come out equal on both sides, by name."""


class Task(Protocol):
    """One thing that is measured.

    Attributes:
      flops: of the products of matrices that one run computes; None if it cannot be known.
    """

    flops: float | None

    def prepare(self) -> None:
        """Runs once, compiling what is compiled."""

    def numbers(self) -> Numbers:
        """What one run computes from the weights in the folder; called after `prepare`."""

    def run(self) -> None:
        """Runs once, to its end: nothing is left for a device to do."""


class Side(Protocol):
    """A program that is measured."""

    def task(self, name: str) -> Task:
        """The task of this name; see `compare.comparisons`."""

    def peak_bytes(self) -> int:
        """Most memory held: by the process since the last call, or by the accelerator, where JAX
        knows it only since the process began."""


def process_peak() -> int:
    """Most resident memory of this process since the last call, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets VmHWM
    return 1024 * int(line.split()[1])


def arguments() -> argparse.Namespace:
    """A side's command line: `--folder`, the model's; `--preset`; `--form`, if it has several."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--preset", required=True)
    parser.add_argument("--form", default="default")
    return parser.parse_args()


def serve(make: Callable[[], Side]) -> None:
    """Answers the parent's requests, a line each, until it closes the pipe.

    Requests are `{"do": "prepare", "task": name}`, `{"do": "flops"}`, `{"do": "numbers"}`,
    `{"do": "forget peak"}`, `{"do": "run"}` and `{"do": "close"}`. What the program itself prints
    goes to stderr.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1, encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    side, task = make(), None
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        began = time.perf_counter()
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
                answer["seconds"] = time.perf_counter() - began
                answer["peak_bytes"] = side.peak_bytes()
            case "close":
                task = None
        answer.setdefault("seconds", time.perf_counter() - began)
        answers.write(json.dumps(answer) + "\n")
