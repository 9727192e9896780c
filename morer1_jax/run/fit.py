"""Checks that a mesh fits a model: each of its axes must divide what it splits.

An axis that does not divide would leave arrays whole on every device, and their work with them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from morer1_jax.errors import ConfigError
from morer1_jax.model.config import ModelConfig
from morer1_jax.model.sharding import HEAD_AXIS
from morer1_jax.run.mesh import batch_parts, make_mesh

_WIDTH_AXIS = "fsdp"


def check_mesh(config: ModelConfig, mesh: Mesh) -> None:
    """Checks that the axes `fsdp` and `tensor` divide the model's sizes.

    Key-value heads are free: where `tensor` does not divide them they are repeated.

    Raises:
        ConfigError: an axis does not divide a size.
    """
    for axis, sizes in _sizes(config).items():
        count = mesh.shape.get(axis, 1)
        fitting = _divisors(math.gcd(mesh.size, *sizes.values()))
        _check_divides(f"mesh.{axis}", count, sizes, fitting)


def check_sampling(config: ModelConfig, mesh: Mesh, tensor: int) -> None:
    """Checks that parameters can be split over `tensor` of the mesh's devices for sampling.

    Raises:
        ConfigError: `tensor` does not divide the devices or one of the model's sizes, or rows would
            be split more finely than in training, whose batches divide over its parts.
    """
    rows, sizes = batch_parts(mesh), _sizes(config)[HEAD_AXIS]
    leaves_rows = [n for n in _divisors(mesh.size) if rows % (mesh.size // n) == 0]
    fitting = [n for n in leaves_rows if n in _divisors(math.gcd(*sizes.values()))]
    if tensor not in leaves_rows:
        raise ConfigError(
            f"mesh.sampling_tensor: expected a divisor of the mesh's {mesh.size} devices that "
            f"leaves a divisor of the {rows} parts its rows are split into, found {tensor}; use "
            f"{_either(fitting)}"
        )
    _check_divides("mesh.sampling_tensor", tensor, sizes, fitting)


def any_mesh(config: ModelConfig) -> Mesh:
    """Makes a mesh over all devices that splits parameters over as many as they divide by."""
    fsdp = math.gcd(len(jax.devices()), *_sizes(config)[_WIDTH_AXIS].values())
    return make_mesh({"data": -1, _WIDTH_AXIS: fsdp, HEAD_AXIS: 1})


def _sizes(config: ModelConfig) -> dict[str, dict[str, int]]:
    """Returns what each axis splits (`model.sharding.RULES`): sizes by what they count."""
    text, vision = config.text, config.vision
    return {
        HEAD_AXIS: {
            "attention heads": text.num_attention_heads,
            "attention heads of the vision tower": vision.num_heads,
            "channels between gate and down": text.intermediate_size,
            "channels between gate and down of the vision tower": vision.intermediate_size,
            "channels of the merger": vision.hidden_size * vision.spatial_merge_size**2,
            "rows of the embedding": text.vocab_size,
        },
        _WIDTH_AXIS: {
            "hidden channels": text.hidden_size,
            "hidden channels of the vision tower": vision.hidden_size,
        },
    }


def _check_divides(key: str, count: int, sizes: dict[str, int], fitting: Sequence[int]) -> None:
    for what, size in sizes.items():
        if size % count:
            raise ConfigError(
                f"{key}: expected a divisor of the model's {size} {what}, found {count}; use "
                f"{_either(fitting)}"
            )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _either(numbers: Sequence[int]) -> str:
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last
