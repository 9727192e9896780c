"""Runs sides in their own processes: checks that they compute the same, times them in turns.

A machine's speed changes during a measurement, so sides take turns: in a round each side runs once,
and ratios are taken of runs of the same round.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.task import Numbers
from morer1_jax.errors import ConfigError


class SideError(RuntimeError):
    """A side's process ended, or two sides computed different numbers."""


class Worker:
    """The parent's end of a side's process.

    Args:
        name: the side's, in errors.
        module: the module that serves the side; see `task.serve`.
        arguments: the module's command line.
    """

    def __init__(self, name: str, module: str, arguments: Sequence[str]) -> None:
        self.name = name
        paths = (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            bufsize=1,
        )
        self._last_lines: deque[str] = deque(maxlen=40)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self._process.stderr:
            self._last_lines.append(line)

    def ask(self, do: str, **options: Any) -> dict[str, Any]:
        """Sends a request and returns the answer; see `task.serve`.

        Raises:
            SideError: the process ended; says how, and its last lines on stderr.
        """
        try:
            self._process.stdin.write(json.dumps({"do": do, **options}) + "\n")
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            ending = _ending(self._process.wait())
            raise SideError(f"{self.name} ended at {do!r} {ending}:\n{''.join(self._last_lines)}")
        return json.loads(answer)

    def close(self) -> None:
        """Ends the process."""
        # A process that has ended already leaves the last request unsent.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()


def _ending(status: int) -> str:
    """Returns how a process ended, in words."""
    if status >= 0:
        return f"with status {status}"
    name = signal.Signals(-status).name
    if name == "SIGKILL":
        name += ", as where memory ran out (fewer of `--forms` at a time hold less of it)"
    return f"by {name}"


@dataclasses.dataclass
class Timing:
    """The measurements of one side at one task.

    Attributes:
        prepare_seconds: from the start to the end of the first run, with loading and compiling.
        seconds: of each run, in the order of the rounds.
        peak_bytes: maximum memory held during the runs.
        flops: of the matrix products of a run; None if unknown.
    """

    prepare_seconds: float
    seconds: list[float]
    peak_bytes: int
    flops: float | None

    @property
    def median(self) -> float:
        """Seconds of the median run."""
        return statistics.median(self.seconds)


def take_turns(
    tasks: Mapping[str, tuple[Worker, str]], rounds: int, tolerance: float
) -> dict[str, Timing]:
    """Times the same work on every side.

    Args:
        tasks: by side, its process and the name of its task.
        rounds: number of timed runs of each side.
        tolerance: relative difference that numbers of two sides may have.

    Raises:
        SideError: two sides compute different numbers, or a side's process ended.
    """
    workers = {name: worker for name, (worker, _) in tasks.items()}
    timings = {}
    for name, (worker, task) in tasks.items():
        # Before any other request, so that it counts all compilation.
        seconds = worker.ask("prepare", task=task)["seconds"]
        timings[name] = Timing(seconds, [], 0, worker.ask("flops")["flops"])
    check({name: worker.ask("numbers")["numbers"] for name, worker in workers.items()}, tolerance)
    for worker in workers.values():
        worker.ask("forget peak")
    for number in range(rounds):
        order = list(workers) if number % 2 == 0 else list(reversed(workers))
        for name in order:
            answer, timing = workers[name].ask("run"), timings[name]
            timing.seconds.append(answer["seconds"])
            timing.peak_bytes = max(timing.peak_bytes, answer["peak_bytes"])
    for worker in workers.values():
        worker.ask("close")
    return timings


def check(numbers: Mapping[str, Numbers], tolerance: float) -> None:
    """Checks that every two sides agree in the numbers that both have.

    Args:
        numbers: by side.
        tolerance: relative difference that is allowed.

    Raises:
        SideError: two sides differ, or have no number in common; names both, the number and values.
    """
    sides = list(numbers)
    for number, first in enumerate(sides):
        for second in sides[number + 1 :]:
            common = numbers[first].keys() & numbers[second].keys()
            if not common:
                raise SideError(
                    f"expected a number that both sides compute, found {sorted(numbers[first])} of "
                    f"{first} and {sorted(numbers[second])} of {second}"
                )
            for key in common:
                a, b = numbers[first][key], numbers[second][key]
                if not _near(a, b, tolerance):
                    raise SideError(
                        f"{key}: expected {a}, as {first} has it, found {b} of {second}"
                    )


def _near(a: Any, b: Any, tolerance: float) -> bool:
    if isinstance(a, list):
        return len(a) == len(b) and all(_near(x, y, tolerance) for x, y in zip(a, b, strict=True))
    return a == b if isinstance(a, int) else math.isclose(a, b, rel_tol=tolerance, abs_tol=1e-6)


def ratio(slow: Timing, fast: Timing) -> tuple[float, float, float]:
    """Returns (minimum, median, maximum) over the rounds of how many times faster `fast` was.

    Raises:
        ConfigError: there are no rounds.
    """
    if not slow.seconds:
        raise ConfigError("--rounds: expected at least 1, found 0")
    ratios = sorted(a / b for a, b in zip(slow.seconds, fast.seconds, strict=True))
    return ratios[0], slow.median / fast.median, ratios[-1]
