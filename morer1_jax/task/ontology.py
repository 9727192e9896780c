"""The label list: relations between an object's type and an entity's type, and `none`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from morer1_jax.errors import DataError
from morer1_jax.files import read_json, write_json
from morer1_jax.task.fact import composed

NONE = "none"
ENTITY_TYPES = ("per", "org", "loc", "misc")


def label_types(label: str) -> tuple[str, str]:
    """Returns a relation's types of object and entity, `("per", "org")` of `/per/org/member_of`."""
    _, object_type, entity_type, _ = label.split("/", 3)
    return object_type, entity_type


@dataclass(frozen=True)
class Ontology:
    """A label list in id order.

    Attributes:
        labels: a label's id is its place; `none` is among them, anywhere.

    Raises:
        DataError: a label is malformed or occurs twice, or `none` is missing.
    """

    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        for label in self.labels:
            if problem := _label_problem(label):
                raise DataError(f"label {label!r}: {problem}")
        if len(set(self.labels)) != len(self.labels):
            duplicate = next(x for x in self.labels if self.labels.count(x) > 1)
            raise DataError(f"label {duplicate!r}: expected each label once, found it twice")
        if NONE not in self.labels:
            raise DataError(f"label {NONE!r}: expected exactly once, found none")
        if len(self.labels) < 2:
            raise DataError(f"expected at least one relation, found the label {NONE!r} only")

    @cached_property
    def ids(self) -> Mapping[str, int]:
        """The id of each label."""
        return {label: i for i, label in enumerate(self.labels)}

    @cached_property
    def types(self) -> tuple[str, ...]:
        """`per`, `org`, `loc`, `misc`, then any further type in order of its first label."""
        types = (t for label in self.labels if label != NONE for t in label_types(label))
        return tuple(dict.fromkeys((*ENTITY_TYPES, *types)))

    def allowed(self, object_type: str, entity_type: str) -> tuple[str, ...]:
        """Returns the labels of an ordered pair of types, in id order, with `none` last.

        Raises:
            ValueError: a type is not among `types`.
        """
        for t in (object_type, entity_type):
            if t not in self.types:
                raise ValueError(f"type: expected one of {', '.join(self.types)}, found {t!r}")
        pair = (object_type, entity_type)
        return (*(x for x in self.labels if x != NONE and label_types(x) == pair), NONE)


def read_ontology_file(path: Path) -> Ontology:
    """Reads a `rel2id.json`: one JSON object, label to id, ids 0, 1, 2, … without gap.

    Labels are composed, since the model writes composed text only.

    Raises:
        DataError: the file is missing or not such an object, or a label or id is malformed.
    """
    pairs = read_json(path, "copy it anew", expected="a JSON object, label to id", kind=_Pairs)
    label_by_id: dict[int, str] = {}
    spellings: dict[str, str] = {}
    for spelling, i in pairs:
        # A label comes once, in whichever form of Unicode.
        label = composed(spelling)
        if label in spellings:
            is_repeat = spellings[label] == spelling
            duplicates = "it twice" if is_repeat else f"{spellings[label]!a} and {spelling!a}"
            raise DataError(f"{path}: key {label!r}: expected each label once, found {duplicates}")
        spellings[label] = spelling
        if problem := _label_problem(label):
            raise DataError(f"{path}: key {label!r}: {problem}")
        # Its id is its own, and leaves no gap.
        if type(i) is not int:
            raise DataError(f"{path}: key {label!r}: expected an id 0, 1, 2, …, found {i!r}")
        if i in label_by_id:
            raise DataError(
                f"{path}: key {label!r}: expected an id of its own, found {i}, {label_by_id[i]!r}'s"
            )
        if not 0 <= i < len(pairs):
            last = len(pairs) - 1
            raise DataError(
                f"{path}: key {label!r}: expected ids 0 to {last} without a gap, found {i}"
            )
        label_by_id[i] = label
    try:
        return Ontology(tuple(label_by_id[i] for i in range(len(label_by_id))))
    except DataError as e:
        raise DataError(f"{path}: {e}") from e


def write_ontology_file(path: Path, labels: Sequence[str]) -> None:
    """Writes a `rel2id.json`, the labels in id order."""
    write_json(path, {label: i for i, label in enumerate(labels)}, indent=0)


class _Pairs(list):
    """The items of a JSON object in file order, keys that occur twice among them."""


def _label_problem(label: str) -> str | None:
    if not label:
        return "expected a label, found none"
    if label != composed(label):
        return f"expected {composed(label)!a}, found its decomposed form {label!a}"
    if any(c.isspace() or c in "<>" or not c.isprintable() for c in label):
        return (
            "expected no white space, '<', '>' or control character, for the answer tag, found one"
        )
    if label != NONE and (len(parts := label.split("/", 3)) < 4 or parts[0] or not all(parts[1:])):
        return f"expected {NONE!r} or '/object type/entity type/relation'"
    return None
