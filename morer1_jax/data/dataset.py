"""Opens and checks a dataset: facts, labels, reasoning and photos."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence

from etils import epath

from morer1_jax.data.reasoning import read_reasoning_dataset
from morer1_jax.data.source import Source, open_source
from morer1_jax.errors import DataError
from morer1_jax.hosts import group
from morer1_jax.task import more
from morer1_jax.task.fact import Fact
from morer1_jax.task.ontology import Ontology
from morer1_jax.task.photos import PhotoInfo, check_photos, photo_digests
from morer1_jax.task.prompt import student_prompt


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The facts of all splits, in memory but for their photos' pixels.

    Attributes:
        source: where the photos are, and facts and labels came from.
        ontology: the labels.
        splits: the facts of `train`, `valid` and `test`, in file order.
        reasoning: written reasoning and answer, by training fact's id; {} where none was read.
        photos: size and digest of every photo, by `Fact.photo`; {} where none was read.
        digests: SHA-256 of all that the facts, the reasoning and the photos were read from, by
            name.
    """

    source: Source
    ontology: Ontology
    splits: Mapping[str, list[Fact]]
    reasoning: Mapping[str, str]
    photos: Mapping[str, PhotoInfo]
    digests: Mapping[str, str]

    @property
    def folder(self) -> epath.Path:
        """The dataset's folder, local or in a bucket (`gs://…`)."""
        return self.source.folder

    @property
    def facts(self) -> list[Fact]:
        """The facts of all splits, one split after another."""
        return [fact for split in self.splits.values() for fact in split]

    @property
    def photo_sizes(self) -> dict[str, tuple[int, int]]:
        """(width, height) of every photo, by `Fact.photo`."""
        return {photo: info.size for photo, info in self.photos.items()}

    def texts(self) -> Iterator[str]:
        """Yields prompt and reasoning of each training fact, for a tokenizer to learn from."""
        for fact in self.splits["train"]:
            yield student_prompt(fact, self.ontology) + self.reasoning.get(fact.id, "")


def open_dataset(
    folder: epath.PathLike,
    *,
    reasoning: str | None = None,
    reasoning_needed: bool = True,
    photos: bool = True,
) -> Dataset:
    """Reads and checks a dataset; decodes every photo once, so that a bad one is found now.

    Of several processes each decodes its share of the photos.

    Args:
        folder: see `open_source`.
        reasoning: where the written reasoning is (see `read_reasoning_dataset`); None: the folder's
            `reasoning.jsonl`.
        reasoning_needed: False leaves the reasoning out if none is there.
        photos: False leaves the photos unread.

    Raises:
        DataError: a file, a fact, a text of reasoning or a photo is missing or malformed.
    """
    source = open_source(folder)
    ontology = source.ontology
    splits = {split: source.facts(split) for split in more.SPLITS}
    texts: dict[str, str] = {}
    path = source.folder / more.REASONING
    if reasoning_needed or reasoning is not None or path.exists():
        texts = _read_reasoning(path, reasoning, splits["train"], ontology)
    infos: dict[str, PhotoInfo] = {}
    if photos:
        infos = _check_photos([fact for facts in splits.values() for fact in facts], source)
    digests = source.digests() | photo_digests(infos)
    if reasoning is not None:
        canonical = json.dumps(texts, sort_keys=True).encode()
        digests[reasoning] = hashlib.sha256(canonical).hexdigest()
    return Dataset(source, ontology, splits, texts, infos, digests)


def _check_photos(facts: Sequence[Fact], source: Source) -> dict[str, PhotoInfo]:
    """Checks photos, of several processes each its share; see `check_photos`."""
    if group.count() == 1:
        return check_photos(facts, source)
    order = list(dict.fromkeys(fact.photo for fact in facts))
    own = set(order[group.index() :: group.count()])
    checked = check_photos([fact for fact in facts if fact.photo in own], source)
    found: dict[str, tuple[list[int], str]] = {}
    for of_process in group.gather("photos", checked):
        found |= of_process
    return {
        photo: PhotoInfo(tuple(size), digest)
        for photo, (size, digest) in ((photo, found[photo]) for photo in order)
    }


def _read_reasoning(
    path: epath.Path, source: str | None, facts: list[Fact], ontology: Ontology
) -> dict[str, str]:
    if source is not None:
        return read_reasoning_dataset(source, facts, ontology)
    if not path.exists():
        raise DataError(
            f"{path}: no such file; SFT learns from written reasoning, a line "
            '{"fact": "train:1", "text": "<think>…</answer>"} each; put it there, or say '
            "where with data.reasoning"
        )
    return more.read_reasoning(path, facts, ontology)
