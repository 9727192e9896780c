"""The report's learning curves and its curriculum: what `metrics.jsonl` and the ratings hold."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from morer1_jax.data.ratings import POOLS, Rating, read_ratings
from morer1_jax.errors import DataError
from morer1_jax.report.charts import Chart, histogram, line_chart, smooth_window, stacked_area, thin
from morer1_jax.report.page import render

# Points of a line beyond which neighbours are drawn as their mean.
_MAX_POINTS = 600
# Different pass rates beyond which they are counted in tenths.
_MAX_RATES = 17

Records = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Metrics:
    """What a run logged.

    Attributes:
        records: by stage and kind, in order of steps.
        unreadable: how many lines are no record, such as one cut off by a crash.
    """

    records: Mapping[tuple[str, str], Records]
    unreadable: int

    def get(self, stage: str, kind: str = "train") -> Records:
        """Returns the records of a stage, none if it logged nothing."""
        return self.records.get((stage, kind), ())


@dataclasses.dataclass(frozen=True)
class Stage:
    """The learning curves of a stage; `curves.html` says which.

    Attributes:
        key: the stage's name in the records.
        name: what the report calls it.
    """

    key: str
    name: str
    metrics: Metrics

    @property
    def steps(self) -> int:
        """The number of logged training steps."""
        return len(self.metrics.get(self.key))

    @property
    def steps_per_point(self) -> int:
        """How many logged steps a point of a line is the mean of."""
        return math.ceil(self.steps / _MAX_POINTS)

    @property
    def window(self) -> int:
        """How many points a smoothed one averages."""
        return smooth_window(min(self.steps, _MAX_POINTS))

    def chart(
        self,
        title: str,
        unit: str,
        metrics: Mapping[str, str],
        *,
        kind: str = "train",
        band: Sequence[str] = (),
        y_range: Sequence[float] = (0,),
        note: str = "",
    ) -> Chart:
        """Draws metrics over the steps; nothing if none is logged, or all are zero throughout.

        Args:
            unit: of the y axis.
            metrics: each key in the records, and its name in the chart, in the order of colours.
            kind: of the records.
            band: keys of a lower and an upper bound of the first metric.
            y_range: values that the y axis includes at least.
        """
        # The lines that have values, or why there is nothing to draw.
        records = self.metrics.get(self.key, kind)
        lines = {name: _thinned(records, key) for key, name in metrics.items()}
        lines = {name: values for name, values in lines.items() if np.isfinite(values).any()}
        if not lines:
            return Chart(title, missing="Not logged")
        if not any(np.nan_to_num(values).any() for values in lines.values()):
            return Chart(title, missing="Zero throughout")
        # The chart; a band with gaps is left out.
        bounds = tuple(_thinned(records, key) for key in band)
        return line_chart(
            title,
            _thinned(records, "step"),
            lines,
            unit=unit,
            smoothed=kind == "train",
            band=bounds if bounds and np.isfinite(bounds).all() else None,
            y_range=y_range,
            note=note,
        )

    @property
    def best(self) -> str:
        """A sentence about the step that did best on validation, if any was validated."""
        records = self.metrics.get(self.key, "valid")
        scores = _values(records, "validation/micro_f1")
        if not np.isfinite(scores).any():
            return ""
        best = int(np.nanargmax(scores))
        step = records[best]["step"]
        return (
            f"Best micro F1 {scores[best]:.1f} at step {step:,.0f}: the checkpoint that is scored."
        )


def read_metrics(path: Path) -> Metrics:
    """Reads `metrics.jsonl`, which may be missing.

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
    for stage_records in records.values():
        stage_records.sort(key=lambda record: record["step"])
    return Metrics(dict(records), unreadable)


def learning_curves(metrics: Metrics, names: Mapping[str, str]) -> Markup:
    """Returns SFT's and GRPO's charts, then the validation scores of all other trainings.

    Args:
        names: what the report calls each stage.
    """
    trained = {stage for stage, kind in metrics.records if kind == "valid"} | {"sft", "grpo"}
    stages = {
        stage: Stage(stage, names.get(stage.rpartition("/")[2], stage), metrics)
        for stage in sorted(trained)
    }
    return render(
        "curves.html",
        sft=stages.pop("sft"),
        grpo=stages.pop("grpo"),
        others=list(stages.values()),
        unreadable=metrics.unreadable,
    )


def curriculum(metrics: Metrics, ratings: Path) -> Markup:
    """Returns the chart of GRPO's curriculum and that of the pass rates in a file of ratings."""
    charts, problems = [], []
    for draw in (lambda: shares(metrics), lambda: pass_rates(read_ratings(ratings))):
        try:
            charts.append(draw())
        except DataError as error:
            problems.append(error)
    return render("curriculum.html", charts=charts, problems=problems)


def shares(metrics: Metrics) -> Chart:
    """Draws the shares of easy and hard facts over GRPO's steps.

    Raises:
        DataError: GRPO did not log them.
    """
    records = metrics.get("grpo")
    layers = {name: _thinned(records, f"curriculum/{name}_share") for name in ("easy", "hard")}
    if not records or not np.isfinite([*layers.values()]).all():
        raise DataError("No GRPO steps with a curriculum in this workdir.")
    first, last = layers["hard"][0], layers["hard"][-1]
    return stacked_area(
        "Easy and hard facts in a batch",
        _thinned(records, "step"),
        layers,
        unit="share of the batch",
        note=f"Hard facts: {first:.0%} of the first batch, {last:.0%} of the last.",
    )


def pass_rates(ratings: Sequence[Rating]) -> Chart:
    """Draws how many training facts, at least one, the SFT model solved how often, by pool."""
    rates = sorted({rating.pass_rate for rating in ratings})
    if len(rates) > _MAX_RATES:
        rates = [tenth / 10 for tenth in range(11)]
    counts = {pool: np.zeros(len(rates), int) for pool in POOLS}
    for rating in ratings:
        nearest = min(range(len(rates)), key=lambda i: abs(rates[i] - rating.pass_rate))
        counts[rating.pool][nearest] += 1
    counts = {pool: numbers for pool, numbers in counts.items() if numbers.any()}
    sizes = ", ".join(f"{numbers.sum():,} {pool}" for pool, numbers in counts.items())
    return histogram(
        "Pass rates of the training facts",
        [f"{rate:.3g}" for rate in rates],
        counts,
        x_label="pass rate",
        unit="facts",
        note=f"{len(ratings):,} facts: {sizes}.",
    )


def _values(records: Records, key: str) -> np.ndarray:
    """Returns a metric at each step, NaN where it is not a finite number."""
    values = [record.get(key) for record in records]
    finite = [isinstance(value, int | float) and math.isfinite(value) for value in values]
    return np.where(finite, values, np.nan).astype(float)


def _thinned(records: Records, key: str) -> np.ndarray:
    """Returns a metric as it is drawn."""
    return thin(_values(records, key), _MAX_POINTS)
