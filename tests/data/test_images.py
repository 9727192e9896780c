"""Photos and crops as patches: the processor's own numbers, and shapes known without pixels."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from morer1_jax.data.images import ImageConfig, ImageReader, crop_box
from morer1_jax.task.fact import DataError, Fact

CONFIG = ImageConfig(min_pixels=56 * 56, max_pixels=140 * 140)
FACT = Fact(
    id="train:7",
    tokens=("Heat", "Win"),
    entity_name="Heat",
    entity_span=(0, 1),
    object_name="[OBJ0]",
    box=(0.5, 0.4, 0.25, 0.5),
    image="1.jpg",
    label="none",
)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "img_org" / "train").mkdir(parents=True)
    return tmp_path


def save(folder, photo, name="1.jpg", **options):
    path = folder / "img_org" / "train" / name
    photo.save(path, **options)
    return path


def noise(width, height):
    pixels = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


boxes = st.tuples(*[st.floats(0, 1)] * 4).map(
    # Centre and size of the box between two corners, at least a millionth wide.
    lambda c: (
        (c[0] + c[1]) / 2,
        (c[2] + c[3]) / 2,
        max(abs(c[0] - c[1]), 1e-6),
        max(abs(c[2] - c[3]), 1e-6),
    )
)
sides = st.integers(1, 400)
configs = st.builds(
    ImageConfig,
    min_pixels=st.just(56 * 56),
    max_pixels=st.sampled_from([56 * 56, 140 * 140, 300 * 300]),
    crop_margin=st.floats(0, 1),
    crop_least=st.integers(1, 64),
)


@given(box=boxes, width=sides, height=sides, config=configs)
@settings(max_examples=500)
def test_a_crop_is_never_empty_and_never_outside(box, width, height, config):
    left, top, right, bottom = crop_box(box, (width, height), config)
    assert all(type(edge) is int for edge in (left, top, right, bottom))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    # At least what was asked for, as far as the photo goes (to a pixel, for edges are rounded).
    assert right - left >= min(config.crop_least, width) - 1
    assert bottom - top >= min(config.crop_least, height) - 1


@given(box=boxes, width=sides, height=sides, config=configs)
@settings(max_examples=300)
def test_a_crop_holds_its_object(box, width, height, config):
    left, top, right, bottom = crop_box(box, (width, height), config)
    x, y, w, h = box
    assert left <= (x - w / 2) * width + 1
    assert right >= (x + w / 2) * width - 1
    assert top <= (y - h / 2) * height + 1
    assert bottom >= (y + h / 2) * height - 1


def test_a_crop_has_its_margin_and_its_least_size():
    config = ImageConfig(crop_margin=0.1, crop_least=28)
    assert crop_box((0.5, 0.5, 0.5, 0.25), (200, 400), config) == (40, 140, 160, 260)
    assert crop_box((0.5, 0.5, 0.01, 0.01), (200, 400), config) == (86, 186, 114, 214)
    # At an edge it is moved inside, not cut.
    assert crop_box((0.01, 0.99, 0.01, 0.01), (200, 400), config) == (0, 372, 28, 400)


def test_patches_are_the_processors_own(folder):
    photo = noise(130, 90)
    save(folder, photo, quality=95)
    reader = ImageReader(folder, CONFIG)
    stored = Image.open(folder / "img_org" / "train" / "1.jpg")
    crop = stored.crop(crop_box(FACT.box, stored.size, CONFIG))
    processor = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=140 * 140)
    expected = processor(images=[stored, crop], return_tensors="np")
    found = reader.patches(FACT)
    np.testing.assert_array_equal(found.values, expected["pixel_values"])
    assert found.values.dtype == np.float32
    assert found.grids == tuple(map(tuple, expected["image_grid_thw"].tolist()))
    assert len(found.values) == sum(t * rows * columns for t, rows, columns in found.grids)


@given(width=st.integers(1, 150), height=st.integers(1, 150), box=boxes, config=configs)
@settings(max_examples=60, deadline=None)
def test_grids_are_known_without_pixels(tmp_path_factory, width, height, box, config):
    folder = tmp_path_factory.mktemp("photo")
    (folder / "img_org" / "train").mkdir(parents=True)
    save(folder, noise(width, height), "1.png")
    fact = dataclasses.replace(FACT, image="1.png", box=box)
    reader = ImageReader(folder, config)
    assert reader.grids(fact, (width, height)) == reader.patches(fact).grids


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA", "1", "CMYK"])
def test_photos_of_other_modes_are_read_as_rgb(folder, mode):
    photo = noise(60, 50).convert(mode)
    form = "jpg" if mode in ("L", "CMYK") else "png"
    save(folder, photo, f"1.{form}")
    fact = dataclasses.replace(FACT, image=f"1.{form}")
    reader = ImageReader(folder, CONFIG)
    whole, crop = reader.pair(fact)
    assert whole.mode == crop.mode == "RGB"
    assert whole.size == (60, 50)
    assert reader.patches(fact).values.shape[1] == 3 * 2 * 14 * 14
    # The same as of the photo stored in colour.
    path = folder / "img_org" / "train" / f"1.{form}"
    colour = Image.open(path).convert("RGB")
    save(folder, colour, "2.png")
    plain = reader.patches(dataclasses.replace(FACT, image="2.png"))
    np.testing.assert_array_equal(reader.patches(fact).values, plain.values)


def spoilt_jpeg(folder):
    path = save(folder, noise(80, 60))
    path.write_bytes(path.read_bytes()[:-300])


def spoilt_png(folder):
    save(folder, noise(80, 60), "1.png")
    path = (folder / "img_org" / "train" / "1.png").rename(folder / "img_org" / "train" / "1.jpg")
    path.write_bytes(path.read_bytes()[:2000] + b"\0" * 500)


def no_photo(folder):
    (folder / "img_org" / "train" / "1.jpg").write_text("<html>Not found</html>")


def absent(folder):
    pass


@pytest.mark.parametrize("spoil", [spoilt_jpeg, spoilt_png, no_photo, absent])
def test_a_photo_that_cannot_be_read_is_named_with_its_fact(folder, spoil):
    spoil(folder)
    reader = ImageReader(folder, CONFIG)
    for read in (reader.open, reader.pair, reader.patches):
        with pytest.raises(DataError, match=r"img_org/train/1\.jpg: photo of train:7 ") as error:
            read(FACT)
        assert "\n" not in str(error.value)


def test_a_shape_that_the_processor_refuses_is_found_with_and_without_pixels(folder):
    save(folder, noise(900, 3))
    reader = ImageReader(folder, CONFIG)
    for read in (lambda: reader.patches(FACT), lambda: reader.grids(FACT, (900, 3))):
        with pytest.raises(DataError, match=r"1\.jpg: photo of train:7: .*aspect ratio") as error:
            read()
        assert "\n" not in str(error.value)
