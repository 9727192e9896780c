"""Reads facts and photos from the TensorFlow dataset that `more_tfds` builds.

folder/
  facts/1.0.0/     an example a fact; `photo` is the place of its photo among its split's photos
  photos/1.0.0/    an example a photo, each once, its file's bytes untouched
  reasoning.jsonl  ours: written reasoning, as in MORE's released form
"""

from __future__ import annotations

import functools
import threading
from typing import Any

from etils import epath

from morer1_jax.errors import DataError, one_line
from morer1_jax.task import more
from morer1_jax.task.fact import Fact
from morer1_jax.task.ontology import Ontology

NAME, FACTS, PHOTOS, VERSION = "more", "facts", "photos", "1.0.0"
# Key of the digests of the files that the facts were built from, in their metadata.
DIGESTS = "digests"
_REMEDY = "build the dataset with tools/build_tfds.py"


class TfdsSource:
    """A `Source` whose facts and photos are examples, read at random.

    Threads share a reader of each split's photos; a worker process opens its own.

    Args:
        folder: as the user named it.
        files: the same folder, or its copy on this machine: examples are read there.
        places: of photos that are known already; see `_place`.
    """

    def __init__(
        self, folder: epath.Path, files: epath.PathLike, places: dict[str, int] | None = None
    ) -> None:
        self.folder = folder
        self._files = files
        self._places = {} if places is None else places
        self._readers: dict[str, Any] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[TfdsSource], tuple[Any, ...]]:
        return TfdsSource, (self.folder, self._files, self._places)

    @functools.cached_property
    def ontology(self) -> Ontology:
        """The labels, in id order."""
        names = self._builder(FACTS).info.features["label"].names
        try:
            return Ontology(tuple(names))
        except DataError as error:
            raise self._error(FACTS, str(error)) from None

    def facts(self, split: str) -> list[Fact]:
        """Returns the facts of a split, equal to those of `more.read_split`.

        Raises:
            DataError: there is no such dataset or split, or it cannot be read.
        """
        labels = self.ontology.labels
        facts = []
        for example in self._read(FACTS, split, list):
            fact = Fact(
                id=example["id"].decode(),
                tokens=tuple(token.decode() for token in example["tokens"]),
                entity_name=example["entity_name"].decode(),
                entity_span=tuple(example["entity_span"].tolist()),
                object_name=example["object_name"].decode(),
                box=tuple(example["box"].tolist()),
                image=example["image"].decode(),
                label=labels[example["label"]],
            )
            self._places[fact.photo] = int(example["photo"])
            facts.append(fact)
        return facts

    def digests(self) -> dict[str, str]:
        """Returns the digests of `more.digests`, those of the files that the facts were built from.

        Raises:
            DataError: an earlier version built the dataset, which kept no digests.
        """
        digests = (self._builder(FACTS).info.metadata or {}).get(DIGESTS)
        if digests is None:
            raise self._error(
                FACTS,
                "expected the digests of MORE's files, found none: an earlier version built it; "
                f"delete {self.folder}",
            )
        return digests | more.digests(self.folder, [more.REASONING])

    def name(self, fact: Fact) -> str:
        """Returns what errors call a fact's photo."""
        return f"{self.folder / PHOTOS / VERSION}: {fact.photo}"

    def photo(self, fact: Fact) -> bytes:
        """Returns the bytes of the file that a fact's photo was built from.

        Raises:
            DataError: it cannot be read, or another photo is in its place.
        """
        place = self._place(fact)
        try:
            example = self._photos(fact.split)[place]
        except DataError:
            raise
        except Exception as error:  # What readers raise is nowhere written down.
            raise DataError(f"{one_line(error)}; {_REMEDY}") from error
        if (found := example["image"].decode()) != fact.image:
            raise DataError(
                f"expected this photo in place {place} of its split's, found {found!r}: facts and "
                f"photos are of two builds; {_REMEDY}"
            )
        return example["photo"]

    def _place(self, fact: Fact) -> int:
        """Returns the place of a fact's photo among those of its split."""
        if fact.photo not in self._places:
            self.facts(fact.split)
        try:
            return self._places[fact.photo]
        except KeyError:
            raise DataError(f"expected a photo of {self.folder}, found none of this name") from None

    def _photos(self, split: str) -> Any:
        with self._lock:
            if split not in self._readers:
                self._readers[split] = self._read(PHOTOS, split)
            return self._readers[split]

    def _builder(self, config: str) -> Any:
        import tensorflow_datasets as tfds

        try:
            return tfds.builder_from_directory(epath.Path(self._files) / config / VERSION)
        except Exception as error:  # There is no list of what a damaged file raises.
            raise self._error(config, one_line(error)) from error

    def _read(self, config: str, split: str, take: Any = lambda examples: examples) -> Any:
        """Returns what `take` makes of a split's examples."""
        import tensorflow_datasets as tfds

        builder = self._builder(config)
        # Photos stay as their files are: what TFDS decodes knows no EXIF.
        decoders = {"photo": tfds.decode.SkipDecoding()} if config == PHOTOS else None
        try:
            return take(builder.as_data_source(split=split, decoders=decoders))
        except Exception as error:  # As above; a format that cannot be read at random among it.
            raise self._error(config, one_line(error)) from error

    def _error(self, config: str, problem: str) -> DataError:
        return DataError(f"{self.folder / config / VERSION}: {problem}; {_REMEDY}")
