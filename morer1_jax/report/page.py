"""HTML by construction: every text is escaped unless it was built here; and the page's frame.

The page loads nothing. Its content security policy forbids scripts and any source but the page
itself, so that even a mistake in escaping a title or a completion could not run or fetch anything.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

_VOID = ("img", "input", "meta")
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class Html(str):
    """Text that is markup already; any other `str` is escaped where it is put into a page."""


def escape(text: object) -> Html:
    """Markup that shows `text`; markup stays as it is."""
    return text if isinstance(text, Html) else Html(html.escape(str(text)))


def join(parts: Sequence[str], separator: str = "") -> Html:
    """The parts in a row, each escaped if it is not markup."""
    return Html(escape(separator).join(escape(part) for part in parts))


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """An element.

    Args:
      children: markup or text.
      attributes: `class_="a"` gives `class="a"`, `stroke_width=1` gives `stroke-width="1"`; True
        gives the bare name, and one that is None or False is left out.
    """
    words = [name]
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            words.append(key)
        elif value is not None and value is not False:
            words.append(f'{key}="{html.escape(str(value))}"')
    start = f"<{' '.join(words)}>"
    return Html(start if name in _VOID else f"{start}{join(children)}</{name}>")


def remark(text: object) -> Html:
    """One line in place of, or about, what could not be shown."""
    return tag("p", text, class_="remark")


def table(
    head: Sequence[object],
    rows: Sequence[Sequence[object]],
    caption: str = "",
    groups: Sequence[tuple[str, int]] = (),
) -> Html:
    """A table whose first column names the row and whose others hold numbers.

    Args:
      groups: headings above those of `head`, each with how many columns it spans.
    """
    body = [
        tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:]))
        for row in rows
    ]
    spans = (tag("th", text, scope="colgroup", colspan=n) for text, n in groups)
    above = tag("tr", *spans, class_="groups") if groups else ""
    return tag(
        "div",
        tag(
            "table",
            tag("caption", caption) if caption else "",
            tag("thead", above, tag("tr", *(tag("th", cell, scope="col") for cell in head))),
            tag("tbody", *body),
        ),
        class_="scroll",
        tabindex=0,
    )


def section(anchor: str, title: str, *body: object) -> Html:
    """A part of the page that the navigation leads to."""
    return tag("section", tag("h2", title), *body, id=anchor)


def page(title: str, *body: object) -> Html:
    """The whole document."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("title", title),
        tag("style", Html(_CSS)),
    )
    return Html(f"<!DOCTYPE html>\n{tag('html', head, tag('body', *body), lang='en')}\n")


