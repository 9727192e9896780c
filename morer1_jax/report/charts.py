"""Charts as static SVG in the page's own colours, drawn by matplotlib.

matplotlib lays a chart out. It writes text as text and nothing that differs between two runs; this
module then puts the page's CSS variables in place of colours, so that charts are light or dark as
the page is. What a chart holds in numbers is in its hits, which the page shows on hovering.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Sizes are in units of the SVG, which are matplotlib's points, 72 an inch.
_WIDTH, _HEIGHT = 360, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 16, 24, 32
_FONT_SIZE = 11
# Hits are vertical strips; more of them than this would be narrower than a pointer.
_MAX_HITS = 90
# A smoothed value is the mean over this share of the series.
_SMOOTH = 0.06
# Colours that only stand for variables of the page's style sheet.
_SERIES = ("#000001", "#000002", "#000003", "#000004")
_GRID, _TEXT = "#000005", "#000006"
_VARIABLES = dict(zip(_SERIES, ("var(--c1)", "var(--c2)", "var(--c3)", "var(--c4)"), strict=True))
_VARIABLES |= {_GRID: "var(--line)", _TEXT: "var(--muted)"}
# Dashes, in widths of the line, keep series apart for colour-blind readers.
_DASHES = ("-", (0, (3.9, 1.4)), (0, (1.4, 1.1)), (0, (5, 1.1, 1.1, 1.1)))
_REPLACEMENTS = {
    # Ids, which several charts of a page would share. Markers are referred to, by a hash, and keep
    # theirs.
    r' id="(?!m[0-9a-f]{10}")[^"]*"': "",
    r' clip-path="[^"]*"': "",
    r"font-family: [^;]*; ": "",
    r' transform="rotate\(-?0 [^"]*"': "",
    r"\s*\n\s*": "",
    r"(\.\d\d)\d+(?=[^\d<])": r"\1",  # Digits of coordinates, not of labels.
    "|".join(_VARIABLES): lambda match: _VARIABLES[match[0]],
}


@dataclasses.dataclass(frozen=True)
class Hit:
    """The text about a vertical strip of a chart; sizes in units of the SVG."""

    left: float
    width: float
    text: str


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart and what stands around it.

    Attributes:
        drawing: the markup inside the `<svg>` of `macros.html`; empty if there is nothing to draw.
        names: the legend, in the order of colours; empty if the chart needs none.
        lines: whether the legend shows lines, not areas.
        note: a sentence below the chart.
        missing: why there is no drawing.
    """

    title: str
    drawing: str = ""
    hits: tuple[Hit, ...] = ()
    names: tuple[str, ...] = ()
    lines: bool = False
    note: str = ""
    missing: str = ""


