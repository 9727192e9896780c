"""Which kernels compute attention, by what the mesh is made of."""

from __future__ import annotations

from typing import Literal

from jax.sharding import Mesh

from morer1_jax.model.attention import XLA, Kernels
from morer1_jax.model.cudnn import CuDNN
from morer1_jax.model.splash import Splash
from morer1_jax.run.config import ConfigError
from morer1_jax.run.mesh import BATCH_AXES, HEAD_AXIS

Attention = Literal["auto", "xla", "splash", "cudnn"]


def choose(attention: Attention, dtype: str, mesh: Mesh) -> Kernels:
    """Attention's kernels on a mesh.

    Args:
      attention: "auto": splash attention on TPUs; on NVIDIA's GPUs cuDNN's, if `dtype` has 16 bits;
        XLA's products elsewhere. Or one of them by name.
      dtype: of activations.

    Raises:
      ConfigError: the mesh's devices, or the dtype, cannot do what is asked.
    """
    device = mesh.devices.flat[0]
    short = dtype in ("bfloat16", "float16")
    nvidia = device.platform == "gpu" and "cuda" in device.client.platform_version.lower()
    if attention == "auto":
        attention = "xla"
        if device.platform == "tpu":
            attention = "splash"
        elif nvidia and short:
            attention = "cudnn"
    if attention == "splash":
        if device.platform != "tpu":
            raise _unfit(attention, f"a TPU, and the mesh has {device.device_kind} devices")
        return Splash(mesh, BATCH_AXES, HEAD_AXIS)
    if attention == "cudnn":
        if not nvidia:
            raise _unfit(attention, f"an NVIDIA GPU, and the mesh has {device.device_kind} devices")
        if not short:
            raise _unfit(attention, f"runtime.dtype='bfloat16', which is {dtype!r}")
        return CuDNN()
    return XLA()


def _unfit(attention: str, needs: str) -> ConfigError:
    return ConfigError(
        f"config.runtime.attention: {attention!r} found, which needs {needs}; use 'auto'"
    )
