"""Photos and crops as patches: the processor's own numbers, and shapes known without pixels."""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import skimage
import sklearn
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from morer1_jax.data.images import ImageReader, crop_box
from morer1_jax.errors import DataError
from morer1_jax.model.config import ImageConfig
from morer1_jax.model.vision import normalised
from morer1_jax.task.fact import Fact
from morer1_jax.task.photo import open_photo
from morer1_jax.task.photos import PhotoFiles, photo_sizes

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


def test_patches_are_the_processors_own(folder, pixels):
    photo = noise(130, 90)
    save(folder, photo, quality=95)
    reader = ImageReader(PhotoFiles(folder), CONFIG)
    stored = Image.open(folder / "img_org" / "train" / "1.jpg")
    crop = stored.crop(crop_box(FACT.box, stored.size, CONFIG))
    processor = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=140 * 140)
    expected = processor(images=[stored, crop], return_tensors="np")
    found = reader.patches(FACT)
    pixels.assert_same(pixels.values(found, CONFIG), expected["pixel_values"])
    assert found.grids == tuple(map(tuple, expected["image_grid_thw"].tolist()))
    assert len(found.values) == sum(t * rows * columns for t, rows, columns in found.grids)


@pytest.mark.parametrize("sizes", [(14, 2, 2), (14, 1, 1), (16, 2, 2), (2, 2, 3), (4, 3, 1)])
def test_patches_of_any_tower_are_the_processors_own(folder, sizes, pixels):
    sizes = dict(zip(("patch_size", "merge_size", "temporal_patch_size"), sizes, strict=True))
    save(folder, noise(61, 90), format="PNG")
    config = ImageConfig(min_pixels=800, max_pixels=9000, **sizes)
    reader = ImageReader(PhotoFiles(folder), config)
    processor = Qwen2VLImageProcessorPil(min_pixels=800, max_pixels=9000, **sizes)
    expected = processor(images=list(reader.pair(FACT)), return_tensors="np")
    found = reader.patches(FACT)
    pixels.assert_same(pixels.values(found, config), expected["pixel_values"])
    assert found.grids == tuple(map(tuple, expected["image_grid_thw"].tolist()))


MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK")


def stored(width, height, mode, form, orientation, name, folder):
    """Noise in a mode, with an EXIF orientation if it is not 0."""
    if mode == "I;16":
        photo = Image.fromarray(np.asarray(noise(width, height).convert("L")).astype(np.uint16))
    else:
        photo = noise(width, height).convert(mode)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    return save(folder, photo, name, format=form, exif=exif)


@given(
    width=sides,
    height=sides,
    # Long and thin ones are on both sides of what the processor takes.
    thin=st.sampled_from([None, None, None, 1, 2, 10]),
    mode=st.sampled_from(MODES),
    orientation=st.integers(0, 8),
    box=boxes,
    config=configs,
)
@settings(max_examples=100, deadline=None)
def test_sizes_and_grids_are_known_as_the_pixels_have_them(
    tmp_path_factory, width, height, thin, mode, orientation, box, config
):
    folder = tmp_path_factory.mktemp("photo")
    (folder / "img_org" / "train").mkdir(parents=True)
    if thin:
        width, height = (width * 5, thin) if width > height else (thin, height * 5)
    form = {"CMYK": "TIFF"}.get(mode, "PNG")
    stored(width, height, mode, form, orientation, "1.jpg", folder)
    fact = dataclasses.replace(FACT, box=box)
    reader = ImageReader(PhotoFiles(folder), config)
    sizes = photo_sizes([fact], PhotoFiles(folder))
    turned = orientation > 4
    assert sizes == {fact.photo: (height, width) if turned else (width, height)}
    assert reader.open(fact).size == sizes[fact.photo]

    def outcome(make):
        try:
            return make()
        except DataError as error:
            return str(error)

    grids = outcome(lambda: reader.grids(fact, sizes[fact.photo]))
    assert outcome(lambda: reader.patches(fact).grids) == grids
    if max(width, height) > 200 * min(width, height):
        assert "expected a photo whose shape" in grids
        assert "pixels: absolute aspect ratio must be smaller than 200" in grids
    else:
        assert not isinstance(grids, str)


