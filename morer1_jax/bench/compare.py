"""The comparison: what is set against what, run in turns, as tables and JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from morer1_jax.bench.cases import Preset
from morer1_jax.bench.turns import Timing, Worker, ratio, take_turns
from morer1_jax.files import atomic_write
from morer1_jax.run.config import ConfigError
from morer1_jax.run.log import progress

OURS = "ours"
# In float32 sums of thousands of products agree to about this; bfloat16 keeps three digits.
_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}


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
            f"update, {g} samples", f"update/{longest}/{g}", {"by hand": f"update/{longest}/{g}"}
        )
        for g in (1, 2, 4, 8, 16)
    ]
    return made


def run(
    preset_name: str,
    preset: Preset,
    folder: Path,
    chosen: Sequence[Comparison],
    forms: Callable[[str], Sequence[str]],
    rounds: int,
) -> Iterator[tuple[Comparison, dict[str, Timing]]]:
    """Measures one comparison after another.

    Args:
      folder: the model's.
      forms: of a peer's task, the forms it can be run in.
      rounds: turns that each side has.
    """
    given = [f"--folder={folder}", f"--preset={preset_name}"]
    workers: dict[str, Worker] = {}

    def worker(name: str, module: str, *more: str) -> Worker:
        if name not in workers:
            workers[name] = Worker(name, module, [*given, *more])
        return workers[name]

    try:
        for comparison in progress(chosen, desc="compare", unit="task"):
            tasks: dict[str, tuple[Worker, str]] = {}
            for peer, task in comparison.peers.items():
                for form in forms(task):
                    process = worker(form, "morer1_jax.bench.peers", f"--form={form}")
                    tasks[f"{peer}, {form}"] = process, task
            # Last, for TRL leaves the rollout that it took its numbers of to the others.
            tasks[OURS] = worker(OURS, "morer1_jax.bench.ours"), comparison.task
            yield comparison, take_turns(tasks, rounds, _TOLERANCE[preset.dtype])
    finally:
        for process in workers.values():
            process.close()


@dataclasses.dataclass(frozen=True)
class Results:
    """All that was measured of a preset on a device: by task, its name and its sides' timings."""

    preset: str
    device: str
    tasks: dict[str, tuple[str, dict[str, Timing]]]

    @classmethod
    def read(cls, path: Path, preset: str, device: str) -> Results:
        """What earlier runs saved; nothing if there is no such file.

        Raises:
          ConfigError: it is no such file, or of another preset or device.
        """
        if not path.exists():
            return cls(preset, device, {})
        try:
            saved = json.loads(path.read_text())
            found = saved["preset"], saved["device"]
            tasks = {
                one["task"]: (
                    one["name"],
                    {name: Timing(**side) for name, side in one["sides"].items()},
                )
                for one in saved["comparisons"]
            }
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: {error!r}; results of tools/bench.py expected") from None
        if found != (preset, device):
            raise ConfigError(
                f"{path}: results of {found[0]!r} on {found[1]!r} found, of {preset!r} on "
                f"{device!r} expected; give another --out"
            )
        return cls(*found, tasks)

    def save(self, path: Path) -> None:
        """Writes what `read` reads."""
        comparisons = [
            {
                "name": name,
                "task": task,
                "sides": {side: dataclasses.asdict(timing) for side, timing in sides.items()},
            }
            for task, (name, sides) in self.tasks.items()
        ]
        described = {"preset": self.preset, "device": self.device, "comparisons": comparisons}
        atomic_write(path, json.dumps(described, indent=1) + "\n")

    def sorted(self, order: Sequence[str]) -> Results:
        """With the tasks in this order."""
        tasks = {task: self.tasks[task] for task in order if task in self.tasks}
        return dataclasses.replace(self, tasks=tasks)

    def tables(self) -> list[str]:
        """One a task."""
        return [table(*measured) for measured in self.tasks.values()]


def table(name: str, timings: dict[str, Timing]) -> str:
    """What was seen, a line a side: ours first, then the others from the fastest on."""
    ours = timings[OURS]
    others = sorted((name for name in timings if name != OURS), key=lambda n: timings[n].median)
    lines = [
        f"### {name}",
        "",
        "| | seconds | ours is faster by | memory, MB | GFLOP | first run, seconds |",
        "|---|---|---|---|---|---|",
    ]
    for side in (OURS, *others):
        timing = timings[side]
        least, median, most = ratio(timing, ours)
        faster = "" if side == OURS else f"{median:.2f}× ({least:.2f} to {most:.2f})"
        flops = "" if timing.flops is None else f"{timing.flops / 1e9:,.0f}"
        spread = f"{min(timing.seconds):.2f} to {max(timing.seconds):.2f}"
        lines.append(
            f"| {side} | {timing.median:.2f} ({spread}) | {faster} "
            f"| {timing.peak_bytes / 1e6:,.0f} | {flops} | {timing.prepare_seconds:.0f} |"
        )
    return "\n".join(lines) + "\n"
