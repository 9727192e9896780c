"""The report's gallery: what the final model said about some test facts, beside their photos."""

from __future__ import annotations

import base64
import io
import itertools
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from morer1_jax.data.images import ImageReader
from morer1_jax.errors import DataError
from morer1_jax.files import read_text
from morer1_jax.report.page import Html, escape, join, remark, tag
from morer1_jax.run.batch_sampler import Answer
from morer1_jax.task.answer import read_steps
from morer1_jax.task.fact import Fact

# Largest sides, in pixels, of what is embedded.
_PHOTO, _CROP = 360, 200
# The height in CSS pixels that a card's images do not exceed.
_TALLEST = 260
# A completion without steps is shown up to this length.
_MOST_TEXT = 2000

Pair = tuple[Fact, Answer]


def read_answers(path: Path, facts: Sequence[Fact]) -> list[Pair]:
    """Reads what `stages.evaluate.write_scores` wrote, each answer with its fact.

    Raises:
      DataError: naming file and line: a line is not an answer, or not one to any of the facts.
    """
    known = {fact.id: fact for fact in facts}
    try:
        lines = read_text(path).split("\n")
    except (OSError, DataError):
        raise DataError(f"{path}: no answers there; run the stage `evaluate` first") from None
    pairs = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            answer = Answer(**json.loads(line))
            if not isinstance(answer.text, str) or not isinstance(answer.label, str | None):
                raise TypeError
        except (ValueError, TypeError):
            raise DataError(
                f"{path}:{number}: {line[:80]!r} found, an answer "
                '{"fact": …, "label": …, "text": …, "format": …, "effort": …} expected'
            ) from None
        if answer.fact not in known:
            raise DataError(
                f"{path}:{number}: fact {answer.fact!r} is not in the test split; "
                "evaluate again on this dataset"
            )
        pairs.append((known[answer.fact], answer))
    return pairs


def is_right(pair: Pair) -> bool:
    """Whether the predicted label is the gold one."""
    return pair[1].label == pair[0].label


def choose(pairs: Sequence[Pair], count: int, seed: int) -> list[Pair]:
    """At most `count` pairs, right and wrong ones by turns, each spread evenly over gold labels.

    Half are right; where there are too few of one kind, the other fills up. The choice depends on
    the pairs and the seed alone.
    """
    rng = random.Random(seed)
    right = _spread([pair for pair in pairs if is_right(pair)], rng)
    wrong = _spread([pair for pair in pairs if not is_right(pair)], rng)
    rights = min(len(right), max(count // 2, count - len(wrong)))
    turns = itertools.zip_longest(wrong[: count - rights], right[:rights])
    return [pair for turn in turns for pair in turn if pair is not None]


def show(pairs: Sequence[Pair], images: ImageReader) -> Html:
    """The gallery: a choice of right ones, wrong ones or all, and a card for each pair."""
    rights = sum(map(is_right, pairs))
    choices = [
        ("all", f"All ({len(pairs)})"),
        ("only-right", f"✓ Right ({rights})"),
        ("only-wrong", f"✗ Wrong ({len(pairs) - rights})"),
    ]
    controls = [
        part
        for name, text in choices
        for part in (
            tag("input", type="radio", name="shown", id=name, checked=name == "all"),
            tag("label", text, for_=name),
        )
    ]
    cards = tag("div", *(_card(pair, images) for pair in pairs), class_="cards")
    return tag("div", *controls, cards, class_="gallery")


def _spread(pairs: Sequence[Pair], rng: random.Random) -> list[Pair]:
    """In a random order that takes from each gold label by turns."""
    by_label = defaultdict(list)
    for pair in pairs:
        by_label[pair[0].label].append(pair)
    groups = [by_label[label] for label in sorted(by_label)]
    rng.shuffle(groups)
    for group in groups:
        rng.shuffle(group)
    return [pair for turn in itertools.zip_longest(*groups) for pair in turn if pair is not None]


def _card(pair: Pair, images: ImageReader) -> Html:
    fact, answer = pair
    right = is_right(pair)
    verdict = "✓ Right" if right else "✗ Wrong" if answer.label else "✗ Wrong: unreadable"
    start, end = fact.entity_span
    title = [
        join(fact.tokens[:start], " "),
        tag("mark", fact.entity_text, title="the asked entity"),
        join(fact.tokens[end:], " "),
    ]
    return tag(
        "article",
        tag("header", tag("b", verdict), tag("span", fact.id)),
        _images(fact, images),
        tag("p", join(title, " "), class_="title"),
        tag(
            "dl",
            tag("dt", "gold"),
            tag("dd", tag("code", fact.label)),
            tag("dt", "predicted"),
            tag("dd", tag("code", answer.label) if answer.label else "no label could be read"),
        ),
        _reasoning(answer),
        class_="card right" if right else "card wrong",
    )


def _images(fact: Fact, images: ImageReader) -> Html:
    try:
        photo, crop = images.pair(fact)
    except DataError as error:
        return remark(error)
    x, y, width, height = fact.box
    place = {"x": x - width / 2, "y": y - height / 2, "width": width, "height": height}
    box = tag(
        "svg",
        tag("rect", class_="outer", **place),
        tag("rect", class_="inner", **place),
        viewBox="0 0 1 1",
        preserveAspectRatio="none",
    )
    shapes = [image.width / image.height for image in (photo, crop)]
    parts = [
        tag("div", _embed(photo, _PHOTO, "the photo"), box, style=f"flex:{shapes[0]:.4f}"),
        tag("div", _embed(crop, _CROP, "the object"), style=f"flex:{shapes[1]:.4f}"),
    ]
    return tag("div", *parts, class_="images", style=f"max-width:{round(sum(shapes) * _TALLEST)}px")


def _embed(image: Image.Image, side: int, alt: str) -> Html:
    image = image.copy()
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode()
    size = {"width": image.width, "height": image.height}
    return tag("img", src=f"data:image/jpeg;base64,{data}", alt=alt, **size)


def _reasoning(answer: Answer) -> Html:
    text = answer.text.removesuffix("<|im_end|>")
    steps = read_steps(text.encode("utf-8", "replace"))
    if steps is not None:
        body = tag("ol", *(tag("li", step) for step in steps))
        return tag("details", tag("summary", "Reasoning"), body, open=True)
    if not text.strip():
        return remark("The model said nothing.")
    cut = "…" if len(text) > _MOST_TEXT else ""
    body = tag("pre", escape(text[:_MOST_TEXT] + cut))
    return tag("details", tag("summary", "What it said, not in six steps"), body, open=True)
