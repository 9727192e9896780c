"""Reads photos: whatever a file holds becomes eight-bit RGB, upright.

All code that looks at a photo reads it here, so that the pixels that are checked are those of
training, sampling, rating, evaluation, prediction and the report.

- EXIF's orientation is applied: a box is a fraction of the photo as people see it.  MORE does not
  say how its boxes were made; they have the form of detectors of the YOLO family, which read
  through OpenCV, and that turns photos upright, as viewers and `transformers`' `load_image` do.
  EXIF that cannot be read is passed over, as by viewers.
- Transparent pixels show white, as with `transformers` and qwen-vl-utils.
- Sixteen-bit grayscale is scaled, 65535 to 255; of a file with several pictures the first is read.
"""

import hashlib
import io
import os
from collections.abc import Callable

import numpy as np
from etils import epath
from PIL import ExifTags, Image, UnidentifiedImageError

from morer1_jax.errors import DataError, one_line

# Pillow's other formats are not photos, or run programs to be read.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
DIGEST = "sha256"
# The transposition that undoes an orientation of EXIF (CIPA DC-008, tag 274); 1 is upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_photo(
    source: str | os.PathLike[str] | bytes | Callable[[], bytes], name: str | None = None
) -> Image.Image:
    """Reads a photo.

    Args:
        source: a path, local or in a bucket (`gs://…`), the bytes of a file, or what returns them;
            what it raises is named as any other error.
        name: what errors call the photo; by default the path.

    Returns:
        The photo, RGB of 8 bits, upright; `info[DIGEST]` is the SHA-256 of the file's bytes.

    Raises:
        DataError: the photo cannot be read, is damaged, is larger than Pillow's guard against
            decompression bombs allows, or has pixels of 32 bits, whose white is not agreed on.
    """
    if name is None:
        name = str(source) if isinstance(source, str | os.PathLike) else "photo"
    try:
        data = source() if callable(source) else source
        data = data if isinstance(data, bytes) else epath.Path(data).read_bytes()
        with Image.open(io.BytesIO(data), formats=FORMATS) as file_image:
            file_image.load()
            photo = _to_rgb(file_image)
            if (transposition := _UPRIGHT.get(_orientation(file_image))) is not None:
                photo = photo.transpose(transposition)
    except Image.DecompressionBombError as e:
        raise DataError(f"{name}: {one_line(e)}; expected a smaller photo, scale it down") from e
    except UnidentifiedImageError as e:
        raise DataError(
            f"{name}: cannot be read, no photo in one of the formats {', '.join(FORMATS)}; "
            "expected a whole photo, copy it anew"
        ) from e
    except DataError as e:
        raise DataError(f"{name}: {e}") from e
    except Exception as e:  # There is no list of what decoders raise on a damaged file.
        raise DataError(
            f"{name}: cannot be read: {one_line(e)}; expected a whole photo, copy it anew"
        ) from e
    # The rest of the file's information, such as the orientation, no longer holds.
    photo.info = {DIGEST: hashlib.sha256(data).hexdigest()}
    return photo


def _to_rgb(photo: Image.Image) -> Image.Image:
    if photo.mode.startswith("I;16"):
        # Pillow's own conversion would cut off at 255.
        pixels = np.asarray(photo).astype(np.uint32)
        gray = ((pixels + 128) // 257).astype(np.uint8)
        gray[pixels == photo.info.get("transparency", -1)] = 255
        return Image.fromarray(gray).convert("RGB")
    if photo.mode in ("I", "F"):
        raise DataError(
            f"expected pixels of 8 or 16 bits, found 32 (mode {photo.mode!r}), whose white is not "
            "agreed on; save it anew"
        )
    if photo.has_transparency_data:
        white = Image.new("RGBA", photo.size, "white")
        return Image.alpha_composite(white, photo.convert("RGBA")).convert("RGB")
    return photo.convert("RGB")


def _orientation(photo: Image.Image) -> int | None:
    try:
        value = photo.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # As above; a viewer shows such a photo as it is stored.
        return None
    return value if isinstance(value, int) else None
