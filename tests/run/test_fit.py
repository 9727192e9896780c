"""Which meshes fit a model, and what to change where one does not."""

import dataclasses
import math

import jax
import pytest

from morer1_jax.errors import ConfigError
from morer1_jax.learn.state import abstract_params
from morer1_jax.model.config import LoRA, Runtime
from morer1_jax.model.family import published_sizes
from morer1_jax.model.sharding import HEAD_AXIS, partition_spec
from morer1_jax.model.vlm import Qwen25VL
from morer1_jax.run.fit import any_mesh, check_mesh, check_sampling
from morer1_jax.run.mesh import path_name

MODELS = {size: published_sizes(f"Qwen/Qwen2.5-VL-{size}-Instruct") for size in ("3B", "7B")}


@dataclasses.dataclass(frozen=True)
class Mesh:
    """What of a mesh is read, with no devices in it."""

    shape: dict[str, int]

    @property
    def size(self):
        return math.prod(self.shape.values())


def mesh(data, fsdp, tensor):
    return Mesh({"data": data, "fsdp": fsdp, "tensor": tensor})


@pytest.mark.parametrize(
    ("model", "sizes", "message"),
    [
        (
            "3B",
            (1, 4, 3),
            "mesh.tensor: expected a divisor of the model's 16 attention heads, found 3; use 1, 2 "
            "or 4",
        ),
        # Three devices fit the model in no other way.
        (
            "3B",
            (1, 1, 3),
            "mesh.tensor: expected a divisor of the model's 16 attention heads, found 3; use 1",
        ),
        (
            "7B",
            (1, 1, 8),
            "mesh.tensor: expected a divisor of the model's 28 attention heads, found 8; use 1, 2 "
            "or 4",
        ),
        (
            "7B",
            (1, 4, 7),
            "mesh.tensor: expected a divisor of the model's 16 attention heads of the vision tower,"
            " found 7; use 1, 2 or 4",
        ),
        (
            "3B",
            (2, 1, 8),
            "mesh.tensor: expected a divisor of the model's 3420 channels between gate and down of "
            "the vision tower, found 8; use 1, 2 or 4",
        ),
        (
            "3B",
            (1, 6, 1),
            "mesh.fsdp: expected a divisor of the model's 2048 hidden channels, found 6; use 1 or "
            "2",
        ),
        (
            "7B",
            (1, 512, 1),
            "mesh.fsdp: expected a divisor of the model's 1280 hidden channels of the vision tower,"
            " found 512; use 1, 2, 4, 8, 16, 32, 64, 128 or 256",
        ),
    ],
)
def test_a_mesh_that_does_not_divide_the_model_is_named(model, sizes, message):
    with pytest.raises(ConfigError) as error:
        check_mesh(MODELS[model], mesh(*sizes))
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("what", "size"), [("intermediate_size", 11_007), ("vocab_size", 151_935)], ids=str
)
def test_other_sizes_that_tensor_splits_are_checked(what, size):
    config = MODELS["3B"]
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, **{what: size}))
    with pytest.raises(ConfigError, match=rf"^mesh\.tensor: .* {size} .*, found 2; use 1$"):
        check_mesh(config, mesh(1, 4, 2))


@pytest.mark.parametrize(
    ("sizes", "tensor", "message"),
    [
        ((1, 4, 2), 3, "expected a divisor of the mesh's 8 devices .* found 3; use 2 or 4$"),
        # Rows may be split no finer than in training, whose batches divide over its parts.
        ((1, 4, 2), 1, r"leaves a divisor of the 4 parts its rows .* found 1; use 2 or 4$"),
        ((1, 4, 2), 16, "expected a divisor of the mesh's 8 devices .* found 16; use 2 or 4$"),
        ((1, 16, 1), 16, "of the model's 3420 channels .*, found 16; use 1, 2 or 4$"),
        ((1, 3, 1), 3, "of the model's 16 attention heads, found 3; use 1$"),
    ],
)
def test_a_layout_for_sampling_that_does_not_fit_is_named(sizes, tensor, message):
    with pytest.raises(ConfigError, match=rf"^mesh\.sampling_tensor: .*{message}"):
        check_sampling(MODELS["3B"], mesh(*sizes), tensor)


@pytest.mark.parametrize("model", MODELS)
def test_of_a_mesh_that_fits_every_axis_of_the_rules_splits(model):
    """But for key-value heads, which are repeated."""
    config, checked = MODELS[model], 0
    tree = abstract_params(Qwen25VL(config, Runtime(), LoRA(rank=4)))
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    for tensor in (1, 2, 3, 4, 7, 8, 16):
        for fsdp in (1, 2, 5, 8, 16, 128, 256, 512):
            try:
                check_mesh(config, mesh(1, fsdp, tensor))
            except ConfigError:
                continue
            for path, leaf in leaves:
                name = path_name(path)
                # A size of 1 divides everything, so these are the axes that the rule names.
                named = partition_spec(mesh(1, 1, 1), name, leaf.shape)
                split = partition_spec(mesh(1, fsdp, tensor), name, leaf.shape)
                kv = "language/" in name and name.split("/")[-2] in ("k", "v")
                for axis, ours in zip(named, split, strict=True):
                    assert ours == axis or (kv and axis == HEAD_AXIS), (name, tensor, fsdp)
                    checked += axis is not None
    assert checked > 1000


@pytest.mark.parametrize(
    ("model", "count", "expected"),
    [("3B", 8, (1, 8)), ("3B", 6, (3, 2)), ("7B", 7, (7, 1)), ("3B", 1, (1, 1))],
)
def test_a_mesh_of_any_devices_splits_what_divides(devices, model, count, expected):
    with devices(count):
        found = any_mesh(MODELS[model])
    assert dict(found.shape) == dict(zip(("data", "fsdp"), expected, strict=True)) | {"tensor": 1}
    check_mesh(MODELS[model], found)
