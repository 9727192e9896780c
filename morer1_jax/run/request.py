"""A request to the teacher: a fact's photo, its crop and the prompt, as one chat message."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
from typing import Any

from PIL import Image

from morer1_jax.data.images import ImageReader
from morer1_jax.run.budget import Size
from morer1_jax.task.fact import Fact
from morer1_jax.task.ontology import Ontology
from morer1_jax.task.teacher import teacher_prompt

JPEG_QUALITY = 90
_TILE = 512


@dataclasses.dataclass(frozen=True)
class Request:
    """What is sent for one fact.

    Attributes:
      prompt: the text.
      images: photo and crop as JPEG files.
      shapes: (width, height) of each, in pixels.
    """

    prompt: str
    images: tuple[bytes, ...]
    shapes: tuple[tuple[int, int], ...]

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
    images = [_at_most(image, reader.config.max_pixels) for image in reader.pair(fact)]
    return Request(
        prompt=teacher_prompt(fact, ontology),
        images=tuple(map(_jpeg, images)),
        shapes=tuple(image.size for image in images),
    )


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