def number(value: float) -> str:
    """Returns a number in as few characters as it can be read: 12,500, 0.25, 3e-05."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def thin(values: np.ndarray, max_values: int) -> np.ndarray:
    """Returns at most `max_values` values, equal runs of neighbours replaced by their means.

    A mean leaves NaNs out; where there is nothing else it is NaN.
    """
    size = math.ceil(len(values) / max_values) or 1
    runs = np.pad(values, (0, -len(values) % size), constant_values=np.nan).reshape(-1, size)
    counts = np.isfinite(runs).sum(1)
    return np.where(counts, np.nansum(runs, 1) / np.maximum(counts, 1), np.nan)


def smooth_window(count: int) -> int:
    """Returns how many neighbours, an odd number, of `count` values a smoothed one averages."""
    return 2 * round(_SMOOTH * count / 2) + 1


def smooth(values: np.ndarray) -> np.ndarray:
    """Replaces each value by the mean of its neighbours; the window is cut off at the ends.

    NaNs stay, and means leave them out.
    """
    window = np.ones(smooth_window(len(values)))
    finite = np.isfinite(values)
    sums = np.convolve(np.where(finite, values, 0), window, "same")
    counts = np.convolve(finite, window, "same")
    return np.where(finite, sums / np.maximum(counts, 1), np.nan)


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """Sets matplotlib's settings to its defaults, whatever those of this machine's user are."""
    # Imported where a page is written: it takes a second, and may look for the machine's fonts.
    from matplotlib import rc_context, style

    own = {"svg.fonttype": "none", "svg.hashsalt": "report"}
    with style.context("default"), rc_context(own):
        yield


@_settings()
def line_chart(
    title: str,
    steps: np.ndarray,
    lines: Mapping[str, np.ndarray],
    *,
    unit: str,
    smoothed: bool,
    band: tuple[np.ndarray, np.ndarray] | None = None,
    y_range: Sequence[float] = (),
    note: str = "",
) -> Chart:
    """Draws values over steps.

    Args:
        steps: increasing.
        lines: at most four, by name, with a value for each step; NaN breaks a line. Not all are
            NaN.
        unit: of the y axis.
        smoothed: whether to draw the values light and their running mean strong, instead of a
            marker on each value.
        band: a lower and an upper bound of each value of the first line, drawn as a light area.
        y_range: values that the y axis includes at least.
    """
    # The lines, and their values for the hits.
    axes = _axes(steps, np.concatenate([*lines.values(), *(band or ()), y_range]), "step", unit)
    texts = [[f"step {number(step)}" for step in steps]]
    for (name, values), colour, dashes in zip(lines.items(), _SERIES, _DASHES, strict=False):
        style = {"color": colour, "linestyle": dashes, "linewidth": 1.8}
        if smoothed:
            axes.plot(steps, values, color=colour, alpha=0.33, linewidth=1)
            axes.plot(steps, smooth(values), **style)
        else:
            axes.plot(steps, values, marker="o", markersize=4.4, **style)
        texts.append([f"{name}: {'no value' if math.isnan(y) else number(y)}" for y in values])
    # The band around the first line, and its bounds for the hits.
    if band:
        axes.fill_between(steps, *band, color=_SERIES[0], alpha=0.14, linewidth=0)
        bounds = zip(texts[1], *band, strict=True)
        texts[1] = [f"{text} ({number(low)} to {number(high)})" for text, low, high in bounds]
    names = tuple(lines) if len(lines) > 1 else ()
    return Chart(title, _svg(axes), _hits(axes, steps, texts), names, lines=True, note=note)


@_settings()
def stacked_area(
    title: str, steps: np.ndarray, layers: Mapping[str, np.ndarray], *, unit: str, note: str = ""
) -> Chart:
    """Draws shares of a whole over steps.

    Args:
        steps: increasing.
        layers: by name, the lowest first: a share, 0 to 1, for each step.
        unit: of the y axis.
    """
    axes = _axes(steps, np.array([0, 1]), "step", unit)
    axes.set_axisbelow(False)
    axes.stackplot(steps, *layers.values(), colors=_SERIES, alpha=0.85, linewidth=0)
    texts = [[f"step {number(step)}" for step in steps]]
    texts += [[f"{name}: {100 * y:.0f}%" for y in values] for name, values in layers.items()]
    return Chart(title, _svg(axes), _hits(axes, steps, texts), tuple(layers), note=note)


@_settings()
def histogram(
    title: str,
    labels: Sequence[str],
    counts: Mapping[str, np.ndarray],
    *,
    x_label: str,
    unit: str,
    note: str = "",
) -> Chart:
    """Draws counts as stacked bars.

    Args:
        labels: of each bar, left to right.
        counts: by name, the lowest first: a number for each bar.
        x_label: what the bars' labels say.
        unit: of the y axis.
    """
    places = np.arange(len(labels)) + 0.5
    axes = _axes(np.array([0, len(labels)]), np.array([0, *sum(counts.values())]), x_label, unit)
    base = np.zeros(len(labels))
    for values, colour in zip(counts.values(), _SERIES, strict=False):
        axes.bar(places, values, 0.8, base, color=colour, alpha=0.85, linewidth=0)
        base = base + values
    every = math.ceil(len(labels) / 11)
    axes.set_xticks(places[::every], labels[::every])
    axes.tick_params(axis="x", length=0, pad=7)
    texts = [[f"{x_label} {label}" for label in labels]]
    texts += [[f"{n:,} {name}" if n else "" for n in values] for name, values in counts.items()]
    return Chart(title, _svg(axes), _hits(axes, places, texts), tuple(counts), note=note)


def _axes(xs: np.ndarray, ys: np.ndarray, x_label: str, y_label: str) -> Axes:
    """Returns empty axes around the values, with round numbers as ticks and ends of the y axis."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # Not through pyplot, which would keep every figure in a global list.
    figure = Figure((_WIDTH / 72, _HEIGHT / 72), dpi=72)
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    place = (_LEFT / _WIDTH, _BOTTOM / _HEIGHT, width / _WIDTH, height / _HEIGHT)
    axes = figure.add_axes(place, frameon=False)
    # Ranges.
    locator = MaxNLocator(5, steps=[1, 2, 5, 10])
    low, high = np.nanmin(ys), np.nanmax(ys)
    if high - low <= 1e-6 * max(abs(low), abs(high)):  # Labels could not tell the ticks apart.
        spread = abs(low) / 2 or 0.5
        low, high = low - spread, high + spread
    y_ticks = locator.tick_values(low, high)
    x_range = (xs[0], xs[-1]) if xs[-1] > xs[0] else (xs[0] - 1, xs[0] + 1)
    axes.set(xlim=x_range, ylim=(y_ticks[0], y_ticks[-1]), yticks=y_ticks)
    axes.xaxis.set_major_locator(locator)
    # Looks.
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: number(value))
    axes.tick_params(color=_GRID, labelcolor=_TEXT, labelsize=_FONT_SIZE, width=1, length=4)
    axes.tick_params(axis="y", length=0, pad=5)
    axes.grid(axis="y", color=_GRID, linewidth=1)
    axes.set_axisbelow(True)
    figure.text(0, 1 - 10 / _HEIGHT, y_label, color=_TEXT, fontsize=_FONT_SIZE)
    right = 1 - _RIGHT / _WIDTH
    figure.text(right, 3 / _HEIGHT, x_label, color=_TEXT, fontsize=_FONT_SIZE, ha="right")
    return axes


