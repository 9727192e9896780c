"""A checkpoint folder's image processor, read and written as `transformers` does."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from morer1_jax.errors import WeightsError, one_line
from morer1_jax.model.config import ImageConfig, VisionConfig
from morer1_jax.weights.folder import read_json, write_json

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
    limits = _limits(path, found, (theirs.size.shortest_edge, theirs.size.longest_edge))
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
        image_mean=_channels(path, "image_mean", theirs.image_mean),
        image_std=_channels(path, "image_std", theirs.image_std),
        **sizes,
        **crop,
    )


def _limits(path: Path, found: Mapping[str, Any], limits: tuple[Any, Any]) -> tuple[int, int]:
    """Least and most pixels, if they are that."""
    whole = [int(x) for x in limits if _is_number(x) and x == int(x) > 0]
    if len(whole) == 2 and whole[0] <= whole[1]:
        return whole[0], whole[1]
    said = {
        key: found[key]
        for key in ("size", "min_pixels", "max_pixels")
        if found.get(key) is not None
    }
    keys, values = ", ".join(said), ", ".join(map(repr, said.values()))
    raise WeightsError(
        f"{path}: {keys}: found {values}, least and most pixels expected: "
        '"size": {"shortest_edge": 3136, "longest_edge": 1003520}'
    )


def _channels(path: Path, key: str, values: Any) -> tuple[float, ...]:
    """A number for each of a photo's three channels, if they are that."""
    there = list(values) if isinstance(values, list | tuple) else []
    least = 0.0 if key == "image_std" else -math.inf
    if len(there) != 3 or not all(_is_number(x) and x > least for x in there):
        above = " above 0" if key == "image_std" else ""
        raise WeightsError(
            f"{path}: {key}: found {values!r}, three numbers{above} expected; copy it anew"
        )
    return tuple(map(float, there))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


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
    write_json(folder / PREPROCESSOR, described)
    if (folder / PROCESSOR).exists():
        whole = read_json(folder / PROCESSOR, needed=False)
        if _NESTED in whole:
            kind = whole[_NESTED].get("image_processor_type", _CLASSES[0])
            write_json(
                folder / PROCESSOR, whole | {_NESTED: {**described, "image_processor_type": kind}}
            )


def _read(folder: Path) -> tuple[Path, dict[str, Any]]:
    nested = read_json(folder / PROCESSOR, needed=False).get(_NESTED)
    if nested is None:
        return folder / PREPROCESSOR, read_json(folder / PREPROCESSOR, needed=False)
    if not isinstance(nested, dict):
        raise WeightsError(f"{folder / PROCESSOR}: {_NESTED} is no JSON object; copy it anew")
    return folder / PROCESSOR, nested
