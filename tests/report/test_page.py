import tomllib
from html.parser import HTMLParser
from pathlib import Path

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

import morer1_jax.report
from morer1_jax.report.page import render

ROOT = Path(__file__).parents[2]


def page(anchor="a", title="t", body="", problem=None):
    section = {"anchor": anchor, "title": title, "body": body, "problem": problem}
    return render(
        "page.html",
        title=title,
        problems=[],
        tiles=[],
        filled=lambda *_: "",
        data="",
        stages="",
        config="",
        sections=[section],
    )


@given(st.text(st.characters(codec="utf-8", exclude_characters="\r\x00")))
def test_any_text_comes_back_as_text_and_as_attribute(text):
    elements, words = [], []

    class Reader(HTMLParser):
        def handle_starttag(self, name, attributes):
            elements.append((name, dict(attributes)))

        def handle_data(self, data):
            words.append((elements[-1][0] if elements else "", data))

    reader = Reader()
    reader.feed(page(anchor=text, problem=f"<{text}>"))
    reader.close()
    assert ("section", {"id": text}) in elements
    assert "".join(data for name, data in words if name == "p").count(f"<{text}>") == 1


def test_markup_stays_and_text_is_escaped():
    assert "<b>" in page(body=Markup("<b>"))
    assert "&lt;b&gt;" in page(body="<b>")


def test_a_value_that_a_template_lacks_is_an_error():
    with pytest.raises(jinja2.UndefinedError, match="charts"):
        render("curriculum.html")


def test_a_page_forbids_scripts_and_loading():
    text = page(title="<title>")
    assert text.startswith("<!DOCTYPE html>")
    assert "<title>&lt;title&gt;</title>" in text
    assert "default-src 'none'" in text


def test_templates_ship_with_the_package():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folder = Path(morer1_jax.report.__file__).parent
    shipped = {path for g in setup["package-data"]["morer1_jax.report"] for path in folder.glob(g)}
    files = {
        path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    assert {path for path in files if path.suffix != ".py"} == shipped
    assert shipped
