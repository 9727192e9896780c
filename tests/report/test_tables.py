import re

import pytest

from morer1_jax.errors import DataError
from morer1_jax.report.tables import decimals, get, number_in, score_section
from morer1_jax.task import metrics
from morer1_jax.task.fact import Fact
from morer1_jax.task.ontology import Ontology

ONTOLOGY = Ontology(("none", "/per/org/a", "/per/per/b", "/loc/loc/c"))


def facts():
    """Two objects and one entity in one photo, one of each in another."""
    box = (0.5, 0.5, 0.2, 0.2)
    rows = [("[OBJ0]", "1.jpg", "/per/org/a"), ("[OBJ1]", "1.jpg", "none")]
    rows += [("[OBJ0]", "2.jpg", "/per/per/b")]
    return [
        Fact(f"test:{i}", ("A",), "A", (0, 1), name, box, image, label)
        for i, (name, image, label) in enumerate(rows, start=1)
    ]


def section(**predictions):
    return score_section({k: metrics.score(facts(), v, ONTOLOGY) for k, v in predictions.items()})


def rows(html, heading):
    """The rows under a heading, cells as text."""
    part = str(html).partition(heading)[2].partition("</table>")[0].partition("<tbody>")[2]
    cells = [re.findall("<t[hd].*?</t[hd]>", row, re.DOTALL) for row in part.split("</tr>")[:-1]]
    return [[re.sub(r"<.*?>|\s*\n\s*", "", cell) for cell in row] for row in cells]


GOLD = ("/per/org/a", "none", "/per/per/b")
HALF = ("/per/org/a", None, "none")


def test_the_best_of_each_column_is_bold():
    html = section(sft=HALF, grpo=GOLD)
    table = str(html).partition("</table>")[0]
    assert re.findall("<b>(.*?)</b>", table) == ["100.0"] * 6
    assert rows(html, "<caption>")[0] == [
        "SFT",
        "33.3",
        "50.0",
        "50.0",
        "50.0",
        "50.0",
        "33.3",
        "66.7",
    ]


def test_the_breakdown_leaves_empty_cells_open():
    html = section(majority=GOLD, sft=HALF)
    assert rows(html, "By the number of entities") == [
        ["1 entity, 1 object", "1", "0.0", "0.0", "0.0"],
        ["1 entity, several objects", "2", "50.0", "50.0", "66.7"],
        ["several entities, 1 object", "0", "–", "–", "–"],
        ["several entities, several objects", "0", "–", "–", "–"],
    ]


def test_pairs_with_several_objects_have_their_table():
    html = section(majority=GOLD, sft=HALF)
    assert rows(html, "Pairs with several objects") == [
        ["Majority label", "100.0", "100.0", "100.0"],
        ["SFT", "50.0", "100.0", "66.7"],
    ]


def test_labels_are_compared_where_they_have_facts():
    html = section(sft=HALF, grpo=GOLD)
    assert rows(html, "F1 of each label") == [
        ["/per/org/a", "SFT: 100.0GRPO: 100.0", "100.0", "100.0", "1"],
        ["/per/per/b", "SFT: 0.0GRPO: 100.0", "0.0", "100.0", "1"],
        ["none", "SFT: 0.0GRPO: 100.0", "0.0", "100.0", "1"],
    ]
    assert "Left out, without test facts: 1 of 4 labels." in html


def test_bars_are_as_wide_as_their_percentages():
    per_label = {"none": {"f1": 40.0, "support": 9}}
    better = {"none": {"f1": 62.5, "support": 9}}
    html = score_section({"sft": {"per_label": per_label}, "grpo": {"per_label": better}})
    assert re.findall(r'class="area c(\d)".*?width="([\d.]+)%"', html) == [
        ("1", "40.0"),
        ("2", "62.5"),
    ]


def test_labels_with_more_facts_come_first():
    support = {"/per/org/a": 3, "none": 9, "/per/per/b": 4}
    per_label = {label: {"f1": 50.0, "support": n} for label, n in support.items()}
    found = rows(score_section({"sft": {"per_label": per_label}}), "F1 of each label")
    assert [row[0] for row in found] == ["none", "/per/per/b", "/per/org/a"]


def test_scores_that_lack_parts_are_shown_as_far_as_they_go():
    html = score_section({"odd": {"micro_f1": 3, "accuracy": "high", "macro_f1": float("nan")}})
    assert rows(html, "<caption>")[0] == ["odd", "–", "–", "–", "3.0", "–", "–", "–"]
    assert html.count("No scores of a trained model") == 2
    assert "No test facts of pairs" in html


def test_no_scores_are_an_error():
    with pytest.raises(DataError, match="No scores"):
        score_section({})


def test_looking_up():
    assert get({"a": {"b": 1}}, "a.b") == 1
    assert get({"a": 3}, "a.b") is None
    assert number_in({"a": "1"}, "a") is None
    assert decimals(None) == "–"
