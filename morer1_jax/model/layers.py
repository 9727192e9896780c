"""Layers of tower and decoder: projections and LoRA adapters, norm, SwiGLU, scans."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from morer1_jax.model.config import LoRA, Runtime
from morer1_jax.model.linear import PRODUCT, Linear

Params = dict[str, Any]

_REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
}


def dense(
    features: int | tuple[int, ...],
    runtime: Runtime,
    std: float,
    *,
    name: str,
    axis: int | tuple[int, ...] = -1,
    bias: bool = False,
    lora: LoRA | None = None,
) -> Linear:
    """Returns a linear map in `runtime.dtype`; its kernel is [*contracted axes, *features].

    Args:
        std: standard deviation of the kernel's initial values.
        name: of the map; where it is among `lora`'s targets, an adapter stands beside the kernel.
        axis: contracted axes of the input.
    """
    return Linear(
        features=(features,) if isinstance(features, int) else features,
        axes=(axis,) if isinstance(axis, int) else axis,
        runtime=runtime,
        std=std,
        bias=bias,
        lora=lora if lora is not None and name in lora.targets else None,
        name=name,
    )


def rms_norm(epsilon: float, runtime: Runtime, *, name: str) -> nn.RMSNorm:
    """Returns a root-mean-square norm: float32 statistics and scale, result in `runtime.dtype`."""
    return nn.RMSNorm(epsilon, dtype=runtime.dtype, param_dtype=runtime.param_dtype, name=name)


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))`.

    Attributes:
        hidden: width of input and output.
        features: width between gate and down.
        std: standard deviation of the kernels' initial values.
    """

    hidden: int
    features: int
    std: float
    runtime: Runtime
    bias: bool = False
    lora: LoRA | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*s d"]) -> Float[Array, "*s d"]:
        """Applies the block to each token."""
        run, std, common = self.runtime, self.std, {"bias": self.bias, "lora": self.lora}
        gate = dense(self.features, run, std, name="gate", **common)(x)
        up = dense(self.features, run, std, name="up", **common)(x)
        return dense(self.hidden, run, std, name="down", **common)(nn.silu(gate) * up)


def rematerialised(
    layer: type[nn.Module], runtime: Runtime, *, in_scan: bool = True
) -> type[nn.Module]:
    """Returns `layer` under the runtime's rematerialisation policy.

    Args:
        in_scan: whether a loop of at least two steps repeats the layer.
    """
    if runtime.remat == "none":
        return layer
    # Outside of a loop XLA would merge the recomputation with the first one and save no memory.
    return nn.remat(layer, policy=_REMAT_POLICIES[runtime.remat], prevent_cse=not in_scan)


def scanned(layer: type[nn.Module], length: int, inputs: int, unroll: int = 1) -> type[nn.Module]:
    """Returns `layer` repeated `length` times, with its parameters stacked on a leading axis.

    The layer maps (carry, *inputs) to (carry, output); every repeat gets the same inputs, and the
    outputs are stacked.

    Args:
        inputs: number of the layer's inputs beside the carry.
        unroll: repeats in one step of the loop.
    """
    return nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast,) * inputs,
        length=length,
        unroll=min(unroll, length),
    )


def merged_kernel(layer: Params, lora: LoRA) -> jax.Array:
    """Returns the kernels of a linear map with their adapters merged in, `W + scale · A B`.

    Computed in float32, because what an adapter adds is often less than the rounding of a kernel
    held in bfloat16.

    Args:
        layer: `kernel`, `lora_a` and `lora_b` of the map, stacked over layers [l, …].
    """
    kernel, down, up = layer["kernel"], layer["lora_a"], layer["lora_b"]
    layers, rank = kernel.shape[0], down.shape[-1]
    product = jnp.matmul(
        down.reshape(layers, -1, rank).astype(jnp.float32),
        up.reshape(layers, rank, -1).astype(jnp.float32),
        precision="highest",
    )
    return kernel.astype(jnp.float32) + lora.scale * product.reshape(kernel.shape)
