import itertools
import re

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from morer1_jax.report.charts import histogram, line_chart, number, smooth, stacked_area, thin

VALUES = st.floats(-1e9, 1e9, allow_subnormal=False)
NAN = float("nan")


def paths(chart, colour, **style):
    """The points of each path of a colour whose style has all that is given."""
    svg = chart.drawing
    shared = dict(re.findall(r'<path id="(\w+)" d="([^"]*)"', svg))
    drawn = [(d, 0, 0, look) for d, look in re.findall(r'<path d="([^"]*)" style="([^"]*)"', svg)]
    used = re.findall(r'<use xlink:href="#(\w+)" x="([^"]*)" y="([^"]*)" style="([^"]*)"', svg)
    drawn += [(shared[id_], float(x), float(y), look) for id_, x, y, look in used]
    parts = [f"var(--c{colour})", *(f"{k.replace('_', '-')}: {v}" for k, v in style.items())]
    return [
        [(float(x) + dx, float(y) + dy) for x, y in re.findall(r"[ML] ([\d.-]+) ([\d.-]+)", d)]
        for d, dx, dy, look in drawn
        if all(part in look for part in parts)
    ]


def lines(values, steps=None, smoothed=True, **options):
    steps = np.arange(len(values)) if steps is None else steps
    return line_chart(
        "t", np.array(steps, float), {"a": np.array(values)}, unit="y", smoothed=smoothed, **options
    )


def test_a_line_has_a_point_for_each_value_and_breaks_at_gaps():
    chart = lines([NAN if x in (3, 4) else (x * x) % 7 for x in range(50)])
    (raw,) = paths(chart, 1, stroke_opacity="0.33")
    (strong,) = paths(chart, 1, stroke_width="1.8")
    for path in (raw, strong):
        assert len(path) == 48
    xs = [x for x, _ in raw]
    assert xs == sorted(xs)
    assert (xs[0], xs[-1]) == (44, 344)
    assert [d.count("M") for d in re.findall(r' d="(M [^"]*L [^"]*)"', chart.drawing)][-2:] == [
        2,
        2,
    ]


def test_values_are_at_their_ticks():
    chart = lines([0.0, 100.0], [0, 10], smoothed=False)
    (x0, y0), (x1, y1) = paths(chart, 1, fill="none")[0]
    labels = re.findall(
        r'text-anchor: (\w+).*? x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]*)<', chart.drawing
    )
    left = {text: float(y) for anchor, _, y, text in labels if anchor == "end"}
    below = {text: float(x) for anchor, x, _, text in labels if anchor == "middle"}
    assert list(left)[:-1] == ["0", "20", "40", "60", "80", "100"]
    assert left["0"] - left["100"] == pytest.approx(y0 - y1, abs=0.02)
    assert left["0"] == pytest.approx(y0, abs=5)
    assert (below["0"], below["10"]) == (x0, x1)


def test_the_page_gives_colours_fonts_and_names():
    band = np.array([0.5, 1.5, 2.5]), np.array([1.5, 2.5, 3.5])
    chart = lines([1.0, 2.0, 3.0], smoothed=False, band=band)
    shares = {"easy": np.array([0.5, 0.25, 0.0]), "hard": np.array([0.5, 0.75, 1.0])}
    for drawing in (chart.drawing, stacked_area("t", np.arange(3.0), shares, unit="").drawing):
        assert re.findall(r"#\w{6}\b(?!\w|\")", drawing) == []
        assert not re.search(r"font-family|<style|clip-path|xmlns|https?:|<\?xml", drawing)
        markers = set(re.findall(r' id="([^"]*)"', drawing))
        assert markers == set(re.findall(r'xlink:href="#([^"]*)"', drawing))
        for variable in ("--c1", "--line", "--muted"):
            assert f"var({variable})" in drawing


def test_points_are_marked_and_named_where_not_smoothed():
    chart = lines([2.0, NAN, 4.0], [1, 2, 3], smoothed=False)
    assert len(re.findall(r"<use [^>]*var\(--c1\)", chart.drawing)) == 2
    assert [hit.text for hit in chart.hits] == [
        "step 1\na: 2",
        "step 2\na: no value",
        "step 3\na: 4",
    ]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 400))
def test_hits_meet_and_cover_the_chart(count):
    hits = stacked_area("t", np.arange(count), {"a": np.ones(count)}, unit="").hits
    assert len(hits) <= 90
    assert hits[0].left == 44
    assert hits[-1].left + hits[-1].width == pytest.approx(344)
    for one, following in itertools.pairwise(hits):
        assert one.left + one.width == pytest.approx(following.left, abs=0.11)


