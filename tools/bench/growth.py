"""Shows how time grows with a group's samples and a prompt's length, as tables and a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from bench.cases import Preset
from bench.compare import OURS, Results
from bench.turns import Timing


class Pair(NamedTuple):
    """Median seconds of ours and of the fastest other side, and that side's name."""

    ours: float
    other: float
    form: str


@dataclasses.dataclass(frozen=True)
class Growth:
    """Times at several sizes.

    Attributes:
        update: of an update, by number of samples of a prompt.
        decode: of one more token of all samples, by the prompt's length in tokens.
    """

    preset: Preset
    update: dict[int, Pair]
    decode: dict[int, Pair]

    @classmethod
    def of(cls, results: Results) -> Growth:
        """Returns what the results of `update/…`, `sample/…` and `first/…` say."""
        seconds = {
            tuple(task.split("/")): _medians(outcome.sides)
            for task, outcome in results.tasks.items()
            if outcome.peers
        }
        update = {int(task[2]): _pair(s) for task, s in seconds.items() if task[0] == "update"}
        decode = {}
        for task, whole in seconds.items():
            first = seconds.get(("first", *task[1:]))
            if task[0] == "sample" and first is not None and first.keys() == whole.keys():
                # A form's time for all tokens but the first, per token.
                tokens = results.preset.completion - 1
                per_token = {side: (whole[side] - first[side]) / tokens for side in whole}
                decode[int(task[1])] = _pair(per_token)
        return cls(results.preset, update, decode)

    def tables(self) -> str:
        """Returns Markdown tables; without a table where fewer than two sizes were measured."""
        return "\n".join([*self._update_table(), *self._decode_table()])

    def _update_table(self) -> Iterator[str]:
        if len(self.update) < 2:
            return
        smallest = min(self.update)
        base = self.update[smallest]
        yield "### How an update grows with a prompt's samples\n"
        yield (
            f"| samples | ours, seconds | relative to {smallest} | P + G·T | "
            f"fastest PyTorch, seconds | relative to {smallest} | G·(P + T) |"
        )
        yield "|---|---|---|---|---|---|---|"
        for g, pair in sorted(self.update.items()):
            shared, plain = laws(self.preset, g)
            shared_1, plain_1 = laws(self.preset, smallest)
            yield (
                f"| {g} | {pair.ours:.2f} | {pair.ours / base.ours:.2f} | {shared / shared_1:.2f} "
                f"| {pair.other:.2f} | {pair.other / base.other:.2f} | {plain / plain_1:.2f} |"
            )
        yield ""

    def _decode_table(self) -> Iterator[str]:
        if len(self.decode) < 2:
            return
        base = self.decode[min(self.decode)]
        yield "### How decoding grows with the prompt\n"
        yield "| prompt | ours, ms a token | growth | fastest `generate`, ms a token | growth |"
        yield "|---|---|---|---|---|"
        for p, pair in sorted(self.decode.items()):
            ours, other = (100 * (a / b - 1) for a, b in zip(pair[:2], base[:2], strict=True))
            yield (
                f"| {p} | {1000 * pair.ours:.1f} | {ours:+.0f}% "
                f"| {1000 * pair.other:.1f} ({pair.form}) | {other:+.0f}% |"
            )
        yield ""


def laws(preset: Preset, group: int) -> tuple[int, int]:
    """Returns the tokens of an update at the longest prompt: P + G·T, and G·(P + T)."""
    prompt, completion = max(preset.prompts), preset.completion
    return prompt + group * completion, group * (prompt + completion)


def draw(results: Results, path: Path) -> None:
    """Writes a picture: how much faster ours is at each task, and how an update grows."""
    growth = Growth.of(results)
    figure = Figure(figsize=(10, 4), layout="constrained")
    bars, *curves = figure.subplots(1, 2 if len(growth.update) > 1 else 1, squeeze=False)[0]
    # A first token is part of sampling, which has a bar; updates have their curve.
    hidden = ("first", "update") if curves else ("first",)
    outcomes = [
        outcome
        for task, outcome in results.in_order()
        if outcome.peers and not task.startswith(hidden)
    ]
    for row, outcome in enumerate(outcomes):
        seconds = _medians(outcome.sides)
        ours = seconds.pop(OURS)
        slow, fast = max(seconds.values()) / ours, min(seconds.values()) / ours
        labels = {} if row else {"slow": "its slowest form", "fast": "its fastest form"}
        bars.barh(row, slow, color="#d0d7de", label=labels.get("slow"))
        bars.barh(row, fast, color="#1f6feb", label=labels.get("fast"))
        bars.text(fast, row, f" {fast:.1f}×", va="center", fontsize=8)
    bars.set_yticks(range(len(outcomes)), [outcome.name for outcome in outcomes])
    bars.invert_yaxis()
    bars.axvline(1, color="black", linewidth=0.8)
    bars.set_xlabel("times faster than PyTorch")
    if outcomes:
        bars.legend(fontsize=8)
    for axes in curves:
        _draw_update(axes, growth)
    figure.savefig(path, dpi=150)


def _draw_update(axes: Any, growth: Growth) -> None:
    preset = growth.preset
    groups = sorted(growth.update)
    ours, other, _ = zip(*(growth.update[g] for g in groups), strict=True)
    shared, plain = zip(*(laws(preset, g) for g in groups), strict=True)
    for name, color, seconds, law, formula in (
        ("fastest PyTorch", "#8b949e", other, plain, "G·(P + T)"),
        ("ours", "#1f6feb", ours, shared, "P + G·T"),
    ):
        axes.plot(groups, seconds, "o-", color=color, label=name)
        as_law = [seconds[0] * tokens / law[0] for tokens in law]
        axes.plot(groups, as_law, "--", color=color, linewidth=1, label=f"as {formula} grows")
    axes.set_xticks(groups)
    axes.set_xlabel(f"samples a prompt (P = {max(preset.prompts)}, T = {preset.completion})")
    axes.set_ylabel("seconds an update")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)


def _medians(sides: dict[str, Timing]) -> dict[str, float]:
    return {name: timing.median for name, timing in sides.items()}


def _pair(seconds: dict[str, float]) -> Pair:
    form = min((name for name in seconds if name != OURS), key=seconds.__getitem__)
    return Pair(seconds[OURS], seconds[form], form)
