"""A request to the teacher: a fact's photo, its crop and the prompt, as one chat message."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import math
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath
from PIL import Image

from morer1_jax.data.images import ImageReader
from morer1_jax.errors import DataError, one_line
from morer1_jax.task import more
from morer1_jax.task.fact import Fact
from morer1_jax.task.ontology import Ontology
from morer1_jax.task.photo import DIGEST
from morer1_jax.teacher.ledger import Size
from morer1_jax.teacher.prompt import teacher_prompt

JPEG_QUALITY = 90
_TILE = 512
# Files read at once: more than there are cores, for a bucket keeps its readers waiting.
_READERS = min(32, 2 * (os.cpu_count() or 1) + 6)


@dataclasses.dataclass(frozen=True)
class Request:
    """What is sent for one fact.

    Attributes:
      prompt: the text.
      images: photo and crop as JPEG files.
      shapes: (width, height) of each, in pixels.
      photo: SHA-256 of the photo's file, if there is one.
    """

    prompt: str
    images: tuple[bytes, ...]
    shapes: tuple[tuple[int, int], ...]
    photo: str | None = None

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation as OpenAI's chat format has it, images as data URLs before the text."""
        urls = (
            "data:image/jpeg;base64," + base64.b64encode(image).decode() for image in self.images
        )
        parts: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": url}} for url in urls
        ]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": self.prompt}]}]

    def size(self, answer: int) -> Size:
        """What decides its price, with an answer of at most so many tokens."""
        return Size(
            text=len(self.prompt.encode()),
            pixels=sum(width * height for width, height in self.shapes),
            tiles=sum(-(-width // _TILE) * -(-height // _TILE) for width, height in self.shapes),
            answer=answer,
        )


def build_request(fact: Fact, ontology: Ontology, reader: ImageReader) -> Request:
    """The request for one fact; an image above the reader's `max_pixels` is scaled down to it.

    Raises:
      DataError: the photo cannot be read, or the title holds a special token.
    """
    pair = reader.pair(fact)
    images = [_at_most(image, reader.config.max_pixels) for image in pair]
    return Request(
        prompt=teacher_prompt(fact, ontology),
        images=tuple(map(_jpeg, images)),
        shapes=tuple(image.size for image in images),
        photo=pair[0].info[DIGEST],
    )


def photo_digests(facts: Iterable[Fact], folder: epath.PathLike) -> dict[str, str]:
    """SHA-256 of each distinct photo's file by `Fact.photo`, as requests have it; decodes none.

    Raises:
      DataError: one cannot be read.
    """

    def digest(fact: Fact) -> str:
        try:
            return hashlib.sha256(more.photo_path(folder, fact).read_bytes()).hexdigest()
        except OSError as e:
            raise DataError(f"{one_line(e)} (fact {fact.id}); expected a photo") from None

    first = {fact.photo: fact for fact in facts}
    with ThreadPoolExecutor(_READERS) as pool:
        return dict(zip(first, pool.map(digest, first.values()), strict=True))


def _at_most(image: Image.Image, pixels: int) -> Image.Image:
    width, height = image.size
    if width * height <= pixels:
        return image
    scale = math.sqrt(pixels / (width * height))
    return image.resize((max(1, int(width * scale)), max(1, int(height * scale))))


def _jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()
