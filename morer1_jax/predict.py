r"""Answers one question (photo, box, title, entity) or many, with reasoning steps and a label.

    python -m morer1_jax.predict --checkpoint=runs/demo --image=photo.jpg \
        --box=0.52,0.4,0.2,0.6 --title="Heat and Celtics Are Tied Up" --entity=Heat

`--box` is x centre, y centre, width and height, as fractions of the photo.
`--jsonl=questions.jsonl` answers many, a line each:
{"image": …, "box": […], "title": …, "entity": …}
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from absl import flags
from PIL import Image

from morer1_jax.cli import run_main
from morer1_jax.errors import ConfigError, DataError
from morer1_jax.files import check_writable
from morer1_jax.hosts.alone import check_alone
from morer1_jax.paths import local_path
from morer1_jax.run.cache import use_program_cache
from morer1_jax.serve.loaded import open_model
from morer1_jax.serve.predict import (
    as_json,
    as_question,
    as_text,
    draw_box,
    predict,
    question,
    read_questions,
)
from morer1_jax.task.fact import Fact
from morer1_jax.task.photo import FORMATS

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "A run's workdir, one of its stages, or a published folder, also gs://…; or a hub name.",
)
_IMAGE = flags.DEFINE_string("image", None, "The photo.")
_BOX = flags.DEFINE_list("box", None, "x centre, y centre, width, height; fractions of the photo.")
_TITLE = flags.DEFINE_string("title", None, "The news item's title.")
_ENTITY = flags.DEFINE_string("entity", None, "The entity, as written in the title.")
_JSONL = flags.DEFINE_string("jsonl", None, "A file of questions instead, a JSON object a line.")
_JSON = flags.DEFINE_bool("json", False, "Print a JSON object a line instead of text.")
_PICTURE = flags.DEFINE_string("picture", None, "Where to write the photo with its box.")
_GUIDED = flags.DEFINE_bool("guided", False, "Permit only tokens that lead to a readable answer.")
_LABELS = flags.DEFINE_string("labels", None, "A rel2id.json; by default the checkpoint's.")
_LENGTH = flags.DEFINE_integer(
    "length", None, "Most tokens of an answer; by default as trained.", 1
)
_BATCH = flags.DEFINE_integer("batch", 16, "Questions at once.", 1)


def main(argv: list[str]) -> None:
    """Runs the command line."""
    del argv
    use_program_cache()
    check_alone()
    facts = _questions()
    picture = None
    if _PICTURE.value is not None:
        picture = local_path(_PICTURE.value, "--picture")
        _check_picture(picture, Path(facts[0].image))
    loaded = open_model(_CHECKPOINT.value, labels=_LABELS.value, completion=_LENGTH.value)
    batch = min(_BATCH.value, len(facts))
    answers = predict(loaded, facts, batch=batch, guided=_GUIDED.value)
    for fact, answer in zip(facts, answers, strict=True):
        if _JSON.value:
            print(as_json(fact, answer))
        else:
            print(f"{as_question(fact)}\n{as_text(answer)}\n" if _JSONL.value else as_text(answer))
    if picture is not None:
        draw_box(facts[0]).save(picture)
        print(f"picture: {picture}", file=sys.stderr)


def _check_picture(picture: Path, image: Path) -> None:
    suffix = picture.suffix
    if Image.registered_extensions().get(suffix.lower()) not in FORMATS:
        raise ConfigError(f"--picture: expected an image's suffix such as .png, found {suffix!r}")
    if not picture.parent.is_dir():
        raise ConfigError(
            f"--picture={picture}: expected a folder {picture.parent}, found none; make it first"
        )
    check_writable(picture)
    if picture.exists() and picture.samefile(image):
        raise ConfigError(
            f"--picture={picture}: expected a file of its own, found --image; name another"
        )


def _questions() -> list[Fact]:
    flags_by_key = {"image": _IMAGE, "box": _BOX, "title": _TITLE, "entity": _ENTITY}
    values = {key: flag.value for key, flag in flags_by_key.items() if flag.value is not None}
    if _JSONL.value is not None:
        if values or _PICTURE.value is not None:
            raise ConfigError(
                "--jsonl: expected no other question, found --image or the like; leave it out"
            )
        return read_questions(local_path(_JSONL.value, "--jsonl"))
    if missing := [f"--{name}" for name in flags_by_key if name not in values]:
        raise ConfigError(
            f"{', '.join(missing)}: expected a value, found none; give one, or --jsonl, a file of "
            "questions"
        )
    try:
        box = [float(value) for value in values["box"]]
    except ValueError:
        raise DataError(
            f"--box: expected four numbers, found {','.join(values['box'])!r}"
        ) from None
    image = os.fspath(local_path(values["image"], "--image"))
    return [question(1, values | {"box": box, "image": image}, Path())]


if __name__ == "__main__":
    flags.mark_flag_as_required("checkpoint")
    run_main(main)
