"""Charts as inline SVG, drawn here so that a page needs no library and no network.

A chart is `WIDTH` units wide and is scaled by the page. Colours 1 to 4 are the page's classes `c1`
to `c4`. What a place holds in numbers is its `<title>`, which browsers show on hovering.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

from morer1_jax.report.page import Html, tag

WIDTH, HEIGHT = 360, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 16, 24, 32
# Hovering is by vertical strips; more of them than this would be narrower than a pointer.
_STRIPS = 90
# A smoothed line's value is the mean over this share of the series.
_SMOOTH = 0.06

Point = tuple[float, float | None]


@dataclasses.dataclass(frozen=True)
class Series:
    """A named line.

    Attributes:
      points: (x, y) with x increasing; y None where there is no value, which breaks the line.
      colour: 1 to 4.
      band: (lower, upper) for each point, drawn as a light area; or None.
    """

    name: str
    points: tuple[Point, ...]
    colour: int = 1
    band: tuple[tuple[float, float], ...] | None = None


@dataclasses.dataclass(frozen=True)
class _Frame:
    """Where data lies in a chart: the ranges of both axes, and their ticks."""

    x: tuple[float, float]
    y: tuple[float, float]
    x_ticks: tuple[float, ...]
    y_ticks: tuple[float, ...]

    @classmethod
    def around(cls, xs: Sequence[float], ys: Sequence[float]) -> _Frame:
        y_ticks = ticks(min(ys), max(ys), 5, outside=True)
        x = (min(xs), max(xs)) if max(xs) > min(xs) else (xs[0] - 1, xs[0] + 1)
        return cls(x, (y_ticks[0], y_ticks[-1]), ticks(*x, 5), y_ticks)

    def at(self, x: float, y: float) -> tuple[float, float]:
        (x0, x1), (y0, y1) = self.x, self.y
        return (
            _LEFT + (x - x0) / (x1 - x0) * (WIDTH - _LEFT - _RIGHT),
            HEIGHT - _BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - _TOP - _BOTTOM),
        )

    def path(self, points: Sequence[Point]) -> str:
        """`M` at the first point of each unbroken run of values, `L` at the others."""
        words, pen = [], "M"
        for x, y in points:
            if y is None:
                pen = "M"
                continue
            words.append("{}{:.1f} {:.1f}".format(pen, *self.at(x, y)))
            pen = "L"
        return "".join(words)

    def axes(self, x_label: str, y_label: str) -> list[Html]:
        """Grid lines, ticks and the axes' names."""
        parts = []
        for y in self.y_ticks:
            _, level = self.at(self.x[0], y)
            parts.append(_line(_LEFT, level, WIDTH - _RIGHT, level))
            parts.append(_text(_LEFT - 5, level + 3.5, number(y), "end"))
        for x in self.x_ticks:
            place, _ = self.at(x, self.y[0])
            parts.append(_line(place, HEIGHT - _BOTTOM, place, HEIGHT - _BOTTOM + 4))
            parts.append(_text(place, HEIGHT - _BOTTOM + 15, number(x), "middle"))
        parts.append(_text(0, 10, y_label, "start"))
        parts.append(_text(WIDTH - _RIGHT, HEIGHT - 3, x_label, "end"))
        return parts

    def strips(self, texts: Mapping[float, str]) -> list[Html]:
        """An unseen strip for hovering at each x, over the whole height."""
        xs = list(texts)[:: math.ceil(len(texts) / _STRIPS)]
        places = [self.at(x, self.y[0])[0] for x in xs]
        middles = [(a + b) / 2 for a, b in itertools.pairwise(places)]
        edges = [_LEFT, *middles, WIDTH - _RIGHT]
        return [
            tag(
                "rect",
                tag("title", texts[x]),
                class_="hit",
                x=f"{left:.1f}",
                y=_TOP,
                width=f"{right - left:.1f}",
                height=HEIGHT - _TOP - _BOTTOM,
            )
            for x, (left, right) in zip(xs, itertools.pairwise(edges), strict=True)
        ]


