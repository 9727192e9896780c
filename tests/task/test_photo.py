"""Reading photos: any mode and orientation becomes RGB upright, and what cannot is named."""

import io
import struct
import zlib

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import load_image

from morer1_jax.errors import DataError
from morer1_jax.task.photo import FORMATS, open_photo


def pixels(width, height, channels, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels)).astype(np.uint8)


def encoded(photo, form="PNG", **options):
    buffer = io.BytesIO()
    photo.save(buffer, form, **options)
    return buffer.getvalue()


def rgb(data):
    photo = open_photo(data)
    assert photo.mode == "RGB"
    return np.asarray(photo)


def png(width, height, depth, colour, rows=b"", transparent=b""):
    """A PNG by its specification; Pillow writes neither 16-bit colour nor what it cannot hold."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
        + (chunk(b"tRNS", transparent) if transparent else b"")
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def test_colour_is_read_as_it_is_stored(tmp_path):
    expected = pixels(7, 5, 3)
    path = tmp_path / "1.png"
    Image.fromarray(expected).save(path)
    for source in (path, str(path), path.read_bytes()):
        np.testing.assert_array_equal(np.asarray(open_photo(source)), expected)


def test_gray_is_gray_in_colour():
    gray = pixels(7, 5, 1)
    expected = np.repeat(gray, 3, axis=2)
    np.testing.assert_array_equal(rgb(encoded(Image.fromarray(gray[..., 0]))), expected)
    bits = Image.fromarray(gray[..., 0]).convert("1")
    found = rgb(encoded(bits))
    np.testing.assert_array_equal(found[..., 0], np.asarray(bits) * 255)
    assert set(np.unique(found)) == {0, 255}


def test_sixteen_bits_of_gray_are_scaled_and_not_cut_off():
    levels = np.array([[0, 128, 129, 257, 32768, 65279, 65406, 65407, 65535]], np.uint16)
    expected = np.round(levels / 257).astype(np.uint8)
    assert expected[0, -1] == 255
    assert 0 < expected[0, 2] < expected[0, 4] < 255
    for data in (
        encoded(Image.fromarray(levels)),
        encoded(Image.fromarray(levels), "TIFF"),
        encoded(Image.frombytes("I;16B", levels.T.shape, levels.astype(">u2").tobytes()), "TIFF"),
    ):
        found = rgb(data)
        np.testing.assert_array_equal(found, np.repeat(expected[..., None], 3, axis=2))
    # The grey that a PNG names as transparent is white.
    clear = png(3, 1, 16, 0, b"\0" + levels[0, [3, 4, 3]].astype(">u2").tobytes(), b"\x01\x01")
    assert rgb(clear)[0, :, 0].tolist() == [255, 128, 255]


def test_sixteen_bits_of_colour_keep_their_high_byte():
    row = b"\0" + struct.pack(">6H", 0x01FF, 0x8000, 0xFFFF, 0, 0x7FFF, 0x0100)
    assert rgb(png(2, 1, 16, 2, row)).tolist() == [[[1, 128, 255], [0, 127, 1]]]


def test_what_is_transparent_shows_white():
    colour, alpha = pixels(40, 30, 3), pixels(40, 30, 1, seed=1)
    alpha[:10], alpha[10:20] = 0, 255
    share = alpha / 255
    blended = share * colour + (1 - share) * 255
    found = rgb(encoded(Image.fromarray(np.concatenate([colour, alpha], axis=2))))
    assert (found[:10] == 255).all()
    np.testing.assert_array_equal(found[10:20], colour[10:20])
    assert np.abs(found - blended).max() <= 1

    gray = colour[..., :1]
    blended = share * gray + (1 - share) * 255
    found = rgb(encoded(Image.fromarray(np.concatenate([gray, alpha], axis=2))))
    assert np.abs(found - blended).max() <= 1


def palette_photo(**options):
    photo = Image.new("P", (3, 1))
    photo.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    photo.putdata([0, 1, 2])
    return encoded(photo, **options)


def test_palettes_are_looked_up_and_their_transparent_entries_are_white():
    colours = [[10, 20, 30], [40, 50, 60], [70, 80, 90]]
    assert rgb(palette_photo())[0].tolist() == colours
    clear = [colours[0], [255, 255, 255], colours[2]]
    assert rgb(palette_photo(form="PNG", transparency=1))[0].tolist() == clear
    assert rgb(palette_photo(form="GIF", transparency=1))[0].tolist() == clear
    assert rgb(palette_photo(form="PNG", transparency=b"\xff\x00\xff"))[0].tolist() == clear


@pytest.mark.parametrize(
    "data",
    [
        encoded(Image.fromarray(pixels(20, 10, 4))),
        encoded(Image.fromarray(pixels(20, 10, 2))),
        encoded(Image.fromarray(pixels(20, 10, 3)), transparency=(1, 2, 3)),
        encoded(Image.fromarray(pixels(20, 10, 1)[..., 0]), transparency=7),
        encoded(Image.fromarray(pixels(20, 10, 3)).quantize(9), "GIF", transparency=2),
        encoded(Image.fromarray(pixels(20, 10, 4), "CMYK"), "JPEG"),
        encoded(Image.fromarray(pixels(20, 10, 4), "CMYK"), "TIFF"),
        encoded(Image.fromarray(pixels(20, 10, 4)), "WEBP", lossless=True, exact=True),
    ],
)
def test_conversion_is_that_of_transformers(data):
    with Image.open(io.BytesIO(data)) as photo:
        np.testing.assert_array_equal(rgb(data), convert_to_rgb(photo, return_numpy=True))


def test_a_cmyk_jpeg_keeps_its_colours():
    red = Image.new("RGB", (16, 16), (255, 0, 0)).convert("CMYK")
    assert np.abs(rgb(encoded(red, "JPEG", quality=95)).mean((0, 1)) - [255, 0, 0]).max() < 3


# Where the stored photo's first row and first column are in what people see (CIPA DC-008).
ORIENTATIONS = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def upright(stored, orientation):
    seen = stored
    if ORIENTATIONS[orientation][0] in ("left", "right"):
        seen = seen.swapaxes(0, 1)
    if "bottom" in ORIENTATIONS[orientation]:
        seen = seen[::-1]
    if "right" in ORIENTATIONS[orientation]:
        seen = seen[:, ::-1]
    return seen


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_photos_are_turned_upright(orientation):
    stored = pixels(24, 16, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for form, options in (
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
    ):
        data = encoded(Image.fromarray(stored), form, exif=exif, **options)
        np.testing.assert_array_equal(rgb(data), upright(stored, orientation), err_msg=form)
    deep = (stored[..., 0].astype(np.uint16) * 257).astype(np.uint16)
    data = encoded(Image.fromarray(deep), exif=exif)
    np.testing.assert_array_equal(rgb(data)[..., 1], upright(stored[..., 0], orientation))
    # A JPEG is not exact, but the same as transformers reads it; and is not turned twice.
    data = encoded(Image.fromarray(stored), "JPEG", exif=exif)
    photo = open_photo(data)
    expected = load_image(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(np.asarray(photo), np.asarray(expected))
    np.testing.assert_array_equal(np.asarray(load_image(photo)), np.asarray(photo))


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0garbage",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04six\0\0\0\0\0",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0",
    ],
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
def test_exif_that_cannot_be_read_is_passed_over(exif):
    stored = pixels(24, 16, 3)
    np.testing.assert_array_equal(rgb(encoded(Image.fromarray(stored), exif=exif)), stored)


def test_of_several_pictures_the_first_is_read():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert rgb(data)[0, 0].tolist() == [255, 0, 0]


def bad(data, tmp_path):
    """The message about a file, from its path and from its bytes."""
    path = tmp_path / "1.jpg"
    path.write_bytes(data)
    messages = []
    for source, name, called in (
        (path, str(path), None),
        (data, "here", "here"),
        (data, "photo", None),
    ):
        with pytest.raises(DataError) as error:
            open_photo(source, called)
        assert str(error.value).startswith(f"{name}: ")
        assert "\n" not in str(error.value)
        messages.append(str(error.value).removeprefix(f"{name}: "))
    assert len(set(messages)) == 1
    return messages[0]


def test_bad_files_are_named_in_one_line(tmp_path):
    photo = Image.fromarray(pixels(80, 60, 3))
    anew = "; expected a whole photo, copy it anew"
    assert bad(encoded(photo, "JPEG")[:-300], tmp_path).endswith(anew)
    assert bad(encoded(photo)[:2000], tmp_path).endswith(anew)
    for data in (
        b"",
        b"<html>Not found</html>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        encoded(photo, "PPM"),
    ):
        assert bad(data, tmp_path).startswith(
            "cannot be read, no photo in one of the formats JPEG, PNG, "
        )
    for mode in ("I", "F"):
        message = bad(encoded(Image.new(mode, (3, 3)), "TIFF"), tmp_path)
        assert message.startswith(f"expected pixels of 8 or 16 bits, found 32 (mode {mode!r})")
        assert message.endswith("save it anew")
    with pytest.raises(
        DataError, match=r"^[^\n]*absent\.jpg: cannot be read: .*No such file"
    ) as error:
        open_photo(tmp_path / "absent.jpg")
    assert "\n" not in str(error.value)


def test_decompression_bombs_are_refused_before_they_are_unpacked(tmp_path):
    message = bad(png(60_000, 60_000, 8, 2), tmp_path)
    assert "3600000000 pixels" in message
    assert message.endswith("expected a smaller photo, scale it down")


def test_a_missing_client_of_a_bucket_is_named(monkeypatch):
    def no_client(*args, **kwargs):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "filesystem", no_client)
    with pytest.raises(DataError, match=r"^s3://here/1\.jpg: cannot be read: Install s3fs"):
        open_photo("s3://here/1.jpg")


WHOLE = [
    encoded(Image.fromarray(pixels(24, 16, 3)), form, **options)
    for form, options in (
        (
            "JPEG",
            {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"},
        ),
        ("JPEG", {"progressive": True}),
        *((form, {}) for form in FORMATS),
    )
] + [encoded(Image.fromarray(pixels(24, 16, 4)).quantize(9), "PNG", transparency=3)]


@given(
    whole=st.sampled_from(WHOLE),
    end=st.floats(0.2, 1.5),
    changes=st.dictionaries(st.floats(0, 1, exclude_max=True), st.integers(0, 255), max_size=4),
)
@settings(max_examples=200, deadline=None)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_is_a_photo_or_an_error_of_one_line(whole, end, changes):
    data = bytearray(whole[: int(len(whole) * end)])
    for place, value in changes.items():
        # Mostly in the head, where sizes and forms are.
        data[int(len(data) * place**3)] = value
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, 10_000
    try:
        photo = open_photo(bytes(data), "here")
    except DataError as error:
        photo, message = None, str(error)
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    if photo is None:
        assert message.startswith("here: ")
        assert "\n" not in message
    else:
        assert photo.mode == "RGB"
        assert np.asarray(photo).shape == (photo.height, photo.width, 3)
