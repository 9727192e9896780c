"""The MORE dataset's released files, read as data and checked field by field.

    folder/
      rel2id.json                 one JSON object, label to id
      txt/{train,valid,test}.txt  one Python dict literal a line, one line a fact
      img_org/{train,valid,test}/ the photos
      reasoning.jsonl             ours: written reasoning for some of the facts

What is tolerated, because the released data was made by detectors and taggers: an `h.name` that
is not letter for letter the title's words under `h.pos`, and a box that leaves the photo by up to
`BOX_SLOP` of its side, which is clipped to the photo.  All else is an error of one line.
"""

import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath
from PIL import Image
from tqdm import tqdm

from morer1_jax.errors import DataError, Faults, one_line
from morer1_jax.files import atomic_write, read_jsonl, read_lines, write_jsonl
from morer1_jax.task.answer import Special, read
from morer1_jax.task.fact import Fact, composed
from morer1_jax.task.fields import fields, is_text, literal
from morer1_jax.task.ontology import Ontology, read_ontology_file, write_ontology_file
from morer1_jax.task.photo import DIGEST, open_photo
from morer1_jax.task.prompt import SPECIAL_TOKEN

SPLITS = ("train", "valid", "test")
BOX_SLOP = 1e-3
# A box whose computed edge passes the photo's by no more than this is kept as written, so that
# rounding in `centre ± size / 2` does not change boxes that touch the edge.
_ROUNDING = 1e-6
# Photos read at once: more than there are cores, for a bucket keeps its readers waiting.
_READERS = min(32, 2 * (os.cpu_count() or 1) + 6)


def split_path(folder: epath.PathLike, split: str) -> epath.Path:
    """The text file of a split."""
    return epath.Path(folder) / "txt" / f"{split}.txt"


def photo_path(folder: epath.PathLike, fact: Fact) -> epath.Path:
    """The photo of a fact."""
    return epath.Path(folder) / "img_org" / fact.photo


PhotoPath = Callable[[epath.PathLike, Fact], epath.Path]


def read_ontology(folder: epath.PathLike) -> Ontology:
    """Reads `rel2id.json`.  Raises DataError naming the file and key."""
    return read_ontology_file(epath.Path(folder) / "rel2id.json")


def write_ontology(folder: Path, ontology: Ontology) -> None:
    """Writes `rel2id.json`."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_ontology_file(Path(folder) / "rel2id.json", ontology.labels)


def read_split(folder: epath.PathLike, split: str, ontology: Ontology) -> list[Fact]:
    """Reads one split.  The photos must exist; `photo_sizes` decodes them.

    Text is composed, and photos are found whichever form of Unicode their names have.

    Raises:
        DataError: naming file and line of each that is not a whole and valid fact, up to 20.
    """
    path = split_path(folder, split)
    lines = read_lines(path, "a text file, a fact a line", "copy it anew")
    if not lines:
        raise DataError(f"{path}:1: expected a fact a line, found none; copy it anew")
    photos: dict[str, list[str]] = {}
    try:
        for photo in (epath.Path(folder) / "img_org" / split).iterdir():
            photos.setdefault(composed(photo.name), []).append(photo.name)
    except OSError as e:
        raise DataError(f"{one_line(e)}; expected the folder of the photos of {path}") from e
    facts, faults = [], Faults()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of '\d' in a title, which is data and no mistake.
        for number, line in enumerate(lines, start=1):
            try:
                facts.append(_parse_fact(f"{split}:{number}", line, ontology, photos))
            except DataError as e:
                faults.add(DataError(f"{path}:{number}: {e}"))
    faults.check()
    return facts


def write_split(folder: Path, split: str, facts: Sequence[Fact]) -> None:
    """Writes the text file of one split so that `read_split` gives the same facts.

    Raises:
        ValueError: a fact's id is not its split and line.
    """
    lines = []
    for number, fact in enumerate(facts, start=1):
        if fact.id != f"{split}:{number}":
            raise ValueError(f"fact {fact.id}: at line {number} of {split}, expected its id there")
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


def digests(folder: epath.PathLike) -> dict[str, str]:
    """SHA-256 of each of the dataset's text files that is there, by its path in the folder."""
    names = ["rel2id.json", "reasoning.jsonl", *(f"txt/{split}.txt" for split in SPLITS)]
    paths = {name: epath.Path(folder) / name for name in names}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in paths.items()
        if path.exists()
    }