def test_a_band_encloses_its_line():
    chart = lines([5.0] * 4, band=(np.full(4, 1.0), np.full(4, 9.0)))
    (outline,) = paths(chart, 1, fill_opacity="0.14")
    levels = {y for _, y in outline}
    assert chart.hits[0].text == "step 0\na: 5 (1 to 9)"
    assert len(levels) == 2
    (line,) = paths(chart, 1, stroke_width="1.8")
    assert min(levels) < line[0][1] < max(levels)


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [1e-12], [2e6, 2e6]])
def test_one_point_and_flat_lines_are_drawn_between_ticks(values):
    chart = lines(values, smoothed=False)
    assert len(re.findall(r"<use [^>]*var\(--c1\)", chart.drawing)) == len(values)
    assert len(set(re.findall(r"text-anchor: end[^>]*>([^<]*)<", chart.drawing))) > 3


@settings(max_examples=30, deadline=None)
@given(VALUES, VALUES)
def test_lines_stay_inside_their_chart(a, b):
    (path,) = paths(lines([a, b]), 1, stroke_width="1.8")
    assert all(44 <= x <= 344 and 24 <= y <= 168 for x, y in path)


def test_smoothing_is_the_mean_of_a_window_without_gaps():
    values = np.arange(100.0) % 2
    values[50] = NAN
    out = smooth(values)
    assert np.isnan(out[50])
    assert out[20] == pytest.approx(4 / 7)  # 17 to 23, of which four are odd.
    assert out[49] == pytest.approx(3 / 6)
    assert out[0] == pytest.approx(2 / 4)


@given(st.lists(st.just(NAN) | VALUES, min_size=1, max_size=50), st.integers(1, 60))
def test_thinning_keeps_the_number_and_the_mean(values, most):
    out = thin(np.array(values), most)
    assert len(out) <= most
    if most >= len(values):
        np.testing.assert_array_equal(out, values)
    if most == 1 and not np.isnan(values).all():
        assert out[0] == pytest.approx(np.nanmean(values), abs=1e-3)
    if np.isnan(values).all():
        assert np.isnan(out).all()


def test_areas_stack_to_the_whole():
    layers = {"easy": np.array([0.5, 0.25, 0.0]), "hard": np.array([0.5, 0.75, 1.0])}
    chart = stacked_area("t", np.array([1, 2, 3]), layers, unit="share")
    easy, hard = (set(paths(chart, colour)[0]) for colour in (1, 2))
    boundary = {(44, 96), (194, 132), (344, 168)}
    assert easy == boundary | {(44, 168), (194, 168)}
    assert hard == boundary | {(44, 24), (194, 24), (344, 24)}
    assert chart.hits[1].text == "step 2\neasy: 25%\nhard: 75%"
    assert chart.names == ("easy", "hard")


def test_a_histogram_has_a_bar_for_each_count():
    counts = {"easy": np.array([0, 5, 0]), "hard": np.array([30, 10, 0])}
    chart = histogram("t", ["0", "0.5", "1"], counts, x_label="pass rate", unit="facts")
    (_, easy, _), (hard, above, _) = (
        [sorted({y for _, y in path}) for path in paths(chart, colour)] for colour in (1, 2)
    )
    height = 144 / 30
    assert hard == pytest.approx([24, 168], abs=0.02)
    assert easy == pytest.approx([168 - 5 * height, 168], abs=0.02)
    assert above == pytest.approx([168 - 15 * height, 168 - 5 * height], abs=0.02)
    shown = [hit.text for hit in chart.hits]
    assert shown == ["pass rate 0\n30 hard", "pass rate 0.5\n5 easy\n10 hard", "pass rate 1"]


def test_settings_of_the_machine_change_nothing():
    chart = lines([1.0, 2.0, 3.0])
    odd = {"savefig.bbox": "tight", "xtick.major.pad": 20, "lines.marker": "x", "svg.hashsalt": "a"}
    with matplotlib.rc_context(odd):
        assert lines([1.0, 2.0, 3.0]) == chart
        assert matplotlib.rcParams["svg.hashsalt"] == "a"


def test_names_are_escaped():
    chart = line_chart("t", np.ones(1), {"a": np.ones(1)}, unit="<i>", smoothed=True)
    assert "<i>" not in chart.drawing
    assert "&lt;i&gt;" in chart.drawing


@pytest.mark.parametrize(
    ("value", "text"),
    [(12500, "12,500"), (0.25, "0.25"), (-0.0, "-0"), (3e-5, "3e-05"), (999, "999")],
)
def test_numbers_are_short(value, text):
    assert number(value) == text
