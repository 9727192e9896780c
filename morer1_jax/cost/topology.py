"""Devices of a topology that need not exist here, for a compiler to work for.

TPUs' compiler describes its own. There is none for GPUs without one: TPUs with more memory stand in
for them, by which arguments are exact and temporary memory is about what a GPU needs.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from morer1_jax.cli import needs_extra
from morer1_jax.cost.chips import Chip, chip
from morer1_jax.errors import ConfigError

# What TPUs' compiler reads, where no TPU is.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # Else of two processes that load the library at once one ends with an error.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
}
# GPUs by their names here, and topologies of the TPUs that stand in for them, by size.
_GPUS = {"h100": "H100", "h200": "H200", "a100": "A100-SXM4-80GB"}
_STAND_INS = {4: "v5p:2x2x1", 8: "v5p:2x2x2", 16: "v5p:2x2x4", 64: "v5p:4x4x4"}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
        devices: that a mesh can be made of.
        chip: what a device can do; of a GPU, though the devices are what stands in for it.
    """

    devices: tuple[Any, ...]
    chip: Chip


def describe(name: str, slices: int = 1) -> Topology:
    """Returns a topology by its name, as `v5e:4x4` or `h100:8`.

    Args:
        slices: of TPUs, each of that topology.

    Raises:
        ConfigError: TPUs' compiler is missing, or does not know the topology; or there are too many
            GPUs.
    """
    version, _, shape = name.partition(":")
    if version not in _GPUS:
        devices = _tpus(name, slices)
        return Topology(devices, chip(devices[0].device_kind))
    count = int(shape) if shape.isdigit() else 0
    sizes = [size for size in _STAND_INS if size >= count]
    if not (count and sizes) or slices > 1:
        raise ConfigError(
            f"--topology={name}: expected one slice of 1 to {max(_STAND_INS)} GPUs, such as "
            f"{version}:8, found {shape or 'no number'} in {slices}"
        )
    return Topology(_tpus(_STAND_INS[sizes[0]], 1)[:count], chip(_GPUS[version]))


def _tpus(name: str, slices: int) -> tuple[Any, ...]:
    version, _, shape = name.partition(":")
    chips = math.prod(int(size) for size in re.findall(r"\d+", shape))
    # The versions with two cores a chip are named by cores.
    cores = 2 * chips if version in ("v4", "v5p") else chips
    for key, value in {**_ENVIRONMENT, "TPU_ACCELERATOR_TYPE": f"{version}-{cores}"}.items():
        os.environ.setdefault(key, value)
    # A TPU of this host is left alone.
    jax.config.update("jax_platforms", "cpu")
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if version == "v4":
        options["chip_config_name"] = "megacore"
    with needs_extra("tpu"):
        import libtpu  # noqa: F401
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except jax.errors.JaxRuntimeError as error:
        problem = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"--topology={name}: expected a version and chips along each axis, such as v5e:4x4, "
            f"or GPUs, such as h100:8, found one that TPUs' compiler refuses ({problem})"
        ) from None
    return tuple(described.devices)