def number(value: float) -> str:
    """A number as short as it can be read: 12,500, 0.25, 3e-05."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def ticks(low: float, high: float, most: int, *, outside: bool = False) -> tuple[float, ...]:
    """About `most` round numbers, multiples of 1, 2 or 5 times a power of ten.

    Args:
      outside: whether the first and last lie around `low` and `high` instead of between them.
    """
    if high - low <= 1e-6 * max(abs(low), abs(high)):  # Labels could not tell its ticks apart.
        spread = abs(low) / 2 or 0.5
        low, high = low - spread, high + spread
    raw = (high - low) / most
    scale = 10.0 ** math.floor(math.log10(raw))
    step = next(m * scale for m in (1, 2, 5, 10) if m * scale >= raw * (1 - 1e-9))
    # What rounding adds to a bound that is a tick itself must not push the tick out.
    first, last = low / step, high / step
    if outside:
        first, last = math.floor(first + 1e-9), math.ceil(last - 1e-9)
    else:
        first, last = math.ceil(first - 1e-9), math.floor(last + 1e-9)
    return tuple(float(f"{i * step:.10g}") for i in range(first, last + 1))


def thin(points: Sequence[Point], most: int) -> list[Point]:
    """At most `most` points: equal runs of neighbours are replaced by their means."""
    size = math.ceil(len(points) / most) or 1
    out: list[Point] = []
    for run in (points[i : i + size] for i in range(0, len(points), size)):
        values = [y for _, y in run if y is not None]
        y = math.fsum(values) / len(values) if values else None
        out.append((math.fsum(x for x, _ in run) / len(run), y))
    return out


def smooth_window(count: int) -> int:
    """How many neighbouring points, an odd number, a smoothed value is the mean of."""
    return 2 * round(_SMOOTH * count / 2) + 1


def smooth(points: Sequence[Point]) -> list[Point]:
    """Each value replaced by the mean of those around it; at the ends the window is cut off."""
    reach = smooth_window(len(points)) // 2
    out: list[Point] = []
    for i, (x, y) in enumerate(points):
        around = [v for _, v in points[max(i - reach, 0) : i + reach + 1] if v is not None]
        out.append((x, None if y is None else math.fsum(around) / len(around)))
    return out


def line_chart(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    smoothed: bool,
    low: float | None = None,
    high: float | None = None,
) -> Html:
    """Lines over a common x.

    Args:
      series: at least one value among them.
      smoothed: draw the points light and their running mean strong; else mark each point.
      low, high: what the y axis reaches to at least.
    """
    ys = [y for one in series for _, y in one.points if y is not None]
    ys += [y for one in series for pair in one.band or () for y in pair]
    ys += [y for y in (low, high) if y is not None]
    frame = _Frame.around(sorted({x for one in series for x, _ in one.points}), ys)
    parts = frame.axes(x_label, y_label)
    for one in series:
        colour = f"c{one.colour}"
        if one.band:
            xs = [x for x, _ in one.points]
            lower = list(zip(xs, (low for low, _ in one.band), strict=True))
            upper = list(zip(xs, (high for _, high in one.band), strict=True))
            outline = frame.path(upper + lower[::-1]) + "Z"
            parts.append(tag("path", class_=f"band {colour}", d=outline))
        if smoothed:
            parts.append(tag("path", class_=f"line raw {colour}", d=frame.path(one.points)))
            parts.append(tag("path", class_=f"line {colour}", d=frame.path(smooth(one.points))))
            continue
        parts.append(tag("path", class_=f"line {colour}", d=frame.path(one.points)))
        for x, y in one.points:
            if y is not None:
                cx, cy = frame.at(x, y)
                parts.append(tag("circle", class_=colour, cx=f"{cx:.1f}", cy=f"{cy:.1f}", r=2.2))
    texts: dict[float, list[str]] = {}
    for one in series:
        for i, (x, y) in enumerate(one.points):
            span = " ({} to {})".format(*map(number, one.band[i])) if one.band else ""
            shown = "no value" if y is None else f"{number(y)}{span}"
            texts.setdefault(x, [f"{x_label} {number(x)}"]).append(f"{one.name}: {shown}")
    parts += frame.strips({x: "\n".join(texts[x]) for x in sorted(texts)})
    return _svg(parts)


def stacked_area(
    xs: Sequence[float], layers: Mapping[str, Sequence[float]], *, x_label: str, y_label: str
) -> Html:
    """Shares of a whole over x, the first layer lowest; every layer has a value for each x."""
    frame = _Frame.around(xs, [0.0, 1.0])
    parts, base = [], [0.0] * len(xs)
    for colour, values in enumerate(layers.values(), start=1):
        top = [a + b for a, b in zip(base, values, strict=True)]
        edge = [*zip(xs, top, strict=True), *reversed(list(zip(xs, base, strict=True)))]
        parts.append(tag("path", class_=f"area c{colour}", d=frame.path(edge) + "Z"))
        base = top
    parts += frame.axes(x_label, y_label)
    texts = {
        x: "\n".join(
            [f"{x_label} {number(x)}", *(f"{n}: {100 * v[i]:.0f}%" for n, v in layers.items())]
        )
        for i, x in enumerate(xs)
    }
    return _svg([*parts, *frame.strips(texts)])


def histogram(
    bars: Sequence[tuple[str, Mapping[str, int]]], names: Sequence[str], *, x_label: str
) -> Html:
    """Counts as bars, left to right.

    Args:
      bars: the text under each, and its count by name; those are stacked in the order of `names`.
      names: colours 1, 2, … are theirs.
    """
    most = max(sum(counts.values()) for _, counts in bars)
    frame = _Frame((0, len(bars)), (0, (y := ticks(0, most, 5, outside=True))[-1]), (), y)
    parts = frame.axes(x_label, "facts")
    every = math.ceil(len(bars) / 11)
    for i, (text, counts) in enumerate(bars):
        left, bottom = frame.at(i + 0.1, 0)
        right, _ = frame.at(i + 0.9, 0)
        base = 0
        for colour, name in enumerate(names, start=1):
            count = counts.get(name, 0)
            if not count:
                continue
            top, floor = frame.at(0, base + count)[1], frame.at(0, base)[1]
            parts.append(
                tag(
                    "rect",
                    tag("title", f"{x_label} {text}\n{count:,} {name}"),
                    class_=f"area c{colour}",
                    x=f"{left:.1f}",
                    y=f"{top:.1f}",
                    width=f"{right - left:.1f}",
                    height=f"{floor - top:.1f}",
                )
            )
            base += count
        if i % every == 0:
            parts.append(_text((left + right) / 2, bottom + 15, text, "middle"))
    return _svg(parts)


def paired_bars(values: Mapping[str, float]) -> Html:
    """Percentages as thin horizontal bars, one below the other, as wide as where they are put."""
    height = 18 / len(values)
    track = tag("rect", class_="track", width="100%", height="100%")
    bars = [
        tag(
            "rect",
            tag("title", f"{name}: {value:.1f}"),
            class_=f"area c{colour}",
            y=f"{(colour - 1) * height + 1:.1f}",
            width=f"{value:.1f}%",
            height=f"{min(height - 2, 9):.1f}",
        )
        for colour, (name, value) in enumerate(values.items(), start=1)
    ]
    return tag("svg", track, *bars)


def figure(
    title: str, chart: Html, names: Sequence[str] = (), *, lines: bool = False, note: str = ""
) -> Html:
    """A chart with its title, a legend if colours 1, 2, … have names, and what there is to know."""
    return tag(
        "figure",
        tag("figcaption", title),
        chart,
        legend(names, lines=lines) if names else "",
        tag("p", note, class_="note") if note else "",
    )


def legend(names: Sequence[str], *, lines: bool = False) -> Html:
    """The names of colours 1, 2, …, each beside a piece of its line or its area."""
    entries = []
    for i, name in enumerate(names, start=1):
        if lines:
            swatch = tag("path", class_=f"line c{i}", d="M0 4.5H22")
        else:
            swatch = tag("rect", class_=f"area c{i}", width=22, height=9)
        entries.append(tag("span", tag("svg", swatch), name))
    return tag("div", *entries, class_="legend")


def _svg(parts: Sequence[Html]) -> Html:
    return tag("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}")


def _line(x1: float, y1: float, x2: float, y2: float) -> Html:
    x1, y1, x2, y2 = (f"{v:.1f}" for v in (x1, y1, x2, y2))
    return tag("line", class_="grid", x1=x1, y1=y1, x2=x2, y2=y2)


def _text(x: float, y: float, text: str, anchor: str) -> Html:
    return tag("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)
