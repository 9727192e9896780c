"""The MORE dataset's released files, read as data and checked field by field.

    folder/
      rel2id.json                 one JSON object, label to id
      txt/{train,valid,test}.txt  one Python dict literal a line, one line a fact
      img_org/{train,valid,test}/ the photos
      reasoning.jsonl             ours: written reasoning for some of the facts

Two faults are tolerated, because detectors and taggers made the released data: an `h.name` that
differs from the title's words under `h.pos`, and a box that leaves the photo by up to `BOX_SLOP` of
its side, which is clipped to the photo.  Any other is an error of one line.
"""

import hashlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from morer1_jax.errors import DataError, ErrorList, one_line
from morer1_jax.files import atomic_write, read_jsonl, read_lines, write_jsonl
from morer1_jax.task.answer import Special, read
from morer1_jax.task.fact import Fact, composed
from morer1_jax.task.fields import fields, is_text, literal
from morer1_jax.task.ontology import Ontology, read_ontology_file, write_ontology_file
from morer1_jax.task.prompt import SPECIAL_TOKEN

SPLITS = ("train", "valid", "test")
LABELS, REASONING = "rel2id.json", "reasoning.jsonl"
# The files that facts and labels are read from.
TEXTS = (LABELS, *(f"txt/{split}.txt" for split in SPLITS))
BOX_SLOP = 1e-3
# A box whose computed edge passes the photo's by no more than this is kept as written, so that
# rounding in `centre ± size / 2` does not change boxes that touch the edge.
_ROUNDING = 1e-6


def split_path(folder: epath.PathLike, split: str) -> epath.Path:
    """Returns the text file of a split."""
    return epath.Path(folder) / "txt" / f"{split}.txt"


def photo_path(folder: epath.PathLike, fact: Fact) -> epath.Path:
    """Returns the file of a fact's photo."""
    return epath.Path(folder) / "img_org" / fact.photo


def read_ontology(folder: epath.PathLike) -> Ontology:
    """Reads `rel2id.json`; see `read_ontology_file`."""
    return read_ontology_file(epath.Path(folder) / LABELS)


def write_ontology(folder: Path, ontology: Ontology) -> None:
    """Writes `rel2id.json`."""
    write_ontology_file(Path(folder) / LABELS, ontology.labels)


def read_split(folder: epath.PathLike, split: str, ontology: Ontology) -> list[Fact]:
    """Reads one split.  The photos must exist; `check_photos` decodes them.

    Text is composed, and photos are found whichever form of Unicode their names have.

    Raises:
        DataError: facts are malformed; the message names file and line of up to 20.
    """
    path = split_path(folder, split)
    lines = read_lines(path, "a text file, a fact a line", "copy it anew")
    if not lines:
        raise DataError(f"{path}:1: expected a fact a line, found none; copy it anew")
    # The photos' names as the folder has them, by their composed form.
    photos: dict[str, list[str]] = {}
    try:
        for photo in (epath.Path(folder) / "img_org" / split).iterdir():
            photos.setdefault(composed(photo.name), []).append(photo.name)
    except OSError as e:
        raise DataError(f"{path}: expected the folder of its photos, found {one_line(e)}") from e
    # All faults are collected, so that one reading finds them.
    facts, errors = [], ErrorList()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # A title may hold '\d', which is no escape.
        for number, line in enumerate(lines, start=1):
            try:
                facts.append(_parse_fact(f"{split}:{number}", line, ontology, photos))
            except DataError as e:
                errors.add(DataError(f"{path}:{number}: {e}"))
    errors.check()
    return facts