class PhotoInfo(NamedTuple):
    """Of a photo: (width, height) in pixels, upright, and SHA-256 of its file."""

    size: tuple[int, int]
    digest: str


def photo_digests(seen: Mapping[str, PhotoInfo]) -> dict[str, str]:
    """Those of `check_photos` in the form of `digests`."""
    # A copy of the dataset on another system may have the names in another form. Two photos whose
    # names differ by no more than that share an entry, which either of them changes.
    found: dict[str, list[str]] = {}
    for photo in sorted(seen):
        found.setdefault(f"img_org/{composed(photo)}", []).append(seen[photo].digest)
    return {
        name: each[0] if len(each) == 1 else hashlib.sha256("".join(each).encode()).hexdigest()
        for name, each in found.items()
    }


def read_photo(
    folder: epath.PathLike, fact: Fact, photo_path: PhotoPath = photo_path
) -> Image.Image:
    """The photo of a fact, RGB, upright.

    Raises:
        DataError: naming the photo and the fact; see `open_photo`.
    """
    path = photo_path(folder, fact)
    return open_photo(path, f"{path} (fact {fact.id})")


def photo_sizes(
    facts: Iterable[Fact], folder: epath.PathLike, photo_path: PhotoPath = photo_path
) -> dict[str, tuple[int, int]]:
    """As `check_photos`, of each its (width, height) alone."""
    return {photo: seen.size for photo, seen in check_photos(facts, folder, photo_path).items()}


def check_photos(
    facts: Iterable[Fact], folder: epath.PathLike, photo_path: PhotoPath = photo_path
) -> dict[str, PhotoInfo]:
    """Decodes each distinct photo once and shows a progress bar.

    Args:
        photo_path: where in the folder a fact's photo is.

    Returns:
        By `Fact.photo`.

    Raises:
        DataError: naming each photo that cannot be read, up to 20, and the first fact that uses it.
    """

    def see(fact: Fact) -> PhotoInfo | DataError:
        try:
            photo = read_photo(folder, fact, photo_path)
        except DataError as e:
            return e
        return PhotoInfo(photo.size, photo.info[DIGEST])

    first = {}
    for fact in facts:
        first.setdefault(fact.photo, fact)
    with ThreadPoolExecutor(_READERS) as pool:
        seen = tqdm(pool.map(see, first.values()), "photos", len(first), unit="photo")
        found: dict[str, PhotoInfo] = {}
        faults = Faults()
        try:
            for photo, outcome in zip(first, seen, strict=True):
                if isinstance(outcome, DataError):
                    faults.add(outcome)
                else:
                    found[photo] = outcome
            faults.check()
            return found
        except BaseException:  # an interrupt, too, waits for no other photo
            pool.shutdown(cancel_futures=True)
            raise


def read_reasoning(
    path: epath.PathLike, facts: Iterable[Fact], ontology: Ontology
) -> dict[str, str]:
    """Reads written reasoning, one JSON object `{"fact": id, "text": text}` a line.

    Returns:
        Fact id to text, in file order.

    Raises:
        DataError: naming file and line, if a line is malformed; see `check_reasoning`.
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
        records: pairs of a place, which errors name, and what was found there.

    Returns:
        Fact id to text, composed, in the records' order.

    Raises:
        DataError: a record is no dict of exactly `fact` and `text`, its fact is unknown or was
            there before, or its text is empty, breaks the answer's grammar, does not end in its
            fact's label, or holds a special token.
    """
    golds = {fact.id: fact.label for fact in facts}
    texts: dict[str, str] = {}
    for place, record in records:
        try:
            fact_id, text = fields(record, "the record", {"fact": str, "text": str})
            if fact_id not in golds:
                raise DataError(f"fact {fact_id!r}: unknown, expected the id of a fact read")
            if fact_id in texts:
                raise DataError(f"fact {fact_id!r}: occurs twice, expected one text a fact")
            if not text.strip():
                raise DataError(f"fact {fact_id!r}: text is empty, expected written reasoning")
            if not is_text(text):
                raise DataError(f"fact {fact_id!r}: text holds a lone surrogate, expected Unicode")
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
    """What a text must be for the model to learn the answer's form and the right label from it."""
    if found := SPECIAL_TOKEN.search(text):
        raise DataError(f"text holds {found.group()!r}, a special token of the model; remove it")
    outcome = read([text.encode(), Special.END], ontology.labels)
    if not outcome.format:
        raise DataError(
            "text is not '<think>', steps 1 to 6, a line each, '</think>' and "
            "'<answer>', a label of rel2id.json, '</answer>'; write it anew"
        )
    if (found := ontology.labels[outcome.answer]) != gold:
        raise DataError(f"text ends in {found!r}, expected the fact's label {gold!r}")