def test_a_box_lies_on_the_photo_as_people_see_it(folder):
    seen = noise(60, 40)
    fact = dataclasses.replace(FACT, box=(0.25, 0.25, 0.5, 0.5), image="1.png")
    config = ImageConfig(crop_margin=0.0, crop_least=1)
    turned = seen.transpose(Image.Transpose.ROTATE_90)  # Shown turned by 90 degrees to the right.
    exif = Image.Exif()
    exif[0x0112] = 6
    save(folder, turned, "1.png", exif=exif)
    photo, crop = ImageReader(PhotoFiles(folder), config).pair(fact)
    np.testing.assert_array_equal(np.asarray(photo), np.asarray(seen))
    np.testing.assert_array_equal(np.asarray(crop), np.asarray(seen)[:20, :30])


def test_a_photo_ten_thousand_pixels_wide_is_read(folder):
    save(folder, noise(10_000, 60))
    reader = ImageReader(PhotoFiles(folder), dataclasses.replace(CONFIG, max_pixels=1280 * 28 * 28))
    fact = dataclasses.replace(FACT, box=(0.5, 0.5, 0.01, 0.5))
    sizes = photo_sizes([fact], PhotoFiles(folder))
    grids = reader.patches(fact).grids
    assert grids == reader.grids(fact, sizes[fact.photo])
    assert grids[0][2] > 20 * grids[0][1]


def real_photos():
    """Photos that scikit-image and scikit-learn carry, opaque and of eight bits."""
    drawn = {"chessboard_GRAY", "chessboard_RGB", "color", "horse", "logo", "phantom"}
    files = sorted((Path(skimage.__file__).parent / "data").iterdir())
    found = [p for p in files if p.suffix in (".jpg", ".png") and p.stem not in drawn]
    return found + sorted((Path(sklearn.__file__).parent / "datasets" / "images").glob("*.jpg"))


def test_patches_of_real_photos_are_the_processors_own(folder, pixels):
    paths = real_photos()
    assert len(paths) >= 20
    rng = np.random.default_rng(0)
    for path in paths:
        shutil.copy(path, folder / "img_org" / "train" / path.name)
        x, y = rng.uniform(0.2, 0.8, 2)
        width, height = rng.uniform(0.05, 0.4, 2)
        fact = dataclasses.replace(FACT, image=path.name, box=(x, y, width, height))
        with Image.open(path) as file:
            photo = file.convert("RGB")
        for limit in (84 * 84, 392 * 392, 1280 * 28 * 28):
            config = ImageConfig(max_pixels=limit)
            crop = photo.crop(crop_box(fact.box, photo.size, config))
            processor = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=limit)
            expected = processor(images=[photo, crop], return_tensors="np")
            reader = ImageReader(PhotoFiles(folder), config)
            found = reader.patches(fact)
            pixels.assert_same(pixels.values(found, config), expected["pixel_values"], path)
            grids = tuple(map(tuple, expected["image_grid_thw"].tolist()))
            assert found.grids == grids == reader.grids(fact, photo.size)
    # A lone photo, of no dataset, is the same.
    lone = reader.encode(open_photo(path), fact.box, "lone")
    np.testing.assert_array_equal(lone.values, found.values)


def spoilt_jpeg(folder):
    path = save(folder, noise(80, 60))
    path.write_bytes(path.read_bytes()[:-300])


def spoilt_png(folder):
    path = save(folder, noise(80, 60), format="PNG")
    path.write_bytes(path.read_bytes()[:2000] + b"\0" * 500)


def absent(folder):
    pass


@pytest.mark.parametrize("spoil", [spoilt_jpeg, spoilt_png, absent])
def test_a_photo_that_cannot_be_read_is_named_with_its_fact(folder, spoil):
    spoil(folder)
    reader = ImageReader(PhotoFiles(folder), CONFIG)
    for read in (reader.open, reader.pair, reader.patches):
        with pytest.raises(DataError, match=r"img_org/train/1\.jpg \(fact train:7\): ") as error:
            read(FACT)
        assert "\n" not in str(error.value)


