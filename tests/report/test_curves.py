import json
import re

import pytest

from morer1_jax.data.ratings import Rating, write_ratings
from morer1_jax.errors import DataError
from morer1_jax.report.curves import curriculum, learning_curves, pass_rates, read_metrics, shares
from morer1_jax.report.tables import NAMES


def metrics(tmp_path, *records, tail=""):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return read_metrics(path)


def record(step, stage="sft", kind="train", **values):
    return {"stage": stage, "step": step, "kind": kind, **values}


def curve(html, title):
    """The figure of a title: its legend, and the number of points of each line by its look."""
    figure = str(html).partition(f"<figcaption>{title}</figcaption>")[2].partition("</figure>")[0]
    lines = re.findall(
        r'<path d="([^"]*)" style="fill: none;[^"]*? stroke: var\(--(c.)\)([^"]*)"', figure
    )
    names = re.findall(r'<path class="line (c\d)" d="[^"]*"/></svg>([^<]*)<', figure)
    points = {
        f"{c} light" if "opacity" in look else c: len(path.split()) for path, c, look in lines
    }
    return names, {look: count // 2 for look, count in points.items()}


def test_records_are_sorted_by_stage_kind_and_step(tmp_path):
    found = metrics(
        tmp_path,
        record(2, loss=1.0),
        record(1, loss=2.0),
        record(1, kind="valid"),
        record(1, stage="grpo"),
        tail='3\n{"stage": "sft"}\n{"stage": "sf',
    )
    assert [r["step"] for r in found.get("sft")] == [1, 2]
    assert len(found.get("sft", "valid")) == len(found.get("grpo")) == 1
    assert found.get("control") == ()
    assert found.unreadable == 3


def test_a_line_has_every_step_and_a_gap_where_it_was_not_finite(tmp_path):
    odd = {5: None, 7: float("nan"), 9: "x", 11: float("inf")}
    records = [record(s, loss=odd.get(s, 1 / s), entropy=0.0) for s in range(1, 21)]
    html = learning_curves(metrics(tmp_path, *records), NAMES)
    assert curve(html, "Loss") == ([], {"c1 light": 16, "c1": 16})
    assert "Zero throughout: Entropy." in html
    assert "Not logged: Validation F1." in html


def test_long_series_are_drawn_as_means(tmp_path):
    records = [record(step, loss=1 / step) for step in range(1, 1802)]
    records[9]["loss"] = float("inf")
    html = learning_curves(metrics(tmp_path, *records), NAMES)
    assert 2 < curve(html, "Loss")[1]["c1"] <= 451
    assert "means of 4 logged steps" in html


def test_lines_and_legend_share_their_colours(tmp_path):
    scores = {"validation/micro_f1": 40.0, "validation/macro_f1": 30.0}
    valid = [record(s, kind="valid", **scores) for s in (10, 20)]
    better = record(30, kind="valid", **{"validation/micro_f1": 50.0, "validation/macro_f1": 1.0})
    same = record(40, kind="valid", **{"validation/micro_f1": 50.0, "validation/macro_f1": 2.0})
    html = learning_curves(metrics(tmp_path, record(1, loss=1.0), *valid, better, same), NAMES)
    names, points = curve(html, "Validation F1")
    assert names == [("c1", "micro F1"), ("c2", "macro F1")]
    assert points == {"c1": 4, "c2": 4}
    assert "Best micro F1 50.0 at step 30" in html


def test_other_trainings_are_shown_by_name(tmp_path):
    scores = {"validation/micro_f1": 40.0}
    stages = ("baselines/photo_hidden", "control", "odd")
    records = [record(1, stage=stage, kind="valid", **scores) for stage in stages]
    html = learning_curves(metrics(tmp_path, *records), NAMES)
    titles = re.findall("<figcaption>(.*?)<", html)
    assert titles == ["Photo hidden", "SFT for longer", "odd"]


def test_the_curriculum_needs_both_shares(tmp_path):
    values = {"curriculum/easy_share": 0.25, "curriculum/hard_share": 0.75}
    whole = [record(step, stage="grpo", **values) for step in (1, 2, 3)]
    assert "Hard facts: 75% of the first batch" in shares(metrics(tmp_path, *whole)).note
    del whole[1]["curriculum/easy_share"]
    with pytest.raises(DataError, match="No GRPO steps"):
        shares(metrics(tmp_path, *whole))


def test_a_chart_that_cannot_be_drawn_leaves_the_other(tmp_path):
    values = {"curriculum/easy_share": 0.25, "curriculum/hard_share": 0.75}
    logged = metrics(tmp_path, record(1, stage="grpo", **values))
    html = curriculum(logged, tmp_path / "ratings.jsonl")
    assert html.count("<figure>") == 1
    assert re.search('class="remark">.*ratings.jsonl: expected', html)
    write_ratings(tmp_path / "ratings.jsonl", [Rating("train:1", 0.5, "hard")])
    html = curriculum(metrics(tmp_path), tmp_path / "ratings.jsonl")
    assert html.count("<figure>") == 1
    assert "No GRPO steps with a curriculum" in html


def test_pass_rates_are_counted_by_pool():
    ratings = [
        Rating(f"train:{i}", (i % 5) / 4, "easy" if i % 5 > 1 else "hard") for i in range(50)
    ]
    chart = pass_rates(ratings)
    assert [hit.text for hit in chart.hits] == [
        "pass rate 0\n10 hard",
        "pass rate 0.25\n10 hard",
        "pass rate 0.5\n10 easy",
        "pass rate 0.75\n10 easy",
        "pass rate 1\n10 easy",
    ]
    assert chart.note == "50 facts: 30 easy, 20 hard."


def test_many_pass_rates_are_counted_in_tenths():
    chart = pass_rates([Rating(f"train:{i}", i / 32, "hard") for i in range(33)])
    counts = dict(
        re.fullmatch("pass rate (.*)\n(.*) hard", hit.text).groups() for hit in chart.hits
    )
    assert list(counts) == [f"{i / 10:.3g}" for i in range(11)]
    assert sum(map(int, counts.values())) == 33
