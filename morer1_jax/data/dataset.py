"""Opens and checks a dataset in MORE's released form: facts, labels, reasoning and photos."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from morer1_jax.data.reasoning import read_reasoning_dataset
from morer1_jax.errors import DataError
from morer1_jax.task import more
from morer1_jax.task.fact import Fact
from morer1_jax.task.ontology import Ontology
from morer1_jax.task.prompt import student_prompt

REASONING = "reasoning.jsonl"


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The facts of all splits, in memory but for their photos' pixels.

    Attributes:
        folder: local, or in a bucket (`gs://…`).
        ontology: the labels.
        splits: the facts of `train`, `valid` and `test`, in file order.
        reasoning: written reasoning and answer, by training fact's id; {} where none was read.
        photos: size and digest of every photo, by `Fact.photo`; {} where none was read.
        digests: SHA-256 of all that the facts, the reasoning and the photos were read from, by
            name.
    """

    folder: Path
    ontology: Ontology
    splits: Mapping[str, list[Fact]]
    reasoning: Mapping[str, str]
    photos: Mapping[str, more.PhotoInfo]
    digests: Mapping[str, str]

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
    folder: Path,
    *,
    reasoning: str | None = None,
    reasoning_needed: bool = True,
    photos: bool = True,
) -> Dataset:
    """Reads and checks a dataset; decodes every photo once, so that a bad one is found now.

    Args:
        reasoning: where the written reasoning is (see `read_reasoning_dataset`); None: the folder's
            `reasoning.jsonl`.
        reasoning_needed: False leaves the reasoning out if none is there.
        photos: False leaves the photos unread.

    Raises:
        DataError: a file, a fact, a text of reasoning or a photo is missing or malformed.
    """
    ontology = more.read_ontology(folder)
    splits = {split: more.read_split(folder, split, ontology) for split in more.SPLITS}
    texts: dict[str, str] = {}
    if reasoning_needed or reasoning is not None or (folder / REASONING).exists():
        texts = _read_reasoning(folder, reasoning, splits["train"], ontology)
    infos: dict[str, more.PhotoInfo] = {}
    if photos:
        infos = more.check_photos([fact for facts in splits.values() for fact in facts], folder)
    digests = more.digests(folder) | more.photo_digests(infos)
    if reasoning is not None:
        canonical = json.dumps(texts, sort_keys=True).encode()
        digests[reasoning] = hashlib.sha256(canonical).hexdigest()
    return Dataset(folder, ontology, splits, texts, infos, digests)


def _read_reasoning(
    folder: Path, source: str | None, facts: list[Fact], ontology: Ontology
) -> dict[str, str]:
    if source is not None:
        return read_reasoning_dataset(source, facts, ontology)
    path = folder / REASONING
    if not path.exists():
        raise DataError(
            f"{path}: no such file; SFT learns from written reasoning, a line "
            '{"fact": "train:1", "text": "<think>…</answer>"} each; put it there, or say '
            "where with data.reasoning"
        )
    return more.read_reasoning(path, facts, ontology)
