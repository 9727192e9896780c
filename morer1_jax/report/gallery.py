"""The report's gallery: what the final model answered on test facts, beside their photos."""

from __future__ import annotations

import base64
import io
import itertools
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etils import epath
from markupsafe import Markup
from PIL import Image

from morer1_jax.data.images import ImageReader
from morer1_jax.data.source import open_source
from morer1_jax.errors import DataError
from morer1_jax.files import read_jsonl
from morer1_jax.model.config import ImageConfig
from morer1_jax.report.page import render
from morer1_jax.report.tables import FINAL, NAMES, name_of
from morer1_jax.run.batch_sampler import Answer
from morer1_jax.task.answer import read_steps
from morer1_jax.task.fact import Fact

_ANSWERS = ".answers.jsonl"
_ANSWER = 'an answer {"fact": …, "label": …, "text": …, "format": …, "effort": …}'
_REMEDY = "evaluate again on this dataset"
# Largest sides, in pixels, of the embedded images.
_PHOTO, _CROP = 360, 200
# The height in CSS pixels that a card's images do not exceed.
_MAX_HEIGHT = 260
# A completion that is not in six steps is shown up to this many characters.
_MAX_TEXT = 2000

Pair = tuple[Fact, Answer]


def gallery_section(
    workdir: Path, data: epath.Path, split: str, images: ImageConfig, count: int, seed: int
) -> Markup:
    """Returns cards of the final model's answers, right and wrong ones.

    Args:
        workdir: the run's, with the answers in its `eval/`.
        split: the answers'.
        count: maximum number of cards.
        seed: of their choice.

    Raises:
        DataError: there are no answers of a trained model, or they or the dataset cannot be read.
    """
    files = {p.name.removesuffix(_ANSWERS): p for p in (workdir / "eval").glob(f"*{_ANSWERS}")}
    # The answers of the model that the run trained last; without one, of a system that is not ours.
    candidates = (*FINAL, *sorted(files.keys() - NAMES))
    system = next((name for name in candidates if name in files), None)
    if system is None:
        raise DataError("No answers of a trained model in this workdir; run the stage `evaluate`.")
    # Its cards.
    source = open_source(data)
    pairs = read_answers(files[system], source.facts(split))
    reader = ImageReader(source, images)
    return render(
        "gallery.html",
        system=name_of(system),
        split=split,
        answers=len(pairs),
        rights=sum(map(is_right, pairs)),
        cards=[_card(pair, reader) for pair in choose(pairs, count, seed)],
        max_height=_MAX_HEIGHT,
    )


def read_answers(path: Path, facts: Sequence[Fact]) -> list[Pair]:
    """Reads what `stages.evaluate.write_scores` wrote, each answer with its fact.

    Raises:
        DataError: the file cannot be read, a line is not an answer, or its fact is not in `facts`.
    """
    by_id = {fact.id: fact for fact in facts}

    def parse(_: int, value: dict[str, Any]) -> Pair:
        answer = Answer(**value)
        if not isinstance(answer.text, str) or not isinstance(answer.label, str | None):
            raise TypeError
        if answer.fact not in by_id:
            raise DataError(f"expected a fact of the split, found {answer.fact!r}; {_REMEDY}")
        return by_id[answer.fact], answer

    return read_jsonl(path, parse, _ANSWER, _REMEDY, skip_blank=True)


def is_right(pair: Pair) -> bool:
    """Returns whether the predicted label is the gold one."""
    return pair[1].label == pair[0].label


def choose(pairs: Sequence[Pair], count: int, seed: int) -> list[Pair]:
    """Returns at most `count` pairs, right and wrong in turn, each spread evenly over gold labels.

    Half are right; where there are too few of one kind, the other fills up. The choice depends on
    the pairs and the seed alone.
    """
    rng = random.Random(seed)
    right = _spread([pair for pair in pairs if is_right(pair)], rng)
    wrong = _spread([pair for pair in pairs if not is_right(pair)], rng)
    rights = min(len(right), max(count // 2, count - len(wrong)))
    return _interleave([wrong[: count - rights], right[:rights]])


def _spread(pairs: Sequence[Pair], rng: random.Random) -> list[Pair]:
    """Returns the pairs in a random order that takes from each gold label in turn."""
    by_label = defaultdict(list)
    for pair in pairs:
        by_label[pair[0].label].append(pair)
    groups = [by_label[label] for label in sorted(by_label)]
    rng.shuffle(groups)
    for group in groups:
        rng.shuffle(group)
    return _interleave(groups)


def _interleave(groups: Sequence[Sequence[Pair]]) -> list[Pair]:
    """Returns the first of each group, the second of each, and so on."""
    return [pair for turn in itertools.zip_longest(*groups) for pair in turn if pair is not None]


def _card(pair: Pair, images: ImageReader) -> dict[str, Any]:
    """Returns what the template shows of a pair; `problem` in place of images if there are none."""
    fact, answer = pair
    text = answer.text.removesuffix("<|im_end|>")
    card = {
        "fact": fact,
        "right": is_right(pair),
        "predicted": answer.label,
        "steps": read_steps(text.encode("utf-8", "replace")),
        "text": text[:_MAX_TEXT] + "…" * (len(text) > _MAX_TEXT) if text.strip() else "",
    }
    try:
        photo, crop = images.pair(fact)
    except DataError as error:
        return card | {"pictures": (), "problem": error}
    x, y, width, height = fact.box
    box = {"x": x - width / 2, "y": y - height / 2, "width": width, "height": height}
    pictures = [_picture(photo, _PHOTO, "the photo"), _picture(crop, _CROP, "the object")]
    return card | {"pictures": pictures, "box": box}


def _picture(image: Image.Image, max_side: int, alt: str) -> dict[str, Any]:
    """Returns a small JPEG in base64, its size, and the width over the height of the original."""
    small = image.copy()
    small.thumbnail((max_side, max_side))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return {
        "data": base64.b64encode(buffer.getvalue()).decode(),
        "width": small.width,
        "height": small.height,
        "aspect": image.width / image.height,
        "alt": alt,
    }
