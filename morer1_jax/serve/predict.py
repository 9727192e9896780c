"""Answers questions about photos that belong to no dataset."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from morer1_jax.errors import DataError
from morer1_jax.files import read_jsonl
from morer1_jax.run.batch_sampler import Answer
from morer1_jax.serve.loaded import LoadedModel
from morer1_jax.task import more
from morer1_jax.task.answer import read_steps
from morer1_jax.task.fact import Fact, composed
from morer1_jax.task.fields import is_text
from morer1_jax.task.ontology import NONE
from morer1_jax.task.photo import open_photo
from morer1_jax.task.photos import PhotoFiles, photo_sizes

_KEYS = ("image", "box", "title", "entity")


def question(number: int, fields: Mapping[str, Any], folder: Path) -> Fact:
    """Makes a fact without a known label, from its photo, box, title and entity.

    Args:
        number: of the question, from 1; its id is `question:<number>`. Errors do not name it: the
            caller adds the place.
        fields: `image`, a path; `box`, four fractions of the photo (x centre, y centre, width,
            height); `title`; `entity`, as the title has it.
        folder: what a relative path starts from.

    Raises:
        DataError: a key is missing, unknown or of another type, the box is empty or leaves the
            photo, there is no photo, or the entity is not in the title.
    """
    # Keys and their types.
    if missing := [key for key in _KEYS if key not in fields]:
        raise DataError(f"expected the keys {', '.join(_KEYS)}, found no {', '.join(missing)}")
    if unknown := sorted(fields.keys() - set(_KEYS)):
        raise DataError(f"expected the keys {', '.join(_KEYS)}, found also {', '.join(unknown)}")
    for key in ("image", "title", "entity"):
        if not isinstance(fields[key], str) or not fields[key].strip():
            raise DataError(f"{key}: expected text, found {fields[key]!r}")
    for key in ("title", "entity"):
        if not is_text(fields[key]):
            raise DataError(
                f"{key}: expected Unicode text, found a lone surrogate in {fields[key]!a}"
            )
    if not isinstance(fields["box"], list | tuple):
        raise DataError(f"box: expected four numbers, found {fields['box']!r}")
    # The photo, the box, and the entity's place in the title.
    path = next((p for p in _alike(folder / fields["image"]) if p.is_file()), None)
    if path is None:
        raise DataError(
            f"image: expected a photo's path, found no photo {fields['image']!r} in "
            f"{folder.absolute()}; give its path from there, or an absolute one"
        )
    box = more.check_box(fields["box"])
    tokens, span = _words(composed(fields["title"]), composed(fields["entity"]))
    entity = " ".join(tokens[slice(*span)])
    return Fact(f"question:{number}", tokens, entity, span, "object", box, str(path), NONE)


def _alike(path: Path) -> Iterator[Path]:
    """Yields the path, then existing paths whose name is the same in another Unicode form.

    Each system chooses its own form, and each folder on the way may have another.
    """
    yield path
    folders = [Path(path.anchor)]
    for part in path.parts[bool(path.anchor) :]:
        alike = []
        for folder in folders:
            alike += [folder / part] if (folder / part).exists() else []
            try:
                names = sorted(os.listdir(folder))
            except OSError:  # Not a folder, or one that this user may not list.
                continue
            same = [name for name in names if composed(name) == composed(part) and name != part]
            alike += [folder / name for name in same]
        folders = alike
    yield from folders


def _words(title: str, entity: str) -> tuple[tuple[str, ...], tuple[int, int]]:
    """Returns the title's words and the [start, end) of the entity's first place among them."""
    # The entity ends a word even before punctuation: 'Heat,' becomes 'Heat' and ','.
    pattern = r"\s+".join(re.escape(word) for word in entity.split())
    match = re.search(rf"(?<!\w){pattern}(?!\w)", title)
    if match is None:
        raise DataError(
            f"entity: expected words of the title {title!r}, found {entity!r}; write it as the "
            "title does"
        )
    before, words = title[: match.start()].split(), match.group().split()
    tokens = (*before, *words, *title[match.end() :].split())
    return tokens, (len(before), len(before) + len(words))


def read_questions(path: Path) -> list[Fact]:
    """Reads questions, a JSON object a line; photos' paths are relative to the file's folder.

    Raises:
        DataError: naming file and line.
    """

    def parse(number: int, value: Any) -> Fact:
        if not isinstance(value, dict):
            raise TypeError
        return question(number, value, path.parent)

    expected, remedy = "a question, a JSON object", "write it as README shows"
    facts = read_jsonl(path, parse, expected, remedy, skip_blank=True)
    if not facts:
        raise DataError(f"{path}: expected a question a line, found none; write one")
    return facts


def predict(
    loaded: LoadedModel, facts: Sequence[Fact], *, batch: int, guided: bool
) -> Iterator[Answer]:
    """Yields the likeliest answer to each question, in order.

    Args:
        batch: questions at once.
        guided: whether to choose only tokens that can still lead to a readable answer.
    """
    photos = PhotoFiles(Path(), photo_path)
    sizes = photo_sizes(facts, photos)
    sampler = loaded.sampler(photos, facts, sizes, batch=batch, guided=guided)
    yield from sampler.answers(loaded.params, facts, "predict")


def photo_path(folder: Path, fact: Fact) -> Path:
    """Returns the path of a question's photo, which its `image` is."""
    return folder / fact.image


def as_question(fact: Fact) -> str:
    """Formats a question in one line: photo, box, entity and title."""
    box = ",".join(f"{value:g}" for value in fact.box)
    return f"{fact.image} [{box}] {fact.entity_text!r} in {fact.title!r}:"


def as_text(answer: Answer) -> str:
    """Formats the reasoning step by step and the label, for a person."""
    steps = read_steps(answer.text.encode())
    if steps is None:
        return f"{answer.text}\n\nAnswer: {answer.label or 'unreadable'}"
    lines = [f"Step {k}: {step}" for k, step in enumerate(steps, start=1)]
    return "\n".join([*lines, "", f"Answer: {answer.label or 'unreadable'}"])


def as_json(fact: Fact, answer: Answer) -> str:
    """Formats question, label (null if unreadable), steps and text as a line of JSON."""
    return json.dumps(
        {
            "image": fact.image,
            "box": fact.box,
            "title": fact.title,
            "entity": fact.entity_text,
            "label": answer.label,
            "steps": read_steps(answer.text.encode()),
            **{k: v for k, v in dataclasses.asdict(answer).items() if k not in ("fact", "label")},
        },
        ensure_ascii=False,
    )


def draw_box(fact: Fact) -> Image.Image:
    """Returns the photo with the object's box drawn on it."""
    photo = open_photo(Path(fact.image))
    x, y, w, h = (value * side for value, side in zip(fact.box, photo.size * 2, strict=True))
    corners = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
    width = max(2, round(min(photo.size) / 150))
    ImageDraw.Draw(photo).rectangle(corners, outline=(255, 64, 0), width=width)
    return photo