def test_a_shape_that_the_processor_refuses_is_found_with_and_without_pixels(folder):
    size = (900, 3)
    save(folder, noise(*size))
    reader = ImageReader(PhotoFiles(folder), CONFIG)
    for read in (lambda: reader.patches(FACT), lambda: reader.grids(FACT, size)):
        with pytest.raises(DataError) as error:
            read()
        what = "expected a photo whose shape the processor takes, found 900 × 3 pixels: absolute"
        assert f"1.jpg (fact train:7): {what}" in str(error.value)
        assert str(error.value).endswith("; leave it out")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("size", "box", "expected"),
    [
        # 10,000 to 28 pixels is refused; 50 is what it takes, and one more for rounded edges.
        ((10_000, 60), (0.5, 0.5, 0.95, 0.01), (0, 4, 10_000, 56)),
        ((10_000, 60), (0.5, 0.99, 0.95, 0.01), (0, 9, 10_000, 60)),
        ((60, 10_000), (0.1, 0.5, 0.01, 0.95), (0, 0, 51, 10_000)),
        # The whole of a photo as thin as may be.
        ((6000, 30), (0.5, 0.5, 1.0, 0.01), (0, 0, 6000, 30)),
    ],
)
def test_a_flat_box_in_a_wide_photo_gets_a_crop_that_fits(folder, size, box, expected, pixels):
    assert crop_box(box, size, CONFIG) == expected
    fact = dataclasses.replace(FACT, box=box, image="1.png")
    save(folder, noise(*size), "1.png")
    reader = ImageReader(PhotoFiles(folder), CONFIG)
    photo, crop = reader.pair(fact)
    processor = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=140 * 140)
    found = reader.patches(fact)
    theirs = processor(images=[photo, crop], return_tensors="np")
    pixels.assert_same(pixels.values(found, CONFIG), theirs["pixel_values"])
    assert found.grids == reader.grids(fact, size)


@given(box=boxes, long=st.integers(200, 20_000), short=st.integers(1, 300), config=configs)
@settings(max_examples=500)
def test_a_crop_always_fits_where_the_photo_does(box, long, short, config):
    short = max(short, -(-long // 200))
    left, top, right, bottom = crop_box(box, (long, short), config)
    sides = right - left, bottom - top
    assert max(sides) <= 200 * min(sides)
    x, _, w, _ = box
    assert left <= (x - w / 2) * long + 1
    assert right >= (x + w / 2) * long - 1


@pytest.mark.parametrize(
    ("mean", "std"), [((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), ((0.1, 0.7, 0.3), (0.21, 0.9, 0.33))]
)
def test_patches_of_another_mean_and_deviation_are_the_processors_own(folder, mean, std, pixels):
    save(folder, noise(61, 90), "1.png")
    fact = dataclasses.replace(FACT, image="1.png")
    config = ImageConfig(image_mean=mean, image_std=std)
    reader = ImageReader(PhotoFiles(folder), config)
    processor = Qwen2VLImageProcessorPil(image_mean=list(mean), image_std=list(std))
    expected = processor(images=list(reader.pair(fact)), return_tensors="np")
    pixels.assert_same(pixels.values(reader.patches(fact), config), expected["pixel_values"])


@pytest.mark.parametrize("constant", [False, True])
def test_every_level_is_normalised_as_by_a_table(constant, pixels):
    """Also where the compiler knows mean and deviation, and may compute with their inverses."""
    rng = np.random.default_rng(0)
    mean, std = rng.uniform(0, 1, (300, 3)), rng.uniform(0.05, 1, (300, 3))
    mean[0], std[0] = CONFIG.image_mean, CONFIG.image_std
    mean[1], std[1] = 0, 1
    mean, std = np.float32(mean), np.float32(std)
    table = np.arange(256, dtype=np.float32) / 255
    table = (table - mean[..., None]) / std[..., None]
    # Rows of one patch whose channels each have all levels in an order of their own.
    levels = np.stack([rng.permutation(256) for _ in range(3)]).astype(np.uint8)
    patches = np.broadcast_to(levels.reshape(-1), (300, 1, 1, 3 * 256))
    if constant:
        found = jax.jit(lambda patches: normalised(patches, mean, 1 / std, 2))(patches)
    else:
        found = pixels.compiled()(patches, mean, 1 / std, frames=2)
    found = np.asarray(found).reshape(300, 3, 2, 256)
    expected = np.take_along_axis(table, levels[None].astype(int), axis=2)
    for frame in range(2):
        pixels.assert_same(found[:, :, frame], expected)
    np.testing.assert_array_equal(found[1, 0, 0], levels[0].astype(np.float32) / 255)
