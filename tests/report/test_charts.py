import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from morer1_jax.report.charts import (
    HEIGHT,
    WIDTH,
    Series,
    histogram,
    line_chart,
    number,
    paired_bars,
    smooth,
    stacked_area,
    thin,
    ticks,
)

VALUES = st.floats(-1e9, 1e9, allow_subnormal=False)


def paths(svg, class_):
    return re.findall(rf'<path class="{class_}" d="([^"]*)"', svg)


def places(path):
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.-]+) ([\d.-]+)", path)]


def chart(*series, smoothed=True, **options):
    return line_chart(series, x_label="step", y_label="y", smoothed=smoothed, **options)


def test_a_line_has_a_point_for_each_value_and_breaks_at_gaps():
    points = tuple((float(x), None if x in (3, 4) else x / 7) for x in range(50))
    svg = chart(Series("a", points))
    (raw,), (strong,) = paths(svg, "line raw c1"), paths(svg, "line c1")
    for path in (raw, strong):
        assert len(places(path)) == 48
        assert [letter for letter in path if letter in "ML"].count("M") == 2
    xs = [x for x, _ in places(raw)]
    assert xs == sorted(xs)
    assert xs[0] > 0
    assert xs[-1] < WIDTH


def test_values_are_at_their_ticks():
    svg = chart(Series("a", ((0.0, 0.0), (10.0, 100.0))), smoothed=False)
    (x0, y0), (x1, y1) = places(paths(svg, "line c1")[0])
    labels = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">([^<]*)<', svg)
    left = {text: float(y) - 3.5 for _, y, anchor, text in labels if anchor == "end"}
    below = {text: float(x) for x, _, anchor, text in labels if anchor == "middle"}
    assert (left["0"], left["100"]) == (y0, y1)
    assert (below["0"], below["10"]) == (x0, x1)
    assert y1 < y0 < HEIGHT


def test_points_are_marked_and_named_where_not_smoothed():
    svg = chart(Series("a", ((1.0, 2.0), (2.0, None), (3.0, 4.0))), smoothed=False)
    assert svg.count("<circle") == 2
    titles = re.findall("<title>(.*?)</title>", svg, re.S)
    assert titles == ["step 1\na: 2", "step 2\na: no value", "step 3\na: 4"]


def test_a_band_encloses_its_line():
    points = tuple((float(x), 5.0) for x in range(4))
    svg = chart(Series("a", points, band=((1.0, 9.0),) * 4))
    outline = places(paths(svg, "band c1")[0])
    assert len(outline) == 8
    line = places(paths(svg, "line raw c1")[0])[0][1]
    assert outline[0][1] < line < outline[-1][1]
    assert "a: 5 (1 to 9)" in svg


@pytest.mark.parametrize("points", [((3.0, 1.0),), ((1.0, 0.0), (2.0, 0.0)), ((1.0, 1e-12),)])
def test_one_point_and_flat_lines_are_drawn(points):
    assert len(places(paths(chart(Series("a", points)), "line c1")[0])) == len(points)


@given(VALUES, VALUES, st.integers(2, 8))
def test_ticks_are_round_even_and_cover(a, b, most):
    low, high = sorted((a, b))
    around = ticks(low, high, most, outside=True)
    slack = 1e-6 * (high - low)
    assert around[0] <= low + slack
    assert around[-1] >= high - slack
    assert 2 <= len(around) <= most + 2
    inside = ticks(low, high, most)
    assert len(inside) <= most + 1
    steps = [y - x for x, y in itertools.pairwise(around)]
    assert min(steps) > 0
    assert max(steps) == pytest.approx(min(steps), rel=1e-3)


def test_ticks_of_known_ranges():
    assert ticks(0, 1, 5, outside=True) == (0, 0.2, 0.4, 0.6, 0.8, 1)
    assert ticks(3, 97, 5, outside=True) == (0, 20, 40, 60, 80, 100)
    assert ticks(1, 400, 5) == (100, 200, 300, 400)


def test_smoothing_is_the_mean_of_a_window_without_gaps():
    points = [(float(x), float(x % 2)) for x in range(100)]
    points[50] = (50.0, None)
    out = smooth(points)
    assert out[50][1] is None
    assert out[20][1] == pytest.approx(4 / 7)  # 17 to 23, of which four are odd.
    assert out[49][1] == pytest.approx(3 / 6)
    assert out[0][1] == pytest.approx(2 / 4)


@given(st.lists(st.none() | VALUES, min_size=1, max_size=50), st.integers(1, 60))
def test_thinning_keeps_the_number_and_the_mean(values, most):
    points = [(float(i), v) for i, v in enumerate(values)]
    out = thin(points, most)
    assert len(out) <= most
    if most >= len(points):
        assert out == points
    assert [x for x, _ in out] == sorted({x for x, _ in out})
    if most == 1 and (seen := [v for v in values if v is not None]):
        assert out[0][1] == pytest.approx(sum(seen) / len(seen), abs=1e-3)


def test_areas_stack_to_the_whole():
    layers = {"easy": [0.5, 0.25, 0.0], "hard": [0.5, 0.75, 1.0]}
    svg = stacked_area([1, 2, 3], layers, x_label="step", y_label="share")
    easy, hard = (places(paths(svg, f"area c{colour}")[0]) for colour in (1, 2))
    assert len(easy) == len(hard) == 6
    assert easy[:3] == hard[:2:-1]  # The upper layer stands on the lower one.
    assert len({y for _, y in hard[:3]}) == 1
    assert "step 2\neasy: 25%\nhard: 75%" in svg


def test_a_histogram_has_a_bar_for_each_count():
    bars = [("0", {"hard": 30}), ("0.5", {"hard": 10, "easy": 5}), ("1", {"easy": 0})]
    svg = histogram(bars, ["easy", "hard"], x_label="pass rate")
    found = re.findall(r'class="area c(\d)".*? y="([\d.]+)".*? height="([\d.]+)"', svg)
    assert [colour for colour, _, _ in found] == ["2", "1", "2"]
    (top, hard), (easy_top, easy), (above, few) = ((float(y), float(h)) for _, y, h in found)
    assert hard == pytest.approx(3 * few, abs=0.2)
    assert easy_top + easy == pytest.approx(top + hard, abs=0.2)  # On the same floor.
    assert above + few == pytest.approx(easy_top, abs=0.2)  # One on the other.
    assert "pass rate 0\n30 hard" in svg


def test_paired_bars_are_as_wide_as_their_percentages():
    svg = paired_bars({"SFT": 40.0, "GRPO": 62.5})
    assert re.findall(r'class="area c(\d)".*?width="([\d.]+)%"', svg) == [
        ("1", "40.0"),
        ("2", "62.5"),
    ]


def test_names_are_escaped():
    svg = chart(Series("<i>", ((1.0, 2.0),)))
    assert "<i>" not in svg
    assert "&lt;i&gt;: 2" in svg


@pytest.mark.parametrize(
    ("value", "text"),
    [(12500, "12,500"), (0.25, "0.25"), (-0.0, "-0"), (3e-5, "3e-05"), (999, "999")],
)
def test_numbers_are_short(value, text):
    assert number(value) == text
