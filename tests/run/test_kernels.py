"""The kernels that a mesh's devices and a dtype call for."""

import types

import numpy as np
import pytest

from morer1_jax.model.attention import XLA
from morer1_jax.model.cudnn import CuDNN
from morer1_jax.model.splash import Splash
from morer1_jax.run.config import ConfigError
from morer1_jax.run.kernels import choose

VERSIONS = {
    "cpu": "cpu",
    "tpu": "TFRT TPU v5 lite",
    "gpu": "PJRT C API\ncuda 12090",
    "amd": "rocm 60300",
}


def mesh(kind):
    client = types.SimpleNamespace(platform_version=VERSIONS[kind])
    platform = "gpu" if kind == "amd" else kind
    device = types.SimpleNamespace(platform=platform, device_kind=kind.upper(), client=client)
    return types.SimpleNamespace(devices=np.array([[device]], object))


@pytest.mark.parametrize(
    ("kind", "dtype", "expected"),
    [
        ("cpu", "float32", XLA),
        ("cpu", "bfloat16", XLA),
        ("tpu", "float32", Splash),
        ("tpu", "bfloat16", Splash),
        ("gpu", "float32", XLA),
        ("gpu", "bfloat16", CuDNN),
        ("amd", "bfloat16", XLA),
    ],
)
def test_auto(kind, dtype, expected):
    assert type(choose("auto", dtype, mesh(kind))) is expected


def test_by_name():
    assert choose("xla", "bfloat16", mesh("tpu")) == XLA()
    assert choose("cudnn", "bfloat16", mesh("gpu")) == CuDNN()
    given = mesh("tpu")
    assert choose("splash", "bfloat16", given) == Splash(given, ("data", "fsdp"), "tensor")


@pytest.mark.parametrize(
    ("name", "kind", "dtype", "says"),
    [
        ("splash", "cpu", "float32", "a TPU, and the mesh has CPU devices"),
        ("cudnn", "amd", "bfloat16", "an NVIDIA GPU, and the mesh has AMD devices"),
        ("cudnn", "gpu", "float32", "'bfloat16', which is 'float32'"),
    ],
)
def test_what_cannot_run_is_refused(name, kind, dtype, says):
    with pytest.raises(ConfigError, match=f"attention: {name!r} found.*{says}"):
        choose(name, dtype, mesh(kind))