# Series colours keep apart for colour-blind readers, and in lines also by their dashes.
_CSS = """
:root {
  color-scheme: light dark;
  --back: #fff; --card: #f6f7f9; --text: #1d2329; --muted: #5a6570; --line: #d5dae0;
  --c1: #0b66b0; --c2: #c45a00; --c3: #00806a; --c4: #7a4ea3; --mark: #ffe9a8;
  --right: #0b66b0; --wrong: #b3400a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #14181c; --card: #1d2328; --text: #e4e8ec; --muted: #9ba6b1; --line: #363f48;
    --c1: #6cb4f2; --c2: #f2a154; --c3: #4fc9b0; --c4: #c39be8; --mark: #5e4a12;
    --right: #6cb4f2; --wrong: #f58e5a;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 1180px; padding: 1.5rem 1.25rem 4rem; background: var(--back);
  color: var(--text); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .75rem; padding-bottom: .3rem;
  border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.75rem 0 .5rem; }
p { margin: .4rem 0; max-width: 75ch; }
a { color: var(--c1); }
code, pre { font: .86em/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; margin: .75rem 0 0; }
.remark, .note { color: var(--muted); font-size: .87rem; }
.remark { border-left: 3px solid var(--line); padding-left: .7rem; }
details { margin: .6rem 0; }
summary { cursor: pointer; color: var(--muted); }
details .charts { margin-top: .7rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.25rem 0 0; }
.tile { flex: 1 1 6.5rem; background: var(--card); border-radius: 6px; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.6rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tile span { display: block; color: var(--muted); font-size: .85rem; }
dl.run { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.25rem;
  margin: 1.25rem 0; font-size: .92rem; }
dl.run dt { color: var(--muted); }
dl.run dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--muted); font-size: .87rem; padding-bottom: .3rem; }
th, td { padding: .32rem .7rem; text-align: right; white-space: nowrap; }
th:first-child, .labels .name { text-align: left; padding-left: 0; }
thead th { color: var(--muted); font-weight: 500; vertical-align: bottom; white-space: normal;
  border-bottom: 1px solid var(--line); }
.groups th { border: 0; padding-bottom: 0; text-align: center; }
tbody th { font-weight: 500; }
tbody tr + tr > * { border-top: 1px solid color-mix(in srgb, var(--line) 50%, transparent); }
.scroll th:first-child { position: sticky; left: 0; background: var(--back); }
.labels { width: 100%; max-width: 60rem; }
.labels .bars { width: 55%; }
.labels svg { display: block; width: 100%; height: 18px; }
.charts { display: grid; gap: 1.25rem 1.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); }
figure { margin: 0; min-width: 0; max-width: 480px; }
figcaption { font-weight: 600; font-size: .92rem; }
.legend { display: flex; flex-wrap: wrap; gap: 0 .9rem; color: var(--muted); font-size: .83rem; }
.legend svg { width: 22px; height: 9px; margin-right: .3rem; }
figure > svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--muted); font-size: 11px; font-variant-numeric: tabular-nums; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
svg .band { opacity: .14; stroke: none; }
svg .area { stroke: none; fill-opacity: .85; }
svg .track { fill: var(--card); }
svg .hit { fill: transparent; }
svg .hit:hover { fill: var(--muted); fill-opacity: .18; }
.c1 { stroke: var(--c1); fill: var(--c1); }
.c2 { stroke: var(--c2); fill: var(--c2); }
.c3 { stroke: var(--c3); fill: var(--c3); }
.c4 { stroke: var(--c4); fill: var(--c4); }
svg .line.c2 { stroke-dasharray: 7 2.5; }
svg .line.c3 { stroke-dasharray: 2.5 2; }
svg .line.c4 { stroke-dasharray: 9 2 2 2; }
svg .line.raw { opacity: .33; stroke-width: 1; stroke-dasharray: none; }
.gallery > input { position: absolute; opacity: 0; }
.gallery > label { display: inline-block; padding: .25rem .9rem; margin: 0 .4rem .9rem 0;
  border: 1px solid var(--line); border-radius: 99px; cursor: pointer; font-size: .9rem; }
.gallery > input:checked + label { background: var(--text); color: var(--back);
  border-color: var(--text); }
.gallery > input:focus-visible + label { outline: 2px solid var(--c1); outline-offset: 2px; }
#only-right:checked ~ .cards .wrong, #only-wrong:checked ~ .cards .right { display: none; }
.cards { display: grid; gap: 1.1rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); }
.card { background: var(--card); border-radius: 6px; padding: .8rem .9rem .7rem;
  border-top: 4px solid var(--right); min-width: 0; overflow-wrap: anywhere; font-size: .9rem; }
.card.wrong { border-top-color: var(--wrong); }
.card header { display: flex; justify-content: space-between; gap: .5rem; margin-bottom: .5rem; }
.card header b { color: var(--right); }
.card.wrong header b { color: var(--wrong); }
.card header span { color: var(--muted); font-size: .83rem; }
.images { display: flex; gap: .4rem; align-items: flex-start; }
.images div { position: relative; min-width: 0; }
.images img { display: block; width: 100%; height: auto; border-radius: 3px; }
.images svg { position: absolute; inset: 0; width: 100%; height: 100%; }
.images rect { fill: none; vector-effect: non-scaling-stroke; }
.images .outer { stroke: #fff; stroke-width: 4.5; }
.images .inner { stroke: #d0006f; stroke-width: 2.2; }
.card .title { margin: .6rem 0; font-weight: 500; }
mark { background: var(--mark); color: inherit; border-radius: 2px; padding: 0 .15em; }
.card dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 .7rem; margin: .5rem 0; }
.card dt { color: var(--muted); }
.card dd { margin: 0; }
.card ol { margin: .3rem 0 0; padding-left: 1.3rem; }
.card li::marker { color: var(--muted); }
.card pre { margin: .3rem 0 0; }
@media (max-width: 620px) {
  body { padding: 1rem .9rem 3rem; }
  dl.run { grid-template-columns: 1fr; gap: 0; }
  dl.run dd { margin-bottom: .45rem; }
  table { font-size: .85rem; }
  th, td { padding: .32rem .4rem; }
  .scroll th:first-child { white-space: normal; min-width: 6.5rem; padding-right: .6rem; }
  .labels thead { display: none; }
  .labels tr { display: grid; grid-template-columns: 1fr 3.2rem 3.2rem 3rem; padding: .3rem 0; }
  .labels .name { grid-column: 1 / -1; }
  .labels tr > * { border: 0 !important; padding: 0; }
  .labels .bars { width: auto; }
}
"""