def write_reasoning(path: Path, texts: Mapping[str, str]) -> None:
    """Writes fact id to text so that `read_reasoning` gives the same."""
    write_jsonl(path, ({"fact": fact_id, "text": text} for fact_id, text in texts.items()))


def _parse_fact(
    fact_id: str, line: str, ontology: Ontology, photos: Mapping[str, Sequence[str]]
) -> Fact:
    """Checks one line's dict literal.  Messages lack file and line; the caller adds them."""
    keys = {"token": list, "h": dict, "t": dict, "img_id": str, "relation": str}
    tokens, head, tail, image, label = fields(literal(line), "the line", keys)
    entity_name, span = fields(head, "h", {"name": str, "pos": (list, tuple)})
    object_name, box = fields(tail, "t", {"name": str, "box": (list, tuple)})
    if not tokens or not all(type(t) is str and t for t in tokens):
        raise DataError("token: expected a list of one or more words, none empty")
    if not is_text("".join((*tokens, entity_name, object_name))):
        raise DataError("token or name: holds a lone surrogate, expected Unicode text")
    for key, name in (("h.name", entity_name), ("t.name", object_name)):
        if not name.strip():
            raise DataError(f"{key}: empty, expected a name")
    if len(span) != 2 or not all(type(i) is int for i in span):
        raise DataError(f"h.pos: {span!r}, expected two integers, start and end")
    if not 0 <= span[0] < span[1] <= len(tokens):
        raise DataError(
            f"h.pos: {span!r}, expected 0 <= start < end <= {len(tokens)}, the title's words"
        )
    if composed(label) not in ontology.ids:
        raise DataError(
            f"relation: unknown label {label!r}, expected one of the {len(ontology.labels)} of "
            "rel2id.json"
        )
    names = photos.get(composed(image), [])
    if not names:
        raise DataError(f"img_id: no photo {image!r} in the split's folder under img_org")
    if image not in names and len(names) > 1:
        raise DataError(
            f"img_id: {image!a} found, but the split's folder under img_org has "
            f"{' and '.join(map(ascii, names))}, the same name in other forms of Unicode; "
            "expected one of them"
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
    """A box of four fractions (x centre, y centre, width, height), clipped to the photo.

    Raises:
        DataError: it is none, is empty, or leaves the photo by more than `BOX_SLOP`.
    """
    if len(box) != 4 or not all(type(x) in (int, float) for x in box):
        raise DataError(f"t.box: {box!r}, expected four numbers: x centre, y centre, width, height")
    x, y, w, h = box
    if not (w > 0 and h > 0):
        raise DataError(f"t.box: {box!r} is empty, expected a width and height above 0")
    if not all(-1 <= v <= 2 for v in box):  # Before sums, where a huge integer would overflow.
        raise DataError(f"t.box: {box!r} leaves the photo, expected fractions within 0 to 1")
    edges = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
    if not all(-BOX_SLOP <= e <= 1 + BOX_SLOP for e in edges):
        raise DataError(f"t.box: {box!r} leaves the photo, expected fractions within 0 to 1")
    if not all(-_ROUNDING <= e <= 1 + _ROUNDING for e in edges):
        x0, y0, x1, y1 = (min(max(e, 0.0), 1.0) for e in edges)
        if x0 >= x1 or y0 >= y1:
            raise DataError(f"t.box: {box!r} lies outside the photo, expected it within 0 to 1")
        x, y, w, h = (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0
    return float(x), float(y), float(w), float(h)
