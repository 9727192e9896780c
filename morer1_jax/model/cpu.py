"""What only XLA's compiler for CPUs needs.

Left to itself it computes cosines and sines again in every layer, and transposes a layer's largest
arrays for the gradient of its kernel. On other platforms `cos_sin` calls cosine and sine alone;
`linear_product` computes its gradient with other orders of axes than JAX's rule does.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from morer1_jax.model.products import dot_general


def cos_sin(
    angles: Float[Array, "*s r"],
) -> tuple[Float[Array, "*s r"], Float[Array, "*s r"]]:
    """Returns cosines and sines, computed once for all layers.

    XLA on a CPU would compute them again for every head of every layer outside of a scan, through
    an optimization barrier too; but it does not look into branches.
    """

    def cos_and_sin(angles: Array) -> tuple[Array, Array]:
        return jnp.cos(angles), jnp.sin(angles)

    if not angles.size:
        return cos_and_sin(angles)

    def branch(angles: Array) -> tuple[Array, Array]:
        # A condition that always holds, but that the compiler does not know to.
        first = angles[(0,) * angles.ndim]
        return jax.lax.cond(
            jnp.isfinite(first), cos_and_sin, lambda angles: (angles, angles), angles
        )

    return jax.lax.platform_dependent(angles, cpu=branch, default=cos_and_sin)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def linear_product(
    x: Array, kernel: Array, dims: tuple, precision: Any = None, preferred_element_type: Any = None
) -> Array:
    """Computes `jax.lax.dot_general` of activations and a kernel, without batch axes.

    Only its gradient differs, and only in how it is laid out: the kernel's is computed as
    activations times cotangent, which has the kernel's own order of axes. JAX's rule multiplies the
    other way round and transposes the result; XLA on a CPU then transposes the cotangent first, the
    larger of the two, which takes about as long as the product itself.

    Args:
        kernel: [*contracted axes, *features].
        dims: dimension numbers of `dot_general`.
        precision: Flax's, which it passes and leaves empty; not read, since the operands' dtype
            decides (`model.products`).
    """
    del precision
    return dot_general(x, kernel, dims, preferred_element_type)


def _linear_forward(
    x: Array, kernel: Array, dims: tuple, precision: Any, preferred: Any
) -> tuple[Array, tuple[Array, Array]]:
    return linear_product(x, kernel, dims, precision, preferred), (x, kernel)


def _linear_backward(
    dims: tuple, precision: Any, preferred: Any, saved: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
    del precision, preferred
    x, kernel = saved
    ((contracted, along), _) = dims
    free = tuple(axis for axis in range(x.ndim) if axis not in contracted)
    features = tuple(axis for axis in range(kernel.ndim) if axis not in along)
    outer = tuple(range(len(free)))
    inner = tuple(range(len(free), cotangent.ndim))
    x_gradient = dot_general(cotangent, kernel, ((inner, features), ((), ())))
    # Axes come out as (free, contracted), each in its old order.
    x_gradient = jnp.moveaxis(x_gradient, range(x.ndim), (*free, *contracted))
    kernel_gradient = dot_general(x, cotangent, ((free, outer), ((), ())))
    kernel_gradient = jnp.moveaxis(kernel_gradient, range(kernel.ndim), (*along, *features))
    return x_gradient.astype(x.dtype), kernel_gradient.astype(kernel.dtype)


linear_product.defvjp(_linear_forward, _linear_backward)