def write_split(folder: Path, split: str, facts: Sequence[Fact]) -> None:
    """Writes the text file of one split so that `read_split` returns the same facts.

    Raises:
        ValueError: a fact's id is not its split and line.
    """
    lines = []
    for number, fact in enumerate(facts, start=1):
        if fact.id != f"{split}:{number}":
            raise ValueError(f"{split}:{number}: expected the fact of this id, found {fact.id}")
        lines.append(
            repr(
                {
                    "token": list(fact.tokens),
                    "h": {"name": fact.entity_name, "pos": list(fact.entity_span)},
                    "t": {"name": fact.object_name, "box": fact.box},
                    "img_id": fact.image,
                    "relation": fact.label,
                }
            )
        )
    atomic_write(split_path(folder, split), "".join(line + "\n" for line in lines))


def digests(folder: epath.PathLike, names: Iterable[str] = (*TEXTS, REASONING)) -> dict[str, str]:
    """Returns the SHA-256 of those text files that are there, by their paths in the folder."""
    paths = {name: epath.Path(folder) / name for name in names}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in paths.items()
        if path.exists()
    }


def read_reasoning(
    path: epath.PathLike, facts: Iterable[Fact], ontology: Ontology
) -> dict[str, str]:
    """Reads written reasoning, one JSON object `{"fact": id, "text": text}` a line.

    Returns:
        Fact id to text, in file order.

    Raises:
        DataError: a line is malformed (see `check_reasoning`); the message names file and line.
    """
    records = read_jsonl(
        path,
        lambda number, record: (f"{path}:{number}", record),
        'written reasoning {"fact": …, "text": …}',
        "write it anew",
    )
    return check_reasoning(records, facts, ontology)


def check_reasoning(
    records: Iterable[tuple[str, Any]], facts: Iterable[Fact], ontology: Ontology
) -> dict[str, str]:
    """Checks written reasoning, wherever it was read from.

    A text is `<think>`, six steps, `</think>` and `<answer>label</answer>` (see `answer.py`).

    Args:
        records: pairs of a place, which errors name, and its value.
        facts: all facts that reasoning may be about.

    Returns:
        Fact id to text, composed, in the records' order.

    Raises:
        DataError: a record is not a dict of exactly `fact` and `text`, its fact is unknown or
            occurred before, or its text is empty, breaks the answer's grammar, does not end in its
            fact's label, or holds a special token.
    """
    golds = {fact.id: fact.label for fact in facts}
    texts: dict[str, str] = {}
    for place, record in records:
        try:
            fact_id, text = fields(record, "the record", {"fact": str, "text": str})
            # The fact is known and has one text only.
            if fact_id not in golds:
                raise DataError(f"fact {fact_id!r}: expected a known fact, found none of this id")
            if fact_id in texts:
                raise DataError(f"fact {fact_id!r}: expected one text a fact, found it twice")
            # The text is one that a model can learn from.
            if not text.strip():
                raise DataError(
                    f"fact {fact_id!r}: expected written reasoning, found an empty text"
                )
            if not is_text(text):
                raise DataError(f"fact {fact_id!r}: expected Unicode text, found a lone surrogate")
            text = composed(text)
            try:
                _check_text(text, golds[fact_id], ontology)
            except DataError as e:
                raise DataError(f"fact {fact_id!r}: {e}") from e
        except DataError as e:
            raise DataError(f"{place}: {e}") from e
        texts[fact_id] = text
    return texts


def _check_text(text: str, gold: str, ontology: Ontology) -> None:
    """Checks that a model can learn the answer's form and the right label from a text."""
    if token := SPECIAL_TOKEN.search(text):
        raise DataError(
            f"expected text without special tokens of the model, found {token.group()!r}; remove it"
        )
    outcome = read([text.encode(), Special.END], ontology.labels)
    if not outcome.format:
        raise DataError(
            "expected '<think>', steps 1 to 6, a line each, '</think>' and '<answer>', a label of "
            "rel2id.json, '</answer>', found other text; write it anew"
        )
    if (label := ontology.labels[outcome.answer]) != gold:
        raise DataError(f"expected the fact's label {gold!r} at the end, found {label!r}")


