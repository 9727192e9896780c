"""The image processor's files: read as `transformers` reads them, and written for all releases."""

import dataclasses
import json

import pytest
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from morer1_jax.errors import WeightsError
from morer1_jax.model.config import ImageConfig, VisionConfig
from morer1_jax.weights.processor import PREPROCESSOR, PROCESSOR, read_images, write_images

TOWER = VisionConfig(
    depth=2, hidden_size=8, intermediate_size=8, num_heads=1, out_hidden_size=8,
    fullatt_block_indexes=(1,), patch_size=4, window_size=16,
)  # fmt: skip
LIMITS = {"min_pixels": 700, "max_pixels": 7000}
SIZE = {"shortest_edge": 800, "longest_edge": 8000}
NESTED = {"image_processor": {"size": SIZE, "image_mean": [0.5, 0.4, 0.3]}}


@pytest.mark.parametrize(
    ("preprocessor", "processor"),
    [
        (LIMITS, None),
        ({"size": SIZE}, None),
        (LIMITS | {"size": SIZE}, None),
        ({"size": SIZE, "min_pixels": 900}, None),
        ({"min_pixels": 900}, None),
        ({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}, None),
        ({"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}, None),
        ({"min_pixels": 700.0, "max_pixels": 7e3}, None),
        (None, NESTED),
        (LIMITS, NESTED),
        (LIMITS, {"image_processor": {"image_std": [0.5, 0.6, 0.7]}}),
        (LIMITS, {"processor_class": "Qwen2_5_VLProcessor"}),
    ],
)
def test_it_is_read_as_transformers_reads_it(tmp_path, preprocessor, processor):
    for name, value in ((PREPROCESSOR, preprocessor), (PROCESSOR, processor)):
        if value is not None:
            (tmp_path / name).write_text(json.dumps(value))
    theirs = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    ours = read_images(tmp_path, TOWER)
    assert ours.min_pixels == theirs.size.shortest_edge
    assert ours.max_pixels == theirs.size.longest_edge
    assert list(ours.image_mean) == list(theirs.image_mean)
    assert list(ours.image_std) == list(theirs.image_std)


def test_without_a_file_it_is_as_transformers_makes_it_and_the_tower_s(tmp_path):
    expected = ImageConfig(patch_size=4)
    assert read_images(tmp_path, TOWER) == expected
    theirs = Qwen2VLImageProcessorPil()
    assert expected.image_mean == tuple(theirs.image_mean)
    assert expected.image_std == tuple(theirs.image_std)
    task = {"crop_margin": 0.3, "crop_least": 5, "completion_length": 7}
    expected = dataclasses.replace(expected, crop_margin=0.3, crop_least=5)
    assert read_images(tmp_path, TOWER, task) == expected


@pytest.mark.parametrize(
    ("found", "match"),
    [
        ({"size": 448}, r"size: expected least and most pixels .* found 448"),
        ({"size": {"height": 448, "width": 448}}, r"size: expected least and most .* found"),
        ({"size": {"shortest_edge": 448}}, r"size: expected least and most .* found"),
        ({"size": 448} | LIMITS, "image processor, found size 448 and others"),
        ({"min_pixels": 9, "max_pixels": 8}, r"min_pixels, max_pixels: expected .* found 9, 8"),
        ({"min_pixels": True}, r"min_pixels: expected least and most .* found True"),
        ({"max_pixels": 7000.5}, r"max_pixels: expected .* found 7000.5"),
        ({"max_pixels": "7000"}, r"max_pixels: expected .* found '7000'"),
        ({"max_pixels": float("inf")}, r"max_pixels: expected .* found inf"),
        ({"size": {"shortest_edge": True, "longest_edge": 9}}, r"size: expected .* found .*True"),
        ({"image_mean": None}, "image_mean: expected three numbers, found None; copy it anew"),
        ({"image_mean": 0.5}, "image_mean: expected three numbers, found 0.5"),
        ({"image_mean": [0.5]}, "image_mean: expected three numbers, found"),
        ({"image_mean": [0.5, 0.5, float("nan")]}, "image_mean: expected three numbers, found"),
        ({"image_mean": [0.5, 0.5, "0.5"]}, "image_mean: expected three numbers, found"),
        ({"image_std": [0.5, 0.0, 0.5]}, "image_std: expected three numbers above 0, found"),
        ({"image_std": [0.5, True, 0.5]}, "image_std: expected three numbers above 0, found"),
        ({"do_normalize": False}, "do_normalize: expected True, found False"),
        ({"rescale_factor": 1 / 127}, "rescale_factor: expected"),
        ({"resample": 2}, "resample: expected 3, found 2"),
        ({"patch_size": 14}, "patch_size: expected the model's 4, found 14"),
        ({"image_processor_type": "CLIPImageProcessor"}, "found 'CLIPImageProcessor'"),
        ([], "expected a JSON object, found list; copy it anew"),
    ],
)
@pytest.mark.parametrize("name", [PREPROCESSOR, PROCESSOR])
def test_what_is_not_done_is_refused(tmp_path, name, found, match):
    whole = found if name == PREPROCESSOR or not found else {"image_processor": found}
    (tmp_path / name).write_text(json.dumps(whole))
    with pytest.raises(WeightsError, match=match) as error:
        read_images(tmp_path, TOWER)
    assert str(error.value).startswith(f"{tmp_path / name}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("copied", [None, NESTED, {"processor_class": "Qwen2_5_VLProcessor"}])
def test_what_was_written_is_read_back_whatever_was_copied(tmp_path, copied):
    (tmp_path / PREPROCESSOR).write_text(json.dumps(LIMITS | {"do_resize": False}))
    if copied is not None:
        (tmp_path / PROCESSOR).write_text(json.dumps(copied))
    images = ImageConfig(
        min_pixels=500, max_pixels=5000, patch_size=4, image_std=(0.2, 0.3, 0.4), crop_least=28
    )
    write_images(tmp_path, images)
    assert read_images(tmp_path, TOWER) == images
    theirs = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    assert (theirs.size.shortest_edge, theirs.size.longest_edge) == (500, 5000)
    older = json.loads((tmp_path / PREPROCESSOR).read_text())
    assert (older["min_pixels"], older["max_pixels"]) == (500, 5000)
    assert older["size"] == {"shortest_edge": 500, "longest_edge": 5000}
    assert older["image_processor_type"] == "Qwen2VLImageProcessor"
