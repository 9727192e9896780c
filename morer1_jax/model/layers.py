"""Layers of tower and decoder: projections and LoRA adapters, norm, SwiGLU, rotation, scans."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from morer1_jax.model.config import LoRA, Runtime
from morer1_jax.model.cpu import linear_product
from morer1_jax.model.products import dot_general

Params = dict[str, Any]

# Names the output of `dense`, bias and adapter included, so that the policy "dots" saves one array
# a linear map.
_PRODUCT = "product"
_REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(_PRODUCT),
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
) -> nn.Module:
    """Returns a linear map in `runtime.dtype`; its kernel is [*contracted axes, *features].

    Args:
        features: sizes of the output's new axes.
        runtime: dtypes of parameters and results.
        std: standard deviation of the kernel's initial values.
        name: where it is among `lora`'s targets, an adapter stands beside the kernel.
        axis: contracted axes of the input.
    """
    plain = {
        "axis": axis,
        "use_bias": bias,
        "dtype": runtime.dtype,
        "param_dtype": runtime.param_dtype,
        "kernel_init": nn.initializers.normal(std),
    }
    if lora is None or name not in lora.targets:
        return nn.DenseGeneral(features, **plain, dot_general=_named_product, name=name)
    base = nn.DenseGeneral(features, **plain, dot_general=linear_product, parent=None)
    return AdaptedDense(base, lora, name=name)


def _named_product(*args: Any, **options: Any) -> Array:
    return checkpoint_name(linear_product(*args, **options), _PRODUCT)


class AdaptedDense(nn.Module):
    """A linear map and its adapter: `x W + b + scale · (x A) B`, with B = 0 at first.

    A (`lora_a`) is [*contracted axes, rank], B (`lora_b`) [rank, *features]; they lie beside the
    map's own parameters.
    """

    base: nn.DenseGeneral
    lora: LoRA

    def setup(self) -> None:
        """Puts the adapter's parameters in the map's own scope."""
        nn.share_scope(self, self.base)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Returns the map's output with its adapter's part added."""
        base = self.base
        out = base(x)
        axes = base.axis if isinstance(base.axis, tuple) else (base.axis,)
        features = base.features if isinstance(base.features, tuple) else (base.features,)
        inputs = tuple(x.shape[axis] for axis in axes)
        # B = 0 leaves the model as it is at first; A keeps the scale of its input.
        std = math.prod(inputs) ** -0.5
        down = self.param(
            "lora_a", nn.initializers.normal(std), (*inputs, self.lora.rank), base.param_dtype
        )
        up = self.param(
            "lora_b", nn.initializers.zeros, (self.lora.rank, *features), base.param_dtype
        )
        x, down, up = (value.astype(out.dtype) for value in (x, down, up))
        # (x A) B, since A B would be as large as the kernel.
        axes = tuple(axis % x.ndim for axis in axes)
        narrow = dot_general(x, down, ((axes, tuple(range(len(axes)))), ((), ())))
        wide = dot_general(narrow, up, (((narrow.ndim - 1,), (0,)), ((), ())))
        return checkpoint_name(out + self.lora.scale * wide, _PRODUCT)


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


Rotary = tuple[Float[Array, "*s r"], Float[Array, "*s r"]]
"""Cosines and sines of the angles of the first half of a head, r = e/2."""


def rotate(x: Float[Array, "*s h e"], rotary: Rotary) -> Float[Array, "*s h e"]:
    """Rotates each pair (x_i, x_{i+e/2}) by its angle, in float32 (RoFormer, arXiv 2104.09864)."""
    cos, sin = (angle[..., None, :] for angle in rotary)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


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
