from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from morer1_jax.report.page import Html, escape, join, page, table, tag


@given(st.text(st.characters(codec="utf-8", exclude_characters="\r\x00")))
def test_any_text_comes_back_as_text_and_as_attribute(text):
    seen = []

    class Reader(HTMLParser):
        def handle_starttag(self, name, attributes):
            seen.append((name, attributes))

        def handle_data(self, data):
            seen.append(data)

    reader = Reader()
    reader.feed(tag("p", text, title=text))
    reader.close()
    assert seen[0] == ("p", [("title", text)])
    assert "".join(seen[1:]) == text


def test_markup_stays_and_text_is_escaped():
    assert escape(Html("<b>")) == "<b>"
    assert escape("<b>") == "&lt;b&gt;"
    assert tag("p", Html("<b>"), "<i>", 3) == "<p><b>&lt;i&gt;3</p>"
    assert join(["<", Html("<br>")], "&") == "&lt;&amp;<br>"


def test_attributes():
    assert tag("input", for_="x", stroke_width=2, checked=True, hidden=False, alt=None) == (
        '<input for="x" stroke-width="2" checked>'
    )


def test_a_table_names_its_rows_columns_and_groups():
    text = table(["A", "B"], [["r<", 1]], "caption", [("", 1), ("group", 1)])
    assert '<th scope="row">r&lt;</th><td>1</td>' in text
    assert '<tr class="groups"><th scope="colgroup" colspan="1"></th>' in text
    assert "<caption>caption</caption>" in text


def test_a_page_forbids_scripts_and_loading():
    text = page("<title>", tag("p", "x"))
    assert text.startswith("<!DOCTYPE html>")
    assert "<title>&lt;title&gt;</title>" in text
    assert "default-src &#x27;none&#x27;" in text
