"""Linear maps: the product of activations and a kernel, and the adapters beside it.

A kernel is held in float32, split over the mesh. For a product it is cast to the activations' dtype
and gathered, in the forward pass and again in the backward one, so that a layer's whole kernel
lives as long as the layer. Its gradient comes out of the product in float32, is summed over chips
so, and lies split as the kernel does.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from morer1_jax.model.config import LoRA, Runtime
from morer1_jax.model.products import dot_general
from morer1_jax.model.sharding import Layout

# Names the output of `Linear`, bias and adapter included, so that the policy "dots" saves one array
# a linear map.
PRODUCT = "product"


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def linear_product(
    x: Array, kernel: Array, axes: tuple[int, ...], layout: Layout, path: str
) -> Array:
    """Computes the product of activations and a kernel, in the activations' dtype.

    The kernel's gradient is computed as activations times cotangent, which has the kernel's own
    order of axes. JAX's rule multiplies the other way round and transposes the result; XLA on a CPU
    then transposes the cotangent first, the larger of the two, which takes about as long as the
    product itself.

    Args:
        kernel: [*contracted axes, *features].
        axes: the contracted axes of `x`, not negative.
        path: end of the kernel's path, by which it is split over the mesh.
    """
    return _product(x, _ready(x, kernel, layout, path), axes)


def _ready(x: Array, kernel: Array, layout: Layout, path: str) -> Array:
    return layout.gathered(path, kernel.astype(x.dtype))


def _product(x: Array, kernel: Array, axes: tuple[int, ...]) -> Array:
    return dot_general(x, kernel, ((axes, tuple(range(len(axes)))), ((), ())))


def _forward(
    x: Array, kernel: Array, axes: tuple[int, ...], layout: Layout, path: str
) -> tuple[Array, tuple[Array, Array]]:
    return linear_product(x, kernel, axes, layout, path), (x, kernel)


def _backward(
    axes: tuple[int, ...],
    layout: Layout,
    path: str,
    saved: tuple[Array, Array],
    cotangent: Array,
) -> tuple[Array, Array]:
    x, kernel = saved
    free = tuple(axis for axis in range(x.ndim) if axis not in axes)
    features = tuple(range(len(axes), kernel.ndim))
    outer = tuple(range(len(free)))
    inner = tuple(range(len(free), cotangent.ndim))
    ready = _ready(x, kernel, layout, path)
    x_gradient = dot_general(cotangent, ready, ((inner, features), ((), ())))
    # Axes come out as (free, contracted), each in its old order.
    x_gradient = jnp.moveaxis(x_gradient, range(x.ndim), (*free, *axes))
    return x_gradient, _kernel_gradient(x, cotangent, kernel, free, outer, layout, path)


def _kernel_gradient(
    x: Array,
    cotangent: Array,
    kernel: Array,
    free: tuple[int, ...],
    outer: tuple[int, ...],
    layout: Layout,
    path: str,
) -> Array:
    """Returns the product of activations and cotangent over all tokens, split as the kernel is.

    On a mesh TPUs' compiler transposes the product's first operand: better the smaller one, though
    the result then has to be transposed in turn.

    Args:
        free, outer: the axes of tokens, of `x` and of `cotangent`.
    """
    features = cotangent.ndim - len(outer)
    turned = layout.mesh is not None and x.size > cotangent.size + kernel.size

    def own(x: Array, cotangent: Array) -> Array:
        if turned:
            return dot_general(cotangent, x, ((outer, free), ((), ())), kernel.dtype)
        return dot_general(x, cotangent, ((free, outer), ((), ())), kernel.dtype)

    # Heads are an axis of what goes in or of what comes out.
    heads = layout.head_dimension(path, kernel.shape)
    inputs = tuple(axis for axis in range(x.ndim) if axis not in free)
    of_x = None if heads is None or heads >= len(inputs) else inputs[heads]
    of_cotangent = None if heads is None or of_x is not None else heads - len(inputs) + len(outer)
    gradient = layout.summed(
        path,
        kernel.shape,
        own,
        (x, cotangent),
        (of_x, of_cotangent),
        turned=features if turned else 0,
    )
    if not turned:
        return gradient
    return jnp.transpose(gradient, (*range(features, kernel.ndim), *range(features)))


linear_product.defvjp(_forward, _backward)


class Linear(nn.Module):
    """A linear map with an optional bias and adapter: `x W + b + scale · (x A) B`, B = 0 at first.

    The kernel W is [*contracted axes, *features], A (`lora_a`) [*contracted axes, rank] and B
    (`lora_b`) [rank, *features].

    Attributes:
        axes: the contracted axes of the input.
        std: standard deviation of the kernel's initial values.
        lora: the adapter's sizes; None: there is none.
    """

    features: tuple[int, ...]
    axes: tuple[int, ...]
    runtime: Runtime
    std: float
    bias: bool = False
    lora: LoRA | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Returns the map's output in `runtime.dtype`."""
        run, layout = self.runtime, self.runtime.layout
        axes = tuple(axis % x.ndim for axis in self.axes)
        inputs = tuple(x.shape[axis] for axis in axes)
        # The map itself.
        x = x.astype(run.dtype)
        init = nn.initializers.normal(self.std)
        kernel = self.param("kernel", init, (*inputs, *self.features), run.param_dtype)
        out = linear_product(x, kernel, axes, layout, f"{self.name}/kernel")
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, self.features, run.param_dtype)
            out += bias.astype(run.dtype)
        # Its adapter: (x A) B, since A B would be as large as the kernel. B = 0 leaves the model
        # as it is at first; A keeps the scale of its input.
        if self.lora is not None:
            init = nn.initializers.normal(math.prod(inputs) ** -0.5)
            down = self.param("lora_a", init, (*inputs, self.lora.rank), run.param_dtype)
            shape = (self.lora.rank, *self.features)
            up = self.param("lora_b", nn.initializers.zeros, shape, run.param_dtype)
            narrow = linear_product(x, down, axes, layout, f"{self.name}/lora_a")
            last = (narrow.ndim - 1,)
            out += self.lora.scale * linear_product(narrow, up, last, layout, f"{self.name}/lora_b")
        return checkpoint_name(out, PRODUCT)
