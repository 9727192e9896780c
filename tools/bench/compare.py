"""Compares each task of ours with the same work by PyTorch; keeps results as tables and JSON."""

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
# Relative. Float32 sums of thousands of products agree to about this; bfloat16 has three digits.
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A task of ours, and the tasks of PyTorch that do the same work.

    Attributes:
        name: title in tables.
        task: our task's name.
        peers: the name of PyTorch's task, by the program that does it.
    """

    name: str
    task: str
    peers: dict[str, str]


def comparisons(preset: Preset) -> list[Comparison]:
    """Returns all comparisons of a preset."""
    all_comparisons = [
        Comparison("SFT, one length", "sft", {"transformers": "sft"}),
        Comparison("SFT, lengths 1 to 4", "sft_mixed", {"transformers": "sft_mixed"}),
    ]
    for p in preset.prompts:
        all_comparisons += [
            Comparison(f"first token, prompt {p}", f"first/{p}", {"generate": f"first/{p}"}),
            Comparison(f"sampling, prompt {p}", f"sample/{p}", {"generate": f"sample/{p}"}),
            Comparison(
                f"sampling, unequal lengths, prompt {p}",
                f"tail/{p}",
                {"generate": f"tail/{p}", "by hand": f"tail_dropping/{p}"},
            ),
            Comparison(
                f"GRPO step, prompt {p}",
                f"grpo/{p}",
                {"TRL": f"grpo/{p}", "by hand": f"grpo_plain/{p}"},
            ),
        ]
    longest = max(preset.prompts)
    all_comparisons += [
        Comparison(
            f"update, {g} a prompt", f"update/{longest}/{g}", {"by hand": f"update/{longest}/{g}"}
        )
        for g in (1, 2, 4, 8, 16)
    ]
    return all_comparisons


def measure(
    comparison: Comparison,
    arguments: Sequence[str],
    forms: Callable[[str], Sequence[str]],
    rounds: int,
    tolerance: float,
) -> dict[str, Timing]:
    """Measures a comparison, each side in a process of its own.

    Args:
        arguments: of every side's command line; see `task.arguments`.
        forms: maps a task of PyTorch to the forms it is run in.
        rounds: number of timed runs of each side.
        tolerance: relative difference that numbers of two sides may have.

    Raises:
        SideError: two sides compute different numbers, or a side's process ended.
    """
    tasks: dict[str, tuple[Worker, str]] = {}
    try:
        for peer, task in comparison.peers.items():
            for form in forms(task):
                form_arguments = [*arguments, f"--form={form}"]
                process = Worker(f"{peer}, {form}", "bench.peers", form_arguments)
                tasks[process.name] = process, task
        # Last, since TRL writes the rollout that its numbers are of, which the others then read.
        tasks[OURS] = Worker(OURS, "bench.ours", arguments), comparison.task
        return take_turns(tasks, rounds, tolerance)
    finally:
        for process, _ in tasks.values():
            process.close()


@dataclasses.dataclass(frozen=True)
class Measured:
    """The outcome of a comparison.

    Attributes:
        name: of the comparison.
        made: date and versions of packages.
        sides: timings, by side.
    """

    name: str
    made: str
    sides: dict[str, Timing]

    def table(self) -> str:
        """Returns a Markdown table, a line for each side: ours, then the others, fastest first."""
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
            low, median, high = ratio(timing, ours)
            faster = "" if side == OURS else f"{median:.2f}× ({low:.2f} to {high:.2f})"
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
        """The sides other than ours."""
        return [side for side in self.sides if side != OURS]


@dataclasses.dataclass
class Results:
    """All results of a preset on a device.

    Attributes:
        tasks: outcomes, by our task's name.
        unfinished: a run that was interrupted: what it measures (`run`) and its finished tasks
            (`done`); None if there is none.
    """

    preset: Preset
    device: str
    tasks: dict[str, Measured] = dataclasses.field(default_factory=dict)
    unfinished: dict[str, Any] | None = None

    @classmethod
    def read(cls, path: Path, preset: Preset, device: str) -> Results:
        """Reads what earlier runs saved; returns empty results if there is no such file.

        Raises:
            ConfigError: the file has other content, or is of another preset or device.
        """
        if not path.exists():
            return cls(preset, device)
        try:
            saved = read_json(path, "give another --out")
            saved_device, saved_preset = saved["device"], saved["preset"]
            tasks = {task: _measured(outcome) for task, outcome in saved["tasks"].items()}
            unfinished = saved.get("unfinished")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{path}: expected results of tools/bench.py, found {error!r}; give another --out"
            ) from None
        if (saved_device, saved_preset) != (device, _described(preset)):
            raise ConfigError(
                f"{path}: expected results of this preset, as it is now, on {device!r}, found "
                f"those of another preset or device ({saved_device!r}); give another --out"
            )
        return cls(preset, device, tasks, unfinished)

    def begin(self, run: dict[str, Any]) -> list[str]:
        """Returns the tasks that an equal, interrupted run has finished; the caller adds others."""
        run = json.loads(json.dumps(run))  # As JSON gives it back.
        if self.unfinished is None or self.unfinished["run"] != run:
            self.unfinished = {"run": run, "done": []}
        return self.unfinished["done"]

    def check_replaceable(self, task: str, sides: Sequence[str]) -> None:
        """Checks that measuring a task again with these sides loses no side's results.

        Raises:
            ConfigError: other sides have results, which would be lost.
        """
        if task in self.tasks and (lost := set(self.tasks[task].peers) - set(sides)):
            raise ConfigError(
                f"--out: expected no results of {task} but of these --forms, found "
                f"{', '.join(sorted(lost))}, which would be lost; give more --forms or another "
                "--out"
            )

    def save(self, path: Path) -> None:
        """Writes the file that `read` reads."""
        contents = {
            "device": self.device,
            "preset": _described(self.preset),
            "tasks": {task: dataclasses.asdict(outcome) for task, outcome in self.tasks.items()},
            "unfinished": self.unfinished,
        }
        write_json(path, contents)

    def in_order(self) -> list[tuple[str, Measured]]:
        """Returns tasks with their outcomes, in the order of `comparisons`."""
        known = [comparison.task for comparison in comparisons(self.preset)]
        return sorted(self.tasks.items(), key=lambda item: known.index(item[0]))


def _measured(saved: dict[str, Any]) -> Measured:
    sides = {name: Timing(**side) for name, side in saved["sides"].items()}
    return Measured(saved["name"], saved["made"], sides)


def _described(preset: Preset) -> dict[str, Any]:
    """Returns a preset as JSON gives it back."""
    return json.loads(json.dumps(dataclasses.asdict(preset)))