def _hits(axes: Axes, xs: np.ndarray, texts: Sequence[Sequence[str]]) -> tuple[Hit, ...]:
    """Returns strips that divide the chart halfway between neighbouring x.

    Args:
        axes: of the chart, after everything is drawn.
        xs: increasing.
        texts: the first line of the text at each x, its second line, and so on.
    """
    every = math.ceil(len(xs) / _MAX_HITS)
    places = axes.transData.transform([(x, 0) for x in xs[::every]])[:, 0]
    edges = [_LEFT, *(places[1:] + places[:-1]) / 2, _WIDTH - _RIGHT]
    lines = list(zip(*texts, strict=True))[::every]
    return tuple(
        Hit(round(left, 1), round(right - left, 1), "\n".join(filter(None, text)))
        for (left, right), text in zip(itertools.pairwise(edges), lines, strict=True)
    )


def _svg(axes: Axes) -> Markup:
    """Returns what goes inside an `<svg>` of the page."""
    file = io.StringIO()
    axes.figure.savefig(file, format="svg", transparent=True)
    # Before the first group are the date, and a style sheet that would apply to the whole page;
    # after the last are the clip paths.
    svg = file.getvalue()
    svg = svg[svg.index("<g ") : svg.rindex("</g>") + len("</g>")]
    for pattern, replacement in _REPLACEMENTS.items():
        svg = re.sub(pattern, replacement, svg)
    return Markup(svg)
