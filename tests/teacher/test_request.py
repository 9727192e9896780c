"""The request for a fact: its photo, its crop and the prompt."""

import base64
import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from morer1_jax.data.images import ImageReader
from morer1_jax.errors import DataError
from morer1_jax.model.config import ImageConfig
from morer1_jax.task import more
from morer1_jax.task.photos import PhotoFiles
from morer1_jax.teacher.ledger import Size
from morer1_jax.teacher.prompt import teacher_prompt
from morer1_jax.teacher.request import Request, build_request


@pytest.fixture(scope="module")
def data(teachable):
    folder, facts = teachable(4)
    return folder, facts, more.read_ontology(folder)


def decoded(message):
    """The pictures of a message, decoded, in order."""
    urls = [part["image_url"]["url"] for part in message["content"] if part["type"] == "image_url"]
    assert all(url.startswith("data:image/jpeg;base64,") for url in urls)
    return [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]


def test_photo_and_crop_come_before_the_prompt(data):
    folder, facts, ontology = data
    reader = ImageReader(PhotoFiles(folder), ImageConfig())
    request = build_request(facts[0], ontology, reader)
    (message,) = request.messages
    assert message["role"] == "user"
    assert [part["type"] for part in message["content"]] == ["image_url", "image_url", "text"]
    assert message["content"][2]["text"] == teacher_prompt(facts[0], ontology)
    sent = decoded(message)
    for image, original in zip(sent, reader.pair(facts[0]), strict=True):
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", original.size)
        far = np.abs(np.asarray(image, float) - np.asarray(original, float)).mean()
        assert far < 8  # Noise, the worst there is for JPEG; another picture would be at 60.
    assert request.shapes == tuple(image.size for image in sent)


def test_the_crop_follows_the_margin_of_the_image_config(data):
    folder, facts, ontology = data
    shapes = [
        build_request(
            facts[0], ontology, ImageReader(PhotoFiles(folder), ImageConfig(crop_margin=margin))
        ).shapes
        for margin in (0.1, 0.4)
    ]
    assert shapes[0][0] == shapes[1][0]
    assert shapes[0][1] < shapes[1][1]


def test_large_images_are_scaled_down_and_small_ones_are_not(data):
    folder, facts, ontology = data
    config = ImageConfig(max_pixels=3200)
    photo, crop = build_request(facts[0], ontology, ImageReader(PhotoFiles(folder), config)).shapes
    width, height = ImageReader(PhotoFiles(folder), config).open(facts[0]).size
    assert photo[0] * photo[1] <= 3200 < width * height
    assert photo[0] / photo[1] == pytest.approx(width / height, rel=0.03)
    assert (
        crop
        == build_request(facts[0], ontology, ImageReader(PhotoFiles(folder), ImageConfig())).shapes[
            1
        ]
    )


def test_the_size_counts_bytes_pixels_and_tiles():
    request = Request("Schön", (b"", b""), ((513, 512), (1, 1025)))
    assert request.size(77) == Size(text=6, pixels=513 * 512 + 1025, tiles=2 + 3, answer=77)


def test_a_photo_that_is_gone_is_named(data):
    folder, facts, ontology = data
    fact = dataclasses.replace(facts[0], image="gone.jpg")
    with pytest.raises(DataError, match=r"gone\.jpg \(fact train:1\): cannot be read"):
        build_request(fact, ontology, ImageReader(PhotoFiles(folder), ImageConfig()))
