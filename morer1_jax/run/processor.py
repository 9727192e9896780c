"""A checkpoint folder's image processor, read and written as `transformers` does."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from morer1_jax.data.images import ImageConfig
from morer1_jax.files import read_text
from morer1_jax.model.config import VisionConfig
from morer1_jax.model.names import WeightsError
from morer1_jax.task.fact import one_line

# The older releases' file, and that of all processors, which newer releases write alone.
PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
_NESTED = "image_processor"
_CLASSES = ("Qwen2VLImageProcessor", "Qwen2_5_VLImageProcessor")
# What is done to every photo here.
_DONE = {
    "do_resize": True,
    "resample": int(Image.Resampling.BICUBIC),
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
}


def read_images(
    folder: Path, vision: VisionConfig, task: Mapping[str, Any] | None = None
) -> ImageConfig:
    """How a checkpoint's photos become patches.

    Args:
      folder: of the checkpoint, on this machine; without a processor's file, its defaults hold.
      vision: the checkpoint's tower, whose sizes a patch has.
      task: `crop_margin` and `crop_least`, if they are known.

    Raises:
      WeightsError: the file is not a processor's, asks for what is not done here, or is of another
        tower.
    """
    path, found = _read(folder)
    try:
        # It fills its argument's size in.
        theirs = Qwen2VLImageProcessorPil.from_dict(copy.deepcopy(found))
    except (ValueError, TypeError) as e:
        raise WeightsError(
            f"{path}: size {found.get('size')!r} and the rest make no processor: {one_line(e)}; "
            "expected Qwen2.5-VL's, copy it anew"
        ) from None
    kind = found.get("image_processor_type", _CLASSES[0])
    if not str(kind).startswith(_CLASSES):
        raise WeightsError(
            f"{path}: image_processor_type: found {kind!r}, only {_CLASSES[0]} is done"
        )
    for key, done in _DONE.items():
        if (value := getattr(theirs, key)) != done:
            raise WeightsError(f"{path}: {key}: found {value!r}, only {done!r} is done")
    limits = theirs.size.shortest_edge, theirs.size.longest_edge
    if not all(isinstance(x, int) and x > 0 for x in limits) or limits[0] > limits[1]:
        raise WeightsError(
            f"{path}: size: found {found.get('size')!r}, least and most pixels expected: "
            '{"shortest_edge": 3136, "longest_edge": 1003520}'
        )
    sizes = {
        "patch_size": vision.patch_size,
        "merge_size": vision.spatial_merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
    }
    for key, size in sizes.items():
        if found.get(key, size) != size:
            raise WeightsError(
                f"{path}: {key}: found {found[key]!r}, expected the model's {size}; copy processor "
                "and config from one model"
            )
    task = task or {}
    crop = {key: task[key] for key in ("crop_margin", "crop_least") if task.get(key) is not None}
    return ImageConfig(
        *limits,
        image_mean=tuple(map(float, theirs.image_mean)),
        image_std=tuple(map(float, theirs.image_std)),
        **sizes,
        **crop,
    )


def write_images(folder: Path, images: ImageConfig) -> None:
    """Writes `preprocessor_config.json`, which all releases of transformers read, and sets what
    newer ones read first, if such a file was copied there."""
    described = {
        **_DONE,
        "do_convert_rgb": True,
        "image_mean": list(images.image_mean),
        "image_std": list(images.image_std),
        "image_processor_type": _CLASSES[0],
        "min_pixels": images.min_pixels,
        "max_pixels": images.max_pixels,
        "size": {"shortest_edge": images.min_pixels, "longest_edge": images.max_pixels},
        "patch_size": images.patch_size,
        "merge_size": images.merge_size,
        "temporal_patch_size": images.temporal_patch_size,
        "processor_class": "Qwen2_5_VLProcessor",
    }
    _write(folder / PREPROCESSOR, described)
    if (folder / PROCESSOR).exists():
        whole = read_object(folder / PROCESSOR)
        if _NESTED in whole:
            kind = whole[_NESTED].get("image_processor_type", _CLASSES[0])
            _write(
                folder / PROCESSOR, whole | {_NESTED: {**described, "image_processor_type": kind}}
            )


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file; empty if there is no such file.

    Raises:
      WeightsError: it is none.
    """
    try:
        value = json.loads(read_text(path))
    except FileNotFoundError:
        return {}
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise WeightsError(f"{path}: not a JSON object; copy it anew")
    return value


def _read(folder: Path) -> tuple[Path, dict[str, Any]]:
    nested = read_object(folder / PROCESSOR).get(_NESTED)
    if nested is None:
        return folder / PREPROCESSOR, read_object(folder / PREPROCESSOR)
    if not isinstance(nested, dict):
        raise WeightsError(f"{folder / PROCESSOR}: {_NESTED} is no JSON object; copy it anew")
    return folder / PROCESSOR, nested


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
