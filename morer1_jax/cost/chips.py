"""What devices can do, by their data sheets: the constants of lower bounds.

Sources:

- FLOP/s, sizes and bandwidths of memory, networks between slices: the pages of TPU versions in
  Google Cloud's documentation (docs.cloud.google.com/tpu/docs/v5e and so on), NVIDIA's data sheets.
- Links of TPUs: "How to Scale Your Model" (jax-ml.github.io/scaling-book/tpus), which gives 45 or
  90 GB/s a link and direction, a tenth below the data sheets.
- Memory for programs: the size at which XLA's compiler for the chip refuses a program; it keeps
  0.25 to 0.75 GiB for itself.
- Clocks: in the compiler's estimates a device multiplies so many 128² a cycle: 4 on v5e; 8 on v4
  and v5p, whose two cores are one device; 16 on v6e and a core of TPU7x. The peak then gives the
  clock.
"""

from __future__ import annotations

import dataclasses

from morer1_jax.errors import ConfigError

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device as JAX counts them: a chip, or a core of TPU7x.

    Attributes:
        flops: dense bfloat16 FLOP/s.
        hbm: bytes that a program may use.
        hbm_bytes: bytes/s of memory, reading and writing together.
        link_bytes: bytes/s that the device sends over all its links within a slice or a machine
            together. A collective reaches it where rings run along all axes of a torus, both ways
            round; on a slice without the links that close the rings, as v5e and v6e below 16x16,
            chips at the edge have fewer.
        network_bytes: bytes/s that the device sends to other slices or machines: its share of the
            host's network.
        clock: Hz of the cycles that XLA estimates; None where it estimates none.
    """

    name: str
    flops: float
    hbm: float
    hbm_bytes: float
    link_bytes: float
    network_bytes: float
    clock: float | None = None


def _tpu(
    name: str, flops: float, hbm: float, hbm_bytes: float, links: float, network: float, units: int
) -> Chip:
    """Makes a TPU.

    Args:
        hbm: GiB.
        links: number of links times GB/s of each, one way.
        network: GB/s.
        units: of 128² that multiply at once in the compiler's estimates.
    """
    clock = flops / (2 * 128**2 * units)
    return Chip(name, flops, hbm * _GIB, hbm_bytes, links * 1e9, network * 1e9, clock)


def _gpu(
    name: str, flops: float, hbm: float, hbm_bytes: float, links: float, network: float
) -> Chip:
    """Makes a GPU; `hbm` in GiB, less the 1 GiB of CUDA and its libraries; networks in GB/s."""
    return Chip(name, flops, hbm * _GIB, hbm_bytes, links * 1e9, network * 1e9)


# By the part of a `jax.Device.device_kind` that names them; the first that fits counts.
_CHIPS = (
    ("TPU v4", _tpu("TPU v4", 275e12, 30.75, 1200e9, 6 * 45, 6.25, 8)),
    ("TPU v5 lite", _tpu("TPU v5e", 197e12, 15.75, 819e9, 4 * 45, 3.125, 4)),
    ("TPU v5e", _tpu("TPU v5e", 197e12, 15.75, 819e9, 4 * 45, 3.125, 4)),
    ("TPU v5", _tpu("TPU v5p", 459e12, 95.74, 2765e9, 6 * 90, 6.25, 8)),
    ("TPU v6", _tpu("TPU v6e", 918e12, 31.25, 1638e9, 4 * 90, 12.5, 16)),
    # A chip has six links; its two cores are two devices.
    ("TPU7x", _tpu("TPU7x", 1153.5e12, 94.75, 3690e9, 3 * 90, 6.25, 16)),
    # NVLink one way, PCIe for the card of that name; a network of DGX machines, a port a GPU.
    ("H200", _gpu("H200", 989e12, 139, 4800e9, 450, 50)),
    ("H100 PCIe", _gpu("H100 PCIe", 756e12, 79, 2000e9, 64, 50)),
    ("H100", _gpu("H100 SXM", 989e12, 79, 3350e9, 450, 50)),
    ("A100-SXM4-40GB", _gpu("A100 SXM 40GB", 312e12, 39, 1555e9, 300, 25)),
    ("A100-SXM4-80GB", _gpu("A100 SXM 80GB", 312e12, 79, 2039e9, 300, 25)),
    ("A100", _gpu("A100 PCIe", 312e12, 39, 1555e9, 32, 25)),
)


def known_chip(device_kind: str) -> Chip | None:
    """Returns the chip of a `jax.Device.device_kind`; None if it is not in the table, as a CPU."""
    return next((known for name, known in _CHIPS if name in device_kind), None)


def chip(device_kind: str) -> Chip:
    """Returns the chip of a `jax.Device.device_kind`.

    Raises:
        ConfigError: there is no such chip in the table.
    """
    if (known := known_chip(device_kind)) is not None:
        return known
    names = ", ".join(name for name, _ in _CHIPS)
    raise ConfigError(f"device kind: expected one with {names} in it, found {device_kind!r}")
