"""The comparison: what is set against what, run in turns, as tables and JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.cases import Preset
from bench.turns import Timing, Worker, ratio, take_turns
from morer1_jax.errors import ConfigError
from morer1_jax.files import read_json, write_json

OURS = "ours"
# In float32 sums of thousands of products agree to about this; bfloat16 keeps three digits.
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One task of ours, and the same work elsewhere.

    Attributes:
      name: in tables.
      task: of ours.
      peers: what does the same work, by the name of its side's program.
    """

    name: str
    task: str
    peers: dict[str, str]


def comparisons(preset: Preset) -> list[Comparison]:
    """All that a preset is measured at."""
    made = [
        Comparison("SFT, one length", "sft", {"transformers": "sft"}),
        Comparison("SFT, lengths 1 to 4", "sft_mixed", {"transformers": "sft_mixed"}),
    ]
    for p in preset.prompts:
        made += [
            Comparison(f"first token, prompt {p}", f"first/{p}", {"generate": f"first/{p}"}),
            Comparison(f"sampling, prompt {p}", f"sample/{p}", {"generate": f"sample/{p}"}),
            Comparison(
                f"GRPO step, prompt {p}",
                f"grpo/{p}",
                {"TRL": f"grpo/{p}", "by hand": f"grpo_plain/{p}"},
            ),
        ]
    longest = max(preset.prompts)
    made += [
        Comparison(
            f"update, {g} a prompt", f"update/{longest}/{g}", {"by hand": f"update/{longest}/{g}"}
        )
        for g in (1, 2, 4, 8, 16)
    ]
    return made


def measure(
    comparison: Comparison,
    given: Sequence[str],
    forms: Callable[[str], Sequence[str]],
    rounds: int,
    tolerance: float,
) -> dict[str, Timing]:
    """Measures a comparison, each side in a process of its own.

    Args:
      given: of every side's command line; see `task.arguments`.
      forms: of a peer's task, the forms it is run in.
      rounds: turns that each side has.
      tolerance: by how much, of its size, a number may differ between sides.

    Raises:
      SideError: two sides compute different numbers, or one ended.
    """
    tasks: dict[str, tuple[Worker, str]] = {}
    try:
        for peer, task in comparison.peers.items():
            for form in forms(task):
                side = [*given, f"--form={form}"]
                process = Worker(f"{peer}, {form}", "bench.peers", side)
                tasks[process.name] = process, task
        # Last, for TRL leaves the rollout that it took its numbers of to the others.
        tasks[OURS] = Worker(OURS, "bench.ours", given), comparison.task
        return take_turns(tasks, rounds, tolerance)
    finally:
        for process, _ in tasks.values():
            process.close()


@dataclasses.dataclass(frozen=True)
class Measured:
    """One comparison's outcome.

    Attributes:
      name: of the comparison.
      made: when, and with which versions of what.
      sides: their timings.
    """

    name: str
    made: str
    sides: dict[str, Timing]

    def table(self) -> str:
        """A line a side: ours first, then the others from the fastest on."""
        ours = self.sides[OURS]
        others = sorted(self.peers, key=lambda side: self.sides[side].median)
        lines = [
            f"### {self.name}",
            "",
            "| | seconds | ours is faster by | memory, MB | GFLOP | first run, seconds |",
            "|---|---|---|---|---|---|",
        ]
        for side in (OURS, *others):
            timing = self.sides[side]
            least, median, most = ratio(timing, ours)
            faster = "" if side == OURS else f"{median:.2f}× ({least:.2f} to {most:.2f})"
            flops = "" if timing.flops is None else f"{timing.flops / 1e9:,.0f}"
            spread = f"{min(timing.seconds):.2f} to {max(timing.seconds):.2f}"
            lines.append(
                f"| {side} | {timing.median:.2f} ({spread}) | {faster} "
                f"| {timing.peak_bytes / 1e6:,.0f} | {flops} | {timing.prepare_seconds:.0f} |"
            )
        rounds = len(ours.seconds)
        return "\n".join([*lines, "", f"{rounds} rounds, {self.made}", ""])

    @property
    def peers(self) -> list[str]:
        return [side for side in self.sides if side != OURS]


@dataclasses.dataclass
class Results:
    """All that was measured of a preset on a device.

    Attributes:
      tasks: by our task.
      unfinished: a run that has not come to its end: what it measures, and the tasks it has done.
    """

    preset: Preset
    device: str
    tasks: dict[str, Measured] = dataclasses.field(default_factory=dict)
    unfinished: dict[str, Any] | None = None

    @classmethod
    def read(cls, path: Path, preset: Preset, device: str) -> Results:
        """What earlier runs saved; nothing if there is no such file.

        Raises:
          ConfigError: it is no such file, or of another preset or device.
        """
        if not path.exists():
            return cls(preset, device)
        try:
            saved = read_json(path, "give another --out")
            found = saved["device"], saved["preset"]
            tasks = {task: _measured(one) for task, one in saved["tasks"].items()}
            unfinished = saved.get("unfinished")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path}: {error!r}; results of tools/bench.py expected") from None
        if found != (device, _described(preset)):
            raise ConfigError(
                f"{path}: results of another preset or device found ({found[0]!r}); expected those "
                f"of this preset, as it is now, on {device!r}; give another --out"
            )
        return cls(preset, device, tasks, unfinished)

    def begin(self, run: dict[str, Any]) -> list[str]:
        """The tasks that an equal run, cut off, has done; further ones go into the same list."""
        run = json.loads(json.dumps(run))  # As it is read.
        if self.unfinished is None or self.unfinished["run"] != run:
            self.unfinished = {"run": run, "done": []}
        return self.unfinished["done"]

    def check_replaceable(self, task: str, sides: Sequence[str]) -> None:
        """Finds out whether a measurement of these sides is all that is known of a task.

        Raises:
          ConfigError: there are others, which would be lost.
        """
        if task in self.tasks and (lost := set(self.tasks[task].peers) - set(sides)):
            raise ConfigError(
                f"--out: it has {task} with {', '.join(sorted(lost))}, which would be lost; give "
                "more --forms or another --out"
            )

    def save(self, path: Path) -> None:
        """Writes what `read` reads."""
        described = {
            "device": self.device,
            "preset": _described(self.preset),
            "tasks": {task: dataclasses.asdict(one) for task, one in self.tasks.items()},
            "unfinished": self.unfinished,
        }
        write_json(path, described)

    def in_order(self) -> list[tuple[str, Measured]]:
        """Tasks in the order of `comparisons`."""
        known = [comparison.task for comparison in comparisons(self.preset)]
        return sorted(self.tasks.items(), key=lambda item: known.index(item[0]))


def _measured(saved: dict[str, Any]) -> Measured:
    sides = {name: Timing(**side) for name, side in saved["sides"].items()}
    return Measured(saved["name"], saved["made"], sides)


def _described(preset: Preset) -> dict[str, Any]:
    """As JSON gives it back."""
    return json.loads(json.dumps(dataclasses.asdict(preset)))