def write_reasoning(path: Path, texts: Mapping[str, str]) -> None:
    """Writes fact id to text so that `read_reasoning` returns the same."""
    write_jsonl(path, ({"fact": fact_id, "text": text} for fact_id, text in texts.items()))


def _parse_fact(
    fact_id: str, line: str, ontology: Ontology, photos: Mapping[str, Sequence[str]]
) -> Fact:
    """Parses and checks one line's dict literal; the caller adds file and line to the errors."""
    # Keys and types.
    keys = {"token": list, "h": dict, "t": dict, "img_id": str, "relation": str}
    tokens, head, tail, image, label = fields(literal(line), "the line", keys)
    entity_name, span = fields(head, "h", {"name": str, "pos": (list, tuple)})
    object_name, box = fields(tail, "t", {"name": str, "box": (list, tuple)})
    # Words, names and the entity's place in the title.
    if not tokens or not all(type(t) is str and t for t in tokens):
        raise DataError("token: expected one or more words, none empty, found others")
    if not is_text("".join((*tokens, entity_name, object_name))):
        raise DataError("token or name: expected Unicode text, found a lone surrogate")
    for key, name in (("h.name", entity_name), ("t.name", object_name)):
        if not name.strip():
            raise DataError(f"{key}: expected a name, found none")
    if len(span) != 2 or not all(type(i) is int for i in span):
        raise DataError(f"h.pos: expected two integers, start and end, found {span!r}")
    if not 0 <= span[0] < span[1] <= len(tokens):
        raise DataError(
            f"h.pos: expected 0 <= start < end <= {len(tokens)}, the title's words, found {span!r}"
        )
    # The label, and the photo under whichever form of Unicode the folder has its name in.
    if composed(label) not in ontology.ids:
        raise DataError(
            f"relation: expected one of the {len(ontology.labels)} labels of rel2id.json, found "
            f"{label!r}"
        )
    names = photos.get(composed(image), [])
    if not names:
        raise DataError(
            f"img_id: expected a photo in the split's folder under img_org, found none {image!r}"
        )
    if image not in names and len(names) > 1:
        raise DataError(
            f"img_id: expected {' or '.join(map(ascii, names))}, which are in the split's folder "
            f"under img_org, found {image!a}, the same name in another form of Unicode"
        )
    return Fact(
        id=fact_id,
        tokens=tuple(map(composed, tokens)),
        entity_name=composed(entity_name),
        entity_span=(span[0], span[1]),
        object_name=composed(object_name),
        box=check_box(box),
        image=image if image in names else names[0],
        label=composed(label),
    )


def check_box(box: Sequence[Any]) -> tuple[float, float, float, float]:
    """Returns a box of fractions (x centre, y centre, width, height), clipped to the photo.

    Raises:
        DataError: the box is not four numbers, is empty, or leaves the photo by more than
            `BOX_SLOP`.
    """
    if len(box) != 4 or not all(type(x) in (int, float) for x in box):
        raise DataError(
            f"t.box: expected four numbers, x centre, y centre, width, height, found {box!r}"
        )
    x, y, w, h = box
    if not (w > 0 and h > 0):
        raise DataError(f"t.box: expected a width and height above 0, found {box!r}")
    if not all(-1 <= v <= 2 for v in box):  # Before sums, where a huge integer would overflow.
        raise DataError(f"t.box: expected fractions within 0 to 1, found {box!r} outside")
    edges = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
    if not all(-BOX_SLOP <= e <= 1 + BOX_SLOP for e in edges):
        raise DataError(f"t.box: expected fractions within 0 to 1, found {box!r} outside")
    if not all(-_ROUNDING <= e <= 1 + _ROUNDING for e in edges):
        x0, y0, x1, y1 = (min(max(e, 0.0), 1.0) for e in edges)
        if x0 >= x1 or y0 >= y1:
            raise DataError(f"t.box: expected a box inside the photo, found {box!r} outside of it")
        x, y, w, h = (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0
    return float(x), float(y), float(w), float(h)
