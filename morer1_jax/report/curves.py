"""The report's learning curves and its curriculum: what `metrics.jsonl` and the ratings hold."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from morer1_jax.data.ratings import Rating
from morer1_jax.report.charts import (
    Series,
    figure,
    histogram,
    line_chart,
    smooth_window,
    stacked_area,
    thin,
)
from morer1_jax.report.page import Html, join, remark, tag

# Points of a line beyond which neighbours are drawn as their mean.
_POINTS = 600
# Different pass rates beyond which they are counted in tenths.
_RATES = 17

Records = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Metrics:
    """What a run logged.

    Attributes:
      records: by stage and kind, in order of steps.
      unreadable: lines that are no record, such as one cut off by a crash.
    """

    records: Mapping[tuple[str, str], Records]
    unreadable: int

    def get(self, stage: str, kind: str = "train") -> Records:
        return self.records.get((stage, kind), ())


@dataclasses.dataclass(frozen=True)
class Curve:
    """One chart: some metrics of a stage over its steps.

    Attributes:
      unit: what the y axis measures.
      metrics: key in the records to name in the chart; the colours are given in this order.
      band: keys of a lower and an upper bound around the first metric.
      low, high: what the y axis reaches to at least.
    """

    title: str
    unit: str
    metrics: Mapping[str, str]
    kind: str = "train"
    band: tuple[str, str] | None = None
    low: float | None = None
    high: float | None = None


_VALID = Curve(
    "Validation F1",
    "F1, %",
    {"validation/micro_f1": "micro F1", "validation/macro_f1": "macro F1"},
    kind="valid",
    low=0,
)
_STEP_TIME = Curve("Step time", "seconds", {"step_time": "step time"}, low=0)
_GRAD_NORM = Curve("Gradient norm, before clipping", "L2 norm", {"grad_norm": "norm"}, low=0)
_ENTROPY = Curve("Entropy", "nats per token", {"entropy": "entropy"}, low=0)

_MAIN = {
    "sft": (Curve("Loss", "nats per token", {"loss": "loss"}, low=0), _VALID, _ENTROPY),
    "grpo": (
        Curve(
            "Reward", "mean reward", {"reward": "reward", "reward_std": "spread in a group"}, low=0
        ),
        Curve(
            "Reward's parts, before weighting",
            "mean, 0 to 1",
            {f"rewards/{part}/mean": part for part in ("accuracy", "format", "effort")},
            low=0,
            high=1,
        ),
        _VALID,
        Curve(
            "Completion length, shortest to longest",
            "tokens",
            {"completions/mean_length": "mean length"},
            band=("completions/min_length", "completions/max_length"),
            low=0,
        ),
        _ENTROPY,
        Curve(
            "Groups and completions that teach nothing",
            "share",
            {
                "frac_reward_zero_std": "groups of equal rewards",
                "completions/clipped_ratio": "completions cut off",
            },
            low=0,
            high=1,
        ),
    ),
}
_MORE = {
    "sft": (
        _GRAD_NORM,
        Curve("Target tokens a step", "tokens", {"target_tokens": "tokens"}),
        _STEP_TIME,
    ),
    "grpo": (
        Curve("Loss", "loss", {"loss": "loss"}),
        _GRAD_NORM,
        Curve("KL to the model it began with", "nats per token", {"kl": "KL"}, low=0),
        Curve(
            "Ratios outside the clip range",
            "share of tokens",
            {"clip_ratio/low_mean": "below", "clip_ratio/high_mean": "above"},
            low=0,
        ),
        Curve(
            "Log-probability, sampler against scorer",
            "mean |difference|, nats",
            {"sampling/sampling_logp_difference/mean": "difference"},
            low=0,
        ),
        _STEP_TIME,
    ),
}


def read_metrics(path: Path) -> Metrics:
    """Reads `metrics.jsonl`, which need not be there.

    A NaN or an infinity, logged as null, becomes a gap in its line.
    """
    records, unreadable = defaultdict(list), 0
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for line in filter(None, lines):
        try:
            record = json.loads(line)
            key, step = (str(record["stage"]), str(record["kind"])), float(record["step"])
        except (ValueError, KeyError, TypeError):
            unreadable += 1
        else:
            records[key].append(record | {"step": step})
    for found in records.values():
        found.sort(key=lambda record: record["step"])
    return Metrics(dict(records), unreadable)


def learning_curves(metrics: Metrics, names: Mapping[str, str]) -> Html:
    """SFT's and GRPO's charts, then the validation scores of all other trainings.

    Args:
      names: how to call a stage.
    """
    parts = []
    for stage in ("sft", "grpo"):
        parts.append(tag("h3", names[stage]))
        records = metrics.get(stage)
        if not records:
            parts.append(remark(f"No {names[stage]} metrics in this workdir."))
            continue
        window = smooth_window(min(len(records), _POINTS))
        parts.append(
            tag("p", _legend_note(len(records), window), class_="note") if window > 1 else ""
        )
        parts.append(_charts(metrics, stage, _MAIN[stage]))
        more = tag("summary", f"More curves of {names[stage]}")
        parts.append(tag("details", more, _charts(metrics, stage, _MORE[stage])))
    if metrics.unreadable:
        parts.append(remark(f"Lines of metrics.jsonl that cannot be read: {metrics.unreadable}."))
    return join([*parts, _other_stages(metrics, names)])


def curriculum(metrics: Metrics) -> Html:
    """The shares of easy and hard facts over GRPO's steps."""
    records = metrics.get("grpo")
    layers = {
        name: [y for _, y in thin(_points(records, f"curriculum/{name}_share"), _POINTS)]
        for name in ("easy", "hard")
    }
    if not records or any(y is None for values in layers.values() for y in values):
        return remark("No GRPO steps with a curriculum in this workdir.")
    xs = [x for x, _ in thin(_points(records, "curriculum/easy_share"), _POINTS)]
    chart = stacked_area(xs, layers, x_label="step", y_label="share of the batch")
    first, last = layers["hard"][0], layers["hard"][-1]
    note = f"Hard facts: {100 * first:.0f}% of the first batch, {100 * last:.0f}% of the last."
    return figure("Easy and hard facts in a batch", chart, list(layers), note=note)


