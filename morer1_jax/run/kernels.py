"""Chooses the kernels that compute attention, by the mesh's devices."""

from __future__ import annotations

from collections.abc import Sequence

from jax.sharding import Mesh

from morer1_jax.errors import ConfigError
from morer1_jax.model.attention import XLA, Kernels
from morer1_jax.model.config import AttentionChoice
from morer1_jax.model.cudnn import HEAD_MAX, HEAD_MULTIPLE, CuDNN
from morer1_jax.model.sharded import ShardedKernels
from morer1_jax.model.sharding import Layout


def choose(
    attention: AttentionChoice, dtype: str, head_sizes: Sequence[int], mesh: Mesh
) -> Kernels:
    """Chooses attention's kernels on a mesh.

    Args:
        attention: "auto": splash attention on TPUs; on NVIDIA's GPUs cuDNN's, if it can do `dtype`
            and `head_sizes`; XLA's products elsewhere. Or one of them by name.
        dtype: of activations.
        head_sizes: of the model's attentions.

    Raises:
        ConfigError: the mesh's devices, the dtype or the heads do not fit the kernels named.
    """
    platform, unfit = mesh.devices.flat[0].platform, _unfit_for_cudnn(dtype, head_sizes, mesh)
    if attention == "auto":
        by_platform = {"tpu": "splash", "gpu": "xla" if unfit else "cudnn"}
        attention = by_platform.get(platform, "xla")
    if attention == "xla":
        return XLA()
    if attention == "splash":
        if platform != "tpu":
            raise _refusal(attention, f"a TPU, found a mesh of {_kind(mesh)} devices")
        # Imported here: it uses an experimental module of JAX, on which only TPUs should depend.
        from morer1_jax.model.splash import Splash

        kernels: Kernels = Splash()
    else:
        if unfit:
            raise _refusal(attention, unfit)
        kernels = CuDNN()
    if mesh.size == 1:
        return kernels
    return ShardedKernels(kernels, Layout(mesh))


def _unfit_for_cudnn(dtype: str, head_sizes: Sequence[int], mesh: Mesh) -> str | None:
    """Returns what cuDNN needs and what there is instead, for an error; None if it can run."""
    device = mesh.devices.flat[0]
    nvidia = device.platform == "gpu" and "cuda" in device.client.platform_version.lower()
    if not nvidia or float(device.compute_capability) < 8.0:
        return f"an NVIDIA GPU from Ampere on, found a mesh of {_kind(mesh)} devices"
    if dtype != "bfloat16":
        return f"runtime.dtype='bfloat16', found {dtype!r}"
    if wrong := [size for size in head_sizes if size % HEAD_MULTIPLE or size > HEAD_MAX]:
        return (
            f"heads of a multiple of {HEAD_MULTIPLE} elements, at most {HEAD_MAX}, found heads of "
            f"{wrong[0]}"
        )
    return None


def _kind(mesh: Mesh) -> str:
    return mesh.devices.flat[0].device_kind


def _refusal(attention: str, problem: str) -> ConfigError:
    return ConfigError(f"config.runtime.attention={attention}: expected {problem}; use 'auto'")
