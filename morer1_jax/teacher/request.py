"""Builds requests: a fact's photo, its crop and the prompt, as one chat message."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
from typing import Any

from PIL import Image

from morer1_jax.data.images import ImageReader
from morer1_jax.task.fact import Fact
from morer1_jax.task.ontology import Ontology
from morer1_jax.task.photo import DIGEST
from morer1_jax.teacher.ledger import Size
from morer1_jax.teacher.prompt import teacher_prompt

JPEG_QUALITY = 90
_TILE = 512


@dataclasses.dataclass(frozen=True)
class Request:
    """A request for one fact.

    Attributes:
        prompt: the text.
        images: photo and crop as JPEG files.
        shapes: (width, height) of each, in pixels.
        photo: SHA-256 of the photo's file.
    """

    prompt: str
    images: tuple[bytes, ...]
    shapes: tuple[tuple[int, int], ...]
    photo: str | None = None

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation in OpenAI's chat format, images as data URLs before the text."""
        encoded = (base64.b64encode(image).decode() for image in self.images)
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{image}"}}
            for image in encoded
        ]
        return [{"role": "user", "content": [*content, {"type": "text", "text": self.prompt}]}]

    def size(self, max_tokens: int) -> Size:
        """Returns what its price depends on, with an answer of at most `max_tokens`."""
        return Size(
            text=len(self.prompt.encode()),
            pixels=sum(width * height for width, height in self.shapes),
            tiles=sum(-(-width // _TILE) * -(-height // _TILE) for width, height in self.shapes),
            answer=max_tokens,
        )


def build_request(fact: Fact, ontology: Ontology, reader: ImageReader) -> Request:
    """Builds a fact's request; images above the reader's `max_pixels` are scaled down.

    Raises:
        DataError: the photo cannot be read, or the title holds a special token.
    """
    photo, crop = reader.pair(fact)
    images = [_scaled_down(image, reader.config.max_pixels) for image in (photo, crop)]
    return Request(
        prompt=teacher_prompt(fact, ontology),
        images=tuple(map(_jpeg, images)),
        shapes=tuple(image.size for image in images),
        photo=photo.info[DIGEST],
    )


def _scaled_down(image: Image.Image, max_pixels: int) -> Image.Image:
    width, height = image.size
    if width * height <= max_pixels:
        return image
    scale = math.sqrt(max_pixels / (width * height))
    return image.resize((max(1, int(width * scale)), max(1, int(height * scale))))


def _jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()
