"""Where a dataset's facts and photos come from.

Two forms of MORE are read, each a folder, local or in a bucket: the released files, and the
TensorFlow dataset that tools/build_tfds.py makes of them (`more/facts`, `more/photos`). Both give
the same facts, labels, photos and digests, so the same batches, and a teacher's journal or ratings
go on with either. (A run's workdir keeps its `data.folder`, as part of its identity.) In a bucket
the second is faster, since the first has an object a photo.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Protocol

from etils import epath

from morer1_jax.data.local_copy import local_copy
from morer1_jax.data.tfds_source import FACTS, NAME, PHOTOS, VERSION, TfdsSource
from morer1_jax.errors import DataError, one_line
from morer1_jax.files import INSTALL_CLIENT
from morer1_jax.task import more
from morer1_jax.task.fact import Fact
from morer1_jax.task.ontology import Ontology
from morer1_jax.task.photos import PhotoFiles, Photos

_INFO = "dataset_info.json"
_FORMS = (
    "a dataset in MORE's released form (rel2id.json, txt/, img_org/) or the folder `more` of its "
    "TensorFlow dataset (facts/, photos/)"
)


class Source(Photos, Protocol):
    """A dataset's facts and photos, equal in whichever form they are kept.

    Attributes:
        folder: local, or in a bucket (`gs://…`). Written reasoning lies in it in either form.
    """

    folder: epath.Path

    @property
    def ontology(self) -> Ontology:
        """The labels."""

    def facts(self, split: str) -> list[Fact]:
        """Returns the facts of a split, in the order of its file."""

    def digests(self) -> dict[str, str]:
        """Returns the SHA-256 of the files that all but the photos comes from; `more.digests`."""


class Released(PhotoFiles):
    """A folder in MORE's released form."""

    @functools.cached_property
    def ontology(self) -> Ontology:
        """The labels of `rel2id.json`."""
        return more.read_ontology(self.folder)

    def facts(self, split: str) -> list[Fact]:
        """Reads a split's file; see `more.read_split`."""
        return more.read_split(self.folder, split, self.ontology)

    def digests(self) -> dict[str, str]:
        """Returns the digests of the text files."""
        return more.digests(self.folder)


def open_source(folder: epath.PathLike, flag: str = "--config.data.folder") -> Source:
    """Finds out in which form a folder has its dataset; reads no facts and no photos.

    The files of a TensorFlow dataset in a bucket are copied to this machine first (`local_copy`).

    Args:
        folder: local, or in a bucket.
        flag: the one that named the folder, for errors.

    Raises:
        DataError: the folder has neither form whole, or a package is missing that reads it. One
            that has nothing of either is taken for the released form, whose readers name the file
            that they miss.
    """
    folder = epath.Path(folder)
    try:
        parts = {config: folder / config / VERSION / _INFO for config in (FACTS, PHOTOS)}
        there = [config for config, info in parts.items() if info.exists()]
        if not there:
            if not (folder / more.LABELS).exists():
                _check_others(folder, flag)
            return Released(folder)
    except ImportError as error:
        raise DataError(f"{folder}: {one_line(error)}; {INSTALL_CLIENT}") from None
    # A TensorFlow dataset.
    if len(there) < len(parts):
        (missing,) = parts.keys() - set(there)
        raise DataError(
            f"{folder}: expected {FACTS}/{VERSION} and {PHOTOS}/{VERSION}, found no {missing}: the "
            "build was cut off; run tools/build_tfds.py again"
        )
    if importlib.util.find_spec("tensorflow_datasets") is None:
        raise DataError(
            f"{folder}: reading a TensorFlow dataset takes tensorflow-datasets, found none; pip "
            "install 'morer1-jax[tfds]'"
        )
    in_bucket = "://" in os.fspath(folder)
    return TfdsSource(folder, local_copy(folder, (FACTS, PHOTOS)) if in_bucket else folder)


def _check_others(folder: epath.Path, flag: str) -> None:
    """Checks that a folder without either form is none that lies beside or above one.

    Raises:
        DataError: it is; the message says what to name instead.
    """
    # The folder above, or one of the two below.
    if (folder / NAME / FACTS).is_dir():
        raise DataError(
            f"{folder}: expected {_FORMS}, found the folder above that; give {flag}={folder / NAME}"
        )
    for inside, above in (
        (folder / _INFO, folder.parent.parent),
        (folder / VERSION, folder.parent),
    ):
        if inside.exists() and (above / FACTS).is_dir():
            raise DataError(
                f"{folder}: expected {_FORMS}, found a part of one; give {flag}={above}"
            )
    # Another version, or one whose build was cut off.
    if (folder / FACTS).is_dir():
        found = sorted(path.name for path in (folder / FACTS).iterdir())
        raise DataError(
            f"{folder / FACTS}: expected {VERSION}/{_INFO}, found {', '.join(found) or 'nothing'}; "
            "run tools/build_tfds.py again, of this version of morer1_jax"
        )