def pass_rates(ratings: Sequence[Rating]) -> Html:
    """How many training facts the SFT model solved how often, by the pool they went to."""
    if not ratings:
        return remark("No facts were rated.")
    rates = sorted({rating.pass_rate for rating in ratings})
    if len(rates) > _RATES:
        rates = [tenth / 10 for tenth in range(11)]
    counts: dict[float, Counter[str]] = {rate: Counter() for rate in rates}
    for rating in ratings:
        nearest = min(rates, key=lambda rate: abs(rate - rating.pass_rate))
        counts[nearest][rating.pool] += 1
    pools = [pool for pool in ("easy", "hard", "dropped") if any(c[pool] for c in counts.values())]
    bars = [(f"{rate:.3g}", count) for rate, count in counts.items()]
    sizes = Counter(rating.pool for rating in ratings)
    note = ", ".join(f"{sizes[pool]:,} {pool}" for pool in pools)
    return figure(
        "Pass rates of the training facts",
        histogram(bars, pools, x_label="pass rate"),
        pools,
        note=f"{len(ratings):,} facts: {note}.",
    )


def _legend_note(count: int, window: int) -> str:
    run = math.ceil(count / _POINTS)
    light = f"means of {run} logged steps" if run > 1 else "logged steps"
    return f"Light lines are {light}; strong ones the mean over {window} neighbours."


def _points(records: Records, key: str) -> list[tuple[float, float | None]]:
    points = []
    for record in records:
        y = record.get(key)
        usable = isinstance(y, int | float) and math.isfinite(y)
        points.append((record["step"], float(y) if usable else None))
    return points


def _charts(metrics: Metrics, stage: str, curves: Sequence[Curve]) -> Html:
    shown, zero, absent = [], [], []
    for curve in curves:
        records = metrics.get(stage, curve.kind)
        lines = {key: thin(_points(records, key), _POINTS) for key in curve.metrics}
        lines = {k: line for k, line in lines.items() if any(y is not None for _, y in line)}
        if not lines:
            absent.append(curve.title)
        elif all(not y for line in lines.values() for _, y in line):
            zero.append(curve.title)
        else:
            shown.append(_figure(curve, lines, records))
    parts = [tag("div", *shown, class_="charts")]
    for titles, words in ((zero, "Zero throughout"), (absent, "Not logged")):
        if titles:
            parts.append(remark(f"{words}: {'; '.join(titles)}."))
    return join(parts)


def _figure(
    curve: Curve, lines: Mapping[str, list[tuple[float, float | None]]], records: Records
) -> Html:
    band = None
    if curve.band:
        low, high = ([y for _, y in thin(_points(records, key), _POINTS)] for key in curve.band)
        band = None if None in (*low, *high) else tuple(zip(low, high, strict=True))
    series = [
        Series(curve.metrics[key], tuple(line), colour, band if colour == 1 else None)
        for colour, (key, line) in enumerate(lines.items(), start=1)
    ]
    chart = line_chart(
        series,
        x_label="step",
        y_label=curve.unit,
        smoothed=curve.kind == "train",
        low=curve.low,
        high=curve.high,
    )
    names = [one.name for one in series] if len(series) > 1 else ()
    return figure(curve.title, chart, names, lines=True, note=_best(curve, records))


def _best(curve: Curve, records: Records) -> str:
    if curve.kind != "valid":
        return ""
    points = [(y, -x) for x, y in _points(records, "validation/micro_f1") if y is not None]
    if not points:
        return ""
    best, step = max(points)
    return f"Best micro F1 {best:.1f} at step {-step:,.0f}: the checkpoint that is scored."


def _other_stages(metrics: Metrics, names: Mapping[str, str]) -> Html:
    stages = sorted({stage for stage, kind in metrics.records if kind == "valid"} - {"sft", "grpo"})
    lines = {s: _points(metrics.get(s, "valid"), "validation/micro_f1") for s in stages}
    lines = {s: line for s, line in lines.items() if any(y is not None for _, y in line)}
    if not lines:
        return Html("")
    figures = []
    for stage, line in lines.items():
        name = names.get(stage.rpartition("/")[2], stage)
        series = [Series(name, tuple(line))]
        chart = line_chart(series, x_label="step", y_label="micro F1, %", smoothed=False, low=0)
        figures.append(figure(name, chart))
    return join(
        [tag("h3", "Baselines and controls, on validation"), tag("div", *figures, class_="charts")]
    )
