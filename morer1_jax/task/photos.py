"""Reads and checks the photos of facts, wherever they are."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

from etils import epath
from PIL import Image

from morer1_jax.errors import DataError, ErrorList
from morer1_jax.progress import progress
from morer1_jax.task.fact import Fact, composed
from morer1_jax.task.more import photo_path
from morer1_jax.task.photo import DIGEST, open_photo

# Photos read at once: more than there are cores, for readers of a bucket mostly wait.
_READERS = min(32, 2 * (os.cpu_count() or 1) + 6)


class Photos(Protocol):
    """Where the photos of facts are.

    Several threads may read at once, and worker processes get a pickled copy.
    """

    def name(self, fact: Fact) -> str:
        """Returns what errors call a fact's photo."""

    def photo(self, fact: Fact) -> bytes:
        """Returns the bytes of the file of a fact's photo."""


@dataclasses.dataclass(frozen=True)
class PhotoFiles:
    """Photos that are files of their own.

    Attributes:
        folder: local, or in a bucket (`gs://…`).
        path: `(folder, fact) -> path` of a fact's photo; by default as in MORE's released form.
    """

    folder: epath.PathLike
    path: Callable[[epath.PathLike, Fact], epath.Path] = photo_path

    def name(self, fact: Fact) -> str:
        """Returns the photo's path."""
        return str(self.path(self.folder, fact))

    def photo(self, fact: Fact) -> bytes:
        """Reads the photo's file."""
        return epath.Path(self.path(self.folder, fact)).read_bytes()


class PhotoInfo(NamedTuple):
    """What checking a photo finds.

    Attributes:
        size: (width, height) in pixels, upright.
        digest: SHA-256 of the file.
    """

    size: tuple[int, int]
    digest: str


def read_photo(photos: Photos, fact: Fact) -> Image.Image:
    """Returns the photo of a fact, RGB, upright.

    Raises:
        DataError: the photo cannot be read (see `open_photo`); the message names it and the fact.
    """
    return open_photo(lambda: photos.photo(fact), f"{photos.name(fact)} (fact {fact.id})")


def photo_sizes(facts: Iterable[Fact], photos: Photos) -> dict[str, tuple[int, int]]:
    """Returns (width, height) by `Fact.photo`; see `check_photos`."""
    return {photo: info.size for photo, info in check_photos(facts, photos).items()}


def check_photos(facts: Iterable[Fact], photos: Photos) -> dict[str, PhotoInfo]:
    """Decodes each distinct photo once and shows a progress bar.

    Returns:
        The photos' sizes and digests by `Fact.photo`.

    Raises:
        DataError: photos cannot be read; the message names up to 20, each with the first fact that
            shows it.
    """

    def check(fact: Fact) -> PhotoInfo | DataError:
        try:
            photo = read_photo(photos, fact)
        except DataError as e:
            return e
        return PhotoInfo(photo.size, photo.info[DIGEST])

    # The first fact of each photo, which errors name.
    first_facts: dict[str, Fact] = {}
    for fact in facts:
        first_facts.setdefault(fact.photo, fact)
    # Threads read the photos at once; their faults are collected in order.
    with ThreadPoolExecutor(_READERS) as pool:
        read = pool.map(check, first_facts.values())
        outcomes = progress(read, desc="photos", total=len(first_facts), unit="photo")
        infos: dict[str, PhotoInfo] = {}
        errors = ErrorList()
        try:
            for photo, outcome in zip(first_facts, outcomes, strict=True):
                if isinstance(outcome, DataError):
                    errors.add(outcome)
                else:
                    infos[photo] = outcome
            errors.check()
            return infos
        except BaseException:  # Whoever interrupts does not wait for the other photos.
            pool.shutdown(cancel_futures=True)
            raise


def photo_digests(infos: Mapping[str, PhotoInfo]) -> dict[str, str]:
    """Returns the digests of `check_photos` in the form of `more.digests`."""
    # A copy of the dataset on another system may have the names in another form. Two photos whose
    # names differ in their form only share an entry, which either of them changes.
    groups: dict[str, list[str]] = {}
    for photo in sorted(infos):
        groups.setdefault(f"img_org/{composed(photo)}", []).append(infos[photo].digest)
    return {
        name: group[0] if len(group) == 1 else hashlib.sha256("".join(group).encode()).hexdigest()
        for name, group in groups.items()
    }
