"""Reads and writes a checkpoint folder's image processor as `transformers` does."""

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

# The image processor's own file, and that of all processors, the only one newer releases write.
PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
_NESTED = "image_processor"
_CLASSES = ("Qwen2VLImageProcessor", "Qwen2_5_VLImageProcessor")
# Settings of the only processing that is implemented.
_FIXED = {
    "do_resize": True,
    "resample": int(Image.Resampling.BICUBIC),
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
}


def read_images(
    folder: Path, vision: VisionConfig, task: Mapping[str, Any] | None = None
) -> ImageConfig:
    """Returns how a checkpoint's photos become patches.

    Args:
        folder: of the checkpoint, on this machine; without a processor's file, its defaults hold.
        vision: the checkpoint's tower, whose patch sizes the processor must have.
        task: `crop_margin` and `crop_least`, which a processor does not know; None or missing keys:
            the defaults.

    Raises:
        WeightsError: the file is not a processor's, asks for what is not implemented, or is of
            another tower.
    """
    path, described = _read(folder)
    try:
        # A copy, because it fills its argument's `size` in.
        processor = Qwen2VLImageProcessorPil.from_dict(copy.deepcopy(described))
    except (ValueError, TypeError) as e:
        raise WeightsError(
            f"{path}: expected Qwen2.5-VL's image processor, found size {described.get('size')!r} "
            f"and others that make none ({one_line(e)}); copy it anew"
        ) from None

    # What is not implemented, or of another model.
    kind = described.get("image_processor_type", _CLASSES[0])
    if not str(kind).startswith(_CLASSES):
        raise WeightsError(f"{path}: image_processor_type: expected {_CLASSES[0]}, found {kind!r}")
    for key, fixed in _FIXED.items():
        if (value := getattr(processor, key)) != fixed:
            raise WeightsError(f"{path}: {key}: expected {fixed!r}, found {value!r}")
    limits = _limits(path, described, (processor.size.shortest_edge, processor.size.longest_edge))
    sizes = {
        "patch_size": vision.patch_size,
        "merge_size": vision.spatial_merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
    }
    for key, size in sizes.items():
        if described.get(key, size) != size:
            raise WeightsError(
                f"{path}: {key}: expected the model's {size}, found {described[key]!r}; copy "
                "processor and config from one model"
            )

    task = task or {}
    crop = {key: task[key] for key in ("crop_margin", "crop_least") if task.get(key) is not None}
    return ImageConfig(
        *limits,
        image_mean=_channels(path, "image_mean", processor.image_mean),
        image_std=_channels(path, "image_std", processor.image_std),
        **sizes,
        **crop,
    )


def _limits(path: Path, described: Mapping[str, Any], limits: tuple[Any, Any]) -> tuple[int, int]:
    """Returns least and most pixels, or names the keys that give something else."""
    whole = [int(x) for x in limits if _is_number(x) and x == int(x) > 0]
    if len(whole) == 2 and whole[0] <= whole[1]:
        return whole[0], whole[1]
    sizes = {
        key: described[key]
        for key in ("size", "min_pixels", "max_pixels")
        if described.get(key) is not None
    }
    keys, values = ", ".join(sizes), ", ".join(map(repr, sizes.values()))
    raise WeightsError(
        f"{path}: {keys}: expected least and most pixels as in "
        f'{{"shortest_edge": 3136, "longest_edge": 1003520}}, found {values}; copy it anew'
    )


def _channels(path: Path, key: str, values: Any) -> tuple[float, ...]:
    """Returns a number for each of a photo's three channels, or names what the key gives."""
    numbers = list(values) if isinstance(values, list | tuple) else []
    least = 0.0 if key == "image_std" else -math.inf
    if len(numbers) != 3 or not all(_is_number(x) and x > least for x in numbers):
        above = " above 0" if key == "image_std" else ""
        raise WeightsError(
            f"{path}: {key}: expected three numbers{above}, found {values!r}; copy it anew"
        )
    return tuple(map(float, numbers))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def write_images(folder: Path, images: ImageConfig) -> None:
    """Writes `preprocessor_config.json`, which all releases of transformers read.

    Where `processor_config.json` was copied to the folder, which newer releases read first, its
    image processor is set too.
    """
    described = {
        **_FIXED,
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
        raise WeightsError(
            f"{folder / PROCESSOR}: {_NESTED}: expected a JSON object, found "
            f"{type(nested).__name__}; copy it anew"
        )
    return folder / PROCESSOR, nested
