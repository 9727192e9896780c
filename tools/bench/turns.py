"""Sides in processes of their own, which compute the same and then take turns.

A machine's speed changes while it is measured, so no side is timed at a stretch: each runs once,
then the next, and ratios are taken of runs of one round.
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
    """A side's process ended, or computed something else."""


class Worker:
    """A side's process.

    Args:
      name: of the side, in errors.
      module: the one that serves it; see `task.serve`.
      arguments: of its command line.
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
        self._said: deque[str] = deque(maxlen=40)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self._process.stderr:
            self._said.append(line)

    def ask(self, do: str, **more: Any) -> dict[str, Any]:
        """The answer to a request.

        Raises:
          SideError: the process ended; with how, and the last it said.
        """
        try:
            self._process.stdin.write(json.dumps({"do": do, **more}) + "\n")
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            how = _ending(self._process.wait())
            raise SideError(f"{self.name} ended at {do!r} {how}:\n{''.join(self._said)}")
        return json.loads(answer)

    def close(self) -> None:
        """Ends the process."""
        # One that has ended already leaves what it was asked last unsent.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()


def _ending(status: int) -> str:
    if status >= 0:
        return f"with status {status}"
    name = signal.Signals(-status).name
    if name == "SIGKILL":
        name += ", as where memory ran out (fewer of `--forms` at a time hold less of it)"
    return f"by {name}"


@dataclasses.dataclass
class Timing:
    """What was seen of one side at one task.

    Attributes:
      prepare_seconds: until the first run was over, loading and compiling included.
      seconds: of each run, in the order of the rounds.
      peak_bytes: most memory held while it ran.
      flops: of the products of matrices that a run computes, if known.
    """

    prepare_seconds: float
    seconds: list[float]
    peak_bytes: int
    flops: float | None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def take_turns(
    tasks: Mapping[str, tuple[Worker, str]], rounds: int, tolerance: float
) -> dict[str, Timing]:
    """Times the same work on every side.

    Args:
      tasks: of each side, by its name, the process and what its task is called there.
      tolerance: by how much, of its size, a number may differ between sides.

    Raises:
      SideError: two sides compute different numbers, or one ended.
    """
    workers = {name: worker for name, (worker, _) in tasks.items()}
    timings = {}
    for name, (worker, task) in tasks.items():
        # The first of all, for nothing may have been compiled before it.
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
    """Compares what every two sides have numbers of.

    Raises:
      SideError: they differ, or have none in common; names the sides, the figure and both values.
    """
    sides = list(numbers)
    for number, first in enumerate(sides):
        for second in sides[number + 1 :]:
            common = numbers[first].keys() & numbers[second].keys()
            if not common:
                raise SideError(
                    f"{first} has {sorted(numbers[first])}, {second} {sorted(numbers[second])}; a "
                    "number that both compute was expected"
                )
            for key in common:
                a, b = numbers[first][key], numbers[second][key]
                if not _near(a, b, tolerance):
                    raise SideError(f"{key}: {first} has {a}, {second} has {b}")


def _near(a: Any, b: Any, tolerance: float) -> bool:
    if isinstance(a, list):
        return len(a) == len(b) and all(_near(x, y, tolerance) for x, y in zip(a, b, strict=True))
    return a == b if isinstance(a, int) else math.isclose(a, b, rel_tol=tolerance, abs_tol=1e-6)


def ratio(slow: Timing, fast: Timing) -> tuple[float, float, float]:
    """(least, median, greatest) of how many times faster the second was, round by round.

    Raises:
      ConfigError: there are no rounds.
    """
    if not slow.seconds:
        raise ConfigError("--rounds: 0 found, at least 1 expected")
    ratios = sorted(a / b for a, b in zip(slow.seconds, fast.seconds, strict=True))
    return ratios[0], slow.median / fast.median, ratios[-1]
