"""The kernels that a mesh's devices and a dtype call for."""

import types

import numpy as np
import pytest

from morer1_jax.errors import ConfigError
from morer1_jax.model.attention import XLA
from morer1_jax.model.cudnn import CuDNN
from morer1_jax.model.sharded import ShardedKernels
from morer1_jax.model.sharding import Layout
from morer1_jax.model.splash import Splash
from morer1_jax.run.kernels import choose

# Platform, what its client says, and compute capability.
KINDS = {
    "cpu": ("cpu", "cpu", None),
    "tpu": ("tpu", "TFRT TPU v5 lite", None),
    "h100": ("gpu", "PJRT C API\ncuda 12090", "9.0"),
    "t4": ("gpu", "PJRT C API\ncuda 12090", "7.5"),
    "amd": ("gpu", "rocm 60300", "gfx942"),
}
SIZES = (128, 80)


def mesh(kind, **axes):
    platform, version, capability = KINDS[kind]
    client = types.SimpleNamespace(platform_version=version)
    device = types.SimpleNamespace(
        platform=platform, device_kind=kind, client=client, compute_capability=capability
    )
    shape = axes or {"data": 1}
    devices = np.full(tuple(shape.values()), device, object)
    return types.SimpleNamespace(devices=devices, shape=shape, size=devices.size)


@pytest.mark.parametrize(
    ("kind", "dtype", "sizes", "expected"),
    [
        ("cpu", "float32", SIZES, XLA()),
        ("cpu", "bfloat16", SIZES, XLA()),
        ("tpu", "float32", SIZES, Splash()),
        ("tpu", "bfloat16", (4, 6), Splash()),
        ("h100", "float32", SIZES, XLA()),
        ("h100", "bfloat16", SIZES, CuDNN()),
        ("h100", "bfloat16", (128, 20), XLA()),
        ("h100", "bfloat16", (256, 80), XLA()),
        ("t4", "bfloat16", SIZES, XLA()),
        ("amd", "bfloat16", SIZES, XLA()),
    ],
)
def test_auto(kind, dtype, sizes, expected):
    assert choose("auto", dtype, sizes, mesh(kind)) == expected


def test_by_name():
    assert choose("xla", "bfloat16", SIZES, mesh("tpu")) == XLA()
    assert choose("cudnn", "bfloat16", SIZES, mesh("h100")) == CuDNN()
    assert choose("splash", "bfloat16", SIZES, mesh("tpu")) == Splash()


def test_several_devices():
    """Kernels are split by hand, XLA's products by the compiler."""
    whole = mesh("tpu", data=2, fsdp=2, tensor=2)
    expected = ShardedKernels(Splash(), Layout(whole))
    assert choose("auto", "bfloat16", SIZES, whole) == expected
    rows = mesh("h100", data=8)
    assert choose("auto", "bfloat16", SIZES, rows) == ShardedKernels(CuDNN(), Layout(rows))
    assert choose("xla", "bfloat16", SIZES, whole) == XLA()


@pytest.mark.parametrize(
    ("name", "kind", "dtype", "sizes", "says"),
    [
        ("splash", "cpu", "float32", SIZES, "a TPU, found a mesh of cpu devices"),
        ("cudnn", "amd", "bfloat16", SIZES, "an NVIDIA GPU from Ampere on, found a mesh of amd"),
        ("cudnn", "t4", "bfloat16", SIZES, "an NVIDIA GPU from Ampere on, found a mesh of t4"),
        ("cudnn", "h100", "float32", SIZES, "'bfloat16', found 'float32'"),
        ("cudnn", "h100", "bfloat16", (36, 80), "a multiple of 8 elements, at most 128, .* of 36"),
    ],
)
def test_what_cannot_run_is_refused(name, kind, dtype, sizes, says):
    with pytest.raises(ConfigError, match=f"attention={name}: expected .*{says}"):
        choose(name, dtype, sizes, mesh(kind))
